"""Comparison of a stage with its reference: random inputs, the fp32 stage, errors, times, and CUDA graph replay.

The reference is the PyTorch module of the stage in fp32 on the CPU, with weights read from the checkpoint. It does not
depend on the weight store or the build. Inputs are random with the scale of real ones (order one, nowhere zero). Flags,
masks and relative positions are as in a run. Tolerances are based on the worst errors of the tiny checkpoint's stages
on a CPU: fp32 3e-6, fp16 3e-3, bf16 6e-3, fp8 5e-2.
"""

import statistics
import time
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from scail2_rt.export.models.config import ModelConfig
from scail2_rt.export.models.precision import FP32, Numerics
from scail2_rt.export.models.umt5 import relative_buckets
from scail2_rt.export.onnx.stages import split_dim
from scail2_rt.export.stages.spec import ROWS, StageDefinition
from scail2_rt.kernels.errors import Scail2Error

if TYPE_CHECKING:
    from scail2_rt.export.checkpoint.tensors import TensorSource

# coarsest type of storage and arithmetic → largest max |actual - reference| / max |reference|
TOLERANCES = {"fp32": 2e-5, "fp16": 1e-2, "bf16": 2e-2, "fp8": 1.5e-1}
CLIP_TOKENS = 257
PROMPT_TOKENS = 48
LATENT = (4, 6)  # h, w of the latent: 32×48 pixels


def level(numerics: Numerics) -> str:
    """Return the key of `TOLERANCES`: the coarser type of storage and arithmetic."""
    types = {numerics.storage, numerics.compute}
    if numerics.fp8:
        return "fp8"
    return "bf16" if torch.bfloat16 in types else "fp16" if torch.float16 in types else "fp32"


def stage_inputs(definition: StageDefinition, config: ModelConfig, rows: int, seed: int) -> list[Tensor]:
    """Return the inputs of a stage in fp32 (positions in int64). They depend only on the stage, sizes and seed. rows:
    number of rows of a token-wise stage."""
    text = 0 if config.dit is None else config.dit.text_len
    image = CLIP_TOKENS if config.clip is None else config.clip.tokens
    sizes = {"": 1, ROWS: rows, "t": text, "i": image, "n": PROMPT_TOKENS, "h": LATENT[0], "w": LATENT[1]}
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {definition.name}".encode()))
    tensors = []
    for spec in definition.io(FP32)[0]:
        shape = [factor * sizes[symbol] for factor, symbol in map(split_dim, spec.dims)]
        values = torch.randn(shape, generator=generator)
        kind = (definition.component, spec.name)
        if spec.dtype == torch.int64 and config.umt5 is not None:
            values = relative_buckets(shape[0], config.umt5.buckets, config.umt5.max_distance)
        elif kind == ("dit", "driving"):
            values = (torch.arange(rows) % 3 == 0).float()[:, None]
        elif kind == ("umt5", "mask"):
            values = (torch.arange(shape[0]) < shape[0] * 3 // 4).float()
        elif kind == ("dit", "mask"):
            values = torch.rand(shape, generator=generator)
        elif kind == ("dit", "mod"):
            values = values / 2
        elif kind == ("vae", "video"):
            values = (values / 2).clamp(-1, 1)
        tensors.append(values)
    return tensors


class Reference:
    """The stage in fp32 on the CPU, with weights from the checkpoint."""

    def __init__(self, definition: StageDefinition, source: "TensorSource") -> None:
        with torch.device("meta"):
            module = definition.build(FP32)
        shapes = {name: value.shape for name, value in module.state_dict().items()}
        weights = {
            name: torch.cat([source.get(key).float().reshape(-1) for key in keys]).view(shapes[name])
            for name, keys in definition.weights.items()
        }
        module.load_state_dict(weights, assign=True)
        self._module = module.eval()

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the outputs in fp32. Floating-point inputs are converted to fp32."""
        with torch.inference_mode():
            outputs = self._module(*(x.float() if x.is_floating_point() else x for x in inputs))
        return outputs if isinstance(outputs, tuple) else (outputs,)


def worst_error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float | None:
    """Return max |actual - expected| / max |expected| of the worst output. For an expected output of zeros, such as an
    initial cache, it is the absolute error. Returns None for different shapes or values that are not finite.

    Raises Scail2Error if all expected outputs are zero."""
    if not any(bool(e.any()) for e in expected):
        raise Scail2Error("All outputs of the fp32 stage are zero, so nothing can be compared. Check the checkpoint.")
    errors = []
    for a, e in zip(actual, expected, strict=True):
        a = a.detach().float().cpu()
        if a.shape != e.shape or not a.isfinite().all():
            return None
        scale = float(e.abs().max())
        errors.append(float((a - e).abs().max()) / (scale or 1.0))
    return max(errors)


def median_s(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Return the median seconds of `repeats` synchronised calls. The call must have run once before (warm-up)."""
    seconds = []
    for _ in range(repeats):
        _wait(device)
        started = time.perf_counter()
        call()
        _wait(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def replayed(call: Callable[[], tuple[Tensor, ...]], eager: Sequence[Tensor]) -> float:
    """Record the call as a CUDA graph, replay it twice, and return max |replayed - eager| over all outputs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        outputs = call()
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    return max(float((a.float() - b.float()).abs().max()) for a, b in zip(outputs, eager, strict=True))
