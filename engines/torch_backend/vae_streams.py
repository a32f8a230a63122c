"""The VAE as two machines that take one chunk at a time and keep their causal past in rings on the device.

`DecodeStream` and `EncodeStream` mean what a chain of `decode_chunk` or `encode_chunk` means (`export.models.vae`),
with the weights of the stages `vae.decode_step` and `vae.encode_step`. Buffers are made for the first video size that
is seen and kept; a step runs on the current stream and never waits for the GPU: the position in the rings is a counter
on the device. The 1×1×1 convolution beside the latent and the latent's statistics are one small fp32 matrix.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from scail2_rt.engines.torch_backend.vae_program import Buffers, Layers, Program, Size
from scail2_rt.engines.vae_stream import Part
from scail2_rt.export.models.config import VAEConfig
from scail2_rt.export.models.vae import FRAMES_PER_LATENT, LATENT_MEAN, LATENT_STD, PIXELS_PER_CELL, check_config
from scail2_rt.kernels.conv.ops import Implementation
from scail2_rt.kernels.errors import InputError


def choose_implementation(device: torch.device, dtype: torch.dtype) -> Implementation:
    """Triton where it has a fast type: a GPU in 16 bit. fp32 stays with the library's exact convolutions.

    InputError where Triton is needed and cannot be imported."""
    if device.type != "cuda" or dtype == torch.float32:
        return "library"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"the VAE's {str(dtype).removeprefix('torch.')} convolutions on a GPU need Triton, which cannot be "
            f'imported ({error}); install it with pip install "scail2-rt[gpu]", build with --precision fp32, or use '
            "another --backend."
        ) from error
    return "triton"


class _Stream(ABC):
    """What both halves share: weights, one set of buffers, and whether the next chunk is the first."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        config: VAEConfig,
        device: torch.device | str,
        dtype: torch.dtype,
        implementation: Implementation | None = None,
    ) -> None:
        check_config(config)
        self.config, self.device, self.dtype = config, torch.device(device), dtype
        implementation = implementation or choose_implementation(self.device, dtype)
        self._layers = Layers(weights, self.device, dtype, implementation)
        self._cells: tuple[int, int] | None = None
        self._programs: dict[bool, Program] = {}
        self._buffers: Buffers | None = None
        self._first = True
        self._mix, self._bias = self._latent_map(weights)

    def reset(self) -> None:
        """Forgets the video; the next chunk is a first one."""
        self._first = True
        if self._buffers is not None:
            self._buffers.reset()

    def close(self) -> None:
        """Gives the buffers back, which are far larger than the weights, to whoever needs the device's memory. The
        weights stay: the next chunk is a first one."""
        self._programs, self._buffers, self._cells, self._first = {}, None, None, True
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _prepare(self, height: int, width: int) -> None:
        """Makes the buffers for latents of height × width cells; keeps those it has."""
        if self._cells == (height, width):
            return
        if not self._first:
            raise InputError(f"The video changes its size to {height}×{width} latent cells; reset the stream first")
        self._programs, self._buffers = {}, None  # frees the old buffers first
        self._buffers = Buffers(self.dtype, self.device)
        self._programs = {first: self._build(self._buffers, first, Size(height, width)) for first in (False, True)}
        self._layers.forget_source()  # all are laid out now
        self._cells = (height, width)

    @abstractmethod
    def _latent_map(self, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The 1×1×1 convolution beside the latent together with the latent's statistics: fp32 matrix and bias."""

    @abstractmethod
    def _build(self, buffers: Buffers, first: bool, cells: Size) -> Program:
        """The operations of a first or of a later step."""

    def _next(self) -> tuple[Program, Buffers]:
        if self._buffers is None:
            raise ValueError("the stream has no buffers yet")
        program = self._programs[self._first]
        self._first = False
        return program, self._buffers


class DecodeStream(_Stream):
    """Latent frames → pixels. weights: those of `vae.decode_step`, in any float type on any device.

    part: of the picture. The coarsest level, whose attention sees all of it, is computed whole (a twentieth of the
    work), the others with as many rows more as reach into the part (`halo`): so its pixels are those of the whole."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        config: VAEConfig,
        device: torch.device | str,
        dtype: torch.dtype,
        implementation: Implementation | None = None,
        part: Part | None = None,
    ) -> None:
        super().__init__(weights, config, device, dtype, implementation)
        self._part = part

    def _rows(self, height: int) -> tuple[slice, slice]:
        """Of a latent of this height: the rows that are decoded, and which of those are the part."""
        if self._part is None:
            return slice(0, height), slice(0, height)
        start, stop = self._part.rows(height)
        margin = halo(self.config)
        decoded = slice(max(start - margin, 0), min(stop + margin, height))
        return decoded, slice(start - decoded.start, stop - decoded.start)

    def _latent_map(self, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        mix, bias, mean, std = _mixing(weights, "conv2", self.device)
        return mix * std, bias + mix @ mean  # of latent · std + mean

    def step(self, latent: Tensor) -> Tensor:
        """Normalised latent [16, 1, h, w] → unclamped pixels, fp32 [3, 1 (first chunk) or 4, 8h, 8w]; of a part its
        rows."""
        height, width = latent.shape[2:]
        decoded, part = self._rows(height)
        self._prepare(height, width)
        program, buffers = self._next()
        values = latent.to(self.device, torch.float32).flatten(1).T @ self._mix.T + self._bias
        _, new = buffers.ring("decoder.conv1", 1, Size(height, width), len(self._bias))
        new.write(buffers.clock, values.view(1, height, width, -1))
        side = PIXELS_PER_CELL
        rows = side * (decoded.stop - decoded.start)
        pixels = torch.empty(3, program.frames, rows, side * width, dtype=torch.float32, device=self.device)
        program.run(pixels)
        return pixels[:, :, side * part.start : side * part.stop]

    def _build(self, buffers: Buffers, first: bool, cells: Size) -> Program:
        config, name = self.config, "decoder"
        program = Program(self._layers, buffers, first, cells, later=1)
        program.input_conv(f"{name}.conv1", buffers.ring(f"{name}.conv1", 1, cells, config.z_dim)[0])
        _middle(program, name)
        temporal, index = tuple(reversed(config.temporal_downsample)), 0
        for level in range(len(config.dim_mult)):
            last_level = level == len(config.dim_mult) - 1
            for block in range(config.res_blocks + 1):
                before_time = block == config.res_blocks and not last_level and temporal[level] and not first
                into = program.time_ring(f"{name}.upsamples.{index + 1}")[1] if before_time else None
                program.residual_block(f"{name}.upsamples.{index}", into)
                index += 1
            if not last_level:
                cut = self._rows(cells.height)[0] if level == 0 and self._part is not None else None
                program.upsample(f"{name}.upsamples.{index}", temporal[level], cut)
                index += 1
        program.head(f"{name}.head")
        return program


def halo(config: VAEConfig) -> int:
    """Rows of latent cells beside a part of the picture that its pixels depend on, below the coarsest level: a row for
    each 3×3 convolution, halved at each doubling of the picture."""
    convolutions = 2 * (config.res_blocks + 1)
    rows = 1  # the head
    for _ in range(len(config.dim_mult) - 1):
        rows = -(-(rows + convolutions + 1) // 2)
    return rows


class EncodeStream(_Stream):
    """Pixels → latent frames. weights: those of `vae.encode_step`, in any float type on any device."""

    def _latent_map(self, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        mix, bias, mean, std = _mixing(weights, "conv1", self.device)
        half = self.config.z_dim  # the other half of the outputs is a variance that nothing reads
        return mix[:half] / std[:, None], (bias[:half] - mean) / std

    def step(self, video: Tensor) -> Tensor:
        """video [3, 1 (first chunk) or 4, 8h, 8w] in -1..1 → normalised latent, fp32 [16, 1, h, w]."""
        frames, height, width = video.shape[1:]
        if frames != (1 if self._first else FRAMES_PER_LATENT):
            raise InputError(f"A stream takes 1 frame, then {FRAMES_PER_LATENT} at a time; got {frames}")
        height, width = height // PIXELS_PER_CELL, width // PIXELS_PER_CELL
        self._prepare(height, width)
        program, buffers = self._next()
        _, new = buffers.ring("encoder.conv1", FRAMES_PER_LATENT, Size(*video.shape[2:]), len(video))
        new.write(buffers.clock, video.to(self.device, torch.float32).permute(1, 2, 3, 0))
        channels = self._mix.shape[1]
        features = torch.empty(channels, 1, height, width, dtype=torch.float32, device=self.device)
        program.run(features)
        return torch.addmm(self._bias[:, None], self._mix, features.flatten(1)).view(-1, 1, height, width)

    def _build(self, buffers: Buffers, first: bool, cells: Size) -> Program:
        config, name = self.config, "encoder"
        size = cells.scaled(PIXELS_PER_CELL)
        program = Program(self._layers, buffers, first, size, later=FRAMES_PER_LATENT)
        program.input_conv(f"{name}.conv1", buffers.ring(f"{name}.conv1", FRAMES_PER_LATENT, size, 3)[0])
        index = 0
        for level in range(len(config.dim_mult)):
            for _ in range(config.res_blocks):
                program.residual_block(f"{name}.downsamples.{index}")
                index += 1
            if level < len(config.dim_mult) - 1:
                program.downsample(f"{name}.downsamples.{index}", config.temporal_downsample[level])
                index += 1
        _middle(program, name)
        program.head(f"{name}.head")
        return program


def _middle(program: Program, name: str) -> None:
    program.residual_block(f"{name}.middle.0")
    program.attention(f"{name}.middle.1")
    program.residual_block(f"{name}.middle.2")


def _mixing(weights: Mapping[str, Tensor], name: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Matrix and bias of the 1×1×1 convolution `name`, and the latent's mean and deviation, all fp32 on the device."""
    weight = weights[f"{name}.weight"].detach().to(device, torch.float32).flatten(1)
    bias = weights[f"{name}.bias"].detach().to(device, torch.float32)
    mean, std = (torch.tensor(values, dtype=torch.float32, device=device) for values in (LATENT_MEAN, LATENT_STD))
    return weight, bias, mean, std
