"""The CUDA C++ convolution for Hopper: compilation and limits anywhere, results against the PyTorch twin on sm_90."""

from pathlib import Path

import pytest
import torch

from scail2_rt.kernels.conv import hopper_conv as hopper
from scail2_rt.kernels.conv.hopper_conv import NARROW, WIDE, WIDE_SMALL, ConvTile
from scail2_rt.kernels.conv.ops import ConvCall, ConvWeights, Frames, Norm, conv, prepare_conv
from scail2_rt.kernels.cuda.nvrtc import HOPPER, compile_cubin
from scail2_rt.kernels.errors import Scail2Error

HALF = torch.float16
on_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == HOPPER
needs_hopper = pytest.mark.skipif(not on_hopper, reason="needs a GPU of compute capability 9.0")
TILES = {96: [NARROW], 192: [WIDE, WIDE_SMALL], 384: [WIDE, WIDE_SMALL]}


def layer(c_in: int, c_out: int, backend: str, device: str) -> ConvWeights:
    gen = torch.Generator().manual_seed(c_in)
    weight = torch.randn(c_out, c_in, 3, 3, 3, generator=gen) / (27 * c_in) ** 0.5
    bias = torch.randn(c_out, generator=gen)
    return prepare_conv(weight, bias, HALF, torch.device(device), "library" if backend == "library" else "triton")


def random_frames(ring: int, height: int, width: int, channels: int, device: str, **place: float) -> Frames:
    gen = torch.Generator().manual_seed(height)
    data = torch.zeros(ring, height + 2, width + 2, channels, dtype=HALF)
    data[:, 1:-1, 1:-1] = torch.randn(ring, height, width, channels, generator=gen).to(HALF)
    return Frames(data.to(device), int(place.get("counter", 0)), int(place.get("offset", 0)), place.get("scale", 1.0))


def poisoned(like: Frames, ring: int, channels: int, counter: int, offset: int, scale: float) -> Frames:
    data = like.data.new_zeros(ring, *like.data.shape[1:3], channels)
    data[:, 1:-1, 1:-1] = float("nan")
    return Frames(data, counter, offset, scale)


@pytest.mark.parametrize("tile", [NARROW, WIDE, WIDE_SMALL, ConvTile(96, 2, 4)])
def test_shared_memory_fits(tile: ConvTile) -> None:
    assert tile.kernel().shared_bytes <= 227 * 1024
    assert tile.stages >= 4
    assert tile.box in range(8, 257, 8)


@pytest.mark.parametrize("tile", [NARROW, WIDE, WIDE_SMALL])
def test_compiles(tile: ConvTile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCAIL2_RT_KERNELS", str(tmp_path))
    try:
        cubin = compile_cubin(tile.kernel())
    except Scail2Error as reason:
        if "could not compile" in str(reason):
            raise
        pytest.skip(f"NVRTC: {reason}")
    assert cubin[:4] == b"\x7fELF"


def test_takes_nothing_on_a_cpu() -> None:
    assert not hopper.takes(ConvCall(random_frames(3, 4, 4, 96, "cpu"), layer(96, 96, "triton", "cpu"), 1), None)


def test_refuses_other_shapes() -> None:
    weights, clock = layer(96, 96, "triton", "cpu"), torch.zeros(1, dtype=torch.int32)
    src, other = random_frames(3, 4, 4, 96, "cpu"), random_frames(3, 5, 4, 96, "cpu")
    for raw, residual in ((other, None), (src, other)):
        with pytest.raises(ValueError):
            hopper.launch_conv(ConvCall(src, weights, 1, raw, residual), clock, False)


@needs_hopper
@pytest.mark.parametrize(("c_in", "c_out"), [(96, 96), (96, 192), (192, 192), (192, 384), (384, 384)])
@pytest.mark.parametrize("size", [(11, 21), (33, 17)])
def test_agrees_with_twin(c_in: int, c_out: int, size: tuple[int, int]) -> None:
    """Rings that wrap, a scaled residual, outputs initialised with NaN; the border must stay zero."""
    clock = torch.tensor([0, 7, 5, 3], dtype=torch.int32, device="cuda")
    src = random_frames(5, *size, c_in, "cuda", counter=2)
    residual = random_frames(4, *size, c_out, "cuda", scale=2.0**-6)
    norm = Norm(torch.rand(c_out, device="cuda") + 0.5, c_out, True) if c_out < 384 else None
    for tile in TILES[c_out]:
        results = []
        for backend in ("library", "hopper"):
            raw = poisoned(src, 6, c_out, 1, 2, 2.0**-6)
            normed = poisoned(src, 6, c_out, 3, 1, 1.0) if norm is not None else None
            weights = layer(c_in, c_out, backend, "cuda")
            call = ConvCall(src, weights, 2, raw, residual, normed, norm)
            if backend == "library":
                conv(call, clock)
            else:
                hopper.launch_conv(call, clock, norm is not None, tile)
            results.append([f.read(clock, 2) for f in (raw, normed) if f is not None])
        for expected, got in zip(*results, strict=True):
            assert torch.isfinite(got).all()
            assert float((got - expected).norm() / expected.norm()) < 1e-3


@needs_hopper
def test_updates_a_residual_in_place() -> None:
    clock = torch.zeros(1, dtype=torch.int32, device="cuda")
    src, stream = random_frames(3, 40, 30, 96, "cuda"), random_frames(1, 40, 30, 96, "cuda", scale=2.0**-6)
    twin = Frames(stream.data.clone(), scale=stream.scale)
    conv(ConvCall(src, layer(96, 96, "library", "cuda"), 1, twin, twin), clock)
    hopper.launch_conv(ConvCall(src, layer(96, 96, "triton", "cuda"), 1, stream, stream), clock, False)
    got, expected = stream.read(clock, 1), twin.read(clock, 1)
    assert float((got - expected).norm() / expected.norm()) < 1e-3
