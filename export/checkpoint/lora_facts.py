"""What a LoRA file is, without a transformer to apply it to: whose names, ranks, alphas, targets.

Names are read by the same table as when it is applied, against the module names that every SCAIL-2 transformer has."""

import re
from collections import Counter
from dataclasses import dataclass

from scail2_rt.export.checkpoint.derive import dit_shapes
from scail2_rt.export.checkpoint.lora import SUFFIXES, ModuleIndex
from scail2_rt.export.checkpoint.tensors import TensorSource
from scail2_rt.export.models.config import DiTConfig

_MOST_LAYERS = 64  # the 14B model has 40
_ANY_SIZE = DiTConfig(dim=8, heads=1, layers=_MOST_LAYERS, ffn_dim=8)
_FAMILIES = (  # first match decides
    ("SAT", re.compile(r"lora_layer|\.matrix_[AB]\.")),
    ("kohya", re.compile(r"^lora_(unet|transformer)_")),
    ("PEFT", re.compile(r"\.lora_[AB]\.")),
    ("ComfyUI / lightx2v", re.compile(r"\.lora[._](down|up)\.|\.diff(_b|_m)?$")),
)


@dataclass(frozen=True, slots=True)
class LoRAFacts:
    """names: whose convention; ranks and scales (alpha/rank): value → pairs; targets: module → tensors that change it
    (block numbers left out); unknown: tensors that mean nothing for SCAIL-2."""

    names: str
    tensors: int
    dtypes: dict[str, int]
    ranks: dict[int, int]
    scales: dict[float, int]
    kinds: dict[str, int]
    targets: dict[str, int]
    blocks: int
    unknown: tuple[str, ...]


def lora_facts(source: TensorSource) -> LoRAFacts | None:
    """The facts; None when no tensor is named as a part of a LoRA."""
    names = list(source.keys())
    if not any(kind in ("down", "up", "weight") and pattern.fullmatch(n) for pattern, kind in SUFFIXES for n in names):
        return None
    index = ModuleIndex(dit_shapes(_ANY_SIZE))
    kinds: Counter[str] = Counter()
    targets: Counter[str] = Counter()
    ranks: Counter[int] = Counter()
    blocks, unknown = set(), []
    rank_of: dict[tuple[str, ...], int] = {}
    alpha_of: dict[tuple[str, ...], float] = {}
    for name in names:
        role = index.role(name)
        if role is None:
            unknown.append(name)
            continue
        kinds[role.kind] += 1
        for module in role.modules:
            blocks |= set(re.findall(r"^blocks\.(\d+)\.", module))
            if role.kind not in ("up", "alpha"):
                targets[re.sub(r"^blocks\.\d+\.?", "", module) or "modulation"] += 1
        if role.kind == "down":
            rank_of[role.modules] = source.shape(name)[0]
            ranks[rank_of[role.modules]] += 1
        elif role.kind == "alpha":
            alpha_of[role.modules] = float(source.get(name).float().flatten()[0])
    scales = Counter(alpha_of[key] / rank if key in alpha_of else 1.0 for key, rank in rank_of.items() if rank)
    return LoRAFacts(
        names=next((family for family, sign in _FAMILIES if any(sign.search(name) for name in names)), "unknown"),
        tensors=len(names),
        dtypes=dict(Counter(str(source.dtype(name)).removeprefix("torch.") for name in names)),
        ranks=dict(ranks.most_common()),
        scales=dict(scales.most_common()),
        kinds=dict(kinds),
        targets=dict(targets.most_common()),
        blocks=len(blocks),
        unknown=tuple(unknown),
    )
