"""Convolutions of the causal video VAE over frames kept as [slot, H+2, W+2, C] with a border of zero pixels.

With the border inside the buffer, a convolution needs no padding, and a tap is only a shift of the flattened pixels:
row m of the implicit GEMM reads the pixels m + shift. The taps of one kernel row (dx) lie side by side in memory and
form one contiguous range of kx·C values. Frames are kept in rings: frame t lies at slot (clock + offset + t) mod ring,
where `clock` is a counter on the device. A step can thus read the last two frames of the previous step without a copy,
and always launches kernels with the same arguments. The epilogue adds bias and residual and, where one program holds
all channels of its pixels, also writes the RMS-normed and SiLU'd result into the next ring.
Values that are not normed are stored times `Frames.scale`, a power of two: the lowest sixth of fp16's exponents is
unused, and RMS norm is invariant to the factor. Nearest ×2 before a 3×3 convolution is four 2×2 convolutions (phases)
with summed weights on the small input. Each op has a PyTorch twin on the same buffers.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from scail2_rt.kernels.conv.config import ConvConfig, choose_conv

Implementation = Literal["triton", "library"]  # library: PyTorch's convolutions; also on a CPU
Phases = Literal["none", "space", "time"]
NORM_FLOOR = 1e-12  # smallest norm that RMS norm divides by
CHANNEL_STEP = 8  # channels are padded to a multiple of it: pixels of 16 bytes, which TMA needs
GROUP_STEP = 64  # values of one kernel row in the weight matrix are padded to a multiple of it


def padded(channels: int) -> int:
    """Return the channel count as stored: rounded up to a multiple of CHANNEL_STEP."""
    return -(-channels // CHANNEL_STEP) * CHANNEL_STEP


@dataclass(frozen=True, slots=True)
class Frames:
    """Frames t = 0, 1, ... at slots (clock[counter] + offset + t) mod ring of `data` [ring, H+2, W+2, C]."""

    data: Tensor
    counter: int = 0
    offset: int = 0
    scale: float = 1.0

    @property
    def ring(self) -> int:
        return self.data.shape[0]

    @property
    def pitch(self) -> int:
        """Pixels per row, border included."""
        return self.data.shape[2]

    def slots(self, clock: Tensor, count: int) -> Tensor:
        """Return the slots of the first `count` frames, int64 [count] on the clock's device."""
        steps = torch.arange(count, device=clock.device, dtype=torch.int64)
        return (clock[self.counter] + self.offset + steps) % self.ring

    def read(self, clock: Tensor, count: int) -> Tensor:
        """Copy the first `count` frames with their border: fp32 [count, H+2, W+2, C], unscaled."""
        return self.data.index_select(0, self.slots(clock, count)).float() / self.scale

    def write(self, clock: Tensor, values: Tensor) -> None:
        """Store unscaled fp32 values [count, H, W, C'] with C' ≤ C; border and remaining channels become zero."""
        values = store_cast(values * self.scale, self.data.dtype)
        channels = self.data.shape[3] - values.shape[3]
        self.data.index_copy_(0, self.slots(clock, len(values)), F.pad(values, (0, channels, 1, 1, 1, 1)))


def store_cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast fp32 to dtype; fp16 saturates, so that one large value does not turn the frame into NaN at the next norm."""
    if dtype == torch.float16:
        limit = torch.finfo(dtype).max
        x = x.clamp(-limit, limit)
    return x.to(dtype)


@dataclass(frozen=True, slots=True)
class ConvWeights:
    """Weights of one convolution in the layout of an implementation. `matrix`: [phases·c_out, kt·ky·group] in the
    compute type for Triton, [phases·c_out, c_in, kt, ky, kx] fp32 (rounded to the compute type) for the library. `bias`
    fp32 [phases·c_out].

    c_in and c_out are padded channel counts. `phases`: "space" writes output pixel (2y+a, 2x+b), "time" frame 2t+a."""

    matrix: Tensor
    bias: Tensor
    c_in: int
    c_out: int
    taps: tuple[int, int, int]
    stride: int
    time_stride: int
    phases: Phases
    implementation: Implementation

    @property
    def phase_count(self) -> int:
        return {"none": 1, "space": 4, "time": 2}[self.phases]

    def origin(self, phase: int) -> tuple[int, int]:
        """Return row and column, in the bordered frame, of the first tap of output pixel (0, 0)."""
        if self.phases == "space":
            return phase // 2, phase % 2
        inside = self.taps[1] == 1 or self.stride == 2
        return (1, 1) if inside else (0, 0)


@dataclass(frozen=True, slots=True)
class ConvForm:
    """The form of a convolution. `phases` "space": a 3×3 convolution after nearest ×2; "time": 2·C outputs that are two
    frames of C channels. `pad_out`: the output channels are padded to a multiple of it."""

    stride: int = 1
    time_stride: int = 1
    phases: Phases = "none"
    pad_out: int = CHANNEL_STEP


PLAIN = ConvForm()


def prepare_conv(
    weight: Tensor,
    bias: Tensor,
    dtype: torch.dtype,
    device: torch.device,
    implementation: Implementation,
    form: ConvForm = PLAIN,
) -> ConvWeights:
    """Convert a checkpoint's weights to `ConvWeights`. weight [O, I, kt, ky, kx] or [O, I, ky, kx], bias [O]; kernel
    sizes 3×3×3, 3×1×1, 1×1×1."""
    weight, bias = weight.detach().to(device, torch.float32), bias.detach().to(device, torch.float32)
    if weight.ndim == 4:
        weight = weight[:, :, None]
    if form.phases == "space":
        weight, bias = _fold_nearest(weight), bias.repeat(4, 1)
    else:
        parts = 2 if form.phases == "time" else 1
        weight, bias = weight.unflatten(0, (parts, -1)), bias.view(parts, -1)
    out, inputs = weight.shape[1:3]
    c_out, c_in = -(-out // form.pad_out) * form.pad_out, padded(inputs)
    weight = F.pad(weight, (0, 0, 0, 0, 0, 0, 0, c_in - inputs, 0, c_out - out)).flatten(0, 1)
    bias = F.pad(bias, (0, c_out - out)).flatten().contiguous()
    taps = (weight.shape[2], weight.shape[3], weight.shape[4])
    weight = weight.to(dtype)
    if implementation == "triton":
        group = taps[2] * c_in
        weight = weight.permute(0, 2, 3, 4, 1).reshape(len(weight), taps[0] * taps[1], group)
        matrix = F.pad(weight, (0, -group % GROUP_STEP)).flatten(1).contiguous()
    else:
        matrix = weight.float()
    return ConvWeights(matrix, bias, c_in, c_out, taps, form.stride, form.time_stride, form.phases, implementation)


def _fold_nearest(weight: Tensor) -> Tensor:
    """Fold nearest ×2 into 3×3 weights → 2×2 weights of the four output parities: [O, I, 1, 3, 3] → [4, O, I, 1, 2, 2].

    Output row 2y reads input rows y-1, y, y; output row 2y+1 reads y, y, y+1; columns likewise. Sums in fp32."""
    pick = weight.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])  # parity, small tap, large tap
    folded = torch.einsum("oityx,ary,bcx->aboitrc", weight, pick, pick)
    return folded.flatten(0, 1)


def pad_channels(values: Tensor, channels: int) -> Tensor:
    """Flatten a norm's gamma (any trailing ones) → contiguous fp32 [channels], padded with zeros."""
    values = values.detach().float().flatten()
    return F.pad(values, (0, channels - len(values))).contiguous()


@dataclass(frozen=True, slots=True)
class Norm:
    """RMS norm of stored frames. gamma fp32 [padded C] on the device; `channels` counts the real ones."""

    gamma: Tensor
    channels: int
    silu: bool


@dataclass(frozen=True, slots=True)
class ConvCall:
    """One convolution between buffers: y = conv(src) + bias + residual for `frames` output frames (before "time" phases
    double them).

    Stores y in `raw` and norm(y) in `normed`. With `norm`, `raw` is scratch memory if the norm cannot be fused
    (`fuses_norm`), and is written in any case if `keep_raw`. `residual` may be `raw`. All frames have the padded
    channels of the weights. Raises ValueError unless `normed` is given with `norm`, unscaled."""

    src: Frames
    weights: ConvWeights
    frames: int
    raw: Frames | None = None
    residual: Frames | None = None
    normed: Frames | None = None
    norm: Norm | None = None
    keep_raw: bool = True

    def __post_init__(self) -> None:
        if (self.norm is None) != (self.normed is None):
            raise ValueError("`norm` and `normed` must be given together")
        if self.normed is not None and self.normed.scale != 1:
            raise ValueError("normed frames are stored unscaled")

    def destinations(self, fused: bool) -> tuple[Frames | None, Frames | None, Norm | None]:
        """Return (raw, normed, norm) of a launch that also computes the norm, or leaves it to a separate launch."""
        if fused:
            return self.raw if self.keep_raw else None, self.normed, self.norm
        return self.raw, None, None


def conv(call: ConvCall, clock: Tensor, planar: Tensor | None = None, config: ConvConfig | None = None) -> None:
    """Run `call`. If `planar` fp32 [c, frames, H, W] is given, it receives the first c channels of y.

    clock: int32 counters on the device. config: overrides the configuration of `choose_conv`."""
    weights, norm = call.weights, call.norm
    if weights.implementation == "library":
        _torch_conv(call, clock, planar)
        return
    from scail2_rt.kernels.conv import hopper_conv
    from scail2_rt.kernels.conv.launch import launch_conv, launch_norm

    fused = norm is not None and fuses_norm(call, config)
    if config is None and hopper_conv.takes(call, planar):
        hopper_conv.launch_conv(call, clock, fused)
    else:
        launch_conv(call, clock, config or _configuration(call), fused, planar)
    if norm is not None and not fused:
        if call.raw is None or call.normed is None:
            raise ValueError("a norm that cannot be fused needs both `raw` and `normed`")
        launch_norm(call.raw, call.normed, norm, clock, call.frames * (2 if weights.phases == "time" else 1))


def fuses_norm(call: ConvCall, config: ConvConfig | None = None) -> bool:
    """Return whether one launch computes convolution and norm of such a call without planar output, so that `raw` is
    needed for `keep_raw` only."""
    if call.weights.implementation == "library":
        return True
    from scail2_rt.kernels.conv import hopper_conv

    if config is None and hopper_conv.takes(call, None):
        return call.weights.c_out <= hopper_conv.FUSED_CHANNELS
    return (config or _configuration(call)).columns >= call.weights.c_out


def _configuration(call: ConvCall) -> ConvConfig:
    weights = call.weights
    return choose_conv(call.src.data.device, weights.c_in, weights.c_out, weights.stride)


def rms_norm_frames(
    src: Frames, dst: Frames, norm: Norm, clock: Tensor, frames: int, implementation: Implementation
) -> None:
    """Compute dst = [silu](x / rms(x) · gamma) for every pixel of `frames` frames. src, dst: frames of equal size."""
    if implementation == "library":
        dst.write(clock, _torch_norm(src.read(clock, frames)[:, 1:-1, 1:-1], norm))
        return
    from scail2_rt.kernels.conv.launch import launch_norm

    launch_norm(src, dst, norm, clock, frames)


def _torch_norm(x: Tensor, norm: Norm) -> Tensor:
    """Norm x fp32 [..., padded C] over its real channels → the same shape."""
    rms = (x * x).sum(-1, keepdim=True).div(norm.channels).sqrt()
    y = x / rms.clamp_min(NORM_FLOOR / math.sqrt(norm.channels)) * norm.gamma
    return F.silu(y) if norm.silu else y


def _torch_conv(call: ConvCall, clock: Tensor, planar: Tensor | None) -> None:
    y = convolved(call.src, call.weights, clock, call.frames)
    if call.residual is not None:
        y = y + call.residual.read(clock, len(y))[:, 1:-1, 1:-1]
    if planar is not None:
        planar.copy_(y[..., : len(planar)].permute(3, 0, 1, 2))
    if call.raw is not None:
        call.raw.write(clock, y)
    if call.norm is not None and call.normed is not None:
        call.normed.write(clock, _torch_norm(y, call.norm))


def convolved(src: Frames, weights: ConvWeights, clock: Tensor, frames: int) -> Tensor:
    """Compute conv(src) + bias by `F.conv3d` with the library's weights → fp32 [frames', H', W', c_out]."""
    kt, ky, kx = weights.taps
    window = src.read(clock, (frames - 1) * weights.time_stride + kt).permute(3, 0, 1, 2)[None]
    height, width = (size - 2 for size in window.shape[3:])
    outputs = []
    for phase in range(weights.phase_count):
        top, left = weights.origin(phase)
        part = slice(phase * weights.c_out, (phase + 1) * weights.c_out)
        bottom, right = (top + height + ky - 1, left + width + kx - 1)
        outputs.append(
            F.conv3d(
                window[:, :, :, top : min(bottom, height + 2), left : min(right, width + 2)],
                weights.matrix[part],
                weights.bias[part],
                stride=(weights.time_stride, weights.stride, weights.stride),
            )[0].permute(1, 2, 3, 0)
        )
    if weights.phases == "time":
        return torch.stack(outputs, dim=1).flatten(0, 1)
    if weights.phases == "space":
        grid = torch.stack(outputs).unflatten(0, (2, 2))  # [a, b, T, H, W, C]
        return grid.permute(2, 3, 0, 4, 1, 5).flatten(3, 4).flatten(1, 2)
    return outputs[0]
