"""The VAE for one video size as two programs (lists of operations on fixed buffers): the first frame, all later steps.

A layer appends the kernel launches it needs. Each causal convolution has a ring buffer, which the producer of its input
writes, already normed and SiLU'd; sums between blocks are kept in plain buffers that are updated in place. A layer that
begins with a norm attaches it to the preceding convolution, whose epilogue then writes both results.
In fp16, all values that are not normed are stored times 2^-6: sums up to 4·10^6 stay finite, and values below 0.004
have a constant absolute step.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from scail2_rt.kernels.conv.ops import (
    PLAIN,
    ConvCall,
    ConvForm,
    ConvWeights,
    Frames,
    Implementation,
    Norm,
    conv,
    fuses_norm,
    pad_channels,
    padded,
    prepare_conv,
    rms_norm_frames,
)

RAW_SCALE = {torch.float16: 2.0**-6}  # for values that are not normed; 1 in types with fp32's range
HISTORY = 2  # frames of the previous step that a ring keeps


class Layers:
    """The weights of one half of the VAE by checkpoint name, converted to the kernels' layout on first use."""

    def __init__(
        self, weights: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype, implementation: Implementation
    ) -> None:
        self.source, self.device, self.dtype, self.implementation = weights, device, dtype, implementation
        self._convs: dict[str, ConvWeights] = {}
        self._norms: dict[str, Norm] = {}

    def conv(self, name: str, form: ConvForm = PLAIN) -> ConvWeights:
        if name not in self._convs:
            weight, bias = self.source[f"{name}.weight"], self.source[f"{name}.bias"]
            self._convs[name] = prepare_conv(weight, bias, self.dtype, self.device, self.implementation, form)
        return self._convs[name]

    def norm(self, name: str, silu: bool = True) -> Norm:
        if name not in self._norms:
            gamma = self.source[f"{name}.gamma"].to(self.device)
            self._norms[name] = Norm(pad_channels(gamma, padded(gamma.numel())), gamma.numel(), silu)
        return self._norms[name]

    def has(self, name: str) -> bool:
        return f"{name}.weight" in self.source

    def channels(self, name: str) -> int:
        """Return the number of outputs of a convolution in the checkpoint."""
        return self.source[f"{name}.weight"].shape[0]

    def forget_source(self) -> None:
        """Keep only the shapes of the checkpoint's tensors. Call it after every layer has been used."""
        self.source = {name: tensor.to("meta") for name, tensor in self.source.items()}


@dataclass(frozen=True, slots=True)
class Size:
    """Bordered frames of one resolution."""

    height: int
    width: int

    def scaled(self, numerator: int, denominator: int = 1) -> "Size":
        return Size(self.height * numerator // denominator, self.width * numerator // denominator)


class Buffers:
    """All buffers of one video size, allocated once, with zero borders. `clock` counts the frames seen at every rate.

    Counter 0 does not advance (plain buffers); counter i counts frames of a rate of `rates[i]` frames per step."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.raw_scale = RAW_SCALE.get(dtype, 1.0)
        self.rates = (0, 1, 2, 4)
        self.clock = torch.zeros(len(self.rates), dtype=torch.int32, device=device)
        self.advance = {
            first: torch.tensor([min(r, 1) if first else r for r in self.rates], dtype=torch.int32, device=device)
            for first in (True, False)
        }
        self._made: dict[tuple[object, ...], Tensor] = {}
        self._rings: dict[str, tuple[Tensor, int]] = {}

    def _zeros(self, frames: int, size: Size, channels: int) -> Tensor:
        return torch.zeros(
            frames, size.height + 2, size.width + 2, padded(channels), dtype=self.dtype, device=self.device
        )

    def plain(self, use: str, frames: int, size: Size, channels: int, raw: bool = True) -> Frames:
        """Return a buffer without history, shared by all callers with the same arguments. `frames`: of a later step."""
        key = (use, frames, size, channels)
        if key not in self._made:
            self._made[key] = self._zeros(frames, size, channels)
        return Frames(self._made[key], scale=self.raw_scale if raw else 1.0)

    def ring(self, name: str, rate: int, size: Size, channels: int, raw: bool = False) -> tuple[Frames, Frames]:
        """Return (window that starts with the two previous frames, new frames) of the ring that feeds layer `name`."""
        if name not in self._rings:
            # one extra zero frame: the history that the first frame does not fill
            self._rings[name] = (self._zeros(rate + HISTORY, size, channels), HISTORY + 1)
        data, counter = self._rings[name][0], self.rates.index(rate)
        scale = self.raw_scale if raw else 1.0
        return Frames(data, counter, 0, scale), Frames(data, counter, HISTORY, scale)

    def reset(self) -> None:
        for data, frames in self._rings.values():
            data[:frames].zero_()
        self.clock.zero_()


Op = Callable[[Tensor], object]  # takes the clock


class Program:
    """The operations of one pass in order, built layer by layer on a value `x`: the sums of `frames` frames at `size`.

    `later`: frames of a later step at this point, which determines buffer sizes; `frames` is 1 in the first pass."""

    def __init__(self, layers: Layers, buffers: Buffers, first: bool, size: Size, later: int) -> None:
        self.layers, self.buffers, self.first = layers, buffers, first
        self.size, self.later = size, later
        self.ops: list[Op | ConvCall] = []
        self.x: Frames | None = None

    @property
    def frames(self) -> int:
        return 1 if self.first else self.later

    def stream(self, channels: int) -> Frames:
        return self.buffers.plain("stream", self.later, self.size, channels)

    def input_conv(self, name: str, src: Frames) -> None:
        weights = self.layers.conv(name)
        self.x = self.stream(self.layers.channels(name))
        self.ops.append(ConvCall(src, weights, self.frames, raw=self.x))

    def normed(self, x: Frames, norm: Norm, into: Frames) -> None:
        """Append into = norm(x); if the last operation is the convolution that makes x, it also computes the norm."""
        last = self.ops[-1] if self.ops else None
        if isinstance(last, ConvCall) and last.raw is x and last.norm is None:
            self.ops[-1] = replace(last, norm=norm, normed=into)
            return
        frames, implementation = self.frames, self.layers.implementation
        self.ops.append(lambda clock: rms_norm_frames(x, into, norm, clock, frames, implementation))

    def current(self) -> Frames:
        if self.x is None:
            raise ValueError("the program has no input yet")
        return self.x

    def residual_block(self, name: str, into: Frames | None = None) -> None:
        """Append x = shortcut(x) + conv(silu(norm(conv(silu(norm(x)))))); the sum is written to `into`, or in place."""
        x, layers, buffers = self.current(), self.layers, self.buffers
        conv1, conv2 = layers.conv(f"{name}.residual.2"), layers.conv(f"{name}.residual.6")
        norm1, norm2 = layers.norm(f"{name}.residual.0"), layers.norm(f"{name}.residual.3")
        window1, new1 = buffers.ring(f"{name}.residual.2", self.later, self.size, norm1.channels)
        window2, new2 = buffers.ring(f"{name}.residual.6", self.later, self.size, norm2.channels)
        self.normed(x, norm1, new1)
        first = ConvCall(window1, conv1, self.frames, normed=new2, norm=norm2, keep_raw=False)
        if not fuses_norm(first):
            first = replace(first, raw=buffers.plain("scratch", self.later, self.size, norm2.channels))
        self.ops.append(first)
        out = self.stream(norm2.channels)
        if layers.has(f"{name}.shortcut"):
            self.ops.append(ConvCall(x, layers.conv(f"{name}.shortcut"), self.frames, raw=out))
            x = out
        self.x = into or out
        self.ops.append(ConvCall(window2, conv2, self.frames, raw=self.x, residual=x))

    def attention(self, name: str) -> None:
        """Append x += proj(attention(norm(x))), within each frame."""
        x, norm, buffers = self.current(), self.layers.norm(f"{name}.norm", silu=False), self.buffers
        channels = norm.channels
        rows = buffers.plain("attention", self.later, self.size, channels, raw=False)
        qkv = buffers.plain("qkv", self.later, self.size, 3 * channels, raw=False)
        self.normed(x, norm, rows)
        self.ops.append(ConvCall(rows, self.layers.conv(f"{name}.to_qkv"), self.frames, raw=qkv))
        frames = self.frames
        self.ops.append(lambda clock: attend(qkv.data[:frames], rows.data[:frames], channels))
        self.x = self.stream(channels)
        self.ops.append(ConvCall(rows, self.layers.conv(f"{name}.proj"), self.frames, raw=self.x, residual=x))

    def upsample(self, name: str, temporal: bool, rows: slice | None = None) -> None:
        """Append x = [twice the frames, then] nearest ×2 and a 3×3 convolution to half the channels. `rows`: keep only
        these rows of the frame from here on."""
        x, channels = self.current(), self.layers.channels(f"{name}.resample.1")
        if temporal:
            if not self.first:
                window, _ = self.time_ring(name)
                out = self.buffers.plain("doubled", 2 * self.later, self.size, 2 * channels)
                weights = self.layers.conv(f"{name}.time_conv", ConvForm(phases="time"))
                self.ops.append(ConvCall(window, weights, self.frames, raw=out))
                x = out
            self.later *= 2
        if rows is not None:
            x = self._cut(x, rows)
        self.size = self.size.scaled(2)
        self.x = self.stream(channels)
        weights = self.layers.conv(f"{name}.resample.1", ConvForm(phases="space"))
        self.ops.append(ConvCall(x, weights, self.frames, raw=self.x))

    def _cut(self, x: Frames, rows: slice) -> Frames:
        """Copy rows of the plain buffer x to a separate buffer, with their neighbouring rows as the border."""
        frames, source, height = self.frames, x.data, rows.stop - rows.start
        self.size = Size(height, self.size.width)
        out = self.buffers.plain("cut", self.later, self.size, source.shape[3])
        self.ops.append(lambda clock: out.data[:frames].copy_(source[:frames, rows.start : rows.stop + 2]))
        return out

    def time_ring(self, name: str) -> tuple[Frames, Frames]:
        """Return the ring of an up-sampling's temporal convolution; the preceding block writes there, not in place."""
        channels = self.layers.channels(f"{name}.time_conv") // 2
        return self.buffers.ring(f"{name}.time_conv", self.later, self.size, channels, raw=True)

    def downsample(self, name: str, temporal: bool) -> None:
        """Append a stride-2 convolution of x, then, if temporal, halve the frames (the first frame is kept)."""
        x, channels = self.current(), self.layers.channels(f"{name}.resample.1")
        self.size = self.size.scaled(1, 2)
        weights = self.layers.conv(f"{name}.resample.1", ConvForm(stride=2))
        if not temporal:
            self.x = self.stream(channels)
            self.ops.append(ConvCall(x, weights, self.frames, raw=self.x))
            return
        window, new = self.buffers.ring(f"{name}.time_conv", self.later, self.size, channels, raw=True)
        self.ops.append(ConvCall(x, weights, self.frames, raw=new))
        self.later //= 2
        self.x = new
        if not self.first:
            self.x = self.stream(channels)
            last = Frames(window.data, window.counter, 1, window.scale)  # this layer needs one previous frame, not two
            weights = self.layers.conv(f"{name}.time_conv", ConvForm(time_stride=2))
            self.ops.append(ConvCall(last, weights, self.frames, raw=self.x))

    def head(self, name: str) -> None:
        """Append the last operation: its output is planar and its destination is given to `run`."""
        norm = self.layers.norm(f"{name}.0")
        window, new = self.buffers.ring(f"{name}.2", self.later, self.size, norm.channels)
        self.normed(self.current(), norm, new)
        self.ops.append(ConvCall(window, self.layers.conv(f"{name}.2", ConvForm(pad_out=16)), self.frames))

    def run(self, planar: Tensor) -> None:
        """Run the program; planar fp32 [channels, frames, H, W] receives the head's output. Advances the clock."""
        clock = self.buffers.clock
        *ops, head = self.ops
        for op in ops:
            if isinstance(op, ConvCall):
                conv(op, clock)
            else:
                op(clock)
        if not isinstance(head, ConvCall):
            raise ValueError("a program must end with its head")
        conv(head, clock, planar)
        clock.add_(self.buffers.advance[self.first])


def attend(qkv: Tensor, out: Tensor, channels: int) -> None:
    """Compute single-head attention over the pixels of each frame.

    qkv [T, H+2, W+2, ≥3·C] and out [T, H+2, W+2, ≥C], both with borders; further channels of out are unchanged."""
    inside = qkv[:, 1:-1, 1:-1, : 3 * channels].flatten(1, 2)  # [T, h·w, 3·C]
    q, k, v = inside.split(channels, dim=2)
    if qkv.is_cuda and qkv.dtype != torch.float32:
        # No fused kernel supports heads this wide; at these sizes the score matrix is 0.1 GB and two GEMMs are faster.
        scores = torch.matmul(q * (1 / math.sqrt(channels)), k.transpose(1, 2))
        result = torch.matmul(scores.softmax(-1), v)
    else:
        dtype = torch.float32 if not qkv.is_cuda else qkv.dtype
        result = F.scaled_dot_product_attention(*(t[:, None].to(dtype) for t in (q, k, v)))[:, 0]
    height, width = (side - 2 for side in qkv.shape[1:3])
    out[:, 1:-1, 1:-1, :channels] = result.unflatten(1, (height, width)).to(out.dtype)
