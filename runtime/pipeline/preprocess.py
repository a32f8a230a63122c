"""Conversions between 8-bit pixels and the networks' inputs.

The public pipeline prepares videos and images in two slightly different ways, and this module reproduces both
bit-identically: a video is resized in 8 bits and then normalised; an image is normalised and then resized in float, so
that its bicubic overshoot remains. Functions take and return tensors on one device; nothing here reads files.

Source of the formulas: zai-org/SCAIL-2 `sample_video.py`, and Wan 2.1 `wan/modules/clip.py` for `clip_pixels`; checked
against the golden folders `preprocess` and `clip/preprocess`.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from scail2_rt.runtime.core.geometry import covering_size
from scail2_rt.runtime.core.window import Window

_FRAMES_AT_ONCE = 8  # limits the fp32 copy needed to resize 8-bit frames
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
CLIP_SIZE = 224


def resize_cover(frames: Tensor, height: int, width: int) -> Tensor:
    """Scale frames to cover height × width (bicubic, anti-aliased) and crop the centre.

    frames [T, 3, H, W]: uint8 (the result is rounded half to even and clamped to 8 bits) or float (any range; overshoot
    remains). Returns [T, 3, height, width] of the same type. Frames that already have the size are returned unchanged.
    """
    scaled = covering_size(frames.shape[-2], frames.shape[-1], height, width)
    top, left = (scaled[0] - height) // 2, (scaled[1] - width) // 2
    return _resized(frames, scaled, slice(top, top + height), slice(left, left + width))


def through_window(frames: Tensor, window: Window) -> Tensor:
    """Scale frames [T, 3, H, W] (uint8, or float in -1..1) and place them in the frame by the window; margins black."""
    height, width = window.frame
    if window.way == "official":
        return resize_cover(frames, height, width)
    top, left = max(window.top, 0), max(window.left, 0)
    bottom, right = min(window.top + window.height, height), min(window.left + window.width, width)
    rows, columns = slice(top - window.top, bottom - window.top), slice(left - window.left, right - window.left)
    shown = _resized(frames, (window.height, window.width), rows, columns)
    if shown.shape[-2:] == window.frame:
        return shown
    framed = shown.new_full((*shown.shape[:2], height, width), 0 if shown.dtype == torch.uint8 else -1)
    framed[..., top:bottom, left:right] = shown
    return framed


def _resized(frames: Tensor, scaled: tuple[int, int], rows: slice, columns: slice) -> Tensor:
    """Return these rows and columns of frames [T, 3, H, W] resized to `scaled`, in the same type."""
    if scaled == tuple(frames.shape[-2:]):
        return frames[..., rows, columns]
    parts = []
    for chunk in frames.split(_FRAMES_AT_ONCE):
        wide = F.interpolate(chunk.float(), scaled, mode="bicubic", antialias=True, align_corners=False)
        wide = wide[..., rows, columns]
        parts.append(wide.clamp_(0, 255).round_().to(torch.uint8) if frames.dtype == torch.uint8 else wide)
    return torch.cat(parts).to(frames.dtype)


def normalise_video(frames: Tensor) -> Tensor:
    """Convert uint8 frames to fp32 in -1..1 as for videos: (v - 127.5) / 127.5."""
    return (frames.float() - 127.5).div_(127.5)


def normalise_image(image: Tensor) -> Tensor:
    """Convert a uint8 image to fp32 in -1..1 as for images: v / 255 · 2 - 1 (the last bits differ from a video's)."""
    return (image.float() / 255).mul_(2).sub_(1)


def half_resolution(video: Tensor) -> Tensor:
    """Resize by 0.5, bilinear, without corner alignment: [T, 3, H, W] → [T, 3, H/2, W/2]. H and W are even."""
    return F.interpolate(video, scale_factor=0.5, mode="bilinear", align_corners=False)


def quantise_frames(video: Tensor) -> Tensor:
    """Convert decoded pixels [3, T, H, W] → uint8 [T, H, W, 3]: clamp to -1..1, (x + 1) / 2 · 255, truncate."""
    levels = video.float().clamp(-1, 1).add_(1).div_(2).mul_(255).to(torch.uint8)
    return levels.permute(1, 2, 3, 0).contiguous()


def clip_pixels(image: Tensor, size: int = CLIP_SIZE) -> Tensor:
    """Prepare CLIP's input: [3, H, W] fp32 in -1..1 → [1, 3, size, size], bicubic without anti-aliasing, aspect ratio
    not kept, rescaled to 0..1 and normalised with CLIP's channel mean and deviation."""
    small = F.interpolate(image[None].float(), (size, size), mode="bicubic", align_corners=False)
    mean = torch.tensor(_CLIP_MEAN, device=small.device).view(1, 3, 1, 1)
    std = torch.tensor(_CLIP_STD, device=small.device).view(1, 3, 1, 1)
    return small.mul_(0.5).add_(0.5).sub_(mean).div_(std)
