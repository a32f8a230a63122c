"""Comparison of a stage in two executors, with Polygraphy, NVIDIA's comparison tool.

The comparison with the fp32 stage (`stage_check`) shows whether a stage is correct. The comparison with ONNX Runtime,
which runs the same stored values with the same numerics, isolates errors of a TensorRT compilation. Outputs are
compared by name. The tolerance is that of the coarser executor, relative to the largest value of each output.
"""

import importlib.util
from collections.abc import Sequence

from torch import Tensor

from scail2_rt.kernels.errors import InputError

INSTALL = 'pip install "polygraphy>=0.53"'


def require_polygraphy() -> None:
    """Raise InputError if Polygraphy is not installed."""
    if importlib.util.find_spec("polygraphy") is None:
        raise InputError(f"--against needs Polygraphy, which is not installed. Install it with: {INSTALL}")


def compare(
    names: Sequence[str], actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float
) -> tuple[float, str | None]:
    """Return (error, fault). error: max |actual - expected| / max |expected| of the worst output; fault: text with the
    names of the outputs beyond the tolerance, or None. The shapes of `actual` and `expected` must be equal."""
    from polygraphy.comparator import IterationResult, SimpleCompareFunc
    from polygraphy.logger import G_LOGGER

    def result(tensors: Sequence[Tensor], runner: str) -> "IterationResult":
        return IterationResult(
            {name: t.detach().float().cpu().numpy() for name, t in zip(names, tensors, strict=True)}, runner_name=runner
        )

    scales = {name: float(e.abs().max()) or 1.0 for name, e in zip(names, expected, strict=True)}
    limits = {name: tolerance * scale for name, scale in scales.items()}
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):  # its findings are also returned
        found = SimpleCompareFunc(check_error_stat="max", rtol=0.0, atol=limits)(
            result(actual, "tested"), result(expected, "onnxruntime")
        )
    errors = {name: float(found[name].max_absdiff) / scales[name] for name in names}
    wrong = [f"{name} by {errors[name]:.2g}" for name in names if not found[name]]
    return max(errors.values()), f"differs from onnxruntime in {', '.join(wrong)}" if wrong else None
