"""Reads LoRA files of every common kind and fuses them into weights while these are converted.

`lora_names` identifies each tensor, `lora_scale` its scale, `lora_kinds` its effect on a weight, and `lora_fusion`
whether it fits. Everything is checked before anything is fused: unknown, unpaired, misshapen or non-finite tensors
raise an error that lists them, unless `partial` asks for the modules that fit. The fused source computes one tensor at
a time, so fusing needs only the memory of one module in fp32.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from scail2_rt.export.checkpoint.lora_foreign import distilled_by, foreign_kind
from scail2_rt.export.checkpoint.lora_fusion import Fusion, Update
from scail2_rt.export.checkpoint.lora_names import ModuleIndex, by_module
from scail2_rt.export.checkpoint.lora_scale import CONFIG, config_of, read_training
from scail2_rt.export.checkpoint.tensors import Derived, TensorSource, open_weights
from scail2_rt.kernels.errors import InputError
from scail2_rt.kernels.wording import counted

_LISTED = 8
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True, slots=True)
class LoRASpec:
    """A LoRA file and its strength."""

    path: Path
    strength: float = 1.0

    def __str__(self) -> str:
        return f"{self.path} at strength {self.strength:g}"

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that the fused weights depend on: the LoRA file, and its PEFT configuration."""
        path = lora_file(self.path)
        config = config_of(path)
        return (path, config) if config else (path,)


@dataclass(frozen=True, slots=True)
class LoRAReport:
    """The result for one file: tensors applied, Wan tensors changed, `name: reason` of those that `partial` skipped,
    one sentence per module that was left out. alpha: its origin, or why there is none; distilled: how the file was
    recognised as step-distilled, None if it is not."""

    path: Path
    strength: float
    applied: int
    changed: int
    skipped: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    alpha: str = ""
    distilled: str | None = None

    @property
    def text(self) -> str:
        """The result on one line for the user, followed by one line per module that was left out."""
        facts = [f"{counted(self.applied, 'tensor')} applied"]
        facts += [f"{len(self.skipped)} skipped"] if self.skipped else []
        facts += [f"alpha: {self.alpha}"] if self.alpha else []
        facts += [f"step-distilled (recognised by its {self.distilled})"] if self.distilled else []
        return "\n".join((f"{self.path}: {', '.join(facts)}", *(f"{self.path}: {line}" for line in self.left_out)))


def parse_lora(spec: str) -> LoRASpec:
    """Parse `FILE` or `DIR`, optionally with `:STRENGTH` (a name may contain colons).

    Raises InputError for a missing file or an invalid strength."""
    name, colon, number = spec.rpartition(":")
    path, strength = Path(spec), 1.0
    if colon and name and not path.exists():
        try:
            path, strength = Path(name), float(number)
        except ValueError:
            if Path(name).exists():
                raise InputError(f"The LoRA strength {number!r} in {spec!r} is not a number. Write FILE:0.8.") from None
    if not math.isfinite(strength):
        raise InputError(f"The LoRA strength {number!r} in {spec!r} is not finite. Write FILE:0.8.")
    if not spec:
        raise InputError("--lora names no LoRA file. Write --lora FILE, or --lora FILE:0.8.")
    return LoRASpec(lora_file(path), strength)


def is_adapter(path: Path) -> bool:
    """Return whether a folder is an adapter saved by PEFT."""
    return any((path / name).is_file() for name in (CONFIG, *_ADAPTER_FILES))


def lora_file(path: Path) -> Path:
    """Return the weights file at `path`, a file or a PEFT folder. Raises InputError if there is none."""
    if path.is_dir():
        for name in _ADAPTER_FILES:
            if (path / name).is_file():
                return path / name
        files = ", ".join(sorted(file.name for file in path.glob("*.safetensors"))[:_LISTED])
        there = f"; it holds {files}. Name one of them." if files else ". Name a LoRA file."
        raise InputError(f"The folder {path} is not a PEFT adapter: it has no {' or '.join(_ADAPTER_FILES)}{there}")
    if not path.is_file():
        raise InputError(
            f"There is no LoRA file {path}. Give a *.safetensors or SAT *.pt file or a PEFT folder, with :STRENGTH if "
            "needed."
        )
    return path


def apply_loras(source: TensorSource, specs: Sequence[LoRASpec], partial: bool = False) -> "FusedSource":
    """Return the transformer's tensors with LoRA files fused in, in order; nothing is computed until `get`.

    Raises InputError for a file that is not a LoRA, belongs to another model, contains a tensor that cannot be applied
    (all are listed; with `partial` their modules are skipped and reported instead), or has nothing to apply.
    """
    known = frozenset(source.keys())
    index = ModuleIndex(known)
    updates: dict[str, list[Update]] = {}
    fused: dict[str, list[LoRASpec]] = {}
    reports = []
    for spec in specs:
        path = lora_file(spec.path)
        lora = open_weights(path)
        if what := foreign_kind(lora):
            raise InputError(f"{path} is {what}")
        groups, unknown = by_module(lora, index)
        fusion = Fusion(lora, source, spec.strength, known, read_training(path, lora))
        fusion.read(groups, unknown)
        if not fusion.applied or fusion.other_width or (fusion.problems and not partial):
            raise InputError(fusion.refusal(path))
        for name, changes in fusion.updates.items():
            updates.setdefault(name, []).extend(changes)
            fused.setdefault(name, []).append(spec)
        report = LoRAReport(
            path,
            spec.strength,
            fusion.applied,
            len(fusion.updates),
            tuple(f"{name}: {reason}" for name, reason in fusion.problems.items()),
            tuple(fusion.left_out),
            "; ".join(fusion.origins),
            distilled_by(path, lora.metadata, groups),
        )
        reports.append(report)
    return FusedSource(source, updates, fused, tuple(reports))


class FusedSource(Derived):
    """A transformer's tensors with LoRAs added: changed tensors are fp32, the others as stored.

    `report` has one entry per file; `touched` are the names of the changed tensors. `files` are those of the checkpoint
    only: a build records LoRA files with their strengths.
    """

    def __init__(
        self,
        source: TensorSource,
        updates: Mapping[str, Sequence[Update]],
        fused: Mapping[str, Sequence[LoRASpec]],
        report: tuple[LoRAReport, ...],
    ) -> None:
        super().__init__(source)
        self._updates, self._fused = updates, fused
        self._last: tuple[str, Tensor] | None = None  # the tensor whose rows are being read
        self.report = report
        self.touched = frozenset(updates)

    def fused_into(self, name: str) -> tuple[LoRASpec, ...]:
        """Return the LoRAs that change a tensor if the stored tensor is finite: they cause a result that is not."""
        specs = tuple(self._fused.get(name, ()))
        return specs if specs and bool(self._source.get(name).float().isfinite().all()) else ()

    def keys(self) -> Iterable[str]:
        return self._source.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if name in self._updates else self._source.dtype(name)

    def get(self, name: str) -> Tensor:
        stored = self._source.get(name)
        if name not in self._updates:
            return stored
        weight = torch.empty(stored.shape, dtype=torch.float32).copy_(stored)  # contiguous, and never the mapped file
        for update in self._updates[name]:
            update.add_to(weight)
        return weight

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if name not in self._updates:
            return self._source.rows(name, start, stop)
        if self._last is None or self._last[0] != name:
            self._last = None  # two at once would need the memory of more than one module
            self._last = (name, self.get(name))
        return self._last[1][start:stop]
