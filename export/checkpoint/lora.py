"""Reads LoRA files of every format that users bring and fuses them into weights while these stream.

A file's tensor names are read as "Wan module, kind of tensor" (`TensorRole`): lightx2v, PEFT and kohya names, and SAT
names through the table of the checkpoint reader. Everything is checked before anything is fused: a tensor that is
unknown, unpaired, misshapen or not finite refuses the file with the list, unless `partial` asks for the rest.
W += strength·(alpha/rank)·up·down in fp32, alpha/rank being 1 without an alpha; differences are added with the
strength. The fused source computes one tensor at a time, so fusing needs no more memory than the largest one in fp32.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from scail2_rt.export.checkpoint.sat_names import sat_to_wan
from scail2_rt.export.checkpoint.tensors import Derived, TensorSource, open_weights
from scail2_rt.kernels.errors import InputError

Kind = Literal["down", "up", "alpha", "weight", "bias", "modulation"]

_PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "pipe.dit.",
    "unet.",
    "model.",
    "module.",
)
_KOHYA = re.compile(r"lora_(?:unet|transformer)_+")
# Suffix → kind. `part` numbers the piece of a fused SAT module (query_key_value: 0 q, 1 k, 2 v).
_SUFFIX_KINDS: tuple[tuple[str, Kind], ...] = (
    (r"lora_layer(?:\.(?P<part>\d+))?\.down\.weight", "down"),
    (r"lora_layer(?:\.(?P<part>\d+))?\.up\.weight", "up"),
    (r"lora_layer(?:\.(?P<part>\d+))?\.alpha", "alpha"),
    (r"lora_layer(?:\.(?P<part>\d+))?\.diff", "weight"),
    (r"lora_layer(?:\.(?P<part>\d+))?\.diff_b", "bias"),
    (r"matrix_A\.(?P<part>\d+)", "down"),
    (r"matrix_B\.(?P<part>\d+)", "up"),
    (r"(?:lora_down|lora\.down)\.weight", "down"),
    (r"(?:lora_up|lora\.up)\.weight", "up"),
    (r"lora_A(?:\.\w+)?\.weight", "down"),
    (r"lora_B(?:\.\w+)?\.weight", "up"),
    (r"alpha", "alpha"),
    (r"diff", "weight"),
    (r"diff_b", "bias"),
    (r"diff_m", "modulation"),
)
SUFFIXES = tuple((re.compile(rf"(?P<module>.+?)\.{suffix}"), kind) for suffix, kind in _SUFFIX_KINDS)
_LISTED = 8


@dataclass(frozen=True, slots=True)
class LoRASpec:
    """A LoRA file and how strongly to apply it."""

    path: Path
    strength: float = 1.0

    def __str__(self) -> str:
        return f"{self.path} at strength {self.strength:g}"


@dataclass(frozen=True, slots=True)
class LoRAReport:
    """What came of one file: tensors applied, Wan tensors changed, and (partial only) `name: reason` of the rest."""

    path: Path
    strength: float
    applied: int
    changed: int
    skipped: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TensorRole:
    """What a LoRA tensor is: its kind, and the Wan modules it speaks of (several: stacked along dimension 0)."""

    kind: Kind
    modules: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Update:
    """One change of one Wan tensor: `up`·`down`·scale, or `diff`·scale; `rows` of a tensor for a fused SAT module.
    spec: the file that it is of."""

    source: TensorSource
    spec: LoRASpec
    scale: float
    names: tuple[str, ...]  # (up, down) or (diff,)
    rows: tuple[int, int] | None = None

    def add_to(self, weight: Tensor) -> None:
        """Adds the change to an fp32 tensor in place. A scale that fp32 cannot hold leaves no number."""
        if abs(self.scale) > torch.finfo(torch.float32).max:
            weight.fill_(math.inf)
            return
        first = self.source.get(self.names[0])
        if self.rows:
            first = first[self.rows[0] : self.rows[1]]
        first = first.float()
        if len(self.names) == 1:
            weight.add_(first.reshape(weight.shape), alpha=self.scale)
        else:
            down = self.source.get(self.names[1]).float()
            weight.flatten(1).addmm_(first.flatten(1), down.flatten(1), alpha=self.scale)


def parse_lora(spec: str) -> LoRASpec:
    """`FILE` or `FILE:STRENGTH` (a file name may contain colons). InputError: no such file, or a bad strength."""
    name, colon, number = spec.rpartition(":")
    path, strength = Path(spec), 1.0
    if colon and name and not path.is_file():
        try:
            path, strength = Path(name), float(number)
        except ValueError:
            if Path(name).is_file():
                raise InputError(f"The LoRA strength {number!r} in {spec!r} is no number; write FILE:0.8") from None
    if not math.isfinite(strength):
        raise InputError(f"The LoRA strength {number!r} in {spec!r} is not finite; write FILE:0.8")
    if not path.is_file():
        raise InputError(
            f"There is no LoRA file {path}; give a *.safetensors or SAT *.pt file, with :STRENGTH if needed"
        )
    return LoRASpec(path, strength)


def apply_loras(source: TensorSource, specs: Sequence[LoRASpec], partial: bool = False) -> "FusedSource":
    """The transformer's tensors with LoRA files fused in, one after the other; nothing is computed until `get`.

    InputError: a file holds a tensor that cannot be applied (all are listed; with `partial` they are skipped and
    reported instead), or nothing that can.
    """
    known = frozenset(source.keys())
    index = ModuleIndex(known)
    updates: dict[str, list[Update]] = {}
    reports = []
    for spec in specs:
        lora = open_weights(spec.path)
        fusion = _Fusion(lora, source, spec, known)
        fusion.read(index, _peft_scale(spec.path, lora))
        if fusion.problems and not partial:
            raise InputError(_refusal(spec.path, fusion.problems))
        if not fusion.applied:
            raise InputError(f"{spec.path} has no tensor that fits this transformer: {_listed(fusion.problems)}")
        for name, changes in fusion.updates.items():
            updates.setdefault(name, []).extend(changes)
        skipped = tuple(f"{name}: {reason}" for name, reason in fusion.problems.items())
        reports.append(LoRAReport(spec.path, spec.strength, fusion.applied, len(fusion.updates), skipped))
    return FusedSource(source, updates, tuple(reports))


class FusedSource(Derived):
    """A transformer's tensors with LoRAs added: the touched ones are fp32, the others as stored.

    `report` has one entry for each file; `touched` are the names of the tensors that the files change. `files` are
    those of the checkpoint alone: a build records LoRA files with their strengths.
    """

    def __init__(
        self,
        source: TensorSource,
        updates: Mapping[str, Sequence[Update]],
        report: tuple[LoRAReport, ...],
    ) -> None:
        super().__init__(source)
        self._updates = updates
        self.report = report
        self.touched = frozenset(updates)

    def keys(self) -> Iterable[str]:
        return self._source.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if name in self._updates else self._source.dtype(name)

    def fused_into(self, name: str) -> tuple[LoRASpec, ...]:
        """The LoRAs that change a tensor, if the tensor itself is of numbers: those to blame if the result is not."""
        specs = dict.fromkeys(update.spec for update in self._updates.get(name, ()))
        return tuple(specs) if specs and bool(self._source.get(name).float().isfinite().all()) else ()

    def get(self, name: str) -> Tensor:
        stored = self._source.get(name)
        if name not in self._updates:
            return stored
        weight = torch.empty(stored.shape, dtype=torch.float32).copy_(
            stored
        )  # contiguous, never the mapped file itself
        for update in self._updates[name]:
            update.add_to(weight)
        return weight


class ModuleIndex:
    """Finds the Wan modules that a LoRA's module name means, whichever convention it follows."""

    def __init__(self, tensor_names: Iterable[str]) -> None:
        names = list(tensor_names)
        self._modules = {re.sub(r"\.(weight|bias)$", "", name) for name in names}
        self._modules |= {name.removesuffix(".modulation") for name in names if name.endswith(".modulation")}
        self._by_underscore = {module.replace(".", "_"): module for module in self._modules}

    def find(self, name: str) -> tuple[str, ...] | None:
        """Wan modules of `name` (more than one for a fused SAT module); None when this transformer has no such one."""
        if kohya := _KOHYA.match(name):
            module = self._by_underscore.get(name[kohya.end() :])
            return (module,) if module else None
        pending = [name]
        while pending:
            name = pending.pop()
            if name in self._modules:
                return (name,)
            targets = sat_to_wan(name)
            if targets and all(target in self._modules for target in targets):
                return targets
            pending += [name.removeprefix(prefix) for prefix in _PREFIXES if name.startswith(prefix)]
        return None

    def role(self, name: str) -> TensorRole | None:
        """What the LoRA tensor called `name` is; None when its name means nothing for this transformer."""
        for pattern, kind in SUFFIXES:
            if match := pattern.fullmatch(name):
                modules = self.find(match["module"])
                part = match.groupdict().get("part")
                if modules and part is not None:
                    modules = modules[int(part) : int(part) + 1]
                return TensorRole(kind, modules) if modules else None
        return None


@dataclass(slots=True)
class _Fusion:
    """Checks one LoRA file against the transformer and collects its updates, or the reasons against them."""

    lora: TensorSource
    base: TensorSource
    spec: LoRASpec
    known: frozenset[str]  # tensors of the transformer
    updates: dict[str, list[Update]] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)  # LoRA tensor → why it cannot be applied
    applied: int = 0

    def read(self, index: ModuleIndex, default_alpha: float | None) -> None:
        groups: dict[tuple[str, ...], dict[Kind, str]] = {}
        for name in self.lora.keys():  # noqa: SIM118
            role = index.role(name)
            if role is None:
                self.problems[name] = "unknown tensor"
            elif role.kind in (group := groups.setdefault(role.modules, {})):
                self.problems[name] = f"the same as {group[role.kind]}"
            else:
                group[role.kind] = name
                if reason := self._unusable(name):
                    self.problems[name] = reason
        self._refuse_overlaps(groups)
        for modules, group in groups.items():
            self._low_rank(modules, group, default_alpha)
            for kind in ("weight", "bias", "modulation"):
                if kind in group and group[kind] not in self.problems:
                    self._difference(modules, group[kind], kind)

    def _unusable(self, name: str) -> str | None:
        if not self.lora.dtype(name).is_floating_point and not name.endswith("alpha"):
            return f"type {self.lora.dtype(name)}"
        tensor = self.lora.get(name)
        return None if bool(torch.isfinite(tensor.float()).all()) else "not finite"

    def _refuse_overlaps(self, groups: dict[tuple[str, ...], dict[Kind, str]]) -> None:
        """A fused tensor beside one of its own pieces would be applied twice: both are problems."""
        single = {modules[0]: modules for modules in groups if len(modules) == 1}
        for modules in [modules for modules in groups if len(modules) > 1]:
            doubled = [single[module] for module in modules if module in single]
            for other in doubled:
                for kind in set(groups[other]) & set(groups[modules]):
                    self.problems[groups[other].pop(kind)] = f"also part of {groups[modules][kind]}"

    def _low_rank(self, modules: tuple[str, ...], group: dict[Kind, str], default_alpha: float | None) -> None:
        names = [group[kind] for kind in ("up", "down", "alpha") if kind in group]
        unusable = [name for name in names if name in self.problems]
        if unusable or not names:
            self._refuse([name for name in names if name not in unusable], f"belongs to {', '.join(unusable)}")
            return
        if "up" not in group or "down" not in group:
            self._refuse(names, "no matching down" if "up" in group else "no matching up")
            return
        up, down = self.lora.shape(group["up"]), self.lora.shape(group["down"])
        alpha = default_alpha
        if "alpha" in group:
            if math.prod(self.lora.shape(group["alpha"])) != 1:
                self._refuse(names, f"alpha of shape {list(self.lora.shape(group['alpha']))}, one number is needed")
                return
            alpha = float(self.lora.get(group["alpha"]).reshape(()))
        targets = [f"{module}.weight" for module in modules]
        if not self.known.issuperset(targets):
            self._refuse(names, f"{targets[0]} is not in this transformer")
            return
        shapes = [self.base.shape(target) for target in targets]
        if not _pair_fits(up, down, shapes):
            wanted = f"{list(shapes[0])}" + (f" x {len(shapes)}" if len(shapes) > 1 else "")
            self._refuse(names, f"up {list(up)} and down {list(down)} do not make {wanted}")
            return
        strength = self.spec.strength
        scale = strength if alpha is None else strength * alpha / down[0]
        self._add(targets, (group["up"], group["down"]), scale, len(names))

    def _difference(self, modules: tuple[str, ...], name: str, kind: Kind) -> None:
        targets = [f"{module}.{kind}" for module in modules]
        if kind == "weight":  # a parameter of its own (a modulation) has no `.weight`
            targets = [target if target in self.known else target.removesuffix(".weight") for target in targets]
        if not self.known.issuperset(targets):
            self._refuse([name], f"{targets[0]} is not in this transformer")
            return
        first = self.base.shape(targets[0])
        wanted = (len(targets) * first[0], *first[1:])
        if self.lora.shape(name) != wanted:
            self._refuse([name], f"shape {list(self.lora.shape(name))}, {list(wanted)} is needed")
            return
        self._add(targets, (name,), self.spec.strength, 1)

    def _add(self, targets: Sequence[str], names: tuple[str, ...], scale: float, count: int) -> None:
        rows = self.base.shape(targets[0])[0]
        for i, target in enumerate(targets):
            cut = (i * rows, (i + 1) * rows) if len(targets) > 1 else None
            self.updates.setdefault(target, []).append(Update(self.lora, self.spec, scale, names, cut))
        self.applied += count

    def _refuse(self, names: Sequence[str], reason: str) -> None:
        self.problems |= dict.fromkeys(names, reason)


def _pair_fits(up: tuple[int, ...], down: tuple[int, ...], targets: Sequence[tuple[int, ...]]) -> bool:
    """Whether up [rows, rank(, 1, ...)] and down [rank, columns...] make the targets, stacked along dimension 0."""
    rows, columns = sum(target[0] for target in targets), targets[0][1:]
    return (
        len(up) >= 2
        and len(down) >= 2
        and bool(columns)
        and up[0] == rows
        and up[1] == down[0] > 0
        and all(n == 1 for n in up[2:])
        and down[1:] in (columns, (math.prod(columns),))
    )


def _peft_scale(path: Path, lora: TensorSource) -> float | None:
    """`lora_alpha` of the `adapter_config.json` that PEFT keeps beside its file; None when there is none."""
    file = path.parent / "adapter_config.json"
    if not file.is_file() or not any(".lora_A." in name for name in lora.keys()):  # noqa: SIM118
        return None
    try:
        config = json.loads(file.read_text())
        alpha = float(config["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} has no readable lora_alpha ({error}); correct or remove it") from error
    unusual = [key for key in ("use_dora", "use_rslora", "alpha_pattern") if config.get(key)]
    if unusual:
        raise InputError(
            f"{path} cannot be applied: its adapter_config.json uses {', '.join(unusual)}; merge it with PEFT"
        )
    return alpha


def _refusal(path: Path, problems: Mapping[str, str]) -> str:
    return (
        f"The LoRA {path} is refused: {len(problems)} of its tensors cannot be applied: {_listed(problems)}. "
        "To apply the rest of it, use --lora-partial"
    )


def _listed(problems: Mapping[str, str]) -> str:
    listed = "; ".join(f"{name} ({reason})" for name, reason in list(problems.items())[:_LISTED])
    return listed + (f"; and {len(problems) - _LISTED} more" if len(problems) > _LISTED else "")
