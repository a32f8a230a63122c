"""The record of the inputs of masks, stored next to them, so that only the same request reuses them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from scail2_rt.runtime.core.request import Clip, ClipSource, ImageSource
from scail2_rt.runtime.masks.make.folders import SegmenterFolder
from scail2_rt.runtime.masks.make.options import MaskOptions
from scail2_rt.runtime.media.clips import clip_hash
from scail2_rt.runtime.media.images import load_image

RECORD = "masks.json"
VERSION = 1  # increased when the same inputs and options give other masks
_FILES = ("mask_image", "mask_video", "sheet")


def fingerprint(
    image: ImageSource, driving: ClipSource, options: MaskOptions, segmenter: SegmenterFolder | None
) -> dict[str, Any]:
    """Fingerprint of inputs, options and segmenter, for JSON. Files are identified by path, size and modification time,
    data in memory by its hash."""
    given = {
        each.name: getattr(options, each.name) for each in fields(options) if each.name not in ("places", "weights")
    }
    ready = {name: _file(given.pop(name)) for name in ("image_from", "driving_from")}
    return _as_json(
        {
            "version": VERSION,
            "image": _file(image) if isinstance(image, Path) else _digest(load_image(image)),
            "driving": clip_hash(driving) if isinstance(driving, Clip) else _file(Path(driving)),
            "options": {**given, **ready, "mode": options.resolved_mode},
            "segmenter": None if segmenter is None else [segmenter.name, *map(_file, segmenter.files)],
        }
    )


def recorded(folder: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The fields of the `Masks` in a folder if their fingerprint is `identity`, else None."""
    try:
        found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict) or found.get("identity") != identity:
        return None
    stored = found.get("masks")
    if not isinstance(stored, dict) or not all(isinstance(stored.get(name), str) for name in _FILES):
        return None
    files = {name: folder / stored[name] for name in _FILES}
    stored_fields = {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}
    return {**stored_fields, **files} if all(file.is_file() for file in files.values()) else None


def _file(path: Path | None) -> Any:
    """Path, size and modification time of a file, or of the files in a folder."""
    if path is None:
        return None
    if path.is_dir():
        return [_file(each) for each in sorted(path.iterdir()) if each.is_file()]
    known = path.stat()
    return [str(path.resolve()), known.st_size, known.st_mtime_ns]


def _digest(pixels: np.ndarray) -> str:
    """SHA-256 of shape and content of an array."""
    return hashlib.sha256(repr(pixels.shape).encode() + np.ascontiguousarray(pixels).tobytes()).hexdigest()


def _as_json(value: dict[str, Any]) -> dict[str, Any]:
    """The value as it is after writing it to JSON and reading it back."""
    found: dict[str, Any] = json.loads(json.dumps(value))
    return found
