"""The streaming VAE against the reference, and the convolution kernels against their PyTorch twins.

On a CPU the kernels run in Triton's interpreter, which multiplies the bits of bf16 operands: bf16 is checked on a GPU.
"""

import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from scail2_rt.engines.torch_backend.vae_streams import DecodeStream, EncodeStream, choose_implementation, halo
from scail2_rt.engines.vae_stream import Part
from scail2_rt.export.models.config import VAEConfig
from scail2_rt.export.models.vae import VAE
from scail2_rt.kernels.conv import ops as kernels
from scail2_rt.kernels.conv.config import ConvConfig
from scail2_rt.kernels.conv.ops import ConvCall, ConvForm, ConvWeights, Frames, Implementation, Norm
from scail2_rt.kernels.errors import InputError
from tests.export.models.test_vae import noise, random_vae

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONFIGS = {
    "wan": VAEConfig(6, res_blocks=1),
    "early_time": VAEConfig(4, dim_mult=(1, 1, 2, 2), res_blocks=2, temporal_downsample=(True, False, True)),
}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 6e-3, torch.bfloat16: 6e-2}


@pytest.fixture(autouse=True)
def _exact_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # of GEMMs it is off unless asked for


def error(got: Tensor, want: Tensor) -> float:
    return float((got.cpu().float() - want.cpu()).norm() / want.cpu().norm())


def chunks(video: Tensor) -> list[Tensor]:
    return [video[:, :1], *video[:, 1:].split(4, dim=1)]


def decode(stream: DecodeStream, latent: Tensor) -> Tensor:
    return torch.cat([stream.step(frame) for frame in latent.to(DEVICE).split(1, dim=1)], dim=1)


def encode(stream: EncodeStream, video: Tensor) -> Tensor:
    return torch.cat([stream.step(chunk) for chunk in chunks(video.to(DEVICE))], dim=1)


def reference(config: VAEConfig, latent: Tensor, video: Tensor) -> tuple[VAE, Tensor, Tensor]:
    vae = random_vae(config)
    with torch.no_grad():
        return vae, vae.decode(latent[None])[0], vae.encode(video[None])[0]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_streams_agree_with_the_reference(name: str, dtype: torch.dtype) -> None:
    """Five chunks wrap every ring; the second video shows that a reset forgets the first."""
    config = CONFIGS[name]
    latent, video = noise(16, 5, 3, 5), noise(3, 17, 24, 40).clamp(-1, 1)
    vae, pixels, codes = reference(config, latent, video)
    decoder = DecodeStream(vae.state_dict(), config, DEVICE, dtype)
    encoder = EncodeStream(vae.state_dict(), config, DEVICE, dtype)
    for _ in range(2):
        assert error(decode(decoder, latent), pixels) < TOLERANCE[dtype]
        assert error(encode(encoder, video), codes) < TOLERANCE[dtype]
        decoder.reset()
        encoder.reset()


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("name", CONFIGS)
def test_parts_of_a_picture_are_those_of_the_whole(name: str, count: int) -> None:
    """Parts taller than two halos; 25 rows in three uneven parts; four rows in five parts, of which the last is
    empty."""
    config = CONFIGS[name]
    height = 4 if count == 5 else 25
    latent = noise(16, 4, height, 3)
    weights = random_vae(config).state_dict()
    whole = decode(DecodeStream(weights, config, DEVICE, torch.float32), latent)
    parts = []
    for index in range(count):
        stream = DecodeStream(weights, config, DEVICE, torch.float32, part=Part(index, count))
        parts.append(decode(stream, latent))
        assert halo(config) < 13
    assert error(torch.cat(parts, dim=2), whole.cpu()) < 1e-5


def test_a_stream_changes_its_size_only_between_videos() -> None:
    config = CONFIGS["wan"]
    vae, pixels, _ = reference(config, noise(16, 2, 2, 3), noise(3, 1, 16, 16))
    stream = DecodeStream(vae.state_dict(), config, DEVICE, torch.float32)
    stream.step(noise(16, 1, 3, 2).to(DEVICE))
    with pytest.raises(InputError, match="Reset"):
        stream.step(noise(16, 1, 2, 3).to(DEVICE))
    stream.reset()
    assert error(decode(stream, noise(16, 2, 2, 3)), pixels) < 1e-5
    with pytest.raises(InputError, match="4 per call"):
        EncodeStream(vae.state_dict(), config, DEVICE, torch.float32).step(noise(3, 4, 16, 16))


def test_large_sums_stay_finite_in_fp16() -> None:
    """Sums of several 10^5 between blocks exceed fp16's range, so they are stored times 2^-6."""
    config = CONFIGS["wan"]
    latent = noise(16, 2, 2, 3)
    vae = random_vae(config)
    with torch.no_grad():
        for name, weight in vae.decoder.named_parameters():
            if name.startswith("conv1."):
                weight.mul_(2e5)
        want = vae.decode(latent[None])[0]
    stream = DecodeStream(vae.state_dict(), config, DEVICE, torch.float16)
    assert error(decode(stream, latent), want) < 0.02


def test_16_bit_on_a_gpu_needs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing requirement raises an error with a remedy instead of a slower fallback."""
    gpu = torch.device("cuda")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(InputError, match=r'need Triton.*pip install "scail2-rt\[gpu\]".*--precision fp32'):
        choose_implementation(gpu, torch.float16)
    assert choose_implementation(gpu, torch.float32) == "library"
    assert choose_implementation(torch.device("cpu"), torch.float16) == "library"


def test_a_closed_stream_begins_again() -> None:
    config = CONFIGS["wan"]
    vae, pixels, _ = reference(config, noise(16, 2, 2, 3), noise(3, 1, 16, 16))
    stream = DecodeStream(vae.state_dict(), config, DEVICE, torch.float32)
    stream.step(noise(16, 1, 3, 2).to(DEVICE))
    stream.close()
    assert error(decode(stream, noise(16, 2, 2, 3)), pixels) < 1e-5


KINDS = {  # taps, fields of ConvForm
    "3x3x3": ((3, 3, 3), {}),
    "1x1x1": ((1, 1, 1), {}),
    "up": ((1, 3, 3), {"phases": "space"}),
    "double": ((3, 1, 1), {"phases": "time"}),
    "down": ((1, 3, 3), {"stride": 2}),
    "halve": ((3, 1, 1), {"time_stride": 2}),
}
TILES = {
    "tma_split": ConvConfig(64, 32, 16, 32, 4, 2, True),
    "tma_pixels": ConvConfig(64, 32, 16, 32, 4, 2, True, merged=False),
    "tma_part": ConvConfig(64, 16, 0, 64, 4, 2, True),  # two programs per pixel: the norm is a separate kernel
    "pointers_split": ConvConfig(64, 32, 16, 32, 4, 2, False),
    "pointers_part": ConvConfig(64, 16, 0, 64, 4, 2, False),
}


def video_frames(
    ring: int, size: tuple[int, int], channels: int, dtype: torch.dtype, counter: int, fill: str, scale: float = 2.0**-3
) -> Frames:
    data = torch.zeros(ring, size[0] + 2, size[1] + 2, channels, dtype=dtype, device=DEVICE)
    inside = noise(ring, *size, channels) if fill == "noise" else torch.full((1,), torch.nan)
    data[:, 1:-1, 1:-1] = inside.to(DEVICE, dtype)
    return Frames(data, counter, 1, scale)


def run_conv(weights: ConvWeights, kind: str, dtype: torch.dtype, tile: ConvConfig | None) -> tuple[Tensor, Tensor]:
    """Stored sum and stored norm of two output frames at an odd size; every ring wraps, and outputs start as NaN."""
    size = (6, 10) if kind == "down" else (5, 7)
    size_out = {"up": (10, 14), "down": (3, 5)}.get(kind, size)
    clock = torch.tensor([0, 7, 5, 3], dtype=torch.int32, device=DEVICE)
    out = weights.c_out
    src = video_frames(5, size, weights.c_in, dtype, 2, "noise")
    residual = video_frames(7, size_out, out, dtype, 3, "noise")
    raw = video_frames(5, size_out, out, dtype, 1, "nan")
    normed = video_frames(5, size_out, out, dtype, 3, "nan", scale=1)
    norm = Norm(kernels.pad_channels(1 + 0.1 * noise(20).to(DEVICE), out), 20, silu=True)
    kernels.conv(ConvCall(src, weights, 2, raw, residual, normed, norm), clock, config=tile)
    frames = 4 if kind == "double" else 2
    return raw.read(clock, frames), normed.read(clock, frames)  # with the border, which must stay zero


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_conv_kernel_agrees_with_its_twin(kind: str, tile: str, dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    taps, options = KINDS[kind]
    if kind == "down" and TILES[tile].tma:
        pytest.skip("a strided convolution reads through pointers")
    if dtype == torch.bfloat16 and DEVICE.type == "cpu":
        pytest.skip("Triton's interpreter has no bf16 dot")
    out = 40 if kind == "double" else 20
    weight, bias = noise(out, 18, *taps, seed=3) / (18 * taps[0] * taps[1] * taps[2]) ** 0.5, noise(out, seed=4)
    results: dict[Implementation, tuple[Tensor, Tensor]] = {}
    implementations: tuple[Implementation, ...] = ("library", "triton")
    for implementation in implementations:
        weights = kernels.prepare_conv(weight, bias, dtype, DEVICE, implementation, ConvForm(**options))
        results[implementation] = run_conv(weights, kind, dtype, TILES[tile] if implementation == "triton" else None)
    bound = 1e-3 if dtype == torch.float16 else 8e-3
    for got, want in zip(results["triton"], results["library"], strict=True):
        assert error(got, want) < bound


def test_norm_kernel_agrees_with_its_twin() -> None:
    pytest.importorskip("triton")
    clock = torch.tensor([0, 2, 5, 3], dtype=torch.int32, device=DEVICE)
    norm = Norm(kernels.pad_channels(noise(20).to(DEVICE), 24), 20, silu=False)
    src = video_frames(3, (5, 7), 24, torch.float16, 2, "noise")
    src.data[..., 20:] = 0
    src.data[:, 2, 3] = 0  # a pixel without a norm
    got, want = (video_frames(5, (5, 7), 24, torch.float16, 1, "nan", scale=1) for _ in range(2))
    kernels.rms_norm_frames(src, got, norm, clock, 3, "triton")
    kernels.rms_norm_frames(src, want, norm, clock, 3, "library")
    assert error(got.read(clock, 3), want.read(clock, 3)) < 1e-3


def test_folded_upsampling_is_nearest_then_3x3() -> None:
    weight, bias = noise(6, 5, 3, 3, seed=3), noise(6, seed=4)
    weights = kernels.prepare_conv(
        weight, bias, torch.float32, torch.device("cpu"), "library", ConvForm(phases="space")
    )
    data = F.pad(noise(2, 4, 3, 5), (0, 3, 1, 1, 1, 1))
    got = kernels.convolved(Frames(data), weights, torch.zeros(1, dtype=torch.int32), 2)[..., :6]
    frames = data[:, 1:-1, 1:-1, :5].permute(0, 3, 1, 2)
    want = F.conv2d(F.interpolate(frames, scale_factor=2, mode="nearest"), weight, bias, padding=1)
    assert error(got, want.permute(0, 2, 3, 1)) < 1e-6


def test_streams_run_on_the_kernels() -> None:
    """One latent after the first, through every kernel (in the interpreter on a CPU)."""
    pytest.importorskip("triton")
    config = VAEConfig(4, dim_mult=(1, 1, 1, 2), res_blocks=0)
    latent, video = noise(16, 2, 1, 2), noise(3, 5, 8, 16).clamp(-1, 1)
    vae, pixels, codes = reference(config, latent, video)
    decoder = DecodeStream(vae.state_dict(), config, DEVICE, torch.float16, implementation="triton")
    encoder = EncodeStream(vae.state_dict(), config, DEVICE, torch.float16, implementation="triton")
    assert error(decode(decoder, latent), pixels) < TOLERANCE[torch.float16]
    assert error(encode(encoder, video), codes) < TOLERANCE[torch.float16]
