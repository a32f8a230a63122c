"""Running with TensorRT for RTX: kernels are compiled on the card.

Typed against its own bindings alone; what both libraries have is typed against those of both. A plan of this library
holds no kernels: they are compiled on the card when a context is made, and kept in a runtime cache, which one session
shares between all its engines (40 blocks need the same kernels) and saves in the engine folder; the library itself
drops what another card or version left there. Kernels for one shape are made at once: by default the library makes them
in the background and changes over while the plan runs, so that a recorded step could differ from the eager one.
(Written from its documentation and tested on recorders; not run by us on a card.)
"""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scail2_rt.engines.folder.manifest import KERNELS
from scail2_rt.engines.tensorrt_backend.compiling import write_file
from scail2_rt.engines.tensorrt_backend.library import Library
from scail2_rt.kernels.errors import Scail2Error

if TYPE_CHECKING:
    import tensorrt_rtx as rtx

CACHE = "tensorrt-rtx.cache"


class KernelCache:
    """The kernels of one session's engines; `folder`: the engine folder, whose file is read and, by `save`, written."""

    def __init__(self, library: Library, folder: Path) -> None:
        self._library, self._path = library, folder / KERNELS / CACHE
        self._cache: rtx.IRuntimeCache | None = None
        self._read = b""

    def new_context(self, engine: Any) -> "rtx.IExecutionContext | None":
        """An execution context whose scratch memory is the caller's, with kernels from here."""
        if TYPE_CHECKING:
            import tensorrt_rtx as rtx
        else:
            rtx = self._library.api()

        typed: rtx.ICudaEngine = engine
        config = typed.create_runtime_config()
        config.set_execution_context_allocation_strategy(rtx.ExecutionContextAllocationStrategy.USER_MANAGED)
        config.cuda_graph_strategy = rtx.CudaGraphStrategy.DISABLED  # steps are recorded whole, by the session
        config.dynamic_shapes_kernel_specialization_strategy = rtx.DynamicShapesKernelSpecializationStrategy.EAGER
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            with contextlib.suppress(OSError):  # none yet, or not readable: kernels are compiled again
                self._read = self._path.read_bytes()
                self._cache.deserialize(self._read)  # False, and nothing taken, for another card or version
        if not config.set_runtime_cache(self._cache):
            raise Scail2Error(f"{self._library.title} refused its own runtime cache; its installation seems damaged.")
        return typed.create_execution_context(config)

    def save(self) -> None:
        """Keep what was compiled. A folder that cannot be written costs the next start its time, and nothing else."""
        if self._cache is None:
            return
        data = bytes(self._cache.serialize())
        self._cache = None
        if data != self._read:
            with contextlib.suppress(OSError):
                self._path.parent.mkdir(exist_ok=True)
                write_file(self._path, data)
