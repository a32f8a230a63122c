"""Segmenters on disk: finds them, and recognises them by the `config.json` files in their folders.

SAM 2    config.json of a `sam2_video` model, and in a subfolder (`detector/`) one of Grounding DINO
SAM 3    config.json of a `sam3_video` model, with its tokenizer
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from scail2_rt.kernels.cache_folder import cache_directory
from scail2_rt.kernels.errors import InputError

Name = Literal["sam2", "sam3"]
NAMES: tuple[Name, ...] = ("sam2", "sam3")
KINDS: dict[str, Name] = {"sam2_video": "sam2", "sam3_video": "sam3"}
DETECTOR_KIND = "grounding-dino"
DETECTOR = "detector"
SPARE = {
    "sam2": 3 << 30,
    "sam3": 4 << 30,
}  # bytes besides the weights, for inputs of `REFERENCE_PIXELS` and two characters
REFERENCE_PIXELS = {"sam2": 1024**2, "sam3": 1008**2}


@dataclass(frozen=True, slots=True)
class SegmenterFolder:
    """A segmenter on disk.

    model      folder of the model
    detector   folder of Grounding DINO for SAM 2, if there is one
    square     side of the model's square input in pixels"""

    name: Name
    model: Path
    detector: Path | None = None
    square: int = 1024

    @property
    def files(self) -> list[Path]:
        folders = [self.model, *([self.detector] if self.detector else [])]
        return [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]

    @property
    def weight_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    @property
    def memory_bytes(self) -> int:
        """Estimated memory of a run: the weights as stored, and activations in proportion to the area of the input."""
        return self.weight_bytes + int(SPARE[self.name] * self.square**2 / REFERENCE_PIXELS[self.name])


def segmenter_cache() -> Path:
    """The folder in which `download --segmenter` stores segmenters."""
    return cache_directory() / "segmenters"


def open_folder(folder: Path) -> SegmenterFolder:
    """Recognise the segmenter in a folder. Raises InputError if there is none, or its weights are missing."""
    if not folder.is_dir():
        raise InputError(f"The segmenter folder {folder} does not exist: give a folder that holds a config.json.")
    kinds = {each: _config(each) for each in (folder, *sorted(p for p in folder.iterdir() if p.is_dir()))}
    found = {each: str(config.get("model_type", "")) for each, config in kinds.items() if config}
    for each, kind in found.items():
        if kind in KINDS:
            detector = next((place for place, other in found.items() if other == DETECTOR_KIND), None)
            made = SegmenterFolder(KINDS[kind], each, detector if KINDS[kind] == "sam2" else None, _square(kinds[each]))
            if not list(each.glob("*.safetensors")):
                raise InputError(f"{each} holds no *.safetensors: download the segmenter's weights again.")
            return made
    if DETECTOR_KIND in found.values():
        raise InputError(f"{folder} holds only Grounding DINO, which detects characters: add SAM 2, which tracks them.")
    kind = ", ".join(sorted(set(found.values()) - {""})) or "no readable config.json"
    raise InputError(
        f"{folder} holds {kind}, and a segmenter is a sam2_video or sam3_video model: get one with "
        "`scail2-rt download --segmenter sam2`."
    )


def find_segmenter(name: str, weights: Path | None) -> SegmenterFolder:
    """The segmenter that `--segmenter` and `--segmenter-weights` select; `auto` selects SAM 3 if it is in the cache,
    else SAM 2. Raises InputError, with the download command, if there is none."""
    if weights is not None:
        folder = open_folder(weights)
        if name not in ("auto", folder.name):
            raise InputError(
                f"{weights} holds {folder.name}, not {name}: leave out --segmenter, or give another folder."
            )
        return folder
    wanted = ("sam3", "sam2") if name == "auto" else (name,)
    for each in wanted:
        place = segmenter_cache() / each
        if place.is_dir():
            return open_folder(place)
    fetch = "sam2" if name == "auto" else name
    raise InputError(
        f"{segmenter_cache()} holds no {'segmenter' if name == 'auto' else name}, which making masks needs: get one "
        f"with `scail2-rt download --segmenter {fetch}`, or give the masks."
    )


def _config(folder: Path) -> dict[str, Any]:
    """The contents of `config.json`; {} if it cannot be read."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _square(config: dict[str, Any]) -> int:
    """Side of the model's input in pixels. Raises InputError if the file states no number."""
    size = config.get("image_size", 1024) if config.get("model_type") == "sam2_video" else 1008
    sides = size if isinstance(size, list) else [size]
    if not sides or not all(isinstance(side, int) and side > 0 for side in sides):
        raise InputError(f"The config.json of a segmenter has the invalid image_size {size!r}: download it again.")
    return int(max(sides))
