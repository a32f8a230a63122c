"""Reads LoRA files of every kind that users bring and fuses them into weights while these stream.

`lora_names` says what each tensor is, `lora_scale` how strongly it acts, `lora_kinds` what it does to a weight, and
`lora_fusion` whether it fits. All is checked before anything is fused: what is unknown, unpaired, misshapen or not
finite refuses the file with the list, unless `partial` asks for the modules that fit. The fused source computes one
tensor at a time, so fusing needs no more memory than one module in fp32.
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
    """A LoRA file and how strongly to apply it."""

    path: Path
    strength: float = 1.0

    def __str__(self) -> str:
        return f"{self.path} at strength {self.strength:g}"

    @property
    def files(self) -> tuple[Path, ...]:
        """What the fused weights depend on: the file, and PEFT's configuration of it."""
        path = lora_file(self.path)
        config = config_of(path)
        return (path, config) if config else (path,)


@dataclass(frozen=True, slots=True)
class LoRAReport:
    """What came of one file: tensors applied, Wan tensors changed, `name: reason` of those that `partial` skipped, a
    sentence for each module left out. alpha: where it is from, or why there is none; distilled: by what the file is
    known to be step-distilled, None when it is not."""

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
        """For people, on one line; what was left out on a line each."""
        facts = [f"{counted(self.applied, 'tensor')} applied"]
        facts += [f"{len(self.skipped)} skipped"] if self.skipped else []
        facts += [f"alpha: {self.alpha}"] if self.alpha else []
        facts += [f"step-distilled (told by its {self.distilled})"] if self.distilled else []
        return "\n".join((f"{self.path}: {', '.join(facts)}", *(f"{self.path}: {line}" for line in self.left_out)))


def parse_lora(spec: str) -> LoRASpec:
    """`FILE`, `DIR` or either with `:STRENGTH` (a name may contain colons). InputError: no such file, or a bad
    strength."""
    name, colon, number = spec.rpartition(":")
    path, strength = Path(spec), 1.0
    if colon and name and not path.exists():
        try:
            path, strength = Path(name), float(number)
        except ValueError:
            if Path(name).exists():
                raise InputError(f"The LoRA strength {number!r} in {spec!r} is no number; write FILE:0.8") from None
    if not math.isfinite(strength):
        raise InputError(f"The LoRA strength {number!r} in {spec!r} is not finite; write FILE:0.8")
    if not spec:
        raise InputError("--lora names no LoRA file; write --lora FILE, or --lora FILE:0.8")
    return LoRASpec(lora_file(path), strength)


def is_adapter(path: Path) -> bool:
    """Whether a folder is what PEFT saves."""
    return any((path / name).is_file() for name in (CONFIG, *_ADAPTER_FILES))


def lora_file(path: Path) -> Path:
    """The weights that `path`, a file or a PEFT folder, stands for. InputError: there are none."""
    if path.is_dir():
        for name in _ADAPTER_FILES:
            if (path / name).is_file():
                return path / name
        files = ", ".join(sorted(file.name for file in path.glob("*.safetensors"))[:_LISTED])
        there = f"; it holds {files}: name one of them" if files else "; name a LoRA file"
        raise InputError(f"The folder {path} is no PEFT adapter: it has no {' or '.join(_ADAPTER_FILES)}{there}")
    if not path.is_file():
        raise InputError(
            f"There is no LoRA file {path}; give a *.safetensors or SAT *.pt file or a PEFT folder, with :STRENGTH if "
            "needed"
        )
    return path


def apply_loras(source: TensorSource, specs: Sequence[LoRASpec], partial: bool = False) -> "FusedSource":
    """The transformer's tensors with LoRA files fused in, one after the other; nothing is computed until `get`.

    InputError: a file that is none, or of another model, holds a tensor that cannot be applied (all are listed; with
    `partial` their modules are skipped and reported instead), or nothing that can.
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
    """A transformer's tensors with LoRAs added: the touched ones are fp32, the others as stored.

    `report` has one entry for each file; `touched` are the names of the tensors that the files change. `files` are
    those of the checkpoint alone: a build records LoRA files with their strengths.
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
        self._last: tuple[str, Tensor] | None = None  # whose rows are asked for in turn
        self.report = report
        self.touched = frozenset(updates)

    def fused_into(self, name: str) -> tuple[LoRASpec, ...]:
        """The LoRAs that change a tensor, if the tensor itself is of numbers: those to blame if the result is not."""
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
        weight = torch.empty(stored.shape, dtype=torch.float32).copy_(stored)  # contiguous, never the mapped file
        for update in self._updates[name]:
            update.add_to(weight)
        return weight

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if name not in self._updates:
            return self._source.rows(name, start, stop)
        if self._last is None or self._last[0] != name:
            self._last = None  # two at once are more than one module
            self._last = (name, self.get(name))
        return self._last[1][start:stop]
