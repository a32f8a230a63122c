"""Facts about a LoRA file, without a transformer to apply it to: kind, naming convention, ranks, alphas and their
origin, targets, whether it is step-distilled.

Names are read by the same table as for fusing, against the module names that every SCAIL-2 transformer has."""

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from scail2_rt.export.checkpoint.derive import dit_shapes
from scail2_rt.export.checkpoint.lora_foreign import distilled_by, foreign_kind
from scail2_rt.export.checkpoint.lora_kinds import Hadamard, Kronecker, LowRank, Product, product_of
from scail2_rt.export.checkpoint.lora_names import (
    CHANGES_BY_ITSELF,
    ModuleIndex,
    ModuleTensors,
    by_module,
    has_lora_tensors,
)
from scail2_rt.export.checkpoint.lora_scale import Scale, Training, read_training
from scail2_rt.export.checkpoint.tensors import TensorSource
from scail2_rt.export.models.config import DiTConfig
from scail2_rt.kernels.errors import InputError

_MOST_LAYERS = 64  # the 14B model has 40
_ANY_SIZE = DiTConfig(dim=8, heads=1, layers=_MOST_LAYERS, ffn_dim=8)
_FAMILIES = (  # first match decides
    ("SAT", re.compile(r"lora_layer|\.matrix_[AB]\.")),
    (
        "diffusers",
        re.compile(r"attn[12][._](to_[qkv]|to_out|add_[kv]_proj|processor)|condition_embedder|ffn[._]net[._]"),
    ),
    ("kohya", re.compile(r"^(lora_(unet|transformer)|lycoris)_")),
    ("PEFT", re.compile(r"\.lora_[AB]\.")),
    ("ComfyUI / lightx2v", re.compile(r"\.lora[._](down|up)\.|\.diff(_b|_m)?$|^diffusion_model\.")),
)


@dataclass(frozen=True, slots=True)
class LoRAFacts:
    """kind: LoRA, LoKr, LoHa, with DoRA magnitudes or differences; names: naming convention; ranks, alphas and scales
    (the factor of a product): value → number of products; alpha_from: origin of alpha; distilled: how it was recognised
    as step-distilled; targets: module → number of changes (without block numbers); unknown: tensors without meaning for
    SCAIL-2; refused: why it cannot be fused into any transformer."""

    kind: str
    names: str
    tensors: int
    dtypes: dict[str, int]
    ranks: dict[int, int]
    alphas: dict[float, int]
    alpha_from: str
    rslora: bool
    scales: dict[float, int]
    distilled: str | None
    kinds: dict[str, int]
    targets: dict[str, int]
    blocks: int
    unknown: tuple[str, ...]
    refused: str | None = None


def lora_facts(source: TensorSource, path: Path) -> LoRAFacts | None:
    """Return the facts; None if no tensor name belongs to a LoRA. Only alphas are read."""
    names = list(source.keys())
    refused = foreign_kind(source)
    if not has_lora_tensors(names) and (refused is None or "not a LoRA" in refused):
        return None
    groups, unknown = by_module(source, ModuleIndex(dit_shapes(_ANY_SIZE)))
    products = [(group, product) for group in groups if (product := _product(group, source)) is not None]
    scales: list[Scale] = []
    training = Training()
    try:
        training = read_training(path, source)
        scales = [training.scale(group.module, product.rank, _alpha(group, source)) for group, product in products]
    except InputError as error:
        refused = refused or str(error)
    targets: Counter[str] = Counter()
    for group in groups:
        differences = sum(kind in CHANGES_BY_ITSELF for kind in group.tensors)
        count = differences + (differences < len(group.tensors))
        for module in group.modules:
            targets[re.sub(r"^blocks\.\d+\.?", "", module) or "modulation"] += count
    return LoRAFacts(
        kind=_kind(groups, [product for _, product in products]),
        names=next((family for family, sign in _FAMILIES if any(sign.search(name) for name in names)), "Wan"),
        tensors=len(names),
        dtypes=dict(Counter(str(source.dtype(name)).removeprefix("torch.") for name in names)),
        ranks=dict(Counter(product.rank for _, product in products if product.rank is not None).most_common()),
        alphas=dict(Counter(scale.alpha for scale in scales if scale.alpha is not None).most_common()),
        alpha_from="; ".join(dict.fromkeys(scale.origin for scale in scales)),
        rslora=training.rslora,
        scales=dict(Counter(scale.value for scale in scales).most_common()),
        distilled=distilled_by(path, source.metadata, groups),
        kinds=dict(Counter(kind for group in groups for kind in group.tensors)),
        targets=dict(targets.most_common()),
        blocks=len({found[1] for group in groups for m in group.modules if (found := re.match(r"blocks\.(\d+)\.", m))}),
        unknown=(*unknown, *(name for group in groups for name in group.strays)),
        refused=refused,
    )


def _product(group: ModuleTensors, source: TensorSource) -> Product | None:
    product = product_of(group, source)
    return None if isinstance(product, str) else product


def _alpha(group: ModuleTensors, source: TensorSource) -> float | None:
    """Return the module's own alpha; None if it has none. Raises InputError if it is not one number."""
    name = group.tensors.get("alpha")
    if name is None:
        return None
    if math.prod(shape := source.shape(name)) != 1:
        raise InputError(f"{name} is an alpha of shape {list(shape)} instead of one number.")
    return float(source.get(name).reshape(()))


def _kind(groups: list[ModuleTensors], products: list[Product]) -> str:
    labels = {LowRank: "LoRA", Kronecker: "LoKr", Hadamard: "LoHa"}
    kinds = [label for product, label in labels.items() if any(isinstance(p, product) for p in products)]
    having = {kind for group in groups for kind in group.tensors}
    extras = ["DoRA magnitudes"] if "magnitude" in having else []
    extras += ["differences"] if having & {"weight", "bias", "modulation"} else []
    extras += ["whole tensors"] if having & {"new weight", "new bias"} else []
    return " and ".join(kinds or ["LoRA"]) + (f" with {', '.join(extras)}" if extras else "")
