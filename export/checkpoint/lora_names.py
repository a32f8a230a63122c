"""Identifies a LoRA tensor by its name: its kind, and the Wan modules it changes.

A name is a prefix, a module and a suffix. The suffix gives the kind; module names follow the Wan branch, diffusers, the
SAT checkpoint, or one of these with underscores (kohya, musubi, LyCORIS). A name with a known module and an unknown
suffix also belongs to that module, so that the module is not applied without it.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, get_args

from scail2_rt.export.checkpoint.diffusers_names import DIFFUSERS_TO_WAN, diffusers_to_wan
from scail2_rt.export.checkpoint.sat_names import SAT_TO_WAN, sat_to_wan
from scail2_rt.export.checkpoint.tensors import TensorSource

Kind = Literal[
    "down", "up", "mid", "up bias", "alpha", "magnitude",
    "lokr w1", "lokr w1_a", "lokr w1_b", "lokr w2", "lokr w2_a", "lokr w2_b", "lokr t2",
    "loha w1_a", "loha w1_b", "loha w2_a", "loha w2_b", "loha t1", "loha t2",
    "weight", "bias", "modulation", "new weight", "new bias",
]  # fmt: skip

CHANGES_BY_ITSELF: tuple[Kind, ...] = ("weight", "bias", "modulation", "new weight", "new bias")
_PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "pipe.dit.",
    "dit.",
    "unet.",
    "model.",
    "module.",
    "lora_unet.",
    "lora_transformer.",
    "lycoris.",
)
_KOHYA = re.compile(r"(?:lora|lycoris)_+|(?:unet|transformer|dit|diffusion_model|model|base_model)_+")
_PART = r"lora_layer(?:\.(?P<part>\d+))?"  # `part`: index in a fused SAT module (query_key_value: 0 q, ...)
_ADAPTER = r"(?:\.\w+)?"  # PEFT's adapter name, usually `default`


def _factors(family: str) -> list[tuple[Kind, str]]:
    """Return (kind, name of the factor) of a family, as ("lokr w1", "w1")."""
    return [(kind, kind.removeprefix(f"{family} ")) for kind in get_args(Kind) if kind.startswith(family)]


_SUFFIX_KINDS: tuple[tuple[str, Kind], ...] = (
    (rf"\.{_PART}\.down\.weight", "down"),
    (rf"\.{_PART}\.up\.weight", "up"),
    (rf"\.{_PART}\.alpha", "alpha"),
    (rf"\.{_PART}\.diff", "weight"),
    (rf"\.{_PART}\.diff_b", "bias"),
    (r"\.matrix_A\.(?P<part>\d+)", "down"),
    (r"\.matrix_B\.(?P<part>\d+)", "up"),
    (r"(?:\.lora_down|\.lora\.down|\.lora_linear_layer\.down|_lora\.down)\.weight", "down"),
    (r"(?:\.lora_up|\.lora\.up|\.lora_linear_layer\.up|_lora\.up)\.weight", "up"),
    (r"\.lora_mid\.weight", "mid"),
    (rf"\.lora_A{_ADAPTER}\.weight", "down"),
    (rf"\.lora_B{_ADAPTER}\.weight", "up"),
    (rf"\.lora_B{_ADAPTER}\.bias", "up bias"),
    (r"(?:\.lora_linear_layer|_lora)?\.alpha", "alpha"),
    (r"\.(?:dora_scale|magnitude|lora_magnitude_vector(?:\.(?:weight|\w+\.weight|\w+))?)", "magnitude"),
    *((rf"\.lokr_{factor}(?:\.default)?", kind) for kind, factor in _factors("lokr")),
    *((rf"\.hada_{factor}(?:\.default)?", kind) for kind, factor in _factors("loha")),
    (r"\.(?:diff|w_norm)", "weight"),
    (r"\.(?:diff_b|b_norm)", "bias"),
    (r"\.diff_m", "modulation"),
)
_ABSOLUTE_KINDS: tuple[tuple[str, Kind], ...] = (  # values that replace the checkpoint's
    (r"(?:\.base_layer|\.modules_to_save(?:\.\w+)?)?\.weight", "new weight"),
    (r"(?:\.base_layer|\.modules_to_save(?:\.\w+)?)?\.bias", "new bias"),
)
_SUFFIXES = tuple((re.compile(rf"(?P<module>.+?){suffix}"), kind) for suffix, kind in _SUFFIX_KINDS)
_ABSOLUTE = tuple((re.compile(rf"(?P<module>.+?){suffix}"), kind) for suffix, kind in _ABSOLUTE_KINDS)
_PEFT_PAIR = re.compile(rf"\.lora_A{_ADAPTER}\.weight$|\.hada_w1_a$|\.lokr_w[12](_a)?$")


@dataclass(frozen=True, slots=True)
class TensorRole:
    """Identity of a LoRA tensor: its kind, and the Wan modules it changes (several: stacked along dimension 0). module:
    its module name in the file; kind None: it belongs to the modules, but its kind is unknown."""

    kind: Kind | None
    modules: tuple[str, ...]
    module: str


@dataclass(slots=True)
class ModuleTensors:
    """All tensors of one module in a file. tensors: kind → name; strays: unknown or duplicate tensors → reason."""

    modules: tuple[str, ...]
    module: str
    tensors: dict[Kind, str] = field(default_factory=dict)
    strays: dict[str, str] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.tensors.values(), *self.strays)


def has_lora_tensors(names: Iterable[str]) -> bool:
    """Return whether a file is a LoRA, for any network: whether it has tensors that change weights."""
    return any(pattern.fullmatch(name) and kind != "alpha" for name in names for pattern, kind in _SUFFIXES)


class ModuleIndex:
    """Finds the Wan modules of a LoRA's module name, in any naming convention."""

    def __init__(self, tensor_names: Iterable[str]) -> None:
        names = list(tensor_names)
        self._modules = {re.sub(r"\.(weight|bias)$", "", name) for name in names}
        self._modules |= {name.removesuffix(".modulation") for name in names if name.endswith(".modulation")}
        # modules with a weight or bias: an unknown suffix may belong to them
        self._owners = {re.sub(r"\.(weight|bias)$", "", name) for name in names if name.endswith((".weight", ".bias"))}
        self._by_underscore: dict[str, tuple[str, ...]] = {
            module.replace(".", "_"): (module,) for module in self._modules
        }
        blocks = sorted({match[1] for module in self._modules if (match := re.match(r"blocks\.(\d+)\.", module))})
        for table in (DIFFUSERS_TO_WAN, SAT_TO_WAN):
            for name, targets in table.items():
                for i in blocks if any("{i}" in target for target in targets) else ("",):
                    modules = tuple(target.format(i=i) for target in targets)
                    if self._modules.issuperset(modules):
                        self._by_underscore.setdefault(name.format(i=i).replace(".", "_"), modules)

    def find(self, name: str) -> tuple[str, ...] | None:
        """Return the Wan modules of `name` (several for a fused module); None if this transformer lacks them."""
        if name.startswith(("lora_", "lycoris_")) and "." not in name:
            return self._find_underscored(name)
        pending = [name.replace(".processor.", ".")]  # old attention processors of diffusers
        while pending:
            name = pending.pop()
            if name in self._modules:
                return (name,)
            for targets in (sat_to_wan(name), diffusers_to_wan(name), diffusers_to_wan(f"{name}.0")):
                if targets and self._modules.issuperset(targets):
                    return targets
            pending += [name.removeprefix(prefix) for prefix in _PREFIXES if name.startswith(prefix)]
        return None

    def _find_underscored(self, name: str) -> tuple[str, ...] | None:
        while prefix := _KOHYA.match(name):
            name = name[prefix.end() :]
            if modules := self._by_underscore.get(name):
                return modules
        return None

    def role(self, name: str, absolute: bool = False) -> TensorRole | None:
        """Identify the LoRA tensor `name`; None if it is unrelated to this transformer. absolute: PEFT has stored
        complete biases and weights beside its pairs."""
        for pattern, kind in (*_SUFFIXES, *(_ABSOLUTE if absolute else ())):
            if match := pattern.fullmatch(name):
                modules, part = self.find(match["module"]), match.groupdict().get("part")
                if modules and part is not None:
                    modules = modules[int(part) : int(part) + 1]
                if modules:
                    return TensorRole(kind, modules, match["module"])
        module = name
        while "." in module:
            module = module.rpartition(".")[0]
            if (modules := self.find(module)) and self._owners.issuperset(modules):
                return TensorRole(None, modules, module)
        return None


def by_module(lora: TensorSource, index: ModuleIndex) -> tuple[list[ModuleTensors], list[str]]:
    """Group the tensors of a file by module; also return those of no module of this transformer."""
    names = list(lora.keys())
    absolute = any(_PEFT_PAIR.search(name) for name in names)
    groups: dict[tuple[str, ...], ModuleTensors] = {}
    unknown = []
    for name in names:
        role = index.role(name, absolute)
        if role is None:
            unknown.append(name)
            continue
        group = groups.setdefault(role.modules, ModuleTensors(role.modules, role.module))
        if role.kind is None:
            group.strays[name] = "unknown tensor"
        elif role.kind in group.tensors:
            group.strays[name] = f"a duplicate of {group.tensors[role.kind]}"
        else:
            group.tensors[role.kind] = name
    return list(groups.values()), unknown
