"""The 16-bit CUDA C++ attention for Hopper: operand layouts and compilation anywhere, results against fp32 on sm_90."""

import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from scail2_rt.kernels.attention import hopper_attention_16bit as hopper
from scail2_rt.kernels.attention.variants import choose_attention
from scail2_rt.kernels.cache_folder import use_kernel_cache
from scail2_rt.kernels.cuda import nvrtc
from scail2_rt.kernels.cuda.nvrtc import compile_cubin
from scail2_rt.kernels.errors import Scail2Error

WIDTH = 128
UNAVAILABLE = hopper.available(torch.bfloat16)
needs_hopper = pytest.mark.skipif(UNAVAILABLE is not None, reason=f"CUDA C++ kernel: {UNAVAILABLE}")
LIMITS = {torch.bfloat16: 0.006, torch.float16: 0.0015}  # relative, of P and the output rounded once each
SIZES = [(1, 1), (1, 3), (79, 2), (80, 1), (81, 3), (191, 2), (193, 1), (1000, 3), (4001, 3), (1000, 40)]


def operands(
    tokens: int,
    heads: int,
    dtype: torch.dtype,
    device: str,
    v_shift: float = 0,
    k_shift: float = 0,
    sharpness: float = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Views as the preparation makes them: q and k of [L, C] buffers, v of qkv. Shifts are common to all tokens."""
    gen, c = torch.Generator().manual_seed(tokens * 64 + heads), heads * WIDTH

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen)

    q, k = randn(tokens, c) * sharpness, randn(tokens, c) + k_shift * randn(c)
    qkv = randn(tokens, 3 * c) + v_shift * randn(3 * c)
    q, k, qkv = (t.to(device, dtype) for t in (q, k, qkv))
    q, k, v = (t.unflatten(-1, (heads, WIDTH)).transpose(0, 1) for t in (q, k, qkv[:, 2 * c :]))
    return q, k, v


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q.double(), k.double(), v.double()
    return (torch.softmax(q @ k.transpose(1, 2) / math.sqrt(WIDTH), -1) @ v).transpose(0, 1).flatten(1)


def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = q.new_full((q.shape[1], q.shape[0] * WIDTH), float("nan"))
    assert hopper.hopper_attention_16bit(q, k, v, out) is out
    torch.cuda.synchronize()
    return out


def error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


# ---- anywhere -----------------------------------------------------------------------------------------------------


def test_packed_scores_are_the_second_products_operand() -> None:
    """P through the fragment layouts of wgmma m64nNk16 as the PTX ISA gives them: register j is pair j, in order."""
    p = np.random.default_rng(0).integers(0, 9, (64, hopper.KEYS))
    a = np.zeros_like(p)  # the A operand represented by the registers
    for thread in range(128):
        row, b = thread // 32 * 16 + thread % 32 // 4, thread % 4
        # accumulator element 4g + 2i + c: row + 8i, column 8g + 2b + c
        s = [p[row + 8 * (e // 2 % 2), 8 * (e // 4) + 2 * b + e % 2] for e in range(hopper.KEYS // 2)]
        for j in range(hopper.KEYS // 4):  # as `pack_all` and `issue_pv` pass them: register j % 4 of k-step j // 4
            step, half, i = j // 4, j % 4 // 2, j % 2
            for c in range(2):
                a[row + 8 * i, 16 * step + 8 * half + 2 * b + c] = s[2 * j + c]
    assert np.array_equal(a, p)


def test_descriptors_find_every_element() -> None:
    """Shared memory as TMA writes a tile, [half][token][64 elements] with the 128-byte swizzle, read through the
    canonical layouts of K-major and MN-major operands with the offsets of the kernel's descriptors and k-steps."""
    keys = hopper.KEYS
    tile = np.arange(keys * WIDTH).reshape(keys, WIDTH)
    memory = np.zeros(keys * WIDTH, tile.dtype)

    def swizzled(element: np.ndarray) -> np.ndarray:  # 16-byte chunks are exchanged by the number of their 128-byte row
        at = 2 * element
        return (at ^ ((at >> 7 & 7) << 4)) // 2

    token, dim = np.meshgrid(np.arange(keys), np.arange(WIDTH), indexing="ij")
    memory[swizzled(dim // 64 * keys * 64 + token * 64 + dim % 64)] = tile
    row, k = np.meshgrid(np.arange(keys), np.arange(16), indexing="ij")
    for step in range(8):  # Q.K: start offset in 16 bytes, groups of 8 rows 1024 bytes apart
        start = (step // 4 * (keys * 128 // 16) + step % 4 * 2) * 8
        assert np.array_equal(memory[swizzled(start + row // 8 * 512 + row % 8 * 64 + k)], tile[:, 16 * step :][:, :16])
    k, n = np.meshgrid(np.arange(16), np.arange(WIDTH), indexing="ij")
    for step in range(keys // 16):  # P.V: leading offset from half to half, stride offset from 8 tokens to the next 8
        at = 128 * step * 8 + n // 64 * (keys * 128 // 2) + n % 64 + k // 8 * 512 + k % 8 * 64
        assert np.array_equal(memory[swizzled(at)], tile[16 * step :][:16])


@pytest.mark.parametrize("dtype", hopper.KERNELS, ids=str)
def test_compiles(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCAIL2_RT_KERNELS", str(tmp_path))
    try:
        cubin = compile_cubin(hopper.KERNELS[dtype])
    except Scail2Error as reason:
        if "could not compile" in str(reason):
            raise
        pytest.skip(f"NVRTC: {reason}")
    assert cubin[:4] == b"\x7fELF"


@pytest.mark.parametrize(
    ("precision", "kernel"),
    [("bf16", "hopper_attention_16bit"), ("fp16", "hopper_attention_16bit"), ("fp8", "hopper_attention")],
)
def test_the_choice_leaves_its_kernel_in_the_engine_folder(
    precision: str, kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stand-ins for the GPU and for NVRTC: opening a folder, as `build-engines` does at its end, compiles the variant
    of `auto` into the cache that the next process uses."""
    for variable in ("SCAIL2_RT_KERNELS", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(variable, "")  # so that the change by `use_kernel_cache` is undone
        monkeypatch.delenv(variable)
    use_kernel_cache(tmp_path)
    for name, stand_in in {
        "is_available": lambda: True,
        "current_device": lambda: 99,  # not a device whose availability may be known already
        "get_device_capability": lambda *_: (9, 0),
        "device": nullcontext,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(nvrtc, "_bindings", lambda _: SimpleNamespace(nvrtcVersion=lambda: (0, 13, 0)))
    monkeypatch.setattr(nvrtc, "_nvrtc_compile", lambda *_: b"compiled")
    monkeypatch.setattr(nvrtc, "_load", lambda kernel, _: nvrtc.compile_cubin(kernel))
    reason = choose_attention("auto", precision, "cuda", 128)[1]
    assert "(the sm90 CUDA kernel)" in reason
    (kept,) = tmp_path.glob("*.cubin")
    assert kept.name.startswith(f"{kernel}-")
    assert kept.read_bytes() == b"compiled"


def test_shared_memory_fits() -> None:
    assert hopper.SHARED <= 227 * 1024


def test_refuses_tensors_on_a_cpu() -> None:
    q, k, v = operands(100, 2, torch.bfloat16, "cpu")
    with pytest.raises(ValueError, match="on a GPU"):
        hopper.hopper_attention_16bit(q, k, v, torch.empty(100, 256, dtype=torch.bfloat16))


# ---- on Hopper ----------------------------------------------------------------------------------------------------


@needs_hopper
@pytest.mark.parametrize("dtype", hopper.KERNELS, ids=str)
@pytest.mark.parametrize(("tokens", "heads"), SIZES)
def test_agrees_with_fp64(tokens: int, heads: int, dtype: torch.dtype) -> None:
    q, k, v = operands(tokens, heads, dtype, "cuda")
    assert error(run(q, k, v), exact(q, k, v)) < LIMITS[dtype]


@needs_hopper
@pytest.mark.parametrize("dtype", hopper.KERNELS, ids=str)
@pytest.mark.parametrize(
    ("v_shift", "k_shift", "sharpness"), [(3, 0, 1), (0, 2, 1), (0, 8, 1), (0, 0, 4), (0, 0, 0), (0, 0, 0.1)]
)
def test_shifted_peaked_and_flat(v_shift: float, k_shift: float, sharpness: float, dtype: torch.dtype) -> None:
    """A common component of the keys shifts all scores of a row far below or above 0; peaked rows raise the maximum
    often."""
    q, k, v = operands(4001, 2, dtype, "cuda", v_shift, k_shift, sharpness)
    assert error(run(q, k, v), exact(q, k, v)) < LIMITS[dtype]


@needs_hopper
def test_keys_beyond_the_end_have_no_weight() -> None:
    """Every real score is about −60, where a padded key of score 0 would take all weight."""
    q, k, v = operands(177, 2, torch.bfloat16, "cuda")
    q, k = q * 0.1 - 2.6, k * 0.1 + 2.1
    assert exact(q, k, v).isfinite().all()
    assert error(run(q, k, v), exact(q, k, v)) < LIMITS[torch.bfloat16]


@needs_hopper
@pytest.mark.parametrize("change", ["v type", "v strides", "out", "alignment"])
def test_refuses_other_operands(change: str) -> None:
    q, k, v = operands(100, 2, torch.bfloat16, "cuda")
    out = torch.empty(100, 256, dtype=torch.bfloat16, device="cuda")
    if change == "v type":
        v = v.half()
    elif change == "v strides":
        v = v.contiguous()  # heads one after the other
    elif change == "out":
        out = out[:99]
    else:
        q = torch.zeros(100 * 256 + 1, dtype=torch.bfloat16, device="cuda")[1:].view(100, 2, 128).transpose(0, 1)
    with pytest.raises(ValueError):
        hopper.hopper_attention_16bit(q, k, v, out)


@needs_hopper
def test_replays_in_a_graph() -> None:
    q, k, v = operands(1000, 3, torch.bfloat16, "cuda")
    expected, out = run(q, k, v), torch.zeros(1000, 3 * WIDTH, dtype=torch.bfloat16, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        hopper.hopper_attention_16bit(q, k, v, out)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)
