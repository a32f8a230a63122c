"""The plan of a conversion: tensors, types and output paths, and whether they may be written.

Matrices get the requested type. Tensors that engines of every precision hold in fp32 (norms, modulation, time
embedding, head) are found from the engine stages and stay fp32. Tensors are written in a fixed order, whatever layout
they come from, and the header contains nothing about the source, so that equal weights give an identical file.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from scail2_rt.engines.folder.store import StoreLayout, TensorShape
from scail2_rt.engines.folder.weights import planned_tensors
from scail2_rt.export.checkpoint.open import Checkpoint
from scail2_rt.export.checkpoint.tensors import TensorSource
from scail2_rt.export.models.config import CLIPConfig, DiTConfig, ModelConfig, UMT5Config
from scail2_rt.export.models.precision import Component
from scail2_rt.export.stages.definitions import stage_definitions
from scail2_rt.export.stages.dit import table_sources
from scail2_rt.kernels.errors import InputError

if TYPE_CHECKING:
    from scail2_rt.export.checkpoint.lora import LoRASpec

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PARTS: dict[Component, str] = {"vae": "vae.safetensors", "umt5": "umt5.safetensors", "clip": "clip.safetensors"}
TOKENIZER = "tokenizer.json"
DISK_MARGIN = 1 << 24


@dataclass(frozen=True, slots=True)
class ConvertRequest:
    """Output and options of a conversion. dtype None: 16-bit matrices keep their type, all others become bf16.
    everything: also the other networks. overwrite: replace an output or unfinished work of another conversion. loras:
    fused into the transformer; lora_partial: use the matching modules of a LoRA that does not fit completely."""

    output: Path
    dtype: str | None = None
    everything: bool = False
    overwrite: bool = False
    loras: "tuple[LoRASpec, ...]" = ()
    lora_partial: bool = False


@dataclass(frozen=True, slots=True)
class Target:
    """One file to write: its layout, and groups of tensors, each one step. loras: fused into `source`."""

    component: Component
    path: Path
    source: TensorSource
    layout: StoreLayout
    groups: dict[str, tuple[str, ...]]
    loras: "tuple[LoRASpec, ...]" = ()

    @property
    def partial(self) -> Path:
        return self.path.with_name(f"{self.path.name}.partial")

    @property
    def journal(self) -> Path:
        return self.path.with_name(f"{self.path.name}.partial.json")

    @property
    def record(self) -> Path:
        return self.path.with_name(f"{self.path.name}.json")


def make_target(checkpoint: Checkpoint, component: Component, path: Path, request: ConvertRequest) -> Target:
    """Plan the file of one component at `path`, with the request's LoRAs fused if it is the transformer."""
    stored = checkpoint.sources[component]
    source, loras = stored, request.loras if component == "dit" else ()
    if loras:
        from scail2_rt.export.checkpoint.lora import apply_loras

        source = apply_loras(stored, loras, request.lora_partial)
    exact = _held_in_fp32(checkpoint.config, component)
    asked = DTYPES[request.dtype] if request.dtype and component == "dit" else None
    tensors, groups = {}, dict[str, tuple[str, ...]]()
    for name in sorted(source.keys(), key=_order):
        dtype = _dtype(component, stored.dtype(name), name in exact, asked)
        tensors[name] = TensorShape(dtype, source.shape(name))
        group = ".".join(name.split(".")[: 2 if name.startswith("blocks.") else 1])
        groups[group] = (*groups.get(group, ()), name)
    layout = StoreLayout.plan(tensors, _metadata(checkpoint.config, component))
    return Target(component, path, source, layout, groups, loras)


def _order(name: str) -> tuple[int, str]:
    """Return a sort key that orders blocks by number, so that equal weights give an identical file from any layout."""
    words = name.split(".")
    return (int(words[1]) if words[0] == "blocks" else -1), name


def _dtype(component: Component, stored: torch.dtype, exact: bool, asked: torch.dtype | None) -> torch.dtype:
    """Return a tensor's type in the file. VAE and CLIP keep theirs: their engines compute in fp16, not bf16."""
    if not stored.is_floating_point or component in ("vae", "clip"):
        return stored
    if exact and asked != torch.float32:
        return stored if stored.itemsize == 2 else torch.float32
    return asked or (stored if stored.itemsize == 2 else torch.bfloat16)


def _held_in_fp32(config: ModelConfig, component: Component) -> set[str]:
    """Return the checkpoint tensors that a bf16 engine folder holds in fp32."""
    alone = ModelConfig(**{component: getattr(config, component)})
    definitions = stage_definitions(alone)
    held = {
        name
        for stage, tensors in planned_tensors(alone, definitions, "bf16").items()
        for parameter, tensor in tensors.items()
        if tensor.dtype == torch.float32 and stage in definitions
        for name in definitions[stage].weights.get(parameter, ())
    }
    return held | (set(table_sources(alone.dit).values()) if alone.dit else set())


def _metadata(config: ModelConfig, component: Component) -> dict[str, str]:
    """Return the metadata that a reader needs because shapes do not determine it."""
    part = getattr(config, component)
    if isinstance(part, DiTConfig):
        settings: dict[str, Any] = {"num_heads": part.heads, "text_len": part.text_len, "eps": part.eps}
    elif isinstance(part, UMT5Config):
        settings = {"max_dist": part.max_distance, "eps": part.eps}
    elif isinstance(part, CLIPConfig):
        settings = {"num_heads": part.heads}
    else:
        return {}
    return {"config": json.dumps(settings)}


def check_places(targets: list[Target], checkpoint: Checkpoint, tokenizer: Path | None, overwrite: bool) -> None:
    """Raise InputError before anything is read if an output is a source, already exists, or lacks disk space."""
    sources = {file.resolve() for file in checkpoint.files}
    fused = {file.resolve() for target in targets for spec in target.loras for file in spec.files}
    folder = targets[0].path.parent
    for target in targets:
        if target.path.resolve() in sources:
            raise InputError(f"the output {target.path} is a file of the checkpoint. Use another -o.")
        if target.path.resolve() in fused:
            raise InputError(f"the output {target.path} is the LoRA file. Use another -o.")
        if target.path.is_dir():
            raise InputError(f"the output {target.path} is a folder. Name a file with -o.")
        known = target.record.is_file() or target.journal.is_file()
        if target.path.exists() and not known and not overwrite:
            raise InputError(f"{target.path} exists. Use --overwrite to replace it, or another -o.")
    if tokenizer is not None and checkpoint.tokenizer is not None:
        searched = [file for file in sources if folder.resolve() in (file.parent, file.parent.parent)]
        if searched:  # opening the folder would find each component twice
            raise InputError(
                f"the components of the checkpoint are already in {folder} ({searched[0].name}, ...), and a folder can "
                "hold each only once. Use an -o in another folder, or leave out --all."
            )
        other = tokenizer.exists() and tokenizer.read_bytes() != checkpoint.tokenizer.read_bytes()
        if other and not overwrite:
            raise InputError(f"{tokenizer} exists and is another tokenizer. Use --overwrite, or another -o.")
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{targets[0].path.parent} cannot be made: {folder} is not writable. Use another -o.")
    there = [file for target in targets for file in (target.partial, target.path) if file.is_file()]
    needed = sum(target.layout.size for target in targets) + DISK_MARGIN
    needed -= sum(file.stat().st_blocks * 512 for file in there if file.suffix == ".partial" or not overwrite)
    if (free := shutil.disk_usage(folder).free) < needed:
        raise InputError(
            f"{needed / 2**30:.2f} GiB are needed on the disk of {folder}, which has {free / 2**30:.2f} GiB free. "
            "Free some space or use another -o."
        )
