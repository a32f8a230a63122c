"""Opens a SCAIL-2 checkpoint in any layout that users have and gives every network's tensors under their Wan names.

Three layouts: the official folder (SAT keys in `model/<latest>/*.pt`, the others under their own names), Wan-key
weights (one file or shards, with or without a prefix, quantised or not) with the VAE, umT5 and CLIP in the same folder,
one in it or the one around it, and ComfyUI's models folder. What a file holds, its tensor names decide (`find.py`,
`recognise.py`). Sizes are derived from shapes and every tensor is checked here, before anything is converted; nothing
is read until a tensor is asked for.
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
OPTIONS: dict[Component, str] = {"vae": "--vae", "umt5": "--t5", "clip": "--clip"}  # of the command line
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
        """Every file that an engine made from this checkpoint depends on."""
        files = [file for source in self.sources.values() for file in source.files]
        return (*files, *((self.tokenizer,) if self.tokenizer else ()))


@dataclass(frozen=True, slots=True)
class Place:
    """Where a checkpoint's parts are. root: the folder that messages speak of; main: the files that the path itself
    names (None: it is only a folder); searched: where the others may be, the nearest first."""

    root: Path
    main: Group | None
    searched: tuple[Where, ...]


class MissingPart(InputError):
    """Networks that are in no file. unreadable: why files could not be read, one of which might hold them."""

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
    """Opens the checkpoint at `path` (a folder or a file); `vae`, `umt5`, `clip` and `tokenizer` override the search.

    Only `components` are opened; all of them must be there, complete and fitting together. InputError otherwise.
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
    """The folder that the parts were searched in, and the tensors of the `wanted` ones, not checked yet.

    InputError: one of them is not there or cannot be read."""
    if not path.exists():
        raise InputError(f"There is no checkpoint at {path}; give a SCAIL-2 folder or a *.safetensors file")
    place = _locate(path)
    sources: Sources = {}
    if place.main and ("dit" in wanted or path.is_file()):
        component, source = _open_main(path, place.main)
        if component in wanted:
            sources[component] = source
        if component != "dit" and "dit" in wanted:
            raise InputError(f"{path} holds a {LABELS[component]}; give the file or folder with the transformer")
    for component in wanted:
        if overrides and component in overrides:
            sources[component] = _open_override(component, overrides[component])
    if missing := [component for component in wanted if component not in sources]:
        sources |= _search(path, place, missing, sources.get("dit"))
    return place.root, {component: _configured(component, sources[component], place.root) for component in wanted}


def _locate(path: Path) -> Place:
    """The official folder (given itself, its `model` folder or the file in it), ComfyUI's models folder, or any."""
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
        raise InputError(f"{latest} says {name[:40]!r}, but there is no folder {latest.parent}/{name[:40]}; correct it")
    files = sorted(folder.glob("*.pt"))
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise InputError(
            f"{folder} must hold one *.pt file with the transformer (found: {names}); give that file itself"
        )
    return Place(path, (files[0],), (path,))


def _above(folder: Path) -> tuple[Around, ...]:
    """The folder around one that a named file lies in, which may hold the other parts; never a root or a home."""
    above = folder.absolute().parent
    return () if above in (above.parent, Path.home(), folder.absolute()) else (Around(above),)


def _open_main(path: Path, group: Group) -> tuple[Component, TensorSource]:
    source = open_group(group)
    found = recognise(source)
    if found is None:
        names = list(source.keys())
        raise InputError(
            f"{group[0]} holds no SCAIL-2 network: it has {counted(len(names), 'tensor')}, such as "
            f"{', '.join(names[:3])}; SAT keys (model.diffusion_model.transformer.layers.0...) or Wan keys "
            "(blocks.0.self_attn...) are needed"
        )
    _refuse_other_model(group[0], found)
    return found.component, found.source


def _refuse_other_model(path: Path, found: Recognised) -> None:
    if found.foreign:
        raise InputError(foreign_file(path, found))


def _open_override(component: Component, path: Path) -> TensorSource:
    if not path.exists():
        raise InputError(f"There is no {LABELS[component]} at {path}; give an existing file")
    found = recognise(open_group(group_of(path)))
    if found is None or found.component != component:
        held = f"a {LABELS[found.component]}" if found else "no network of SCAIL-2"
        raise InputError(f"{path} was given as the {LABELS[component]}, but it holds {held}; give another file")
    _refuse_other_model(path, found)
    return found.source


def _search(path: Path, place: Place, missing: list[Component], dit: TensorSource | None) -> Sources:
    """Finds components beside the named file or in the folder. InputError names what is missing or doubled."""
    found: dict[Component, TensorSource] = {}
    refused: dict[str, None] = {}
    for where in place.searched:
        sought = [component for component in missing if component not in found]
        if not sought:
            break
        result = search(where, place.main, sought)
        if where == place.searched[0] or any(result.candidates.values()):  # what lies around a folder may be unrelated
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
    """Of several candidates those that can be used, with this transformer; all of them when none can."""
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
    return f"{root} holds several files with a {LABELS[component]} ({names}); name the one to use, for example {how}"


def _absent(path: Path, root: Path, absent: list[Component], unreadable: list[str]) -> str:
    problems = "".join(f" Not usable: {reason}." for reason in unreadable)
    if "dit" in absent:
        entries = sorted(entry.name + "/" * entry.is_dir() for entry in root.iterdir())
        listed = ", ".join(entries[:8]) + (", ..." if len(entries) > 8 else "") if entries else "nothing"
        return (
            f"{path} is no SCAIL-2 checkpoint: found {listed}; expected the official folder (model/latest and "
            "model/1/fsdp2_rank_0000_checkpoint.pt) or Wan-key weights (*.safetensors with blocks.0.self_attn.q.weight)"
            f".{problems}"
        )
    comfy = model_folders(path)
    places = {c: comfy.root / KINDS[c][0] if comfy else root / _OFFICIAL_PLACE[c] for c in absent}
    listed = "; ".join(f"the {LABELS[c]} {'in' if comfy else 'at'} {where}" for c, where in places.items())
    options = ", ".join(f"{OPTIONS[component]} FILE" for component in absent)
    return f"The checkpoint {path} is not complete. Missing: {listed} (or name each with {options}).{problems}"


def _configured(component: Component, source: TensorSource, root: Path) -> TensorSource:
    """The source with the `config.json` beside it as its metadata, unless it brings a configuration of its own.

    A `config.json` speaks of the transformer, or of the network whose width its `dim` gives.
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
            raise InputError(f"{file} cannot be read as JSON ({error}); correct or remove it") from error
        if not isinstance(settings, dict):
            raise InputError(f"{file} must hold a JSON object; correct or remove it")
        derive = dit_config if component == "dit" else clip_config
        width = derive(shapes_of(source), {"config": '{"num_heads": 1}'}).dim  # the heads do not matter here
        if settings.get("dim", width if component == "dit" else None) == width:
            whole = {name: Rows(name) for name in source.keys()}  # noqa: SIM118
            return View(source, whole, {**source.metadata, "config": text})
    return source


def check_sources(sources: Mapping[Component, TensorSource]) -> ModelConfig:
    """Derives every component's sizes, checks every tensor, and that the components fit together."""
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
        raise InputError(f"The transformer takes text of width {dit.text_dim}, but the umT5 encoder gives {umt5.dim}")
    if dit and clip and dit.clip_dim != clip.dim:
        raise InputError(f"The transformer takes CLIP features of width {dit.clip_dim}, but the tower gives {clip.dim}")
    if dit and vae and dit.latent_channels != vae.z_dim:
        raise InputError(f"The transformer takes {dit.latent_channels} latent channels, but the VAE has {vae.z_dim}")
    return ModelConfig(dit=dit, vae=vae, umt5=umt5, clip=clip)


def find_tokenizer(root: Path, umt5_files: tuple[Path, ...], given: Path | None) -> Path:
    """The `tokenizer.json` that was given, or the one with the umT5 encoder. InputError says what is there instead."""
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
                f"{folder} has only spiece.model; the tokenizer is read from tokenizer.json. Put the tokenizer.json of "
                "google/umt5-xxl beside it, or write it with transformers' AutoTokenizer(...).save_pretrained(...)"
            )
    raise InputError(
        f"There is no tokenizer.json in {folders[0]}; put that of google/umt5-xxl there, or name it with --tokenizer"
    )
