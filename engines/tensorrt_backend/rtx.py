"""Running with TensorRT for RTX: kernels are compiled on the RTX card.

This module is typed against the library's bindings only; code shared by both libraries is typed against both. A plan of
this library contains no kernels: they are compiled on the card when a context is created, and kept in a runtime cache,
which one session shares between all its engines (40 blocks need the same kernels) and saves in the engine folder; the
library drops entries of another card or version. Kernels for one shape are compiled at once: by default the library
compiles them in the background and switches while the plan runs, so that a captured step could differ from the eager
one. (Written from the documentation and tested with recorders; not run on a card.)
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
    """The kernels of one session's engines. `folder`: the engine folder, whose cache file is read and saved."""

    def __init__(self, library: Library, folder: Path) -> None:
        self._library, self._path = library, folder / KERNELS / CACHE
        self._cache: rtx.IRuntimeCache | None = None
        self._read = b""

    def new_context(self, engine: Any) -> "rtx.IExecutionContext | None":
        """Return an execution context that uses these kernels and the caller's scratch memory, or None on failure."""
        if TYPE_CHECKING:
            import tensorrt_rtx as rtx
        else:
            rtx = self._library.api()

        typed: rtx.ICudaEngine = engine
        config = typed.create_runtime_config()
        config.set_execution_context_allocation_strategy(rtx.ExecutionContextAllocationStrategy.USER_MANAGED)
        config.cuda_graph_strategy = rtx.CudaGraphStrategy.DISABLED  # the session captures complete steps
        config.dynamic_shapes_kernel_specialization_strategy = rtx.DynamicShapesKernelSpecializationStrategy.EAGER
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            with contextlib.suppress(OSError):  # no file yet, or not readable: kernels are compiled again
                self._read = self._path.read_bytes()
                self._cache.deserialize(self._read)  # returns False and ignores data of another card or version
        if not config.set_runtime_cache(self._cache):
            raise Scail2Error(f"{self._library.title} rejected its runtime cache. Reinstall the library.")
        return typed.create_execution_context(config)

    def save(self) -> None:
        """Save the compiled kernels. If the folder is not writable, the next start compiles them again."""
        if self._cache is None:
            return
        data = bytes(self._cache.serialize())
        self._cache = None
        if data != self._read:
            with contextlib.suppress(OSError):
                self._path.parent.mkdir(exist_ok=True)
                write_file(self._path, data)
