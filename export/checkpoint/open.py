"""Opens a SCAIL-2 checkpoint in any layout and returns every network's tensors under their Wan names.

Three layouts: the official folder (SAT names in `model/<latest>/*.pt`, the other networks in separate files), Wan-name
weights (one file or shards, with or without a prefix, quantised or not) with the VAE, umT5 and CLIP in the same folder,
a sub-folder or the parent folder, and ComfyUI's models folder. Tensor names determine the network in a file (`find.py`,
`recognise.py`). Sizes are derived from shapes and every tensor's shape is checked here, before anything is converted;
data is read only when a tensor is used.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from scail2_rt.export.checkpoint.comfy_folder import KINDS, model_folders
from scail2_rt.export.checkpoint.derive import (
    check_shapes,
    clip_config,
    clip_shapes,
    dit_config,
    dit_shapes,
    umt5_config,
    umt5_shapes,
    vae_config,
    vae_shapes,
)
from scail2_rt.export.checkpoint.find import LABELS, Around, Group, Where, foreign_file, group_of, open_group, search
from scail2_rt.export.checkpoint.recognise import Recognised, recognise
from scail2_rt.export.checkpoint.tensors import Rows, TensorSource, View, shapes_of
from scail2_rt.export.models.config import ModelConfig
from scail2_rt.export.models.precision import Component
from scail2_rt.kernels.errors import InputError
from scail2_rt.kernels.wording import counted

COMPONENTS: tuple[Component, ...] = ("dit", "vae", "umt5", "clip")
OPTIONS: dict[Component, str] = {"vae": "--vae", "umt5": "--t5", "clip": "--clip"}  # command-line options
_OFFICIAL_PLACE: dict[Component, str] = {
    "dit": "model/1/fsdp2_rank_0000_checkpoint.pt (with model/latest holding 1)",
    "vae": "Wan2.1_VAE.pth",
    "umt5": "umt5-xxl/models_t5_umt5-xxl-enc-bf16.pth",
    "clip": "models_clip_open-clip-xlm-roberta-large-vit-huge-14-onlyvisual.pth",
}
_CLIP_UNUSED = ("log_scale", "visual.head", "visual.post_norm.weight", "visual.post_norm.bias")
_TOKENIZER_FOLDERS = ("umt5-xxl", "google/umt5-xxl", "tokenizer", ".")

Sources = dict[Component, TensorSource]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint: sizes, lazy tensors by component (Wan names), and the `tokenizer.json` file."""

    path: Path
    config: ModelConfig
    sources: dict[Component, TensorSource]
    tokenizer: Path | None

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that an engine built from this checkpoint depends on."""
        files = [file for source in self.sources.values() for file in source.files]
        return (*files, *((self.tokenizer,) if self.tokenizer else ()))


@dataclass(frozen=True, slots=True)
class Place:
    """Location of a checkpoint's networks. root: the folder named in messages; main: the files that the path names
    (None: it is a folder); searched: where the others may be, the nearest first."""

    root: Path
    main: Group | None
    searched: tuple[Where, ...]


class MissingPart(InputError):
    """Networks that no file contains. unreadable: reasons why files could not be read; one might contain them."""

    def __init__(self, message: str, unreadable: tuple[str, ...]) -> None:
        super().__init__(message)
        self.unreadable = unreadable


def open_checkpoint(
    path: Path | str,
    vae: Path | str | None = None,
    umt5: Path | str | None = None,
    clip: Path | str | None = None,
    tokenizer: Path | str | None = None,
    components: Iterable[Component] = COMPONENTS,
) -> Checkpoint:
    """Open the checkpoint at `path` (a folder or a file); `vae`, `umt5`, `clip` and `tokenizer` override the search.

    Only `components` are opened. Raises InputError unless all of them are found, complete and compatible.
    """
    path = Path(path)
    wanted = tuple(component for component in COMPONENTS if component in set(components))
    named: dict[Component, Path | str | None] = {"vae": vae, "umt5": umt5, "clip": clip}
    overrides = {component: Path(file) for component, file in named.items() if file is not None}
    root, sources = open_sources(path, wanted, overrides)
    config = check_sources(sources)
    found_tokenizer = None
    if "umt5" in wanted or tokenizer is not None:
        umt5_files = sources["umt5"].files if "umt5" in sources else ()
        found_tokenizer = find_tokenizer(root, umt5_files, None if tokenizer is None else Path(tokenizer))
    return Checkpoint(path, config, sources, found_tokenizer)


def open_sources(
    path: Path, wanted: Sequence[Component], overrides: Mapping[Component, Path] | None = None
) -> tuple[Path, dict[Component, TensorSource]]:
    """Return the searched folder, and the tensors of the `wanted` components, not checked yet.

    Raises InputError if one is missing or cannot be read."""
    if not path.exists():
        raise InputError(f"There is no checkpoint at {path}. Give a SCAIL-2 folder or a *.safetensors file.")
    place = _locate(path)
    sources: Sources = {}
    if place.main and ("dit" in wanted or path.is_file()):
        component, source = _open_main(path, place.main)
        if component in wanted:
            sources[component] = source
        if component != "dit" and "dit" in wanted:
            raise InputError(f"{path} holds a {LABELS[component]}. Give the file or folder with the transformer.")
    for component in wanted:
        if overrides and component in overrides:
            sources[component] = _open_override(component, overrides[component])
    if missing := [component for component in wanted if component not in sources]:
        sources |= _search(path, place, missing, sources.get("dit"))
    return place.root, {component: _configured(component, sources[component], place.root) for component in wanted}


def _locate(path: Path) -> Place:
    """Locate the official folder (or its `model` folder, or the file in it), ComfyUI's models folder, or any folder."""
    if path.is_file():
        if path.parent.parent.name == "model" and (path.parent.parent / "latest").is_file():
            return Place(path.parents[2], group_of(path), (path.parents[2],))
        if folders := model_folders(path):
            return Place(folders.root, group_of(path), (folders,))
        folder = path.parent
        return Place(folder, group_of(path), (folder, *_above(folder)))
    if (path / "latest").is_file() and path.name == "model":
        path = path.parent
    latest = path / "model" / "latest"
    if not latest.is_file():
        folders = model_folders(path)
        return Place(folders.root, None, (folders,)) if folders else Place(path, None, (path,))
    name = latest.read_text(errors="replace").strip()
    folder = latest.parent / name
    if not re.fullmatch(r"[\w.-]+", name) or not folder.is_dir():
        raise InputError(
            f"{latest} says {name[:40]!r}, but there is no folder {latest.parent}/{name[:40]}. Correct it."
        )
    files = sorted(folder.glob("*.pt"))
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise InputError(f"{folder} must hold one *.pt file with the transformer (found: {names}). Give that file.")
    return Place(path, (files[0],), (path,))


def _above(folder: Path) -> tuple[Around, ...]:
    """Return the parent of a named file's folder, which may hold the other networks; never a root or home folder."""
    above = folder.absolute().parent
    return () if above in (above.parent, Path.home(), folder.absolute()) else (Around(above),)


def _open_main(path: Path, group: Group) -> tuple[Component, TensorSource]:
    source = open_group(group)
    found = recognise(source)
    if found is None:
        names = list(source.keys())
        raise InputError(
            f"{group[0]} holds no SCAIL-2 network: it has {counted(len(names), 'tensor')}, such as "
            f"{', '.join(names[:3])}. Give a file with SAT names (model.diffusion_model.transformer.layers.0...) or "
            "Wan names (blocks.0.self_attn...)."
        )
    _refuse_other_model(group[0], found)
    return found.component, found.source


def _refuse_other_model(path: Path, found: Recognised) -> None:
    if found.foreign:
        raise InputError(foreign_file(path, found))


def _open_override(component: Component, path: Path) -> TensorSource:
    if not path.exists():
        raise InputError(f"There is no {LABELS[component]} at {path}. Give an existing file.")
    found = recognise(open_group(group_of(path)))
    if found is None or found.component != component:
        held = f"a {LABELS[found.component]}" if found else "no network of SCAIL-2"
        raise InputError(f"{path} was given as the {LABELS[component]}, but it holds {held}. Give another file.")
    _refuse_other_model(path, found)
    return found.source


def _search(path: Path, place: Place, missing: list[Component], dit: TensorSource | None) -> Sources:
    """Find components beside the named file or in the folder. Raises InputError for missing or ambiguous ones."""
    found: dict[Component, TensorSource] = {}
    refused: dict[str, None] = {}
    for where in place.searched:
        sought = [component for component in missing if component not in found]
        if not sought:
            break
        result = search(where, place.main, sought)
        if where == place.searched[0] or any(result.candidates.values()):  # a parent folder may be unrelated
            refused |= dict.fromkeys(result.refused)
        for component in sought:
            sources = _fitting(component, result.candidates[component], found.get("dit", dit))
            if len(sources) > 1:
                raise InputError(_several(where if isinstance(where, Path) else where.root, component, sources))
            if sources:
                found[component] = sources[0]
    if absent := [component for component in missing if component not in found]:
        raise MissingPart(_absent(path, place.root, absent, list(refused)), tuple(refused))
    return found


def _fitting(component: Component, sources: list[TensorSource], dit: TensorSource | None) -> list[TensorSource]:
    """Return the candidates that can be used, with this transformer; all of them if none can."""
    if len(sources) < 2:
        return sources
    fitting = []
    for source in sources:
        try:
            check_sources({component: source})
            if dit is not None and component != "dit":
                check_sources({"dit": dit, component: source})
        except InputError:
            continue
        fitting.append(source)
    return fitting or sources


def _several(root: Path, component: Component, sources: list[TensorSource]) -> str:
    files = [source.files[0] for source in sources]
    names = ", ".join(str(file.relative_to(root) if file.is_relative_to(root) else file) for file in files)
    how = f"as CHECKPOINT: {files[0]}" if component == "dit" else f"with {OPTIONS[component]} {files[0]}"
    return f"{root} holds several files with a {LABELS[component]} ({names}). Name the one to use, for example {how}"


def _absent(path: Path, root: Path, absent: list[Component], unreadable: list[str]) -> str:
    problems = "".join(f" Not usable: {reason}." for reason in unreadable)
    if "dit" in absent:
        entries = sorted(entry.name + "/" * entry.is_dir() for entry in root.iterdir())
        listed = ", ".join(entries[:8]) + (", ..." if len(entries) > 8 else "") if entries else "nothing"
        return (
            f"{path} is not a SCAIL-2 checkpoint: found {listed}. Give the official folder (with model/latest and "
            "model/1/fsdp2_rank_0000_checkpoint.pt) or Wan-name weights (*.safetensors with "
            f"blocks.0.self_attn.q.weight).{problems}"
        )
    comfy = model_folders(path)
    places = {c: comfy.root / KINDS[c][0] if comfy else root / _OFFICIAL_PLACE[c] for c in absent}
    listed = "; ".join(f"the {LABELS[c]} {'in' if comfy else 'at'} {where}" for c, where in places.items())
    options = ", ".join(f"{OPTIONS[component]} FILE" for component in absent)
    return f"The checkpoint {path} is not complete. Missing: {listed}. Add them, or use {options}.{problems}"


def _configured(component: Component, source: TensorSource, root: Path) -> TensorSource:
    """Add the `config.json` beside the source as its metadata, unless the source has a configuration.

    A `config.json` describes the transformer, or the network whose width equals its `dim`.
    """
    if "config" in source.metadata or component not in ("dit", "clip"):
        return source
    for folder in dict.fromkeys((source.files[0].parent if source.files else root, root)):
        file = folder / "config.json"
        if not file.is_file():
            continue
        try:
            text = file.read_text()
            settings = json.loads(text)
        except (OSError, ValueError) as error:
            raise InputError(f"{file} cannot be read as JSON ({error}). Correct or remove it.") from error
        if not isinstance(settings, dict):
            raise InputError(f"{file} is not a JSON object. Correct or remove it.")
        derive = dit_config if component == "dit" else clip_config
        width = derive(shapes_of(source), {"config": '{"num_heads": 1}'}).dim  # the heads are irrelevant here
        if settings.get("dim", width if component == "dit" else None) == width:
            whole = {name: Rows(name) for name in source.keys()}  # noqa: SIM118
            return View(source, whole, {**source.metadata, "config": text})
    return source


def check_sources(sources: Mapping[Component, TensorSource]) -> ModelConfig:
    """Derive every component's sizes, check every tensor's shape, and check that the components are compatible.

    Raises InputError otherwise."""
    shapes = {component: shapes_of(source) for component, source in sources.items()}

    def what(component: Component) -> str:
        files = sources[component].files
        return f"The {LABELS[component]}" + (f" in {files[0]}" if files else "")

    dit = dit_config(shapes["dit"], sources["dit"].metadata) if "dit" in sources else None
    vae = vae_config(shapes["vae"], sources["vae"].metadata) if "vae" in sources else None
    umt5 = umt5_config(shapes["umt5"], sources["umt5"].metadata) if "umt5" in sources else None
    clip = clip_config(shapes["clip"], sources["clip"].metadata) if "clip" in sources else None
    if dit:
        check_shapes(shapes["dit"], dit_shapes(dit), what("dit"))
    if vae:
        check_shapes(shapes["vae"], vae_shapes(vae), what("vae"))
    if umt5:
        check_shapes(shapes["umt5"], umt5_shapes(umt5), what("umt5"))
    if clip:
        used = {name: shape for name, shape in shapes["clip"].items() if name not in _CLIP_UNUSED}
        expected = {name: shape for name, shape in clip_shapes(clip).items() if name not in _CLIP_UNUSED}
        check_shapes(used, expected, what("clip"))
    if dit and umt5 and dit.text_dim != umt5.dim:
        raise InputError(
            f"The transformer needs text of width {dit.text_dim}, but the umT5 encoder gives {umt5.dim}. Use matching "
            "files."
        )
    if dit and clip and dit.clip_dim != clip.dim:
        raise InputError(
            f"The transformer needs CLIP features of width {dit.clip_dim}, but the tower gives {clip.dim}. Use "
            "matching files."
        )
    if dit and vae and dit.latent_channels != vae.z_dim:
        raise InputError(
            f"The transformer needs {dit.latent_channels} latent channels, but the VAE has {vae.z_dim}. Use matching "
            "files."
        )
    return ModelConfig(dit=dit, vae=vae, umt5=umt5, clip=clip)


def find_tokenizer(root: Path, umt5_files: tuple[Path, ...], given: Path | None) -> Path:
    """Return the given `tokenizer.json`, or the one beside the umT5 encoder. Raises InputError if there is none."""
    if given is not None:
        folders = [given.parent if given.is_file() else given]
        if given.is_file() and given.name.endswith(".json"):
            return given
    else:
        folders = [file.parent for file in umt5_files if file.parent != root]
        folders += [root / name for name in _TOKENIZER_FOLDERS]
    for folder in folders:
        if (folder / "tokenizer.json").is_file():
            return folder / "tokenizer.json"
    for folder in folders:
        if (folder / "spiece.model").is_file():
            raise InputError(
                f"{folder} has only spiece.model, but tokenizer.json is needed. Put the tokenizer.json of "
                "google/umt5-xxl beside it, or write it with transformers' AutoTokenizer(...).save_pretrained(...)."
            )
    raise InputError(
        f"There is no tokenizer.json in {folders[0]}. Put that of google/umt5-xxl there, or name it with --tokenizer."
    )
