"""The VAE as two streams that process one chunk at a time and keep their causal past in ring buffers on the device.

`DecodeStream` and `EncodeStream` compute the same as a chain of `decode_chunk` or `encode_chunk` (`export.models.vae`),
with the weights of the stages `vae.decode_step` and `vae.encode_step`. Buffers are allocated for the first video size
and kept. A step runs on the current stream and never waits for the GPU: the position in the rings is a counter on the
device. The 1×1×1 convolution beside the latent and the latent's statistics are merged into one small fp32 matrix.
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
    """Choose Triton on a GPU in 16 bits; the library's exact convolutions in fp32 or on a CPU.

    Raises InputError if Triton is needed and cannot be imported."""
    if device.type != "cuda" or dtype == torch.float32:
        return "library"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"the VAE's {str(dtype).removeprefix('torch.')} convolutions on a GPU need Triton, which cannot be "
            f'imported ({error}). Install it with pip install "scail2-rt[gpu]", build with --precision fp32, or use '
            "another --backend."
        ) from error
    return "triton"


class _Stream(ABC):
    """Common part of both halves: weights, one set of buffers, and whether the next chunk is the first."""

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
        """Forget the video; the next chunk is a first one."""
        self._first = True
        if self._buffers is not None:
            self._buffers.reset()

    def close(self) -> None:
        """Free the buffers, which are far larger than the weights, for other users of GPU memory. The weights stay; the
        next chunk is a first one."""
        self._programs, self._buffers, self._cells, self._first = {}, None, None, True
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _prepare(self, height: int, width: int) -> None:
        """Allocate the buffers for latents of height × width cells, unless they exist.

        Raises InputError if the size changes within a video."""
        if self._cells == (height, width):
            return
        if not self._first:
            raise InputError(f"The video changes its size to {height}×{width} latent cells. Reset the stream first.")
        self._programs, self._buffers = {}, None  # frees the old buffers first
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # the allocator's cached blocks are too small for these buffers
        self._buffers = Buffers(self.dtype, self.device)
        self._programs = {first: self._build(self._buffers, first, Size(height, width)) for first in (False, True)}
        self._layers.forget_source()  # all weights have been converted
        self._cells = (height, width)

    @abstractmethod
    def _latent_map(self, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Merge the 1×1×1 convolution beside the latent with the latent's statistics: fp32 matrix and bias."""

    @abstractmethod
    def _build(self, buffers: Buffers, first: bool, cells: Size) -> Program:
        """Build the operations of a first or of a later step."""

    def _next(self) -> tuple[Program, Buffers]:
        if self._buffers is None:
            raise ValueError("the stream has no buffers yet")
        program = self._programs[self._first]
        self._first = False
        return program, self._buffers


class DecodeStream(_Stream):
    """Decodes latent frames to pixels. weights: those of `vae.decode_step`, in any float type on any device.

    part: decode only this strip of the frame. The coarsest level, whose attention covers the complete frame, is
    computed completely (a twentieth of the work), the others with the extra rows that influence the strip (`halo`): so
    its pixels equal those of a complete decode."""

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
        """For a latent of this height, return the rows to decode, and which of them are the strip."""
        if self._part is None:
            return slice(0, height), slice(0, height)
        start, stop = self._part.rows(height)
        margin = halo(self.config)
        decoded = slice(max(start - margin, 0), min(stop + margin, height))
        return decoded, slice(start - decoded.start, stop - decoded.start)

    def _latent_map(self, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        mix, bias, mean, std = _mixing(weights, "conv2", self.device)
        return mix * std, bias + mix @ mean  # applied to latent · std + mean

    def step(self, latent: Tensor) -> Tensor:
        """Decode a normalised latent [16, 1, h, w] → unclamped pixels, fp32 [3, 1 (first chunk) or 4, 8h, 8w]; of a
        strip, only its rows."""
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
    """Return the rows of latent cells beside a strip that its pixels depend on, below the coarsest level: one row per
    3×3 convolution, halved at each doubling of the resolution."""
    convolutions = 2 * (config.res_blocks + 1)
    rows = 1  # the head
    for _ in range(len(config.dim_mult) - 1):
        rows = -(-(rows + convolutions + 1) // 2)
    return rows


class EncodeStream(_Stream):
    """Encodes pixels to latent frames. weights: those of `vae.encode_step`, in any float type on any device."""

    def _latent_map(self, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        mix, bias, mean, std = _mixing(weights, "conv1", self.device)
        half = self.config.z_dim  # the second half of the outputs is a variance, which is not used
        return mix[:half] / std[:, None], (bias[:half] - mean) / std

    def step(self, video: Tensor) -> Tensor:
        """Encode video [3, 1 (first chunk) or 4, 8h, 8w] in -1..1 → normalised latent, fp32 [16, 1, h, w].

        Raises InputError for another number of frames."""
        frames, height, width = video.shape[1:]
        if frames != (1 if self._first else FRAMES_PER_LATENT):
            raise InputError(f"A stream needs 1 frame, then {FRAMES_PER_LATENT} per call, not {frames}.")
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
    """Return matrix and bias of the 1×1×1 convolution `name`, and the latent's mean and deviation, all fp32."""
    weight = weights[f"{name}.weight"].detach().to(device, torch.float32).flatten(1)
    bias = weights[f"{name}.bias"].detach().to(device, torch.float32)
    mean, std = (torch.tensor(values, dtype=torch.float32, device=device) for values in (LATENT_MEAN, LATENT_STD))
    return weight, bias, mean, std
