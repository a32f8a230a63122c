"""Objects that all TensorRT engines of a process share on one device: runtime, messages, scratch memory, stream.

Stages never overlap on a stream, so one scratch block, as large as the largest stage needs, serves all; it grows when a
larger stage is loaded. Memory captured in a CUDA graph is never freed before the session closes, because the graph
continues to use it. TensorRT must not run on the default stream (it would synchronise with it on every call); if the
caller is on it, work runs on a stream of the session, ordered before and after.
`CudaDevice` is the only code here that knows CUDA; the tests replace it with another device.
"""

import contextlib
import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from scail2_rt.engines.tensorrt_backend.library import (
    ErrorList,
    Library,
    error_recorder,
    process_log,
    process_logger,
    require_library,
)
from scail2_rt.engines.tensorrt_backend.rtx import KernelCache
from scail2_rt.kernels.errors import InputError, Scail2Error

if TYPE_CHECKING:
    import tensorrt as trt

ALIGNMENT = 256  # bytes; for scratch memory, inputs and outputs


class Device(Protocol):
    """The device that engines run on."""

    torch_device: torch.device

    def stream(self) -> contextlib.AbstractContextManager[int]:
        """Yield the handle of a stream that is not the default stream. Its work is ordered after the caller's earlier
        work and before the caller's later work."""
        ...

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Allocate a contiguous tensor at an aligned address."""
        ...

    def capturing(self) -> bool:
        """Return whether a CUDA graph is being captured on the current stream."""
        ...

    def synchronize(self) -> None:
        """Wait until all launched work is complete."""
        ...


class CudaDevice:
    """A GPU, through PyTorch."""

    def __init__(self, torch_device: torch.device) -> None:
        if torch_device.type != "cuda":
            raise InputError(f"plans run on a CUDA GPU, and the device {torch_device} was named. Use --backend torch.")
        index = torch.cuda.current_device() if torch_device.index is None else torch_device.index
        self.torch_device = torch.device("cuda", index)
        self._own: torch.cuda.Stream | None = None

    @contextlib.contextmanager
    def stream(self) -> Iterator[int]:
        with torch.cuda.device(self.torch_device):
            current = torch.cuda.current_stream(self.torch_device)
            if current.cuda_stream != 0:
                yield current.cuda_stream
                return
            if self._own is None:
                self._own = torch.cuda.Stream(self.torch_device)
            self._own.wait_stream(current)
            try:
                yield self._own.cuda_stream
            finally:
                current.wait_stream(self._own)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=self.torch_device)  # PyTorch aligns blocks to 512 bytes

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch_device)


class SharedScratch:
    """One aligned block of device memory for the activations of every engine on the session's stream."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._block: Tensor | None = None
        self._recorded: list[Tensor] = []
        self.size = 0

    @property
    def pointer(self) -> int:
        """Address of the block; it changes when the block grows."""
        if self._block is None:
            return 0
        return -(-self._block.data_ptr() // ALIGNMENT) * ALIGNMENT

    def reserve(self, size: int) -> None:
        """Make the block at least `size` bytes. Raises Scail2Error if the device has too little free memory."""
        size = -(-max(size, 1) // ALIGNMENT) * ALIGNMENT
        if self._block is not None and size <= self.size:
            return
        self._device.synchronize()  # running work uses the old block
        self._block = None
        try:
            self._block = torch.empty(size + ALIGNMENT, dtype=torch.uint8, device=self._device.torch_device)
        except torch.cuda.OutOfMemoryError as error:
            self.size = 0
            raise Scail2Error(
                f"TensorRT needs {size / 2**30:.2f} GiB of scratch memory on {self._device.torch_device}; too little "
                "is free. End other programs on the GPU, lower --max-rows, or build the engines for smaller frames."
            ) from error
        self.size = size

    def keep(self) -> None:
        """Keep the block, which a CUDA graph has captured, until `close`, even if a larger one replaces it."""
        if self._block is not None and not any(block is self._block for block in self._recorded):
            self._recorded.append(self._block)

    def close(self) -> None:
        self._block, self.size = None, 0
        self._recorded.clear()


class TensorRTSession:
    """A library's runtime on one device. Close the engines first.

    folder: the engine folder, where a library that compiles on the card saves its kernels. Raises InputError if the
    library is missing or too old, Scail2Error if it cannot start."""

    def __init__(self, library: Library, device: Device, folder: Path) -> None:
        require_library(library)
        if TYPE_CHECKING:
            import tensorrt as trt
        else:
            trt = library.api()

        self.library, self.device = library, device
        self.scratch = SharedScratch(device)
        self._errors = ErrorList()
        self._recorder = error_recorder(library, self._errors)
        try:
            self._runtime: trt.Runtime | None = trt.Runtime(process_logger(library))
        except (TypeError, RuntimeError) as error:
            raise self.failure(f"the runtime of {library.title} cannot start on this machine") from error
        self._runtime.error_recorder = self._recorder
        self._kernels = KernelCache(library, folder) if library.targets else None

    def new_context(self, engine: "trt.ICudaEngine") -> "trt.IExecutionContext | None":
        """Return a context that uses the caller's scratch memory."""
        if TYPE_CHECKING:
            import tensorrt as trt
        else:
            trt = self.library.api()

        if self._kernels is not None:
            return self._kernels.new_context(engine)
        return engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)

    def load(self, path: Path, stage: str, remedy: str) -> "trt.ICudaEngine":
        """Load the engine in a plan file. Raises InputError with `remedy` if it is missing or cannot run here."""
        if self._runtime is None:
            raise Scail2Error(
                f"stage {stage} was loaded after its TensorRT session was closed. Open the engines again."
            )
        self.forget()
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
                engine = self._runtime.deserialize_cuda_engine(plan)
        except (OSError, ValueError) as error:
            raise InputError(
                f"the plan of stage {stage} cannot be read: {error}. Build it again with: {remedy}"
            ) from error
        if engine is None:
            raise InputError(
                f"{self.library.title} rejects the plan {path} of stage {stage}: {self.said()}. Build it again "
                f"with: {remedy}"
            )
        return engine

    def forget(self) -> None:
        """Drop earlier messages, so that a failure reports only its messages."""
        self._errors.clear()
        process_log(self.library).clear()

    def said(self) -> str:
        """Return the errors of recorder and logger as one text."""
        texts = list(dict.fromkeys([*self._errors.texts(), *process_log(self.library).recent()]))
        return "; ".join(text for text in texts if not any(text in other and text != other for other in texts)) or (
            "it gave no message"
        )

    def failure(self, what: str) -> Scail2Error:
        """Make an error from the fault `what` and TensorRT's messages."""
        return Scail2Error(f"{what}. {self.library.title} said: {self.said()}.")

    def close(self) -> None:
        if self._kernels is not None:
            self._kernels.save()
        self.scratch.close()
        self._runtime = None
