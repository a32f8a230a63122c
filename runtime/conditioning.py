"""What a generation is conditioned on, encoded once: prompts, CLIP features, reference latents and their masks.

A prompt whose encoding is in the cache on disk never loads the text encoder. Encoders leave memory when they are done.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scail2_rt.engines.executors import EngineSet
from scail2_rt.export.umt5 import relative_buckets
from scail2_rt.runtime.masks import mask_latents
from scail2_rt.runtime.media import load_image, load_mask_image
from scail2_rt.runtime.preprocess import clip_pixels, normalise_image, resize_cover
from scail2_rt.runtime.text import PromptCache, Tokenizer, clean_prompt
from scail2_rt.runtime.vae import encode_clip


@dataclass(frozen=True, slots=True)
class Conditions:
    """contexts: text encodings [n, text_dim], one a guidance pass (positive first); clip [257, clip_dim];
    reference [16, 1, h, w]; reference_mask [28, 1, h, w]; additional_refs [16, N, h, w];
    additional_masks [28, N, h, w]."""

    contexts: tuple[Tensor, ...]
    clip: Tensor
    reference: Tensor
    reference_mask: Tensor
    additional_refs: Tensor
    additional_masks: Tensor


def encode_prompts(engines: EngineSet, prompts: Sequence[str], cache: PromptCache | None) -> tuple[Tensor, ...]:
    """Each prompt, cleaned → fp32 [n ≤ 512, text_dim] on the CPU, its true length."""
    assert engines.config.umt5 is not None
    encodings = []
    for prompt in map(clean_prompt, prompts):
        encoding = cache.load(prompt) if cache else None
        if encoding is None:
            tokenizer = Tokenizer(engines.tokenizer_path, engines.config.umt5.vocab)
            encoding = encode_ids(engines, tokenizer.encode(prompt)).cpu()
            if cache:
                cache.store(prompt, encoding)
        encodings.append(encoding)
    engines.release("umt5.")
    return tuple(encodings)


def encode_ids(engines: EngineSet, ids: Sequence[int]) -> Tensor:
    """umT5 over one prompt's token ids, without padding: the encoder masks padding, so it changes nothing."""
    config = engines.config.umt5
    assert config is not None
    x = engines.embedding_rows(torch.tensor(ids)).to(engines.device, torch.float32)
    buckets = relative_buckets(len(ids), config.buckets, config.max_distance).to(engines.device)
    mask = torch.ones(len(ids), device=engines.device)
    for i in range(config.layers):
        (x,) = engines.run(f"umt5.layers.{i}", x, buckets, mask)
    (encoding,) = engines.run("umt5.final", x)
    return encoding.float()


def clip_features(engines: EngineSet, image: Tensor) -> Tensor:
    """Resized reference image [3, H, W] in -1..1 → fp32 [257, clip_dim]."""
    assert engines.config.clip is not None
    pixels = clip_pixels(image, engines.config.clip.image_size)
    (features,) = engines.run("clip", pixels.to(engines.device, engines.compute_dtype("clip")))
    engines.release("clip")
    return features.float()


def load_reference(image: Path, mask: Path, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Image and mask files → fp32 [3, H, W] each: scaled to -1..1, then resized to cover and cropped."""

    def prepared(pixels: np.ndarray) -> Tensor:
        channels_first = torch.from_numpy(pixels).permute(2, 0, 1)
        return resize_cover(normalise_image(channels_first)[None], height, width)[0]

    return prepared(load_image(image)), prepared(load_mask_image(mask))


def encode_reference(engines: EngineSet, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Image and mask [3, H, W] in -1..1 → latent [16, 1, h, w], mask latent [28, 1, h, w]."""
    latent = encode_clip(engines, image[:, None])
    return latent, mask_latents(mask[None]).to(latent.device)


def encode_references(
    engines: EngineSet, references: Sequence[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(image, mask) pairs, the primary first → reference, reference_mask, additional_refs, additional_masks."""
    pairs = [encode_reference(engines, image, mask) for image, mask in references]
    latents, masks = (torch.cat(tensors, dim=1) for tensors in zip(*pairs, strict=True))
    return latents[:, :1], masks[:, :1], latents[:, 1:], masks[:, 1:]
