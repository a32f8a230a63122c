"""CUDA C++ kernels of this package: compiled by NVRTC, cached on disk, launched through the driver.

Only cuda-python is needed, not a CUDA toolkit. The cubin's file name holds a hash of everything it depends on (source,
options, NVRTC's version), so a stale cubin is never used. Kernels run on PyTorch's current stream. Tensor maps are
passed by value, so a captured CUDA graph replays with them; the tensors they describe must then keep their addresses.
PyTorch is imported for launches only: `kernels.ahead` compiles without it.
"""

import ctypes
import functools
import hashlib
import itertools
import operator
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scail2_rt.kernels.cache_folder import kernel_directory
from scail2_rt.kernels.errors import Scail2Error

if TYPE_CHECKING:
    import torch
    from torch import Tensor

HOPPER = (9, 0)
_SHARED_PTX = Path(__file__).with_name("hopper_ptx.cu")
_ELEMENTS = {  # type names of tensor maps; 8-bit types are bytes
    "torch.int8": "UINT8",
    "torch.float8_e4m3fn": "UINT8",
    "torch.float16": "FLOAT16",
    "torch.bfloat16": "BFLOAT16",
}


@dataclass(frozen=True, slots=True)
class Kernel:
    """A `__global__` function named like its .cu file `source_file`, compiled for sm_90a after `hopper_ptx.cu` with
    `defines`. `threads` per block; `shared_bytes` of dynamic shared memory."""

    source_file: Path
    threads: int
    shared_bytes: int  # dynamic
    defines: tuple[tuple[str, int], ...] = ()

    @property
    def name(self) -> str:
        return self.source_file.stem

    def source(self) -> bytes:
        return b"".join(path.read_bytes() for path in (_SHARED_PTX, self.source_file))

    def options(self) -> list[str]:
        return ["--gpu-architecture=sm_90a", "--std=c++17", *(f"-D{name}={value}" for name, value in self.defines)]


def unavailable(kernel: Kernel, device: int) -> str | None:
    """Return None if this GPU can run the kernel, else the reason. Compiles it if necessary."""
    import torch

    found = torch.cuda.get_device_capability(device)
    if found != HOPPER:
        return f"compute capability {found[0]}.{found[1]}; the kernel is for 9.0"
    try:
        _load(kernel, device)
    except Scail2Error as error:
        return str(error)
    return None


def compile_cubin(kernel: Kernel) -> bytes:
    """Return the kernel's machine code, from disk or from NVRTC; needs no GPU.

    Raises Scail2Error with NVRTC's messages if it does not compile, or if cuda-python is missing."""
    nvrtc = _bindings("nvrtc")
    source, options = kernel.source(), kernel.options()
    version = _call(nvrtc.nvrtcVersion)
    key = hashlib.sha256(b"\0".join((source, " ".join(options).encode(), repr(version).encode()))).hexdigest()
    path = kernel_directory() / f"{kernel.name}-{key[:20]}.cubin"
    if path.is_file():
        return path.read_bytes()
    cubin = _nvrtc_compile(nvrtc, kernel.name, source, options)
    _write_atomically(path, cubin)
    return cubin


def launch(kernel: Kernel, grid: tuple[int, int], arguments: Sequence[Any], device: "torch.device") -> None:
    """Run the kernel on the current stream. `arguments`: ctypes values and structures in the kernel's order.

    Raises Scail2Error if the driver reports an error."""
    import torch

    index = device.index if device.index is not None else torch.cuda.current_device()
    function = _load(kernel, index)
    addresses = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
    stream = torch.cuda.current_stream(device).cuda_stream
    with torch.cuda.device(index):
        _make_current(index)
        _call(
            _bindings("driver").cuLaunchKernel,
            *(function, *grid, 1, kernel.threads, 1, 1, kernel.shared_bytes),
            *(stream, ctypes.addressof(addresses), 0),
        )


def pointer(tensor: "Tensor") -> ctypes.c_void_p:
    """Return the tensor's address as a kernel argument."""
    return ctypes.c_void_p(tensor.data_ptr())


def tensor_map(
    tensor: "Tensor", sizes: Sequence[int], box: Sequence[int], swizzle: int, strides: Sequence[int] | None = None
) -> Any:
    """Encode a TMA descriptor of `tensor`'s storage from its first element on; returns an array of 128 bytes.

    sizes and box: elements per dimension, fastest first; reads outside `sizes` give zeros. swizzle: 64 or 128 bytes.
    strides: in elements, of all dimensions but the first, which is contiguous; None: all dimensions are contiguous.
    The driver requires a descriptor aligned to 64 bytes, which cuda-python's wrapper does not guarantee; hence ctypes.
    Raises Scail2Error if the driver rejects it."""
    driver = _bindings("driver")
    storage = (ctypes.c_ubyte * 192)()
    descriptor = (ctypes.c_ubyte * 128).from_buffer(storage, -ctypes.addressof(storage) % 64)  # keeps `storage` alive
    rank = len(sizes)
    pitches = [tensor.element_size() * s for s in strides or itertools.accumulate(sizes[:-1], operator.mul)]
    element = getattr(driver.CUtensorMapDataType, f"CU_TENSOR_MAP_DATA_TYPE_{_ELEMENTS[str(tensor.dtype)]}")
    pattern = getattr(driver.CUtensorMapSwizzle, f"CU_TENSOR_MAP_SWIZZLE_{swizzle}B")
    code = _encoder()(
        ctypes.byref(descriptor),
        ctypes.c_int(int(element)),
        ctypes.c_uint32(rank),
        ctypes.c_void_p(tensor.data_ptr()),
        (ctypes.c_uint64 * rank)(*sizes),
        (ctypes.c_uint64 * (rank - 1))(*pitches),
        (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        ctypes.c_int(int(driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE)),
        ctypes.c_int(int(pattern)),
        ctypes.c_int(int(driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B)),
        ctypes.c_int(int(driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE)),
    )
    if code != 0:
        raise Scail2Error(f"cuTensorMapEncodeTiled failed for {sizes} in {box}: {driver.CUresult(code).name}")
    return descriptor


@functools.cache
def _encoder() -> Any:
    encode = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled
    encode.restype = ctypes.c_int
    return encode


@functools.cache
def _bindings(name: str) -> Any:
    """cuda.bindings.driver or cuda.bindings.nvrtc."""
    import importlib

    try:
        return importlib.import_module(f"cuda.bindings.{name}")
    except ImportError as error:
        raise Scail2Error(f"cuda-python is missing ({error}). Install it with: pip install cuda-python") from error


@functools.cache
def _load(kernel: Kernel, device: int) -> Any:
    """Load the function and raise its shared memory limit. Loading synchronises: do it before capturing a graph."""
    import torch

    driver = _bindings("driver")
    cubin = compile_cubin(kernel)
    with torch.cuda.device(device):
        _make_current(device)
        module = _call(driver.cuModuleLoadData, cubin)
        function = _call(driver.cuModuleGetFunction, module, kernel.name.encode())
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _call(driver.cuFuncSetAttribute, function, limit, kernel.shared_bytes)
    return function


@functools.cache
def _primary_context(device: int) -> Any:
    driver = _bindings("driver")
    _call(driver.cuInit, 0)
    return _call(driver.cuDevicePrimaryCtxRetain, _call(driver.cuDeviceGet, device))


def _make_current(device: int) -> None:
    """Make the device's context current: the driver needs one, and a thread new to CUDA has none."""
    _call(_bindings("driver").cuCtxSetCurrent, _primary_context(device))


def _call(function: Any, *arguments: Any) -> Any:
    """Call a function of cuda.bindings and return its results without the return code.

    Raises Scail2Error naming the code if it is not 0, or if the shared library is missing."""
    try:
        code, *results = function(*arguments)
    except RuntimeError as error:  # the shared library is missing
        raise Scail2Error(f"{function.__name__}: {error}") from error
    if int(code) != 0:
        raise Scail2Error(f"{function.__name__} failed: {code.name}")
    return results[0] if len(results) == 1 else tuple(results)


def _nvrtc_compile(nvrtc: Any, name: str, source: bytes, options: list[str]) -> bytes:
    program = _call(nvrtc.nvrtcCreateProgram, source, f"{name}.cu".encode(), 0, [], [])
    try:
        (code,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        if int(code) != 0:
            log = b" " * _call(nvrtc.nvrtcGetProgramLogSize, program)
            _call(nvrtc.nvrtcGetProgramLog, program, log)
            raise Scail2Error(f"NVRTC could not compile {name} ({code.name}): {log.decode(errors='replace')}")
        cubin = b" " * _call(nvrtc.nvrtcGetCUBINSize, program)
        _call(nvrtc.nvrtcGetCUBIN, program, cubin)
        return cubin
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _write_atomically(path: Path, data: bytes) -> None:
    """Write the file through a temporary one. A failure is ignored: the kernel is then compiled again next time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as partial:
            partial.write(data)
        os.replace(partial.name, path)
    except OSError:
        return
