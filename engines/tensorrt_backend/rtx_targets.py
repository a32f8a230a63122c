"""Build targets of TensorRT for RTX: typed against the library's bindings, and without PyTorch, for the compiling
process."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from scail2_rt.engines.tensorrt_backend.library import Library
from scail2_rt.kernels.errors import Scail2Error


def set_targets(library: Library, config: Any, targets: Sequence[str]) -> None:
    """Compile for these architectures ("sm89"), independent of this machine. Raises Scail2Error if unknown."""
    if TYPE_CHECKING:
        import tensorrt_rtx as rtx
    else:
        rtx = library.api()

    typed: rtx.IBuilderConfig = config
    typed.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        if not typed.set_compute_capability(rtx.ComputeCapability.__members__[target.upper()], index):
            raise Scail2Error(f"{library.title} does not support the target {target}. Choose another --target.")
