"""ComfyUI's `models` folder: the sub-folders that hold each network, including those of `extra_model_paths.yaml`.

Given the folder, the ComfyUI folder around it, or a file anywhere in it, networks are searched by kind: a transformer
in `diffusion_models` or `unet`, a VAE in `vae`, and so on, with all their sub-folders. LoRAs, upscalers and other files
there are never opened. Source: Comfy-Org/ComfyUI, `folder_paths.py`, `utils/extra_config.py`.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scail2_rt.export.models.precision import Component
from scail2_rt.kernels.errors import InputError

EXTRA = "extra_model_paths.yaml"
KINDS: dict[Component, tuple[str, ...]] = {
    "dit": ("diffusion_models", "unet", "checkpoints"),
    "vae": ("vae",),
    "umt5": ("text_encoders", "clip"),
    "clip": ("clip_vision",),
}
_ALL = frozenset(kind for kinds in KINDS.values() for kind in kinds)
_DEPTH = 6  # maximum number of folders between a file and the models folder


@dataclass(frozen=True, slots=True)
class ModelFolders:
    """root: the `models` folder; places: folders that may contain each network, including their sub-folders."""

    root: Path
    places: Mapping[Component, tuple[Path, ...]]


def model_folders(path: Path) -> ModelFolders | None:
    """Return the models folder that `path` is, contains, or lies in; None if there is none.

    Raises InputError if its `extra_model_paths.yaml` cannot be read."""
    root = _root(path)
    if root is None:
        return None
    places: dict[Component, tuple[Path, ...]] = {}
    extra = [entry for file in _extra_files(root) for entry in _extra_places(file)]
    for component, kinds in KINDS.items():
        found = [root / kind for kind in kinds] + [place for kind, place in extra if kind in kinds]
        places[component] = tuple(dict.fromkeys(place.resolve() for place in found if place.is_dir()))
    relative = {place.resolve(): place for place in (root / kind for kind in _ALL)}  # as the user wrote them
    return ModelFolders(root, {c: tuple(relative.get(p, p) for p in found) for c, found in places.items()})


def folders_below(place: Path) -> Iterator[Path]:
    """Yield the folder and all folders below it, following links, each once, without hidden ones."""
    seen: set[str] = set()
    for folder, inner, _ in os.walk(place, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            inner.clear()
            continue
        seen.add(real)
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        yield Path(folder)


def _root(path: Path) -> Path | None:
    if path.is_dir():
        for candidate in (path, path / "models"):
            if _looks_like_models(candidate):
                return candidate
    for folder in (path, *list(path.absolute().parents)[:_DEPTH]):
        if folder.name in _ALL and folder.is_dir() and _looks_like_models(folder.parent):
            return folder.parent
    return None


def _looks_like_models(folder: Path) -> bool:
    """Return whether the folder has two kinds of sub-folders, one of them for transformers; or one, and EXTRA."""
    kinds = {kind for kind in _ALL if (folder / kind).is_dir()}
    transformers = kinds & {"diffusion_models", "unet"}
    return bool(transformers) and (len(kinds) > 1 or bool(_extra_files(folder)))


def _extra_files(root: Path) -> list[Path]:
    return [file for file in (root / EXTRA, root.absolute().parent / EXTRA) if file.is_file()]


def _extra_places(file: Path) -> list[tuple[str, Path]]:
    """Return (kind, folder) of every entry; paths are relative to the section's `base_path`, else to the file."""
    import yaml

    try:
        sections = yaml.safe_load(file.read_text(encoding="utf-8"))
        found = []
        for section in (sections or {}).values():
            found += _section_places(file.absolute().parent, dict(section or {}))
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{file} cannot be read ({reason}). Correct or remove it.") from error
    return found


def _section_places(folder: Path, section: dict[str, Any]) -> list[tuple[str, Path]]:
    base = folder / os.path.expandvars(os.path.expanduser(str(section.pop("base_path", None) or ".")))
    found = []
    for kind, entry in section.items():
        lines = entry if isinstance(entry, list) else str(entry or "").splitlines() if isinstance(entry, str) else []
        found += [(str(kind), base / os.path.expanduser(str(line).strip())) for line in lines if str(line).strip()]
    return found
