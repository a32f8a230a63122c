"""Does a stage compute in one executor what it computes in another? Compared by Polygraphy, NVIDIA's tool for it.

The plain fp32 stage from the checkpoint tells whether a stage is right at all; against ONNX Runtime, which runs the
same stored values by the same rules, what a compiler did to it stands alone. Outputs are compared by name; the
tolerance is that of the coarser of both, by the largest value of each output.
"""

import importlib.util
from collections.abc import Sequence

from torch import Tensor

from scail2_rt.kernels.errors import InputError

INSTALL = 'pip install "polygraphy>=0.53"'


def require_polygraphy() -> None:
    """InputError without it."""
    if importlib.util.find_spec("polygraphy") is None:
        raise InputError(f"--against compares with Polygraphy, which is not installed; install it with {INSTALL}.")


def compare(
    names: Sequence[str], actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float
) -> tuple[float, str | None]:
    """(largest error of an output by its largest expected value, what differs in words or None). Shapes are equal."""
    from polygraphy.comparator import IterationResult, SimpleCompareFunc
    from polygraphy.logger import G_LOGGER

    def result(tensors: Sequence[Tensor], runner: str) -> "IterationResult":
        return IterationResult(
            {name: t.detach().float().cpu().numpy() for name, t in zip(names, tensors, strict=True)}, runner_name=runner
        )

    scales = {name: float(e.abs().max()) or 1.0 for name, e in zip(names, expected, strict=True)}
    limits = {name: tolerance * scale for name, scale in scales.items()}
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):  # its findings are returned, too
        found = SimpleCompareFunc(check_error_stat="max", rtol=0.0, atol=limits)(
            result(actual, "tested"), result(expected, "onnxruntime")
        )
    errors = {name: float(found[name].max_absdiff) / scales[name] for name in names}
    wrong = [f"{name} by {errors[name]:.2g}" for name in names if not found[name]]
    return max(errors.values()), f"differs from onnxruntime in {', '.join(wrong)}" if wrong else None
