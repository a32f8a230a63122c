"""The Wan 2.1 VAE as a stream: one latent frame per call, equivalent to one pass over the complete video.

Every temporal convolution is causal and keeps its last input frames in a cache, so a chunk of four frames has the same
context as in the complete video. Caches are explicit: a flat list, in layer order, with the same shapes after the first
frame and after every later chunk (a layer that has seen one frame caches [zeros, x]). Names are the checkpoint's.
The same layers serve the fp32 reference and the engine stages, which use other `Numerics`: convolutions in the compute
type, norms and SiLU in fp32, sums between blocks always in fp32. So the input of an fp16 convolution is either normed
(at most √C·gamma) or a sum saturated to the largest finite fp16: only the output of a single convolution could
overflow. Source of the layers: Wan2.1 `wan/modules/vae.py`, and the model specification's description of the complete
sequence.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scail2_rt.export.models.config import VAEConfig
from scail2_rt.export.models.precision import FP32, Numerics
from scail2_rt.export.models.weights import parameter
from scail2_rt.kernels.errors import InputError

# Statistics of the 16 latent channels: normalised latent = (mean output - LATENT_MEAN) / LATENT_STD.
# fmt: off
LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)
LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)
# fmt: on
NORM_FLOOR = 1e-12  # smallest norm that RMSNorm divides by
FRAMES_PER_LATENT = 4  # pixel frames per latent frame, except the first
PIXELS_PER_CELL = 8  # pixels per latent cell and side


class Caches:
    """The caches of one call: layers read the old ones and append the new ones in the same order.

    `old` is None for the first frame of a video, which has no history."""

    def __init__(self, old: Sequence[Tensor] | None) -> None:
        self.first = old is None
        self._old: Iterator[Tensor] = iter(old or ())
        self.new: list[Tensor] = []

    def extend(self, x: Tensor, frames: int) -> Tensor:
        """Prepend the previous `frames` frames (zeros at the start) to x [B, C, T, H, W], and cache the last ones."""
        x = F.pad(x, (0, 0, 0, 0, frames, 0)) if self.first else torch.cat([next(self._old), x], dim=2)
        self.new.append(x[:, :, -frames:].clone())  # a view would keep all of x alive until the next call
        return x

    def start(self, frames: Tensor) -> None:
        """Store the cache of a layer that skips the first frame."""
        self.new.append(frames)


def saturate(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast an fp32 sum between blocks for a convolution: saturates in fp16; the other types have fp32's range."""
    if dtype == torch.float16:
        limit = torch.finfo(dtype).max
        x = x.clamp(-limit, limit)
    return x.to(dtype)


class Conv(nn.Module):
    """Weights of a convolution in the storage type. `kernel` is (t, y, x) or (y, x)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, ...], numerics: Numerics) -> None:
        super().__init__()
        self.kernel, self.compute = kernel, numerics.compute
        self.weight = parameter(out_channels, in_channels, *kernel, dtype=numerics.storage)
        self.bias = parameter(out_channels, dtype=numerics.storage)

    def weights(self) -> tuple[Tensor, Tensor]:
        return self.weight.to(self.compute), self.bias.to(self.compute)


def conv3d(
    x: Tensor, weight: Tensor, bias: Tensor, stride: tuple[int, ...] = (1, 1, 1), padding: tuple[int, ...] = (0, 0, 0)
) -> Tensor:
    """Call `F.conv3d`, but oneDNN on a CPU: for few channels and rows, PyTorch's default path is nine times slower.

    oneDNN's operator has no ONNX form, so an export uses the plain one."""
    plain = torch.is_grad_enabled() or torch.compiler.is_exporting() or torch.jit.is_tracing()
    if plain or x.device.type != "cpu" or x.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return F.conv3d(x, weight, bias, stride, padding)
    return torch.mkldnn_convolution(x, weight, bias, padding, stride, (1, 1, 1), 1)


class CausalConv3d(Conv):
    """Convolution with stride 1 and unchanged height and width; zero frames on the left, none on the right.

    x [B, C, T, H, W] of any float type → [B, O, T, H, W] in the compute type."""

    def forward(self, x: Tensor, caches: Caches) -> Tensor:
        x = x.to(self.compute)
        if self.kernel[0] > 1:
            x = caches.extend(x, self.kernel[0] - 1)
        return conv3d(x, *self.weights(), padding=(0, self.kernel[1] // 2, self.kernel[2] // 2))


class Conv2d(Conv):
    """Convolution of single frames. x [N, C, H, W] of any float type → [N, O, H', W'] in the compute type."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: tuple[int, int],
        numerics: Numerics,
        stride: int = 1,
        padding: int = 0,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel, numerics)
        self.stride, self.padding = stride, padding

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x.to(self.compute), *self.weights(), stride=self.stride, padding=self.padding)


def frames_of(x: Tensor) -> Tensor:
    """Reorder [B, C, T, H, W] → single frames [B·T, C, H, W]."""
    return x.transpose(1, 2).flatten(0, 1)


def video_of(frames: Tensor, batch: int) -> Tensor:
    """Reorder single frames [B·T, C, H, W] → [B, C, T, H, W]."""
    return frames.unflatten(0, (batch, -1)).transpose(1, 2)


class RMSNorm(nn.Module):
    """x / ‖x‖₂ · √C · gamma over the channels, in fp32. `trailing`: dimensions after them, 3 for videos, 2 for frames.

    Written as x / rms(x) · gamma, so that a graph's optimiser finds no constant to fold into the weight."""

    def __init__(self, channels: int, trailing: int) -> None:
        super().__init__()
        self.gamma = parameter(channels, *(1,) * trailing)

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        channels = self.gamma.shape[0]
        rms = (x * x).mean(-self.gamma.ndim, keepdim=True).sqrt()
        return x / rms.clamp_min(NORM_FLOOR / math.sqrt(channels)) * self.gamma


class ResidualBlock(nn.Module):
    """shortcut(x) + conv(silu(norm(conv(silu(norm(x)))))). x fp32 [B, C, T, H, W] → fp32 [B, O, T, H, W]."""

    def __init__(self, in_channels: int, out_channels: int, numerics: Numerics) -> None:
        super().__init__()
        self.residual = nn.ModuleDict(
            {
                "0": RMSNorm(in_channels, 3),
                "2": CausalConv3d(in_channels, out_channels, (3, 3, 3), numerics),
                "3": RMSNorm(out_channels, 3),
                "6": CausalConv3d(out_channels, out_channels, (3, 3, 3), numerics),
            }
        )
        self.shortcut = (
            None if in_channels == out_channels else CausalConv3d(in_channels, out_channels, (1, 1, 1), numerics)
        )

    def forward(self, x: Tensor, caches: Caches) -> Tensor:
        h = self.residual["2"](F.silu(self.residual["0"](x)), caches)
        h = self.residual["6"](F.silu(self.residual["3"](h)), caches)
        if self.shortcut is not None:
            x = self.shortcut(saturate(x, self.shortcut.compute), caches).float()
        return x + h.float()


class AttentionBlock(nn.Module):
    """x + single-head attention over the h·w cells of each frame. x fp32 [B, C, T, h, w] → the same shape."""

    def __init__(self, channels: int, numerics: Numerics) -> None:
        super().__init__()
        self.norm = RMSNorm(channels, 2)
        self.to_qkv = Conv2d(channels, 3 * channels, (1, 1), numerics)
        self.proj = Conv2d(channels, channels, (1, 1), numerics)

    def forward(self, x: Tensor, caches: Caches) -> Tensor:
        batch, channels, frames, height, width = x.shape
        qkv = self.to_qkv(self.norm(frames_of(x))).reshape(batch * frames, 3, channels, height * width)
        q, k, v = (t.transpose(2, 3) for t in qkv.split(1, dim=1))  # [B·T, 1, h·w, C]
        out = F.scaled_dot_product_attention(q, k, v).transpose(2, 3)
        out = self.proj(out.reshape(batch * frames, channels, height, width))
        return x + video_of(out, batch).float()


def _twice(x: Tensor) -> Tensor:
    """Up-sample ×2 (nearest) in height and width, by expand and reshape. x [N, C, H, W] → [N, C, 2·H, 2·W]."""
    count, channels, height, width = x.shape
    x = x[:, :, :, None, :, None].expand(count, channels, height, 2, width, 2)
    return x.reshape(count, channels, 2 * height, 2 * width)


class Downsample(nn.Module):
    """Halves the size by a stride-2 convolution (zero row below, zero column right); if `temporal`, also the frames.

    In time, the first frame is kept; every later pair is computed from itself and the preceding frame.
    x fp32 [B, C, T, H, W] → fp32 [B, C, T', H/2, W/2]."""

    def __init__(self, channels: int, temporal: bool, numerics: Numerics) -> None:
        super().__init__()
        self.temporal, self.compute = temporal, numerics.compute
        conv = Conv2d(channels, channels, (3, 3), numerics, stride=2)
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), conv)
        self.time_conv = Conv(channels, channels, (3, 1, 1), numerics) if temporal else None

    def forward(self, x: Tensor, caches: Caches) -> Tensor:
        x = video_of(self.resample(frames_of(saturate(x, self.compute))), len(x))
        return self.in_time(x, caches).float()

    def in_time(self, x: Tensor, caches: Caches) -> Tensor:
        """Halve the frames: x [B, C, T, h, w] → [B, C, T', h, w]."""
        if self.temporal and caches.first:
            caches.start(x)
        elif self.time_conv is not None:
            x = conv3d(caches.extend(x, 1), *self.time_conv.weights(), stride=(2, 1, 1))
        return x


class Upsample(nn.Module):
    """If `temporal`, doubles the frames; then nearest ×2 and a convolution to half the channels.

    In time, the first frame is kept; each later one becomes the two halves of a causal convolution, which starts at the
    second frame as if no frame preceded it. x fp32 [B, C, T, H, W] → fp32 [B, C/2, T', 2·H, 2·W]."""

    def __init__(self, channels: int, temporal: bool, numerics: Numerics) -> None:
        super().__init__()
        self.temporal, self.compute = temporal, numerics.compute
        conv = Conv2d(channels, channels // 2, (3, 3), numerics, padding=1)
        self.resample = nn.ModuleDict({"1": conv})
        self.time_conv = CausalConv3d(channels, 2 * channels, (3, 1, 1), numerics) if temporal else None

    def forward(self, x: Tensor, caches: Caches) -> Tensor:
        x = self.in_time(saturate(x, self.compute), caches)
        return video_of(self.resample["1"](_twice(frames_of(x))), len(x)).float()

    def in_time(self, x: Tensor, caches: Caches) -> Tensor:
        """Double the frames: x [B, C, T, h, w] → [B, C, T', h, w]."""
        batch, channels, _, height, width = x.shape
        if self.temporal and caches.first:
            caches.start(x.new_zeros(batch, channels, 2, height, width))
        elif self.time_conv is not None:
            x = self.doubled(x, caches, self.time_conv)
        return x

    @staticmethod
    def doubled(x: Tensor, caches: Caches, time_conv: CausalConv3d) -> Tensor:
        """Convolve x [B, C, T, h, w] → [B, C, 2·T, h, w]: the two halves of the convolution's output per frame."""
        batch, channels, frames, height, width = x.shape
        halves = time_conv(x, caches).reshape(batch, 2, channels, frames, height, width)
        return halves.permute(0, 2, 3, 1, 4, 5).reshape(batch, channels, 2 * frames, height, width)


def drop_time_convs(layers: nn.ModuleList) -> None:
    """Remove the temporal convolutions of resampling layers, which are not used for the first frame of a video."""
    for layer in layers:
        if isinstance(layer, Downsample | Upsample):
            layer.time_conv = None


class Head(nn.ModuleDict):
    """Norm, SiLU, convolution. x fp32 → output in the compute type."""

    def __init__(self, in_channels: int, out_channels: int, numerics: Numerics) -> None:
        conv = CausalConv3d(in_channels, out_channels, (3, 3, 3), numerics)
        super().__init__({"0": RMSNorm(in_channels, 3), "2": conv})

    def forward(self, x: Tensor, caches: Caches) -> Tensor:
        return self["2"](F.silu(self["0"](x)), caches)


def _middle(channels: int, numerics: Numerics) -> nn.ModuleList:
    return nn.ModuleList(
        [
            ResidualBlock(channels, channels, numerics),
            AttentionBlock(channels, numerics),
            ResidualBlock(channels, channels, numerics),
        ]
    )


class Encoder(nn.Module):
    """Encodes pixels [B, 3, T, H, W] → [B, 2·z, 1, h, w]."""

    def __init__(self, config: VAEConfig, numerics: Numerics) -> None:
        super().__init__()
        widths = [config.dim * multiplier for multiplier in config.dim_mult]
        self.conv1 = CausalConv3d(3, config.dim, (3, 3, 3), numerics)
        layers: list[nn.Module] = []
        channels = config.dim
        for level, width in enumerate(widths):
            for _ in range(config.res_blocks):
                layers.append(ResidualBlock(channels, width, numerics))
                channels = width
            if level < len(widths) - 1:
                layers.append(Downsample(width, config.temporal_downsample[level], numerics))
        self.downsamples = nn.ModuleList(layers)
        self.middle = _middle(channels, numerics)
        self.head = Head(channels, 2 * config.z_dim, numerics)

    def forward(self, x: Tensor, caches: Caches) -> Tensor:
        x = self.conv1(x, caches).float()
        for layer in (*self.downsamples, *self.middle):
            x = layer(x, caches)
        return self.head(x, caches)


class Decoder(nn.Module):
    """Decodes latents [B, z, 1, h, w] → pixels [B, 3, T, H, W]."""

    def __init__(self, config: VAEConfig, numerics: Numerics) -> None:
        super().__init__()
        widths = [config.dim * multiplier for multiplier in reversed(config.dim_mult)]
        temporal = tuple(reversed(config.temporal_downsample))
        channels = widths[0]
        self.conv1 = CausalConv3d(config.z_dim, channels, (3, 3, 3), numerics)
        self.middle = _middle(channels, numerics)
        layers: list[nn.Module] = []
        for level, width in enumerate(widths):
            for _ in range(config.res_blocks + 1):
                layers.append(ResidualBlock(channels, width, numerics))
                channels = width
            if level < len(widths) - 1:
                layers.append(Upsample(width, temporal[level], numerics))
                channels = width // 2
        self.upsamples = nn.ModuleList(layers)
        self.head = Head(channels, 3, numerics)

    def forward(self, x: Tensor, caches: Caches) -> Tensor:
        x = self.conv1(x, caches).float()
        for layer in (*self.middle, *self.upsamples):
            x = layer(x, caches)
        return self.head(x, caches)


def channel_mixing(channels: int, numerics: Numerics) -> CausalConv3d:
    """Return the 1×1×1 convolution between encoder and latent (`conv1`, 2·z channels) or latent and decoder
    (`conv2`)."""
    return CausalConv3d(channels, channels, (1, 1, 1), numerics)


def statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return LATENT_MEAN and LATENT_STD, [1, 16, 1, 1, 1]. On a GPU they are filled, not copied from the CPU, since a
    CUDA graph cannot record such a copy."""
    mean, std = (
        torch.stack([torch.full((), value, device=device) for value in values])
        if device.type == "cuda"
        else torch.tensor(values, dtype=torch.float32, device=device)
        for values in (LATENT_MEAN, LATENT_STD)
    )
    return mean.reshape(1, -1, 1, 1, 1), std.reshape(1, -1, 1, 1, 1)


def encode_chunk(
    encoder: Encoder, conv1: CausalConv3d, video: Tensor, caches: Sequence[Tensor] | None
) -> tuple[Tensor, list[Tensor]]:
    """Encode the first frame (caches None) or the next four frames of a video in -1..1.

    video [1, 3, 1 or 4, H, W] → normalised mean, fp32 [1, 16, 1, h, w], and the new caches."""
    state = Caches(caches)
    mean = conv1(encoder(video, state), state).chunk(2, dim=1)[0].float()
    shift, scale = statistics(mean.device)
    return (mean - shift) / scale, state.new


def decode_chunk(
    decoder: Decoder, conv2: CausalConv3d, latent: Tensor, caches: Sequence[Tensor] | None
) -> tuple[Tensor, list[Tensor]]:
    """Decode the first (caches None) or the next normalised latent frame.

    latent [1, 16, 1, h, w] → unclamped pixels, fp32 [1, 3, 1 or 4, H, W], and the new caches."""
    state = Caches(caches)
    shift, scale = statistics(latent.device)
    video = decoder(conv2(latent.float() * scale + shift, state), state)
    return video.float(), state.new


def check_config(config: VAEConfig) -> None:
    """Raise InputError unless the VAE is a Wan 2.1 VAE: 16 latent channels, 8×8×4 pixels per latent cell."""
    side, frames = 2 ** (len(config.dim_mult) - 1), 2 ** sum(config.temporal_downsample)
    levels_agree = len(config.temporal_downsample) == len(config.dim_mult) - 1
    if (config.z_dim, side, frames) != (len(LATENT_MEAN), PIXELS_PER_CELL, FRAMES_PER_LATENT) or not levels_agree:
        raise InputError(
            f"The VAE has {config.z_dim} latent channels and {side}×{side}×{frames} pixels per latent cell, but the "
            "Wan 2.1 VAE of SCAIL-2 has 16 and 8×8×4. Give the checkpoint's Wan2.1_VAE file."
        )


class VAE(nn.Module):
    """Both halves in one module, with the tensor names of the checkpoint: the reference."""

    def __init__(self, config: VAEConfig, numerics: Numerics = FP32) -> None:
        super().__init__()
        check_config(config)
        self.config = config
        self.encoder = Encoder(config, numerics)
        self.conv1 = channel_mixing(2 * config.z_dim, numerics)
        self.conv2 = channel_mixing(config.z_dim, numerics)
        self.decoder = Decoder(config, numerics)

    def encode_first(self, video: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Encode video [1, 3, 1, H, W] → latent [1, 16, 1, h, w], caches."""
        return encode_chunk(self.encoder, self.conv1, video, None)

    def encode_step(self, video: Tensor, caches: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Encode video [1, 3, 4, H, W] → latent [1, 16, 1, h, w], caches."""
        return encode_chunk(self.encoder, self.conv1, video, caches)

    def decode_first(self, latent: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Decode latent [1, 16, 1, h, w] → video [1, 3, 1, H, W], caches."""
        return decode_chunk(self.decoder, self.conv2, latent, None)

    def decode_step(self, latent: Tensor, caches: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Decode latent [1, 16, 1, h, w] → video [1, 3, 4, H, W], caches."""
        return decode_chunk(self.decoder, self.conv2, latent, caches)

    def encode(self, video: Tensor) -> Tensor:
        """Encode video [1, 3, T, H, W] in -1..1, H and W multiples of 8 → normalised latent [1, 16, F, h, w].

        F = 1 + (T-1)//4: up to three frames at the end that do not fill a group of four are dropped."""
        latent, caches = self.encode_first(video[:, :, :1])
        latents = [latent]
        for start in range(1, video.shape[2] - FRAMES_PER_LATENT + 1, FRAMES_PER_LATENT):
            latent, caches = self.encode_step(video[:, :, start : start + FRAMES_PER_LATENT], caches)
            latents.append(latent)
        return torch.cat(latents, dim=2)

    def decode(self, latent: Tensor) -> Tensor:
        """Decode a normalised latent [1, 16, F, h, w] → unclamped video [1, 3, 4·(F-1)+1, H, W]."""
        frames, caches = self.decode_first(latent[:, :, :1])
        videos = [frames]
        for index in range(1, latent.shape[2]):
            frames, caches = self.decode_step(latent[:, :, index : index + 1], caches)
            videos.append(frames)
        return torch.cat(videos, dim=2)
