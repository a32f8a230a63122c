"""Metrics against a known correct video ("truth"), one function each. Videos are uint8 [T, H, W, 3]; PSNR in dB.

Masked metrics use only the pixels of a region bool [T, H, W], pooled over all frames. Silhouettes are computed, for
output and truth in the same way: the pixels that differ from the frame without characters. The motion error is
computed from pixels too: the neighbourhood of each true joint is searched for in the output. SSIM: Wang et al. 2004,
section III-B (Gaussian window of 11x11, deviation 1.5, "valid" border). Lab as in `runtime.media.colour`.
"""

import numpy as np
import torch
from torch.nn import functional as F

from scail2_rt.runtime.media.colour import rgb_to_lab

PEAK = 255.0
MOST_DB = 100.0  # PSNR of equal videos, because JSON has no infinity
SSIM_WINDOW, SSIM_DEVIATION = 11, 1.5
SSIM_C1, SSIM_C2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
SEEN = 15.0  # a pixel belongs to a character if its Lab distance from the frame without characters is larger
PATCH, SEARCH = 5, 8  # half widths in pixels: of a joint's neighbourhood, and of the search area
UNLIKE = 0.5  # largest difference of a match, relative to the variance of the neighbourhood
AMBIGUOUS = 0.15  # a joint is skipped if the truth matches elsewhere with a smaller difference
APART = 2  # pixels; nearer matches count as the same place
FLAT = 2.0  # levels; a neighbourhood with a smaller deviation contains only noise


def psnr(output: np.ndarray, truth: np.ndarray, region: np.ndarray | None = None) -> float:
    """PSNR in dB over all pixels, or those of `region` bool [T, H, W]; nan for an empty region."""
    squared = (output.astype(np.float32) - truth.astype(np.float32)) ** 2
    chosen = squared if region is None else squared[region]
    if not chosen.size:
        return float("nan")
    error = float(chosen.mean(dtype=np.float64))
    return MOST_DB if error == 0 else min(MOST_DB, 10 * float(np.log10(PEAK**2 / error)))


def frame_psnr(output: np.ndarray, truth: np.ndarray, region: np.ndarray) -> np.ndarray:
    """Masked PSNR per frame [T], in dB: shows the growth of the error over a long clip."""
    return np.array([psnr(*(video[t : t + 1] for video in (output, truth, region))) for t in range(len(truth))])


def ssim(output: np.ndarray, truth: np.ndarray) -> float:
    """SSIM, averaged over frames, channels and window positions. Frames must be at least 11 x 11 pixels."""
    positions = torch.arange(SSIM_WINDOW, dtype=torch.float64) - SSIM_WINDOW // 2
    bell = torch.exp(-(positions**2) / (2 * SSIM_DEVIATION**2))
    bell = bell / bell.sum()

    def smooth(images: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.conv2d(images, bell[None, None, :, None]), bell[None, None, None])

    total = 0.0
    for pair in zip(output, truth, strict=True):
        x, y = (torch.from_numpy(np.ascontiguousarray(frame)).double().permute(2, 0, 1)[:, None] for frame in pair)
        mean_x, mean_y = smooth(x), smooth(y)
        variances = smooth(x * x) - mean_x**2 + smooth(y * y) - mean_y**2
        covariance = smooth(x * y) - mean_x * mean_y
        likeness = (2 * mean_x * mean_y + SSIM_C1) * (2 * covariance + SSIM_C2)
        total += float((likeness / ((mean_x**2 + mean_y**2 + SSIM_C1) * (variances + SSIM_C2))).mean())
    return total / len(truth)


def lab(pixels: np.ndarray) -> np.ndarray:
    """sRGB uint8 [..., 3] → CIELAB fp32 [..., 3]."""
    colours = torch.from_numpy(np.moveaxis(pixels, -1, 0).astype(np.float32) / PEAK)
    return np.moveaxis(rgb_to_lab(colours).numpy(), 0, -1)


def colour_error(output: np.ndarray, truth: np.ndarray, region: np.ndarray) -> float:
    """Mean Lab distance over the region's pixels (about 2 is just visible); nan for an empty region."""
    if not region.any():
        return float("nan")
    return float(np.linalg.norm(lab(output[region]) - lab(truth[region]), axis=-1).mean())


def frame_colour(output: np.ndarray, truth: np.ndarray, region: np.ndarray) -> np.ndarray:
    """`colour_error` per frame [T]."""
    return np.array([colour_error(*(video[t : t + 1] for video in (output, truth, region))) for t in range(len(truth))])


def silhouette(video: np.ndarray, bare: np.ndarray) -> np.ndarray:
    """The pixels, bool [T, H, W], that differ from `bare`, the same frames without characters."""
    return np.linalg.norm(lab(video) - lab(bare), axis=-1) > SEEN


def shape_error(found: np.ndarray, true: np.ndarray) -> float:
    """1 - intersection over union of two silhouettes, pooled over all frames; 0 if both are empty."""
    union = int((found | true).sum())
    return 1 - int((found & true).sum()) / union if union else 0.0


def motion_error(output: np.ndarray, truth: np.ndarray, joints: np.ndarray) -> float:
    """Mean distance in pixels between the true joints [T, J, 2] (x, y in pixels) and the best matches of their
    neighbourhoods in the output.

    A neighbourhood is compared without its mean colour. Without a match within `SEARCH` pixels the distance is
    `SEARCH`, so that blank or garbled output gets a high error. Joints outside the picture are skipped, as are joints
    whose position is ambiguous in the truth: flat neighbourhoods, and limbs that look the same a few pixels away. nan
    if no joint remains."""
    height, width = truth.shape[1:3]
    points = np.round(joints).astype(int)
    inside = ((points >= 0) & (points < (width, height))).all(-1)
    frames, _ = np.nonzero(inside)
    if not len(frames):
        return float("nan")
    searched, own = (_areas(video, frames, points[inside]) for video in (output, truth))
    wanted = own[..., SEARCH:-SEARCH, SEARCH:-SEARCH]
    wanted = wanted - wanted.mean((-2, -1), keepdim=True)
    offsets = torch.arange(-SEARCH, SEARCH + 1)
    distance = torch.hypot(offsets[:, None].float(), offsets[None].float()).flatten()
    told = _unlikeness(own, wanted)[:, distance > APART].amin(1) > AMBIGUOUS
    if not told.any():
        return float("nan")
    least, place = _unlikeness(searched[told], wanted[told]).min(1)
    errors = torch.where(least <= UNLIKE, distance[place].clamp(max=SEARCH), float(SEARCH))
    return float(errors.mean())


def _areas(video: np.ndarray, frames: np.ndarray, points: np.ndarray) -> torch.Tensor:
    """The search area around each point (x, y) of a frame: fp32 [N, 3, A, A]. Border pixels are repeated outside."""
    reach = PATCH + SEARCH
    padded = np.pad(video, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode="edge")
    size = 2 * reach + 1
    cut = [padded[t, y : y + size, x : x + size] for t, (x, y) in zip(frames, points, strict=True)]
    return torch.from_numpy(np.stack(cut)).permute(0, 3, 1, 2).float() - PEAK / 2


def _unlikeness(areas: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The difference between a patch and every place of a search area, both without their means: sum of squared
    differences over the energy of the patch. areas [N, 3, A, A], wanted [N, 3, P, P] → [N, places]. For a flat patch
    all differences are 0."""
    count, channels, size, _ = wanted.shape
    energy = wanted.pow(2).sum((1, 2, 3))
    mean, square = (F.avg_pool2d(values, size, 1) for values in (areas, areas**2))
    varies = ((square - mean**2) * size**2).sum(1).clamp(min=0)
    common = F.conv2d(areas.reshape(1, count * channels, *areas.shape[2:]), wanted, groups=count)[0]
    differences = (varies - 2 * common + energy[:, None, None]).clamp(min=0) / energy.clamp(min=1)[:, None, None]
    flat = energy < wanted[0].numel() * FLAT**2
    return torch.where(flat[:, None, None], torch.zeros(()), differences).flatten(1)


def seam_error(output: np.ndarray, truth: np.ndarray, joins: tuple[int, ...]) -> tuple[float, float]:
    """(at the joins, elsewhere): mean absolute difference, in levels, between the frame-to-frame change of the output
    and that of the truth. joins: the first frame of each segment except the first segment."""
    changes = [np.diff(video.astype(np.float32), axis=0) for video in (output, truth)]
    missed = np.abs(changes[0] - changes[1]).mean((1, 2, 3))
    at_join = np.zeros(len(missed), bool)
    at_join[[join - 1 for join in joins]] = True
    return float(missed[at_join].mean()), float(missed[~at_join].mean())
