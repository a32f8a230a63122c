"""The small SCAIL-2 of the sprite world: its sizes, its initial weights, and writing it in the official layout.

Text encoder and CLIP tower keep their seeded random weights, because random features are sufficient here.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from scail2_rt.benchmarks.sprites.training.networks import ClipVAE
from scail2_rt.export.checkpoint.derive import clip_shapes, dit_shapes, umt5_shapes, vae_shapes
from scail2_rt.export.checkpoint.open import open_checkpoint
from scail2_rt.export.checkpoint.random_checkpoint import (
    CLIP_FILE,
    CLIP_OUT_DIM,
    SAT_FILE,
    TOKENIZER_FILE,
    UMT5_FILE,
    VAE_FILE,
    random_tensor,
    sat_module,
    write_tokenizer,
)
from scail2_rt.export.checkpoint.tensors import shapes_of
from scail2_rt.export.models.clip import CLIPVisual, unused
from scail2_rt.export.models.config import CLIPConfig, DiTConfig, UMT5Config, VAEConfig
from scail2_rt.export.models.dit import DiT
from scail2_rt.export.models.precision import Component, Numerics
from scail2_rt.export.models.umt5 import UMT5Encoder
from scail2_rt.kernels.errors import InputError

DIT = DiTConfig(dim=192, heads=3, layers=9, ffn_dim=512, text_dim=64, clip_dim=80)
VAE_SIZES = VAEConfig(dim=16)
UMT5 = UMT5Config(vocab=768, dim=64, attn_dim=64, ffn_dim=128, heads=4, layers=2)
CLIP = CLIPConfig(image_size=224, patch=14, dim=80, heads=1, layers=3, mlp_dim=160)
SEED = 0
PARTS: tuple[Component, ...] = ("dit", "vae")  # the trained components
Weights = dict[str, Tensor]


def initial(component: str, shapes: Mapping[str, tuple[int, ...]]) -> Weights:
    """Seeded random weights, scaled so that residual branches are small and the velocity is 0 initially."""
    weights = {name: random_tensor(component, name, shape, SEED) for name, shape in shapes.items()}
    for name, tensor in weights.items():
        if component == "vae" and name.endswith("residual.6.weight"):
            tensor *= 0.3
        if component == "dit" and name.startswith("time_projection.1"):
            tensor *= 0.1
        if component == "dit" and name.startswith("head.head"):
            tensor *= 0.0
    return weights


def make_dit(weights: Weights | None = None) -> DiT:
    """The transformer. weights: None for random initial weights."""
    dit = DiT(DIT)
    dit.load_state_dict(initial("dit", dit_shapes(DIT)) if weights is None else weights)
    return dit


def make_vae(weights: Weights | None = None, compute: torch.dtype = torch.float32) -> ClipVAE:
    """A trainable VAE with fp32 weights and convolutions in `compute`. weights: None for random initial weights."""
    vae = ClipVAE(VAE_SIZES, Numerics(torch.float32, compute))
    vae.load_state_dict(initial("vae", vae_shapes(VAE_SIZES)) if weights is None else weights)
    return vae.requires_grad_(True)


def make_encoders() -> tuple[UMT5Encoder, CLIPVisual]:
    """Text encoder and CLIP tower in fp32, with the values of the checkpoint's bf16 and fp16 files."""
    umt5, clip = UMT5Encoder(UMT5), CLIPVisual(CLIP)
    umt5.load_state_dict({name: t.bfloat16().float() for name, t in initial("umt5", umt5_shapes(UMT5)).items()})
    tower = {name: t.half().float() for name, t in initial("clip", clip_shapes(CLIP)).items()}
    clip.load_state_dict({name: t for name, t in tower.items() if not unused(name, CLIP)})
    return umt5.requires_grad_(False).eval(), clip.requires_grad_(False).eval()


def weights_of(directory: Path) -> dict[Component, Weights]:
    """The weights of the trained components of a checkpoint, in fp32. Raises InputError for other sizes or another
    folder."""
    checkpoint = open_checkpoint(directory)
    if (checkpoint.config.dit, checkpoint.config.vae) != (DIT, VAE_SIZES):
        raise InputError(
            f"{directory} is not a sprite checkpoint: its transformer or VAE has other sizes. Give a sprite checkpoint."
        )
    sources = checkpoint.sources
    return {part: {name: sources[part].get(name).float() for name in shapes_of(sources[part])} for part in PARTS}


def digest(weights: Weights) -> str:
    """A hash of weights, over the fp32 values sorted by name; 12 hexadecimal digits."""
    values = b"".join(tensor.float().numpy().tobytes() for _, tensor in sorted(weights.items()))
    return hashlib.sha256(values).hexdigest()[:12]


def write_checkpoint(directory: Path, dit: Weights, vae: Weights) -> None:
    """Write a checkpoint in the official folder layout, transformer and VAE in bf16. The folder is renamed into place
    when it is complete."""
    folder = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    for file in (SAT_FILE, UMT5_FILE):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / "model/latest").write_text("1")
    (folder / "config.json").write_text(json.dumps({"num_heads": DIT.heads}) + "\n")
    torch.save({"module": {name: t.bfloat16() for name, t in sat_module(dit).items()}}, folder / SAT_FILE)
    torch.save({name: t.bfloat16() for name, t in vae.items()}, folder / VAE_FILE)
    umt5 = initial("umt5", umt5_shapes(UMT5))
    torch.save({name: t.bfloat16() for name, t in umt5.items()}, folder / UMT5_FILE)
    clip = initial("clip", clip_shapes(CLIP, CLIP_OUT_DIM))
    torch.save({name: t.half() for name, t in clip.items()}, folder / CLIP_FILE)
    write_tokenizer(folder / TOKENIZER_FILE, UMT5.vocab)
    folder.replace(directory)
