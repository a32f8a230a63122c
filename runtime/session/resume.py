"""Resuming an interrupted run: the state after its last finished segment, and the check that it is the same run.

The state is one safetensors file beside the partial video (`runtime.media.unfinished` describes when it is written). It
holds the history (fp32 frames that the next segment starts from), the colour anchor and the state of the noise
generator. Its metadata hold the identity of the run: all options, the hashes of the input files, the source files of
the engines, the device, and the versions of the packages that compute. If the identities are equal, the result is
bit-identical to an uninterrupted run: always on a CPU, and on a GPU if its kernels are deterministic. If they differ,
an error names the first difference.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from scail2_rt.kernels.errors import InputError, Scail2Error
from scail2_rt.runtime.core.case_folder import FILES
from scail2_rt.runtime.media.unfinished import resumable, sidecar_path
from scail2_rt.runtime.pipeline.history import Carry
from scail2_rt.runtime.session.settings import COMPUTING

FORMAT = "2"
# Options that do not change the pixels. Input files are compared by their hashes.
_NO_EFFECT = ("overwrite", "resume", "metadata", "config", "allow_mask_problems", "output", *FILES, "extra_refs")
# Building another executor into the folder changes its manifest but not this run; the digest repeats other fields.
_IGNORED_OF_ENGINES = ("directory", "manifest_sha256", "digest")


@dataclass(frozen=True, slots=True)
class Saved:
    """The state after a segment. frames: number of frames in the partial video; noise: the generator's state, uint8."""

    frames: int
    carry: Carry
    noise: Tensor


def identity(about: Mapping[str, Any]) -> dict[str, str]:
    """Return everything that the result of a run depends on, from its report: dotted field → JSON value."""
    engines = {name: value for name, value in about["engines"].items() if name not in _IGNORED_OF_ENGINES}
    fields = {
        "options": {name: value for name, value in about["options"].items() if name not in _NO_EFFECT},
        "inputs": {label: file["sha256"] for label, file in about["inputs"].items()},
        **{name: about[name] for name in ("mode", "height", "width", "frames")},
        "engines": engines,
        "device": {name: about["device"][name] for name in ("backend", "device", "name")},
        "versions": {name: about["versions"][name] for name in COMPUTING if name in about["versions"]},
    }
    return dict(_flat(fields))


def _flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    if isinstance(value, Mapping):
        return [pair for key, item in value.items() for pair in _flat(item, f"{name}.{key}" if name else str(key))]
    return [(name, json.dumps(value))]


def first_difference(before: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """Return a clause about the first field in which two identities differ, or None if they are equal."""
    for field in [*now, *before]:
        if before.get(field) != now.get(field):
            area, _, name = field.partition(".")
            shown = f"--{name.replace('_', '-')}" if area == "options" else field
            if area == "inputs":
                return f"the input {name} has changed since"
            return f"{shown} was {before.get(field, 'not set')} and is now {now.get(field, 'not set')}"
    return None


class Sidecar:
    """The saved states of one run."""

    def __init__(self, output: Path, identity: Mapping[str, str]) -> None:
        self.output, self.identity = output, identity

    def write(self, part: int, saved: Saved) -> None:
        """Write the state after part `part` atomically, and delete the state before the previous part."""
        tensors = {"noise": saved.noise, **{f"anchor.{name}": value for name, value in saved.carry.anchor.items()}}
        if saved.carry.history is not None:
            tensors["history"] = saved.carry.history
        tensors = {name: value.contiguous().clone() for name, value in tensors.items()}  # safetensors stores no views
        numbers = {"format": FORMAT, "frames": str(saved.frames), "finished": str(saved.carry.finished)}
        path = sidecar_path(self.output, part)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(save(tensors, {**numbers, "identity": json.dumps(dict(self.identity))}))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        sidecar_path(self.output, part - 2).unlink(missing_ok=True)

    def load(self) -> Saved | None:
        """Return the state that belongs to the partial video, or None if there is no unfinished run.

        Raises InputError if it is the state of a different run, Scail2Error if it cannot be read."""
        parts = resumable(self.output)
        if not parts:
            return None
        path = sidecar_path(self.output, parts)
        try:
            with safe_open(path, "pt") as file:
                notes = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (SafetensorError, OSError) as error:
            raise Scail2Error(f"{path} cannot be read ({error}). Use --overwrite to start again.") from error
        if notes.get("format") != FORMAT:
            raise InputError(f"{path} was written by another version of scail2-rt. Use --overwrite to start again.")
        if difference := first_difference(json.loads(notes["identity"]), self.identity):
            raise InputError(
                f"The interrupted run of {self.output} cannot be resumed: {difference}. Repeat its options and files, "
                "or start again with --overwrite and without --resume."
            )
        return Saved(int(notes["frames"]), _carry(int(notes["finished"]), tensors), tensors["noise"])


def _carry(finished: int, tensors: Mapping[str, Tensor]) -> Carry:
    anchor = {name.removeprefix("anchor."): value for name, value in tensors.items() if name.startswith("anchor.")}
    return Carry(finished, tensors.get("history"), anchor)


def noise_generator(device: str, seed: int, saved: Saved | None = None) -> torch.Generator:
    """Return the generator of the noise on `device`: seeded, or in the state after the noise of the saved segment."""
    noise = torch.Generator(device).manual_seed(seed)
    if saved is not None:
        noise.set_state(saved.noise)
    return noise
