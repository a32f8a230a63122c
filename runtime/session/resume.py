"""Resuming an interrupted run: the state after its last finished segment, and the check that it is the same run.

The state is one safetensors file beside the partial video (`runtime.media.unfinished` says when it is written): the
history in the fp32 values that the next segment starts from, the colour anchor, the noise generator's
state, and as metadata the identity of the request: every option, the hashes of the input files, what the engines were
made of and are run by, and the versions of the packages that compute. If the identities are equal, the result is
bit-identical to an uninterrupted run: always on a CPU, on a GPU if its kernels are deterministic. A difference raises
an error that names it.
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
# Options that say where things are or whether to begin, not what comes out; input files count by their hashes.
_NO_MATTER = ("overwrite", "resume", "metadata", "config", "allow_mask_problems", "output", *FILES, "extra_refs")
# Another executor built into the folder changes its manifest, not this one; the digest repeats other fields.
_WHERE = ("directory", "manifest_sha256", "digest")


@dataclass(frozen=True, slots=True)
class Saved:
    """frames: how many the partial video holds; noise: the generator's state, uint8."""

    frames: int
    carry: Carry
    noise: Tensor


def identity(about: Mapping[str, Any]) -> dict[str, str]:
    """What a run's result depends on, from its report: dotted field → value."""
    engines = {name: value for name, value in about["engines"].items() if name not in _WHERE}
    fields = {
        "options": {name: value for name, value in about["options"].items() if name not in _NO_MATTER},
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
    """The first field in which two identities differ, as part of a sentence."""
    for field in [*now, *before]:
        if before.get(field) != now.get(field):
            area, _, name = field.partition(".")
            shown = f"--{name.replace('_', '-')}" if area == "options" else field
            if area == "inputs":
                return f"the file {name} has changed since"
            return f"{shown} was {before.get(field, 'not there')} and is {now.get(field, 'not there')} now"
    return None


class Sidecar:
    """The saved states of one run."""

    def __init__(self, output: Path, identity: Mapping[str, str]) -> None:
        self.output, self.identity = output, identity

    def write(self, part: int, saved: Saved) -> None:
        """Keep the state after part `part`; the one before it stays until the next. All of it or nothing is seen."""
        tensors = {"noise": saved.noise, **{f"anchor.{name}": value for name, value in saved.carry.anchor.items()}}
        if saved.carry.history is not None:
            tensors["history"] = saved.carry.history
        tensors = {name: value.contiguous().clone() for name, value in tensors.items()}  # the format takes no views
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
        """The state that fits the partial video; None when there is no unfinished run. InputError when it was another
        run than this one."""
        parts = resumable(self.output)
        if not parts:
            return None
        path = sidecar_path(self.output, parts)
        try:
            with safe_open(path, "pt") as file:
                notes = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (SafetensorError, OSError) as error:
            raise Scail2Error(f"{path} cannot be read ({error}): start again with --overwrite.") from error
        if notes.get("format") != FORMAT:
            raise InputError(f"{path} was written by another version of scail2-rt: start again with --overwrite.")
        if difference := first_difference(json.loads(notes["identity"]), self.identity):
            raise InputError(
                f"The interrupted run of {self.output} cannot go on: {difference}. Give what was given then, or start "
                "again with --overwrite and without --resume."
            )
        return Saved(int(notes["frames"]), _carry(int(notes["finished"]), tensors), tensors["noise"])


def _carry(finished: int, tensors: Mapping[str, Tensor]) -> Carry:
    anchor = {name.removeprefix("anchor."): value for name, value in tensors.items() if name.startswith("anchor.")}
    return Carry(finished, tensors.get("history"), anchor)


def noise_generator(device: str, seed: int, saved: Saved | None = None) -> torch.Generator:
    """Where the noise comes from: seeded, or as it was when the saved segment had been drawn."""
    noise = torch.Generator(device).manual_seed(seed)
    if saved is not None:
        noise.set_state(saved.noise)
    return noise
