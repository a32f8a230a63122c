"""8-bit self-attention in CUDA C++ for Hopper (sm_90): compiles, keeps, and launches `hopper_attention.cu`.

The source goes through NVRTC, so a CUDA toolkit is not needed, only cuda-python. The cubin is kept on disk under a
name that holds the hash of all it depends on (source, options, NVRTC's version): a stale one is never found. It is
launched through the driver on PyTorch's current stream. The three tensor maps are passed by value, so a captured CUDA
graph replays with them; the tensors they describe must then stay where they are.
"""

import ctypes
import functools
import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from scail2_rt.export.cache import cache_directory
from scail2_rt.export.errors import Scail2Error

if TYPE_CHECKING:
    from scail2_rt.kernels.eight_bit import Prepared8

SOURCE = Path(__file__).with_name("hopper_attention.cu")
KERNEL = b"hopper_attention"
WIDTH = 128  # head width
KEYS = 128  # keys a tile
CAPABILITY = (9, 0)


@dataclass(frozen=True, slots=True)
class Build:
    """The switches of the source, which explains them. The default is the one to use; the others are for timing it."""

    warpgroups: int = 3
    stages: int = 4
    pingpong: int = 1
    lazy: bool = True
    magic: bool = True
    overlap: bool = False

    def __post_init__(self) -> None:
        if self.warpgroups not in (2, 3) or self.pingpong not in (0, 1, 2) or not 2 <= self.stages <= 6:
            raise ValueError(f"{self}: needs 2 or 3 warpgroups, pingpong 0 to 2, 2 to 6 stages")
        if self.overlap and self.warpgroups != 2:
            raise ValueError(f"{self}: overlap needs the registers of 2 warpgroups")

    @property
    def rows(self) -> int:
        """Query rows a block."""
        return 64 * self.warpgroups

    @property
    def threads(self) -> int:
        return 128 * (self.warpgroups + 1)

    @property
    def shared_bytes(self) -> int:
        """1024 to align, Q, both rings, barriers."""
        return 1024 + self.rows * WIDTH + 2 * self.stages * KEYS * WIDTH + 8 + 32 * self.stages

    def options(self) -> list[str]:
        switches = {
            "NWG": self.warpgroups,
            "STAGES": self.stages,
            "PINGPONG": self.pingpong,
            "LAZY": int(self.lazy),
            "MAGIC": int(self.magic),
            "OVERLAP": int(self.overlap),
        }
        return ["--gpu-architecture=sm_90a", "--std=c++17", *(f"-D{name}={value}" for name, value in switches.items())]


DEFAULT = Build()


def available() -> str | None:
    """None if this process can run the kernel on the current GPU, else the reason why not. Compiles it if need be."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    return _availability(torch.cuda.current_device())


def hopper_attention(prepared: "Prepared8", out: Tensor, build: Build = DEFAULT) -> Tensor:
    """Softmax attention over all `prepared.tokens` = L tokens, written to `out` bf16 [L, H·128], which is returned.

    Needs fp8 V (`v_scale` present), head width 128, contiguous tensors on one sm_90 GPU."""
    heads, padded = _checked_shapes(prepared, out)
    if heads == 0 or prepared.tokens == 0:
        return out
    driver = _bindings("driver")
    kernel = _kernel(build, prepared.q.device.index)
    maps = (
        _tensor_map(prepared.q, (WIDTH, padded, heads), build.rows),
        _tensor_map(prepared.k, (WIDTH, padded, heads), KEYS),
        _tensor_map(prepared.v, (padded, WIDTH, heads), WIDTH),
    )
    tensors = (prepared.q_scale, prepared.k_scale, prepared.v_scale, prepared.v_shift, out)
    numbers = (prepared.tokens, padded // KEYS, heads)
    values: list[Any] = [ctypes.c_void_p(t.data_ptr()) for t in tensors if t is not None]  # none is: checked
    values += [ctypes.c_int(n) for n in numbers]
    addresses = [ctypes.addressof(m) for m in maps] + [ctypes.addressof(v) for v in values]
    arguments = (ctypes.c_void_p * len(addresses))(*addresses)
    blocks = -(-prepared.tokens // build.rows)  # of one head, neighbours: they read the same keys
    stream = torch.cuda.current_stream(out.device).cuda_stream
    with torch.cuda.device(out.device):
        _make_current(out.device.index)
        _call(
            driver.cuLaunchKernel,
            *(kernel, blocks, heads, 1, build.threads, 1, 1, build.shared_bytes),
            *(stream, ctypes.addressof(arguments), 0),
        )
    return out


def compile_cubin(build: Build = DEFAULT) -> bytes:
    """The kernel's machine code, from disk or from NVRTC; needs no GPU. Raises `Scail2Error` with NVRTC's messages."""
    nvrtc = _bindings("nvrtc")
    source, options = SOURCE.read_bytes(), build.options()
    version = _call(nvrtc.nvrtcVersion)
    key = hashlib.sha256(b"\0".join((source, " ".join(options).encode(), repr(version).encode()))).hexdigest()
    path = kernel_directory() / f"hopper_attention-{key[:20]}.cubin"
    if path.is_file():
        return path.read_bytes()
    cubin = _nvrtc_compile(nvrtc, source, options)
    _write_atomically(path, cubin)
    return cubin


def kernel_directory() -> Path:
    """$SCAIL2_RT_KERNELS, or `kernels` in this program's cache."""
    own = os.environ.get("SCAIL2_RT_KERNELS")
    return Path(own) if own else cache_directory() / "kernels"


def _checked_shapes(prepared: "Prepared8", out: Tensor) -> tuple[int, int]:
    """→ heads, padded length; the kernel trusts its pointers, so nothing else may pass."""
    heads, padded, width = prepared.q.shape
    if prepared.v_scale is None or prepared.v_shift is None:
        raise ValueError("the Hopper kernel multiplies by fp8 V; these operands hold V in 16 bits")
    if width != WIDTH or padded != -(-prepared.tokens // KEYS) * KEYS:
        raise ValueError(
            f"q {list(prepared.q.shape)} for {prepared.tokens} tokens: needs head width {WIDTH}, padding {KEYS}"
        )
    expected: list[tuple[str, Tensor, tuple[int, ...], torch.dtype]] = [
        ("q", prepared.q, (heads, padded, WIDTH), torch.int8),
        ("k", prepared.k, (heads, padded, WIDTH), torch.int8),
        ("v", prepared.v, (heads, WIDTH, padded), torch.float8_e4m3fn),
        ("q_scale", prepared.q_scale, (heads, padded), torch.float32),
        ("k_scale", prepared.k_scale, (heads, padded // KEYS), torch.float32),
        ("v_scale", prepared.v_scale, (heads, WIDTH), torch.float32),
        ("v_shift", prepared.v_shift, (heads, WIDTH), torch.float32),
        ("out", out, (prepared.tokens, heads * WIDTH), torch.bfloat16),
    ]
    for name, tensor, shape, dtype in expected:
        if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous() or tensor.device != out.device:
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}; "
                f"needed: contiguous {dtype} {list(shape)} on {out.device}"
            )
    if out.device.type != "cuda":
        raise ValueError(f"the Hopper kernel needs tensors on a GPU, not on {out.device}")
    return heads, padded


def _tensor_map(tensor: Tensor, sizes: tuple[int, int, int], rows: int) -> Any:
    """Bytes as a 3-D tensor, `sizes` fastest first; boxes of 128 bytes × `rows` × 1, 128-byte swizzle, zeros outside.

    The driver asks for a descriptor at a multiple of 64 bytes, which cuda-python's own wrapper does not give: hence
    ctypes. → an array of the descriptor's 128 bytes that lies so."""
    driver = _bindings("driver")
    storage = (ctypes.c_ubyte * 192)()
    descriptor = (ctypes.c_ubyte * 128).from_buffer(storage, -ctypes.addressof(storage) % 64)  # keeps `storage` alive
    encode = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled
    encode.restype = ctypes.c_int
    code = encode(
        ctypes.byref(descriptor),
        ctypes.c_int(int(driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT8)),
        ctypes.c_uint32(3),
        ctypes.c_void_p(tensor.data_ptr()),
        (ctypes.c_uint64 * 3)(*sizes),
        (ctypes.c_uint64 * 2)(sizes[0], sizes[0] * sizes[1]),  # bytes from one row, one plane to the next
        (ctypes.c_uint32 * 3)(128, rows, 1),
        (ctypes.c_uint32 * 3)(1, 1, 1),
        ctypes.c_int(int(driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE)),
        ctypes.c_int(int(driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B)),
        ctypes.c_int(int(driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B)),
        ctypes.c_int(int(driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE)),
    )
    if code != 0:
        raise Scail2Error(f"cuTensorMapEncodeTiled failed for sizes {sizes}: {driver.CUresult(code).name}")
    return descriptor


@functools.cache
def _availability(device: int) -> str | None:
    found = torch.cuda.get_device_capability(device)
    if found != CAPABILITY:
        return f"compute capability {found[0]}.{found[1]}; the kernel is for 9.0"
    try:
        _kernel(DEFAULT, device)
    except Scail2Error as error:
        return str(error)
    return None


@functools.cache
def _bindings(name: str) -> Any:
    """cuda.bindings.driver or cuda.bindings.nvrtc."""
    import importlib

    try:
        return importlib.import_module(f"cuda.bindings.{name}")
    except ImportError as error:
        raise Scail2Error(f"cuda-python is missing ({error}); pip install cuda-python") from error


@functools.cache
def _kernel(build: Build, device: int) -> Any:
    """The loaded function, its shared memory limit raised. Loading synchronises, so do it before capturing a graph."""
    driver = _bindings("driver")
    cubin = compile_cubin(build)
    with torch.cuda.device(device):
        _make_current(device)
        module = _call(driver.cuModuleLoadData, cubin)
        kernel = _call(driver.cuModuleGetFunction, module, KERNEL)
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _call(driver.cuFuncSetAttribute, kernel, limit, build.shared_bytes)
    return kernel


@functools.cache
def _primary_context(device: int) -> Any:
    driver = _bindings("driver")
    _call(driver.cuInit, 0)
    return _call(driver.cuDevicePrimaryCtxRetain, _call(driver.cuDeviceGet, device))


def _make_current(device: int) -> None:
    """The driver needs a current context; a thread that has not called CUDA's runtime yet has none."""
    _call(_bindings("driver").cuCtxSetCurrent, _primary_context(device))


def _call(function: Any, *arguments: Any) -> Any:
    """Calls a function of cuda.bindings; its results without the return code, or `Scail2Error` naming the code."""
    try:
        code, *results = function(*arguments)
    except RuntimeError as error:  # the shared library is missing
        raise Scail2Error(f"{function.__name__}: {error}") from error
    if int(code) != 0:
        raise Scail2Error(f"{function.__name__} failed: {code.name}")
    return results[0] if len(results) == 1 else tuple(results)


def _nvrtc_compile(nvrtc: Any, source: bytes, options: list[str]) -> bytes:
    program = _call(nvrtc.nvrtcCreateProgram, source, SOURCE.name.encode(), 0, [], [])
    try:
        (code,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        if int(code) != 0:
            log = b" " * _call(nvrtc.nvrtcGetProgramLogSize, program)
            _call(nvrtc.nvrtcGetProgramLog, program, log)
            raise Scail2Error(f"NVRTC could not compile {SOURCE.name} ({code.name}): {log.decode(errors='replace')}")
        cubin = b" " * _call(nvrtc.nvrtcGetCUBINSize, program)
        _call(nvrtc.nvrtcGetCUBIN, program, cubin)
        return cubin
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _write_atomically(path: Path, data: bytes) -> None:
    """A cache that cannot be written is not a fault: the kernel is compiled again next time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as partial:
            partial.write(data)
        os.replace(partial.name, path)
    except OSError:
        return
