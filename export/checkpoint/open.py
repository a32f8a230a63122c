"""Opens a SCAIL-2 checkpoint in any layout that users have and gives every network's tensors under their Wan names.

Two layouts: the official folder (SAT keys in `model/<latest>/*.pt`, the others under their own names), and Wan-key
weights (one file or shards, with or without a prefix, fp8 with scales too) with the VAE, umT5 and CLIP beside them,
these also under Hugging Face's names. What a file is, its tensor names decide, not its file name: every weights file of
the folder is opened (mapped, not read) and recognised. Sizes are derived from shapes and every tensor is checked here,
before anything is converted. Fused SAT tensors are cut by views, so nothing is read until a tensor is asked for.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

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
from scail2_rt.export.checkpoint.quantised import plain_weights
from scail2_rt.export.checkpoint.recognise import recognise
from scail2_rt.export.checkpoint.tensors import Rows, TensorSource, View, open_safetensors, open_weights, shapes_of
from scail2_rt.export.models.config import ModelConfig
from scail2_rt.export.models.precision import Component
from scail2_rt.kernels.errors import InputError

COMPONENTS: tuple[Component, ...] = ("dit", "vae", "umt5", "clip")
LABELS: dict[Component, str] = {"dit": "transformer", "vae": "VAE", "umt5": "umT5 encoder", "clip": "CLIP tower"}
_OFFICIAL_PLACE: dict[Component, str] = {
    "dit": "model/1/fsdp2_rank_0000_checkpoint.pt (with model/latest holding 1)",
    "vae": "Wan2.1_VAE.pth",
    "umt5": "umt5-xxl/models_t5_umt5-xxl-enc-bf16.pth",
    "clip": "models_clip_open-clip-xlm-roberta-large-vit-huge-14-onlyvisual.pth",
}
_SUFFIXES = (".safetensors", ".pth", ".pt")
_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.safetensors")
_CLIP_UNUSED = ("log_scale", "visual.head", "visual.post_norm.weight", "visual.post_norm.bias")
_TOKENIZER_FOLDERS = ("umt5-xxl", "google/umt5-xxl", "tokenizer", ".")

Group = tuple[Path, ...]  # one weights file, or the shards of one


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
    root, main = _locate(path)
    sources: dict[Component, TensorSource] = {}
    if main and ("dit" in wanted or path.is_file()):
        component, source = _open_main(path, main)
        if component in wanted:
            sources[component] = source
        if component != "dit" and "dit" in wanted:
            raise InputError(f"{path} holds a {LABELS[component]}; give the file or folder with the transformer")
    for component in wanted:
        if overrides and component in overrides:
            sources[component] = _open_override(component, overrides[component])
    if missing := [component for component in wanted if component not in sources]:
        sources |= _search(path, root, main, missing)
    return root, {component: _configured(component, sources[component], root) for component in wanted}


def _locate(path: Path) -> tuple[Path, Group | None]:
    """The folder to search for the parts, and the files that `path` itself names (None: it is only a folder)."""
    if path.is_file():
        in_official_folder = path.parent.parent.name == "model" and (path.parent.parent / "latest").is_file()
        return (path.parents[2] if in_official_folder else path.parent), group_of(path)
    if (path / "latest").is_file() and path.name == "model":
        path = path.parent
    latest = path / "model" / "latest"
    if not latest.is_file():
        return path, None
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
    return path, (files[0],)


def group_of(path: Path) -> Group:
    """The files of the weights that `path` (a file, an index or a folder with one set of weights) stands for."""
    if path.is_dir():
        groups = _groups_in(path)
        if len(groups) != 1:
            names = ", ".join(group[0].name for group in groups) or "nothing"
            raise InputError(f"{path} must hold one set of weights to be given here (found: {names}); name the file")
        return groups[0]
    if path.name.endswith(".index.json"):
        return _indexed(path)
    if _SHARD.fullmatch(path.name):
        return next(group for group in _groups_in(path.parent) if path in group)
    if path.suffix not in _SUFFIXES:
        raise InputError(f"{path} is no weights file; a {', '.join(_SUFFIXES)} or *.safetensors.index.json is needed")
    return (path,)


def _indexed(index: Path) -> Group:
    """The shards that an index file lists. InputError when the index is damaged or a shard is missing."""
    try:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"The shard index {index} cannot be read ({error}); download it again") from error
    for shard in shards:
        if not (index.parent / shard).is_file():
            raise InputError(f"{index} lists the shard {shard}, which is not beside it; download that file too")
    return tuple(index.parent / shard for shard in shards)


def _groups_in(folder: Path) -> list[Group]:
    """Sets of weights directly in a folder: shards (by index, else by their numbering) count as one."""
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
            raise InputError(f"{folder} has {len(shards)} of the {count} shards of {stem}; download the missing ones")
        groups.append(tuple(shards))
    return groups + [(file,) for file in files if file not in taken]


def open_group(group: Group) -> TensorSource:
    """The tensors of one file or of a set of shards, dequantised where the file has scales."""
    return plain_weights(open_safetensors(group) if len(group) > 1 else open_weights(group[0]))


def _open_main(path: Path, group: Group) -> tuple[Component, TensorSource]:
    source = open_group(group)
    found = recognise(source)
    if found is None:
        names = list(source.keys())
        raise InputError(
            f"{group[0]} holds no SCAIL-2 network: its {len(names)} tensors begin with {', '.join(names[:3])}; "
            "SAT keys (model.diffusion_model.transformer.layers.0...) or Wan keys (blocks.0.self_attn...) are needed"
        )
    return found.component, found.source


def _open_override(component: Component, path: Path) -> TensorSource:
    if not path.exists():
        raise InputError(f"There is no {LABELS[component]} at {path}; give an existing file")
    found = recognise(open_group(group_of(path)))
    if found is None or found.component != component:
        held = f"a {LABELS[found.component]}" if found else "no network of SCAIL-2"
        raise InputError(f"{path} was given as the {LABELS[component]}, but it holds {held}; give another file")
    return found.source


def _search(path: Path, root: Path, main: Group | None, missing: list[Component]) -> dict[Component, TensorSource]:
    """Finds components among the weights in `root` and its subfolders. InputError names what is missing or doubled."""
    found: dict[Component, list[TensorSource]] = {component: [] for component in missing}
    unreadable = []
    for folder in (root, *sorted(entry for entry in root.iterdir() if entry.is_dir() and entry.name[0] != ".")):
        try:
            groups = _groups_in(folder)
        except InputError as error:  # an incomplete set of shards, perhaps of no interest
            unreadable.append(str(error))
            continue
        for group in groups:
            if group == main:
                continue
            try:
                recognised = recognise(open_group(group))
            except InputError as error:
                unreadable.append(str(error))
                continue
            if recognised and recognised.component in found:
                found[recognised.component].append(recognised.source)
    for component, sources in found.items():
        if len(sources) > 1:
            names = ", ".join(str(source.files[0].relative_to(root)) for source in sources)
            raise InputError(f"{root} holds several files with a {LABELS[component]} ({names}); name the one to use")
    if absent := [component for component in missing if not found[component]]:
        raise MissingPart(_absent(path, root, absent, unreadable), tuple(unreadable))
    return {component: sources[0] for component, sources in found.items()}


def _absent(path: Path, root: Path, absent: list[Component], unreadable: list[str]) -> str:
    problems = "".join(f" Not readable: {reason}." for reason in unreadable)
    if "dit" in absent:
        entries = sorted(entry.name + "/" * entry.is_dir() for entry in root.iterdir())
        listed = ", ".join(entries[:8]) + (", ..." if len(entries) > 8 else "") if entries else "nothing"
        return (
            f"{path} is no SCAIL-2 checkpoint: found {listed}; expected the official folder (model/latest and "
            "model/1/fsdp2_rank_0000_checkpoint.pt) or Wan-key weights (*.safetensors with blocks.0.self_attn.q.weight)"
            f".{problems}"
        )
    places = "; ".join(f"the {LABELS[component]} at {root / _OFFICIAL_PLACE[component]}" for component in absent)
    return f"The checkpoint {path} is not complete. Missing: {places} (or name the file of each).{problems}"


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
    raise InputError(f"There is no tokenizer.json in {folders[0]}; put the tokenizer files of google/umt5-xxl there")
