"""A small checkpoint for everybody: seeded random weights in the official folder layout.

It allows running and testing everything after the download: the SAT file with its fused tensors, the VAE, umT5 and CLIP
pickles under their official names, and a real tokenizer file that encodes any text. Weights are scaled by their fan-in,
norms are near one and modulations small, so that signals neither vanish nor explode. Each tensor's seed depends on its
name, so that a preset can grow without changing existing tensors. `wide` makes a SAT file of several gigabytes whose
large matrices are zero below their first row: a sparse file, written in a second.
"""

import math
import shutil
import tempfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scail2_rt.export.checkpoint.derive import clip_shapes, dit_shapes, umt5_shapes, vae_shapes
from scail2_rt.export.checkpoint.sat_names import SAT_PREFIX, wan_to_sat
from scail2_rt.export.checkpoint.tensors import open_torch
from scail2_rt.export.models.config import CLIPConfig, DiTConfig, UMT5Config, VAEConfig
from scail2_rt.kernels.errors import InputError, Scail2Error

SAT_FILE = "model/1/fsdp2_rank_0000_checkpoint.pt"
VAE_FILE = "Wan2.1_VAE.pth"
UMT5_FILE = "umt5-xxl/models_t5_umt5-xxl-enc-bf16.pth"
CLIP_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14-onlyvisual.pth"
TOKENIZER_FILE = "umt5-xxl/tokenizer.json"
_SMALL = 1_000_000  # elements; a larger tensor of a sparse preset is zero below its first row
CLIP_OUT_DIM = 64
_WORDS = """
a an and are at background before black blue boy camera character city clothes dance dances dancing day dog dress face
fast forest from girl green hair hand hands hat he her his in into is it jacket jump jumps light long man moves music of
on person red robot room run runs she shirt short sitting slow smile smiles standing street style sun the their they to
turns video walk walking walks wall waves wearing white with woman yellow
"""
_ENDINGS = "ing ed er es ly th ch sh ou ea ar or an in on re st"

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Preset:
    """Sizes of a checkpoint. `sparse`: large transformer matrices are zero below their first row."""

    dit: DiTConfig
    vae: VAEConfig
    umt5: UMT5Config
    clip: CLIPConfig
    sparse: bool = False


_TINY = Preset(
    dit=DiTConfig(dim=256, heads=2, layers=2, ffn_dim=512, text_dim=64, clip_dim=160),
    vae=VAEConfig(dim=6),
    umt5=UMT5Config(vocab=768, dim=64, attn_dim=64, ffn_dim=128, heads=4, layers=2),
    clip=CLIPConfig(image_size=224, patch=14, dim=160, heads=2, layers=3, mlp_dim=320),
)
PRESETS: dict[str, Preset] = {
    "tiny": _TINY,
    # 3.6 GB of fp32; the largest fused tensor has 0.2 GB (the official checkpoint: 65.6 GB and 0.3 GB)
    "wide": Preset(
        dit=DiTConfig(dim=4096, heads=32, layers=3, ffn_dim=11264, text_dim=64, clip_dim=160),
        vae=_TINY.vae,
        umt5=_TINY.umt5,
        clip=_TINY.clip,
        sparse=True,
    ),
}


def make_checkpoint(directory: Path | str, preset: str | Preset = "tiny", seed: int = 0) -> None:
    """Write a checkpoint of random weights in the official folder layout; `directory` appears when it is complete.

    Raises InputError for an unknown preset, or a `directory` that is not empty; Scail2Error if it cannot be written.
    """
    directory = Path(directory)
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise InputError(f"There is no preset {preset!r}. Choose one of {', '.join(PRESETS)}.")
        preset = PRESETS[preset]
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"{directory} exists and is not an empty folder. Give a new name, or remove it first.")
    partial: Path | None = None
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
        _write(partial, preset, seed)
        partial.chmod(0o755)  # mkdtemp allows only the owner
        partial.replace(directory)  # may replace an empty folder
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        raise Scail2Error(
            f"The checkpoint {directory} cannot be written ({error}). Check space and permissions."
        ) from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def _write(folder: Path, preset: Preset, seed: int) -> None:
    for file in (SAT_FILE, UMT5_FILE):
        (folder / file).parent.mkdir(parents=True)
    (folder / "model/latest").write_text("1")
    if preset.sparse:
        _write_sparse_sat(folder / SAT_FILE, dit_shapes(preset.dit), seed)
    else:
        torch.save({"module": sat_module(_weights("dit", dit_shapes(preset.dit), seed))}, folder / SAT_FILE)
    torch.save(_weights("vae", vae_shapes(preset.vae), seed), folder / VAE_FILE)
    umt5 = _weights("umt5", umt5_shapes(preset.umt5), seed)
    torch.save({name: tensor.bfloat16() for name, tensor in umt5.items()}, folder / UMT5_FILE)
    clip = _weights("clip", clip_shapes(preset.clip, CLIP_OUT_DIM), seed)
    torch.save({name: tensor.half() for name, tensor in clip.items()}, folder / CLIP_FILE)
    write_tokenizer(folder / TOKENIZER_FILE, preset.umt5.vocab)


def sat_module(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a transformer's tensors under their SAT names, with fused tensors stacked."""
    return {
        SAT_PREFIX + sat: torch.cat([tensors[part] for part in parts])
        for sat, parts in wan_to_sat(set(tensors)).items()
    }


def _write_sparse_sat(path: Path, shapes: Mapping[str, Shape], seed: int) -> None:
    """Write a SAT file in which only the first row of a large matrix is written: the rest is a hole in the file, which
    reads as zero and uses neither disk space nor memory."""
    stacks = wan_to_sat(set(shapes))
    module = {}
    for sat, parts in stacks.items():
        rows, *rest = shapes[parts[0]]
        module[SAT_PREFIX + sat] = torch.empty(len(parts) * rows, *rest)  # never touched, so no memory
    with torch.serialization.skip_data():
        torch.save({"module": module}, path)
    stored = open_torch(path)
    with path.open("r+b") as file:
        for sat, parts in stacks.items():
            offset = stored.place(SAT_PREFIX + sat).offset
            for part in parts:
                shape = shapes[part]
                written = shape if math.prod(shape) <= _SMALL else (1, *shape[1:])
                file.seek(offset)
                file.write(random_tensor("dit", part, written, seed).numpy().tobytes())
                offset += math.prod(shape) * torch.float32.itemsize


def _weights(component: str, shapes: Mapping[str, Shape], seed: int) -> dict[str, Tensor]:
    return {name: random_tensor(component, name, shape, seed) for name, shape in shapes.items()}


def random_tensor(component: str, name: str, shape: Shape, seed: int) -> Tensor:
    """Return fp32 weights of one tensor, the same on every machine for a name, shape and seed."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{component}/{name}".encode()))
    mean, deviation = distribution(component, name, shape)
    return torch.randn(shape, generator=generator) * deviation + mean


def distribution(component: str, name: str, shape: Shape) -> tuple[float, float]:
    """Return mean and standard deviation: fan-in scaling for matrices, with exceptions for each network."""
    if name == "log_scale":
        return math.log(1 / 0.07), 0.0
    if name.endswith(".gamma") or (name.endswith(".weight") and len(shape) == 1):
        return 1.0, 0.05  # norms
    if name.endswith(".bias"):
        return 0.0, 0.02
    if name.endswith("modulation"):
        return 0.0, 0.1
    if "embedding" in name and component in ("umt5", "clip") and "patch" not in name:
        return 0.0, 0.5
    fan_in = shape[0] if name == "visual.head" else math.prod(shape[1:])
    if component == "umt5" and ".attn.q." in name:
        return 0.0, 1 / math.sqrt(fan_in * 16)  # umT5 does not scale its scores
    if component == "vae" and ".residual." in name:
        return 0.0, math.sqrt(2 / fan_in)  # after SiLU
    if name == "decoder.head.2.weight":
        return 0.0, 0.5 / math.sqrt(fan_in)  # most pixels within -1..1
    return 0.0, 1 / math.sqrt(fan_in)


def write_tokenizer(path: Path, vocab: int) -> None:
    """Write a SentencePiece-style Unigram tokenizer with fewer than `vocab` ids: `<pad>` 0, `</s>` 1 (appended),
    `<unk>` 2, all bytes (so that any text can be encoded), characters and common words. Raises ValueError if vocab is
    small."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    pieces: list[tuple[str, float]] = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    pieces += [("▁", -4.0)] + [(chr(code), -8.0) for code in range(33, 127)]
    pieces += [(f"▁{word}", -6.0 - 0.01 * i) for i, word in enumerate(_WORDS.split())]
    pieces += [(ending, -7.0) for ending in _ENDINGS.split()]
    if len(pieces) > vocab:
        raise ValueError(f"vocab {vocab} is below the {len(pieces)} pieces of the tokenizer")
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=True))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    make: Callable[..., Any] = processors.TemplateProcessing
    tokenizer.post_processor = make(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.save(str(path))
