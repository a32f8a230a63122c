"""The data set of the transformer: cases encoded once, as in the pipeline, and kept on the device.

All tensors are prepared as in the runtime (half-size driving clip, colour masks as 28 channels, CLIP pixels, padded
text), but batched. Samples of one layout (mode, number of references) form a group, because a batch has one layout.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from scail2_rt.benchmarks.sprites.training.drawing import draw_pictures, paint
from scail2_rt.benchmarks.sprites.training.model import UMT5, make_encoders
from scail2_rt.benchmarks.sprites.training.networks import ClipVAE
from scail2_rt.benchmarks.sprites.world.cases import Scene, View
from scail2_rt.export.models.dit import DiTInputs
from scail2_rt.runtime.masks.palette import COLOURS, ON_ABOVE
from scail2_rt.runtime.pipeline.preprocess import clip_pixels, half_resolution, normalise_image, normalise_video
from scail2_rt.runtime.pipeline.text import Tokenizer, clean_prompt

# group → task → relative number of cases; the cases of a group have one layout
GROUPS = {
    "single": {"animate": 20, "pose": 11, "mesh": 10, "animal": 13},
    "several": {"two": 12, "three": 5},
    "replace": {"replace": 15},
    "extra": {"extra": 14},
}
TEXT_ROWS = 96  # tokens of a prompt; longer ones are cut
FRAMES_AT_ONCE = 1056  # 32 cases of 33 frames
NEW_CASES = 10_000_000  # the transformer is not trained on cases from this number on
STORED = torch.bfloat16


@dataclass(frozen=True, slots=True)
class Samples:
    """N encoded cases of one layout.

    latent   the correct output [N, 16, F, h, w]
    weight   share of character pixels per latent cell [N, F, h, w]
    reference, reference_mask, driving, driving_mask, extra, extra_mask   as in `DiTInputs`, batched
    clip     CLIP features [N, 257, C]
    text     [N, rows, C], zeros after the end of a prompt"""

    latent: Tensor
    weight: Tensor
    reference: Tensor
    reference_mask: Tensor
    driving: Tensor
    driving_mask: Tensor
    extra: Tensor
    extra_mask: Tensor
    clip: Tensor
    text: Tensor

    def __len__(self) -> int:
        return len(self.latent)

    def take(self, index: Tensor) -> "Samples":
        """The samples with these indices, in fp32."""
        return Samples(*(getattr(self, f.name)[index].float() for f in fields(self)))

    @classmethod
    def join(cls, parts: Sequence["Samples"]) -> "Samples":
        """Concatenate samples of one layout."""
        return cls(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(cls)))

    def recoloured(self, order: Tensor) -> "Samples":
        """The same cases with permuted character colours, in all masks of a case. order [N, 6]: per case a permutation
        of 0 to 5."""
        planes = torch.cat([torch.zeros_like(order[:, :1]), 1 + order], 1)  # white stays
        channels = (len(COLOURS) * torch.arange(4, device=order.device)[:, None] + planes[:, None]).flatten(1)

        def change(mask: Tensor) -> Tensor:
            return mask.gather(1, channels[..., None, None, None].expand_as(mask))

        masks = (self.reference_mask, self.driving_mask, self.extra_mask)
        reference_mask, driving_mask, extra_mask = (change(mask) for mask in masks)
        return replace(self, reference_mask=reference_mask, driving_mask=driving_mask, extra_mask=extra_mask)

    def inputs(self, latent: Tensor, history_mask: Tensor, text: Tensor, replace: bool) -> DiTInputs:
        """The inputs of the transformer for noisy latents [N, 16, F, h, w]."""
        frames = latent.shape[2]
        zeros = self.reference_mask.new_zeros(1).expand(len(latent), 28, frames, *latent.shape[-2:])
        return DiTInputs(
            latent,
            self.driving,
            self.reference,
            torch.cat([self.reference_mask, zeros], dim=2),
            self.driving_mask,
            text,
            self.clip,
            history_mask,
            self.extra if self.extra.shape[2] else None,
            self.extra_mask if self.extra.shape[2] else None,
            replace,
        )


class Encoding:
    """The encoders; draws and encodes scenes."""

    def __init__(self, vae: ClipVAE, tokenizer_file: Path, device: torch.device) -> None:
        self.vae, self.device = vae.to(device).eval(), device
        self.umt5, self.clip = (encoder.to(device) for encoder in make_encoders())
        self.tokenizer = Tokenizer(tokenizer_file, UMT5.vocab)

    @torch.no_grad()
    def samples(self, scenes: Sequence[Scene]) -> Samples:
        """Draw and encode scenes of one layout; the tensors are bf16."""
        truth, labels = draw_pictures([scene.truth for scene in scenes], self.device)
        driving, driving_mask = self._view([scene.driving for scene in scenes])
        reference, reference_mask = self._view([scene.reference for scene in scenes])
        pixels = normalise_image(reference)
        extras = [self._reference(*self._view(views)) for views in zip(*(s.extras for s in scenes), strict=True)]
        latent, mask = self._reference(reference, reference_mask)
        count, _, _, h, w = latent.shape
        extra, extra_mask = (
            (torch.cat([e[i] for e in extras], 2) for i in range(2))
            if extras
            else (latent.new_zeros(count, 16, 0, h, w), latent.new_zeros(count, 28, 0, h, w))
        )
        halved, halved_mask = (
            half_resolution(normalise_video(x).flatten(0, 1)).unflatten(0, x.shape[:2]) for x in (driving, driving_mask)
        )
        found = Samples(
            self._latent(normalise_video(truth)),
            coverage((labels > 0).float()[:, :, None]).mean(1),
            latent,
            mask,
            self._latent(halved),
            mask_channels(halved_mask),
            extra,
            extra_mask,
            self.clip(torch.cat([clip_pixels(image[0]) for image in pixels])),
            self.text([scene.prompt for scene in scenes]),
        )
        return Samples(*(getattr(found, f.name).to(STORED) for f in fields(Samples)))

    @torch.no_grad()
    def text(self, prompts: Sequence[str]) -> Tensor:
        """Encode prompts → [N, TEXT_ROWS, C], zeros after the end of each prompt."""
        ids = [torch.tensor(self.tokenizer.encode(clean_prompt(prompt))) for prompt in prompts]
        lengths = torch.tensor([len(each) for each in ids])
        mask = torch.arange(max(int(lengths.max()), TEXT_ROWS)) < lengths[:, None]
        padded = torch.stack([F.pad(each, (0, mask.shape[1] - len(each))) for each in ids])
        return self.umt5(padded.to(self.device), mask.long().to(self.device))[:, :TEXT_ROWS]

    def _view(self, views: Sequence[View]) -> tuple[Tensor, Tensor]:
        """Draw views → image and mask image, both uint8 [N, T, 3, H, W]."""
        image, labels = draw_pictures([view.picture for view in views], self.device)
        return image, paint(labels, [view.colours for view in views])

    def _reference(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Encode pictures of one frame → latent [N, 16, 1, h, w], mask channels [N, 28, 1, h, w]."""
        return self._latent(normalise_image(image)), mask_channels(normalise_image(mask))

    def _latent(self, video: Tensor) -> Tensor:
        """Encode video [N, T, 3, H, W] in -1..1 → [N, 16, F, h, w]."""
        clips = video.split(max(FRAMES_AT_ONCE // video.shape[1], 1))
        return torch.cat([self.vae.encode_clip(clip.transpose(1, 2)) for clip in clips])


def mask_channels(mask: Tensor) -> Tensor:
    """Batched `runtime.masks.palette.mask_latents`: [N, T, 3, H, W] in -1..1 → [N, 28, F, h, w]."""
    on = mask > float(torch.tensor((ON_ABOVE - 127.5) / 127.5, dtype=torch.float32))
    table = torch.tensor(list(COLOURS.values()), device=mask.device).bool()
    planes = (on[:, :, None] == table[:, :, None, None]).all(3).float()  # [N, T, 7, H, W]
    return coverage(planes)


def coverage(planes: Tensor) -> Tensor:
    """Planes [N, T, P, H, W] → means over latent cells [N, 4·P, F, h, w]; channels are ordered by frame of the group,
    then by plane."""
    count, frames = planes.shape[:2]
    pooled = F.avg_pool2d(planes.flatten(0, 1), 8).unflatten(0, (count, frames))
    pooled = torch.cat([pooled[:, :1].expand(-1, 3, -1, -1, -1), pooled], dim=1)
    return pooled.unflatten(1, (-1, 4)).permute(0, 2, 3, 1, 4, 5).flatten(1, 2)


def group_requests(group: str, seeds: range) -> list[tuple[str, range]]:
    """(task, seeds) for the tasks of a group. `len(seeds)` cases are distributed over all groups as in `GROUPS`; each
    task gets the first seeds."""
    total = sum(sum(tasks.values()) for tasks in GROUPS.values())
    return [(task, seeds[: max(len(seeds) * part // total, 1)]) for task, part in GROUPS[group].items()]
