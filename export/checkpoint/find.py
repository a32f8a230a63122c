"""Search for weights files: sets of shards, folders, folder trees; and the network that each file holds.

Tensor names determine the network, not file names: every weights file of a folder is opened (mapped, not read) and
recognised. In ComfyUI's models folder, only sub-folders of the wanted kind are opened. Another model's network, or one
of another size, is not a candidate beside one that fits; if none fits, the error names it.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from scail2_rt.export.checkpoint.comfy_folder import ModelFolders, folders_below
from scail2_rt.export.checkpoint.foreign_files import refuse_foreign
from scail2_rt.export.checkpoint.gguf_file import MAGIC, open_gguf
from scail2_rt.export.checkpoint.quantised import plain_weights
from scail2_rt.export.checkpoint.recognise import Recognised, recognise
from scail2_rt.export.checkpoint.tensors import TensorSource, open_safetensors, open_weights
from scail2_rt.export.models.precision import Component
from scail2_rt.kernels.errors import InputError

LABELS: dict[Component, str] = {"dit": "transformer", "vae": "VAE", "umt5": "umT5 encoder", "clip": "CLIP tower"}
_SUFFIXES = (".safetensors", ".gguf", ".pth", ".pt")
_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.safetensors")

_PART_FOLDERS = ("vae", "umt5-xxl", "text_encoder", "text_encoders", "clip", "clip_vision", "image_encoder")

Group = tuple[Path, ...]  # one weights file, or the shards of one set


@dataclass(frozen=True, slots=True)
class Around:
    """The folder around the folder of a named file: its files, and its sub-folders with names of networks. Other
    folders in it may belong to other models."""

    root: Path

    @property
    def folders(self) -> tuple[Path, ...]:
        return (self.root, *(self.root / name for name in _PART_FOLDERS if (self.root / name).is_dir()))


Where = Path | ModelFolders | Around


@dataclass(frozen=True, slots=True)
class Found:
    """Result of a search: candidates by component, and why other files were rejected (unreadable, another model)."""

    candidates: dict[Component, list[TensorSource]]
    refused: tuple[str, ...]


def group_of(path: Path) -> Group:
    """Return the files of the weights at `path` (a file, a shard index, or a folder with one set of weights).

    Raises InputError if there is no weights file, or more than one set."""
    if path.is_dir():
        groups = groups_in(path)
        if len(groups) != 1:
            names = ", ".join(group[0].name for group in groups) or "nothing"
            raise InputError(f"{path} must hold one set of weights (found: {names}). Name the file.")
        return groups[0]
    if path.name.endswith(".index.json"):
        return _indexed(path)
    if _SHARD.fullmatch(path.name):
        return next(group for group in groups_in(path.parent) if path in group)
    if path.suffix not in _SUFFIXES:
        refuse_foreign(path)
        raise InputError(f"{path} is not a weights file. Give a {', '.join(_SUFFIXES)} or *.safetensors.index.json.")
    return (path,)


def _indexed(index: Path) -> Group:
    """Return the shards that an index file lists. Raises InputError for a damaged index or a missing shard."""
    try:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"The shard index {index} cannot be read ({error}). Get an intact one.") from error
    for shard in shards:
        if not (index.parent / shard).is_file():
            raise InputError(f"{index} lists the shard {shard}, which is not beside it. Download that file too.")
    return tuple(index.parent / shard for shard in shards)


def groups_in(folder: Path) -> list[Group]:
    """Return the sets of weights directly in a folder: shards (by index, else by their numbers) count as one set."""
    files = sorted(file for file in folder.iterdir() if file.suffix in _SUFFIXES and not file.name.startswith("."))
    groups = [_indexed(index) for index in sorted(folder.glob("*.safetensors.index.json"))]
    taken = {file for group in groups for file in group}
    numbered: dict[tuple[str, int], list[Path]] = {}
    for file in files:
        match = _SHARD.fullmatch(file.name)
        if match and file not in taken:
            numbered.setdefault((match["stem"], int(match["count"])), []).append(file)
            taken.add(file)
    for (stem, count), shards in numbered.items():
        if len(shards) != count:
            raise InputError(f"{folder} has {len(shards)} of the {count} shards of {stem}. Download the missing ones.")
        groups.append(tuple(shards))
    return groups + [(file,) for file in files if file not in taken]


def open_group(group: Group) -> TensorSource:
    """Open the tensors of one file or of a set of shards, dequantised if the file is quantised."""
    if len(group) > 1:
        return plain_weights(open_safetensors(group))
    if is_gguf(group[0]):
        return open_gguf(group[0])
    return plain_weights(open_weights(group[0]))


def is_gguf(path: Path) -> bool:
    """Return whether the file begins like a GGUF file, whatever its name. Raises InputError for another *.gguf file."""
    try:
        with path.open("rb") as file:
            begins = file.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}. Check the file.") from error
    if path.suffix == ".gguf" and not begins:
        refuse_foreign(path)
        raise InputError(f"{path} is not a GGUF file (it does not begin with GGUF): it is empty or of another format")
    return begins


def search(place: Where, main: Group | None, wanted: Sequence[Component]) -> Found:
    """Return the candidates for the wanted components in a folder, around it, or in a models folder."""
    candidates: dict[Component, list[TensorSource]] = {component: [] for component in wanted}
    refused: dict[str, None] = {}
    taken = {file.resolve() for file in main or ()}
    for component, folder in _folders(place, wanted):
        try:
            groups = groups_in(folder)
        except InputError as error:  # an incomplete set of shards, perhaps irrelevant
            refused[str(error)] = None
            continue
        for group in groups:
            if taken & {file.resolve() for file in group}:
                continue
            try:
                found = recognise(open_group(group))
            except InputError as error:
                refused[str(error)] = None
                continue
            if found is None or found.component not in candidates or component not in (None, found.component):
                continue
            taken |= {file.resolve() for file in group}
            if found.foreign:
                refused[foreign_file(group[0], found)] = None
            else:
                candidates[found.component].append(found.source)
    return Found(candidates, tuple(refused))


def foreign_file(path: Path, found: Recognised) -> str:
    """Return a sentence that names the other model's network in a file."""
    return f"{path} holds {found.foreign}"


def _folders(place: Where, wanted: Sequence[Component]) -> Iterator[tuple[Component | None, Path]]:
    """Yield (the only component to look for, or None for any; folder)."""
    if isinstance(place, ModelFolders):
        for component in wanted:
            for folder in place.places[component]:
                yield from ((component, below) for below in folders_below(folder))
        return
    if isinstance(place, Around):
        yield from ((None, folder) for folder in place.folders)
        return
    yield None, place
    for entry in sorted(entry for entry in place.iterdir() if entry.is_dir() and entry.name[0] != "."):
        yield None, entry
