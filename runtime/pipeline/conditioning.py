"""The conditions of a generation, encoded once: prompts, CLIP features, reference latents and their masks.

If a prompt's encoding is in the disk cache, the text encoder is not loaded. Encoders are released after use.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from scail2_rt.engines.engine_set import EngineSet
from scail2_rt.export.models.umt5 import relative_buckets
from scail2_rt.runtime.core.findings import RGB, ReferenceFit
from scail2_rt.runtime.core.plan import Plan
from scail2_rt.runtime.core.progress import RunProgress
from scail2_rt.runtime.core.request import ImageSource
from scail2_rt.runtime.core.window import Window
from scail2_rt.runtime.masks.framing import place
from scail2_rt.runtime.masks.palette import PALETTE, mask_latents
from scail2_rt.runtime.media.images import load_image, load_mask_image
from scail2_rt.runtime.pipeline.preprocess import clip_pixels, normalise_image, through_window
from scail2_rt.runtime.pipeline.text import PromptCache, Tokenizer, clean_prompt
from scail2_rt.runtime.pipeline.transformer import References
from scail2_rt.runtime.pipeline.vae import encode_clip

BLACK: RGB = PALETTE["black"]
AHEAD = 4  # layers of the text encoder to prefetch beyond the one in use


@dataclass(frozen=True, slots=True, eq=False)
class Conditions:
    """Encoded conditions. contexts: text encodings [n, text_dim], one per guidance pass (positive first); clip
    [257, clip_dim]; references: the latents and masks of the reference images."""

    contexts: tuple[Tensor, ...]
    clip: Tensor
    references: References


def encode_conditions(
    plan: Plan,
    engines: EngineSet,
    progress: RunProgress,
    cache: PromptCache | None = None,
    then: Sequence[str] = (),
) -> Conditions:
    """Encode prompts, CLIP features and references of a request. then: stages that run next; their weights are loaded
    while the references are encoded."""
    request = plan.request
    prompts = [request.prompt, request.negative_prompt][: request.passes]
    with progress.phase("text"):
        contexts = encode_prompts(engines, prompts, cache)
    engines.prefetch(["vae.encode_step", "clip", *then])
    with progress.phase("reference"):
        fits = (plan.fit, *(None for _ in request.extra_refs))  # additional views and close-ups keep their framing
        pictures = [
            load_reference(*pair, window, fit)
            for pair, window, fit in zip(request.references, plan.reference_windows, fits, strict=True)
        ]
        references = encode_references(engines, pictures)
    with progress.phase("clip"):
        clip = clip_features(engines, pictures[0][0])
    return Conditions(contexts, clip, references)


def encode_prompts(engines: EngineSet, prompts: Sequence[str], cache: PromptCache | None) -> tuple[Tensor, ...]:
    """Clean and encode each prompt → fp32 [n, text_dim] on the CPU, n ≤ 512 tokens, without padding."""
    assert engines.config.umt5 is not None
    texts = [clean_prompt(prompt) for prompt in prompts]
    found = {text: cache.load(text) if cache else None for text in texts}
    missing = [text for text, encoding in found.items() if encoding is None]
    if missing:
        tokenizer = Tokenizer(engines.tokenizer_path, engines.config.umt5.vocab)
        encodings = encode_ids(engines, [tokenizer.encode(text) for text in missing])
        for text, rows in zip(missing, encodings, strict=True):
            found[text] = rows.cpu()
            if cache:
                cache.store(text, rows)
    return tuple(encoding for text in texts if (encoding := found[text]) is not None)


def encode_ids(engines: EngineSet, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Run umT5 over each prompt's token ids → [n, text_dim] fp32 each. No padding: the encoder would mask it anyway.

    All prompts pass a layer before its weights are released."""
    config = engines.config.umt5
    assert config is not None
    rows = [engines.embedding_rows(torch.tensor(ids)).to(engines.device, torch.float32) for ids in prompts]
    buckets = [relative_buckets(len(ids), config.buckets, config.max_distance).to(engines.device) for ids in prompts]
    masks = [torch.ones(len(ids), device=engines.device) for ids in prompts]
    for i in range(config.layers):
        engines.prefetch(f"umt5.layers.{j}" for j in range(i, min(i + AHEAD, config.layers)))
        rows = [engines.run(f"umt5.layers.{i}", *inputs)[0] for inputs in zip(rows, buckets, masks, strict=True)]
        engines.release(f"umt5.layers.{i}")
    encodings = [engines.run("umt5.final", x)[0].float() for x in rows]
    engines.release("umt5.")
    return encodings


def clip_features(engines: EngineSet, image: Tensor) -> Tensor:
    """Encode a resized reference image [3, H, W] in -1..1 → fp32 [257, clip_dim]."""
    assert engines.config.clip is not None
    pixels = clip_pixels(image, engines.config.clip.image_size)
    (features,) = engines.run("clip", pixels.to(engines.device, engines.compute_dtype("clip")))
    engines.release("clip")
    return features.float()


def load_reference(
    image: ImageSource, mask: ImageSource, window: Window, fit: ReferenceFit | None = None
) -> tuple[Tensor, Tensor]:
    """Load image and mask → fp32 [3, H, W] each, scaled to -1..1 and placed in the frame by the window or `fit`."""

    def prepared(pixels: np.ndarray, margin: RGB) -> Tensor:
        picture = normalise_image(torch.from_numpy(pixels).permute(2, 0, 1))[None]
        return (place(picture, fit, margin, *window.frame) if fit else through_window(picture, window))[0]

    return prepared(load_image(image), fit.margin if fit else BLACK), prepared(load_mask_image(mask), BLACK)


def encode_reference(engines: EngineSet, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Encode image and mask [3, H, W] in -1..1 → latent [16, 1, h, w], mask latent [28, 1, h, w]."""
    latent = encode_clip(engines, image[:, None])
    return latent, mask_latents(mask[None]).to(latent.device)


def encode_references(engines: EngineSet, references: Sequence[tuple[Tensor, Tensor]]) -> References:
    """Encode (image, mask) pairs [3, H, W] in -1..1, the primary reference first."""
    pairs = [encode_reference(engines, image, mask) for image, mask in references]
    latents, masks = (torch.cat(tensors, dim=1) for tensors in zip(*pairs, strict=True))
    return References(latents[:, :1], masks[:, :1], latents[:, 1:], masks[:, 1:])
