"""Values derived from the size and length of a clip: output size, segments, token layout, FLOP.

No other module counts tokens or frames. This one does not import torch, because `--dry-run` and request checks use it
before anything heavy loads. There are two units of length: T pixel frames and F latent frames, T = 4 (F - 1) + 1. FLOP
counts are two per multiply-add. Those of the transformer are exact for its matrix products. Those of the VAE are
measured on the reference VAE and scaled by the number of pixels.
"""

from dataclasses import dataclass
from itertools import product

from scail2_rt.export.models.config import DiTConfig
from scail2_rt.kernels.errors import InputError, Scail2Error

SIZE_STEP = 32  # VAE ÷8, patch ÷2, driving at half resolution ÷2
SPATIAL_STEP = 8  # pixels per latent
TEMPORAL_STEP = 4  # pixel frames per latent frame, except the first, which holds one
CLIP_TOKENS = 257


def latent_frames(frames: int) -> int:
    """T pixel frames → F latent frames. Raises Scail2Error unless T is 4n+1."""
    if frames < 1 or frames % TEMPORAL_STEP != 1:
        raise Scail2Error(f"A clip of {frames} frames has no latent form: pad it to {padded_length(frames)} frames.")
    return (frames - 1) // TEMPORAL_STEP + 1


def padded_length(frames: int) -> int:
    """The smallest 4n+1 that is at least `frames`."""
    return max(-(-(frames - 1) // TEMPORAL_STEP), 0) * TEMPORAL_STEP + 1


@dataclass(frozen=True, slots=True)
class Layout:
    """Token order of one forward pass: [additional references | reference | video | driving].

    `frames` F, `height` h and `width` w are the latent sizes of the video part. h and w are multiples of 4 because the
    driving part has half of each and a token covers 2×2 latents. Raises Scail2Error for other sizes."""

    frames: int
    height: int
    width: int
    additional_refs: int = 0
    replace: bool = False

    def __post_init__(self) -> None:
        if self.frames < 1 or self.additional_refs < 0:
            raise Scail2Error(
                f"A layout needs at least 1 latent frame and at least 0 additional references, not "
                f"{self.frames} and {self.additional_refs}."
            )
        if min(self.height, self.width) < 4 or self.height % 4 or self.width % 4:
            raise Scail2Error(
                f"A latent of {self.height}x{self.width} cannot be split into tokens: use multiples of 4."
            )

    @classmethod
    def of(cls, frames: int, height: int, width: int, additional_refs: int = 0, replace: bool = False) -> "Layout":
        """Layout of T pixel `frames` (4n+1) of H×W pixels (multiples of 32). Raises InputError for other sizes."""
        check_size(height, width)
        latents = latent_frames(frames)
        return cls(latents, height // SPATIAL_STEP, width // SPATIAL_STEP, additional_refs, replace)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens per video frame: (h/2, w/2)."""
        return self.height // 2, self.width // 2

    @property
    def driving_grid(self) -> tuple[int, int]:
        """Rows and columns of tokens per driving frame: (h/4, w/4)."""
        return self.height // 4, self.width // 4

    @property
    def frame_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def reference_tokens(self) -> int:
        """Number of tokens of the additional references and the reference together."""
        return (self.additional_refs + 1) * self.frame_tokens

    @property
    def video_tokens(self) -> int:
        return self.frames * self.frame_tokens

    @property
    def driving_tokens(self) -> int:
        return self.frames * self.driving_grid[0] * self.driving_grid[1]

    @property
    def tokens(self) -> int:
        """L, the length of the sequence."""
        return self.reference_tokens + self.video_tokens + self.driving_tokens

    @property
    def references(self) -> slice:
        """Rows of the additional references, in the order given, and then of the reference."""
        return slice(0, self.reference_tokens)

    @property
    def video(self) -> slice:
        return slice(self.reference_tokens, self.reference_tokens + self.video_tokens)

    @property
    def driving(self) -> slice:
        return slice(self.reference_tokens + self.video_tokens, self.tokens)


@dataclass(frozen=True, slots=True)
class Segment:
    """One run of the denoising loop, in pixel frames of the driving clip.

    start, valid_end   driving frames start … valid_end - 1 are read
    padded_frames      number of frames computed, 4n+1: the last driving frame is repeated to fill them, and the surplus
                       is dropped from the output
    overlap            number of leading frames that the previous segment has already produced (0 in the first)"""

    start: int
    valid_end: int
    padded_frames: int
    overlap: int

    @property
    def valid_frames(self) -> int:
        """Number of driving frames read, including the overlap."""
        return self.valid_end - self.start

    @property
    def new_frames(self) -> int:
        """Number of frames that this segment adds to the output."""
        return self.valid_frames - self.overlap

    @property
    def padding(self) -> int:
        """How often the last driving frame is repeated."""
        return self.padded_frames - self.valid_frames

    @property
    def latent_frames(self) -> int:
        return latent_frames(self.padded_frames)

    @property
    def history_latents(self) -> int:
        """Number of clean leading latent frames from the previous segment: (overlap - 1) / 4 + 1, or 0 in the first."""
        return latent_frames(self.overlap) if self.overlap else 0


def plan_segments(total: int, length: int = 81, overlap: int = 5) -> tuple[Segment, ...]:
    """Plan segments that produce each of `total` driving frames exactly once.

    Each segment starts `overlap` frames before the end of the previous one. Only the last may be shorter than `length`;
    it is padded to the next 4n+1. Raises InputError unless total > 0, `length` and `overlap` are 4n+1, and
    0 < overlap < length. The official scripts drop an incomplete last segment instead (zai-org/SCAIL-2, `wan-scail2`
    pipeline)."""
    if total <= 0:
        raise InputError(f"There are {total} driving frames to animate: give at least one.")
    _check_segment_lengths(length, overlap)
    segments = [Segment(0, min(total, length), padded_length(min(total, length)), 0)]
    while (end := segments[-1].valid_end) < total:
        start = end - overlap
        valid_end = min(start + length, total)
        segments.append(Segment(start, valid_end, padded_length(valid_end - start), overlap))
    return tuple(segments)


def _check_segment_lengths(length: int, overlap: int) -> None:
    shortest = TEMPORAL_STEP + 1
    if length < shortest or length % TEMPORAL_STEP != 1:
        offers = _nearest(length, shortest, None)
        raise InputError(f"The segment length must be 4n+1 frames and at least {shortest}, not {length}: use {offers}.")
    if overlap <= 0 or overlap >= length:
        offers = _nearest(overlap, 1, length - TEMPORAL_STEP)
        raise InputError(
            f"The segment overlap must be above 0 and below the segment length {length}, not {overlap}: use {offers}."
        )
    if overlap % TEMPORAL_STEP != 1:
        offers = _nearest(overlap, 1, length - TEMPORAL_STEP)
        raise InputError(f"The segment overlap must be 4n+1 frames, not {overlap}: use {offers}.")


def _nearest(value: int, lowest: int, highest: int | None) -> str:
    """The 4n+1 numbers next below (or equal to) and above `value`, within bounds that are 4n+1, as "77 or 81"."""
    below = (value - 1) // TEMPORAL_STEP * TEMPORAL_STEP + 1
    top = max(below + TEMPORAL_STEP, lowest) if highest is None else highest
    clamped = {min(max(candidate, lowest), top) for candidate in (below, below + TEMPORAL_STEP)}
    return " or ".join(str(candidate) for candidate in sorted(clamped))


def oriented(size: tuple[int, int], image_height: int, image_width: int) -> tuple[int, int]:
    """Return `size` (H, W), with its sides swapped if one of `size` and the image is portrait and the other landscape.
    If either is square, nothing is swapped. Source: the orientation rule of the SCAIL-2 Wan branch."""
    height, width = size
    opposed = (height > width and image_height < image_width) or (height < width and image_height > image_width)
    return (width, height) if opposed else size


def check_size(height: int, width: int) -> None:
    """Raise InputError, with the nearest sizes, unless H and W are positive multiples of 32."""
    if min(height, width) >= SIZE_STEP and height % SIZE_STEP == 0 and width % SIZE_STEP == 0:
        return
    choices = [
        {max(side // SIZE_STEP, 1) * SIZE_STEP, max(-(-side // SIZE_STEP), 1) * SIZE_STEP} for side in (height, width)
    ]
    sizes = sorted(product(*choices), key=lambda size: (abs(size[0] - height) + abs(size[1] - width), size))
    offers = " or ".join(f"{h}x{w}" for h, w in sizes[:2])
    raise InputError(f"The size {height}x{width} must have both sides divisible by {SIZE_STEP}: use {offers}.")


def covering_size(height: int, width: int, target_height: int, target_width: int) -> tuple[int, int]:
    """The smallest size (H, W) with the aspect ratio of height × width that covers the target. The side that exceeds
    the target is rounded down to a pixel."""
    if width * target_height > target_width * height:
        return target_height, width * target_height // height
    return height * target_width // width, target_width


def forward_flops(config: DiTConfig, layout: Layout, clip_tokens: int = CLIP_TOKENS) -> int:
    """FLOP of the matrix products of one transformer forward pass with nothing cached.

    3.16e15 for the 14B model at 512×896×81 frames, 9.9e15 at 704×1280×81."""
    c, rows, context = config.dim, layout.tokens, config.text_len + clip_tokens
    linears = rows * (6 * c * c + 2 * c * config.ffn_dim)  # q k v o, cross q o, ffn up and down
    attention = 2 * rows * rows * c + 2 * rows * context * c  # QKᵀ and PV, self and cross
    blocks = config.layers * (linears + attention + 2 * context * c * c)  # last term: cross-attention k and v
    patch = 4 * (config.in_channels + config.mask_channels) * c * rows
    head = 4 * config.out_channels * c * layout.video_tokens
    text = config.text_len * (config.text_dim * c + c * c)
    clip = clip_tokens * (config.clip_dim * config.clip_dim + config.clip_dim * c)
    time = config.freq_dim * c + 7 * c * c
    return 2 * (blocks + patch + head + text + clip + time)


def vae_encode_flops(frames: int, height: int, width: int) -> float:
    """FLOP to encode T pixel frames (4n+1) of H×W: 3.1e12 for one frame of 512×896, 12.4e12 for five. Each later frame
    costs 3/4 of the first, because the deeper levels run at a half and a quarter of the frame rate."""
    return 3.1e12 * (1 + 0.75 * (frames - 1)) * height * width / (512 * 896)


def vae_decode_flops(frames: int, height: int, width: int) -> float:
    """FLOP to decode T pixel frames of H×W: 317e12 for 81 frames of 512×896, proportional to the number of pixels."""
    return 317e12 * frames * height * width / (81 * 512 * 896)
