"""The VAE: golden data, streaming against a full-sequence formulation from the specification, and its stages."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from scail2_rt.export.models.config import VAEConfig
from scail2_rt.export.models.precision import BF16, FP16, FP32, Numerics
from scail2_rt.export.models.vae import LATENT_MEAN, LATENT_STD, VAE, Caches, ResidualBlock, Upsample, conv3d
from scail2_rt.export.stages.spec import StageDefinition, TensorSpec
from scail2_rt.export.stages.vae import definitions
from scail2_rt.kernels.errors import InputError

TOLERANCE = 1e-4
CONFIGS = {
    "wan": VAEConfig(4, res_blocks=1),
    "early_time": VAEConfig(4, dim_mult=(1, 1, 2, 2), res_blocks=2, temporal_downsample=(True, False, True)),
    "no_last_time": VAEConfig(6, dim_mult=(2, 1, 1, 3), res_blocks=1, temporal_downsample=(True, True, False)),
}


def random_vae(config: VAEConfig, seed: int = 0) -> VAE:
    """A VAE whose random weights keep activations near one, so that every layer shows in the output."""
    vae, generator = VAE(config).eval(), torch.Generator().manual_seed(seed)
    for name, weight in vae.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if name.endswith("gamma"):
            weight.data = 1 + 0.2 * noise
        else:
            weight.data = noise / math.sqrt(weight[0].numel()) if weight.ndim > 1 else 0.1 * noise
    return vae


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class WholeSequence:
    """The VAE for a complete video in fp64, written from the specification, without caches and chunks.

    weights: the checkpoint's tensors. Every method maps [1, C, T, H, W] to [1, C, T, H, W]."""

    def __init__(self, config: VAEConfig, weights: Mapping[str, Tensor]) -> None:
        self.config = config
        self.weights = {name: tensor.double() for name, tensor in weights.items()}

    def conv(self, name: str, x: Tensor) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        t, y, _ = weight.shape[2:]
        x = F.pad(x, (0, 0, 0, 0, t - 1, 0))  # two zero frames on the left of a 3-wide kernel, none on the right
        return F.conv3d(x, weight, self.weights[f"{name}.bias"], padding=(0, y // 2, y // 2))

    def norm(self, name: str, x: Tensor) -> Tensor:
        gamma = self.weights[f"{name}.gamma"].view(-1, 1, 1, 1)
        return x / torch.linalg.vector_norm(x, dim=1, keepdim=True) * math.sqrt(x.shape[1]) * gamma

    def residual(self, name: str, x: Tensor) -> Tensor:
        h = self.conv(f"{name}.residual.2", F.silu(self.norm(f"{name}.residual.0", x)))
        h = self.conv(f"{name}.residual.6", F.silu(self.norm(f"{name}.residual.3", h)))
        return h + (self.conv(f"{name}.shortcut", x) if f"{name}.shortcut.weight" in self.weights else x)

    def attention(self, name: str, x: Tensor) -> Tensor:
        frames = []
        for frame in self.norm(f"{name}.norm", x)[0].unbind(1):  # [C, h, w]
            rows = frame.flatten(1).T
            qkv = rows @ self.weights[f"{name}.to_qkv.weight"][:, :, 0, 0].T + self.weights[f"{name}.to_qkv.bias"]
            q, k, v = qkv.chunk(3, dim=1)
            out = (q @ k.T / math.sqrt(q.shape[1])).softmax(1) @ v
            out = out @ self.weights[f"{name}.proj.weight"][:, :, 0, 0].T + self.weights[f"{name}.proj.bias"]
            frames.append(out.T.view_as(frame))
        return x + torch.stack(frames, dim=1)[None]

    def per_frame(self, name: str, x: Tensor, stride: int, padding: int) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return torch.stack([F.conv2d(f, weight, bias, stride, padding) for f in x.unbind(2)], dim=2)

    def down(self, name: str, x: Tensor) -> Tensor:
        x = self.per_frame(f"{name}.resample.1", F.pad(x, (0, 1, 0, 1)), stride=2, padding=0)
        if f"{name}.time_conv.weight" not in self.weights:
            return x
        rest = x[:, :, :0]
        if x.shape[2] > 1:
            rest = F.conv3d(x, *(self.weights[f"{name}.time_conv.{k}"] for k in ("weight", "bias")), stride=(2, 1, 1))
        return torch.cat([x[:, :, :1], rest], dim=2)

    def up(self, name: str, x: Tensor) -> Tensor:
        if f"{name}.time_conv.weight" in self.weights and x.shape[2] > 1:
            first, second = self.conv(f"{name}.time_conv", x[:, :, 1:]).chunk(2, dim=1)
            pairs = [frame for pair in zip(first.unbind(2), second.unbind(2), strict=True) for frame in pair]
            x = torch.stack([x[:, :, 0], *pairs], dim=2)
        x = x.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)
        return self.per_frame(f"{name}.resample.1", x, stride=1, padding=1)

    def layers(self, prefix: str, resample: str, x: Tensor) -> Tensor:
        for index in range(1 + max(int(n.split(".")[2]) for n in self.weights if n.startswith(prefix))):
            name = f"{prefix}{index}"
            if f"{name}.residual.2.weight" in self.weights:
                x = self.residual(name, x)
            else:
                x = self.down(name, x) if resample == "down" else self.up(name, x)
        return x

    def middle(self, name: str, x: Tensor) -> Tensor:
        return self.residual(f"{name}.2", self.attention(f"{name}.1", self.residual(f"{name}.0", x)))

    def head(self, name: str, x: Tensor) -> Tensor:
        return self.conv(f"{name}.2", F.silu(self.norm(f"{name}.0", x)))

    def encode(self, video: Tensor) -> Tensor:
        x = self.layers("encoder.downsamples.", "down", self.conv("encoder.conv1", video.double()))
        mean = self.conv("conv1", self.head("encoder.head", self.middle("encoder.middle", x)))[:, :16]
        shift, scale = (torch.tensor(v).double().view(1, -1, 1, 1, 1) for v in (LATENT_MEAN, LATENT_STD))
        return (mean - shift) / scale

    def decode(self, latent: Tensor) -> Tensor:
        shift, scale = (torch.tensor(v).double().view(1, -1, 1, 1, 1) for v in (LATENT_MEAN, LATENT_STD))
        x = self.conv("decoder.conv1", self.conv("conv2", latent.double() * scale + shift))
        x = self.layers("decoder.upsamples.", "up", self.middle("decoder.middle", x))
        return self.head("decoder.head", x)


def load_stage(definition: StageDefinition, weights: Mapping[str, Tensor], numerics: Numerics) -> nn.Module:
    module = definition.build(numerics).eval()
    state = {
        name: torch.cat([weights[source] for source in sources]).view(target.shape).to(target.dtype)
        for (name, sources), target in zip(definition.weights.items(), _targets(module, definition), strict=True)
    }
    module.load_state_dict(state)
    return module


def _targets(module: nn.Module, definition: StageDefinition) -> list[Tensor]:
    parameters = module.state_dict()
    assert set(parameters) == set(definition.weights)
    return [parameters[name] for name in definition.weights]


def sizes(spec: TensorSpec, cells: dict[str, int]) -> tuple[int, ...]:
    def size(dim: int | str) -> int:
        return dim if isinstance(dim, int) else math.prod(cells.get(f) or int(f) for f in dim.split("*"))

    return tuple(size(dim) for dim in spec.dims)


def run_stages(vae: VAE, numerics: Numerics, half: str, chunks: list[Tensor], cells: dict[str, int]) -> Tensor:
    """Chunks through `vae.{half}_first` and `_step`, checking every input and output against the specs."""
    stages = {d.name: d for d in definitions(vae.config)}
    outputs, caches = [], ()
    with torch.inference_mode():
        for index, chunk in enumerate(chunks):
            definition = stages[f"vae.{half}_{'step' if index else 'first'}"]
            given, made = definition.io(numerics)
            inputs = (chunk.to(given[0].dtype), *caches)
            assert [(tuple(x.shape), x.dtype) for x in inputs] == [(sizes(s, cells), s.dtype) for s in given]
            out, *caches = load_stage(definition, vae.state_dict(), numerics)(*inputs)
            assert [(tuple(x.shape), x.dtype) for x in (out, *caches)] == [(sizes(s, cells), s.dtype) for s in made]
            outputs.append(out)
    return torch.cat(outputs, dim=2)


def relative_rms(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).square().mean().sqrt() / b.double().square().mean().sqrt())


@pytest.fixture(scope="module")
def golden_vae(golden: Path) -> VAE:
    path = golden / "vae" / "weights.safetensors"
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
    vae = VAE(
        VAEConfig(
            config["dim"],
            config["z_dim"],
            tuple(config["dim_mult"]),
            config["num_res_blocks"],
            tuple(config["temperal_downsample"]),
        )
    )
    vae.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()}, strict=True)
    return vae.eval()


@pytest.mark.parametrize("name", ["enc_f1", "enc_f5", "enc_f8_trailing_dropped", "enc_f9"])
@torch.inference_mode()
def test_encode_golden(golden: Path, golden_vae: VAE, name: str) -> None:
    case = load_file(golden / "vae" / f"{name}.safetensors")
    latent = golden_vae.encode(case["video"][None])[0]
    assert latent.shape == case["latent"].shape
    assert (latent - case["latent"]).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", ["dec_l1", "dec_l2", "dec_l4"])
@torch.inference_mode()
def test_decode_golden(golden: Path, golden_vae: VAE, name: str) -> None:
    case = load_file(golden / "vae" / f"{name}.safetensors")
    video = golden_vae.decode(case["latent"][None])[0]
    assert (video - case["video_unclamped"]).abs().max() < TOLERANCE
    assert (video.clamp(-1, 1) - case["video"]).abs().max() < TOLERANCE


@torch.inference_mode()
def test_decode_taps_golden(golden: Path, golden_vae: VAE) -> None:
    """Every intermediate of every chunk."""
    case = load_file(golden / "vae" / "dec_taps.safetensors")
    taps: dict[str, list[Tensor]] = {}
    watched = {"decoder.conv1": "decoder.conv1", "decoder.middle.2": "decoder.middle", "conv2": "conv2"}
    watched |= {f"decoder.upsamples.{i}": f"decoder.upsamples.{i}" for i in (3, 7, 11)}
    modules = dict(golden_vae.named_modules())
    hooks = [
        modules[name].register_forward_hook(lambda _m, _i, out, tap=tap: taps.setdefault(tap, []).append(out))
        for name, tap in watched.items()
    ]
    video = golden_vae.decode(case["latent"][None])
    for hook in hooks:
        hook.remove()
    assert (torch.cat(taps.pop("conv2"), dim=2) - case["conv2"]).abs().max() < TOLERANCE
    seen = 0
    for tap, chunks in taps.items():
        for index, chunk in enumerate(chunks):
            assert (chunk - case[f"chunk{index}.{tap}"]).abs().max() < TOLERANCE, (tap, index)
            seen += 1
    assert seen == 5 * case["latent"].shape[1]
    edges = [0, 1, 5, 9, 13]
    for index in range(4):
        assert (video[:, :, edges[index] : edges[index + 1]] - case[f"chunk{index}.out"]).abs().max() < TOLERANCE


@torch.inference_mode()
def test_stages_golden(golden: Path, golden_vae: VAE) -> None:
    case = load_file(golden / "vae" / "enc_f9.safetensors")
    chunks = list(case["video"][None].split([1, 4, 4], dim=2))
    latent = run_stages(golden_vae, FP32, "encode", chunks, {"h": 6, "w": 4})
    assert (latent[0] - case["latent"]).abs().max() < TOLERANCE
    case = load_file(golden / "vae" / "dec_l4.safetensors")
    video = run_stages(golden_vae, FP32, "decode", list(case["latent"][None].split(1, dim=2)), {"h": 6, "w": 4})
    assert (video[0] - case["video_unclamped"]).abs().max() < TOLERANCE


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@torch.inference_mode()
def test_stream_equals_whole_sequence(config: VAEConfig) -> None:
    vae = random_vae(config)
    whole = WholeSequence(config, vae.state_dict())
    video = noise(1, 3, 13, 24, 16)
    expected = whole.encode(video)
    assert expected.shape == (1, 16, 4, 3, 2)
    assert (vae.encode(video) - expected).abs().max() < 1e-5
    latent = noise(1, 16, 4, 2, 3)
    expected = whole.decode(latent)
    assert expected.shape == (1, 3, 13, 16, 24)
    assert (vae.decode(latent) - expected).abs().max() < 1e-5


@torch.inference_mode()
def test_frames_without_a_group_are_dropped() -> None:
    vae, video = random_vae(CONFIGS["wan"]), noise(1, 3, 9, 16, 16)
    for frames in (5, 6, 7, 8):
        assert torch.equal(vae.encode(video[:, :, :frames]), vae.encode(video[:, :, :5]))
    for frames in (1, 4):
        assert torch.equal(vae.encode(video[:, :, :frames]), vae.encode(video[:, :, :1]))
    assert vae.encode(video).shape[2] == 3


@torch.inference_mode()
def test_caches_keep_their_shapes_and_own_their_memory() -> None:
    vae = random_vae(CONFIGS["wan"])
    for first, step, frames, start in (
        (vae.encode_first, vae.encode_step, noise(1, 3, 4, 16, 24), 1),
        (vae.decode_first, vae.decode_step, noise(1, 16, 1, 2, 3), 1),
    ):
        _, after_first = first(frames[:, :, :start])
        _, after_step = step(frames, after_first)
        assert [x.shape for x in after_first] == [x.shape for x in after_step]
        for cache in after_step:
            assert cache.untyped_storage().nbytes() == cache.numel() * cache.element_size()


@pytest.mark.parametrize("numerics", [FP32, Numerics(torch.float16, torch.float32), FP16, BF16], ids=str)
def test_stages_agree_with_the_reference(numerics: Numerics) -> None:
    """fp32 stages exactly, the others within their rounding (5e-3 relative for fp16, 3e-2 for bf16)."""
    vae = random_vae(CONFIGS["wan"])
    video, latent, cells = noise(1, 3, 9, 16, 24), noise(1, 16, 3, 2, 3), {"h": 2, "w": 3}
    encoded = run_stages(vae, numerics, "encode", list(video.split([1, 4, 4], dim=2)), cells)
    decoded = run_stages(vae, numerics, "decode", list(latent.split(1, dim=2)), cells)
    tolerance = {torch.float32: 1e-6, torch.float16: 5e-3, torch.bfloat16: 3e-2}[
        numerics.compute if numerics.compute != torch.float32 else numerics.storage
    ]
    with torch.inference_mode():
        assert relative_rms(encoded, vae.encode(video)) < tolerance
        assert relative_rms(decoded, vae.decode(latent)) < tolerance
    if numerics != FP32:
        assert not torch.equal(encoded, vae.encode(video)), "the precision must show"


@pytest.mark.parametrize("layer", [ResidualBlock(4, 8, FP16), Upsample(8, False, FP16)], ids=["shortcut", "upsample"])
@torch.inference_mode()
def test_fp16_saturates_large_sums(layer: nn.Module) -> None:
    """A sum beyond the fp16 range meets the next convolution as the largest finite value, not as an infinity."""
    generator = torch.Generator().manual_seed(0)
    for weight in layer.parameters():
        weight.data = (torch.randn(weight.shape, generator=generator) * 0.02).to(weight.dtype)
    channels = 4 if isinstance(layer, ResidualBlock) else 8
    out = layer(torch.full((1, channels, 1, 4, 4), 1e6), Caches(None))
    assert out.isfinite().all()
    assert out.abs().max() > 100


def test_constant_input_norm_of_zero_is_zero() -> None:
    """A black latent cell must not divide by zero."""
    vae = random_vae(CONFIGS["wan"])
    norm = vae.encoder.middle[0].residual["0"]
    assert torch.equal(norm(torch.zeros(1, 16, 1, 2, 2)), torch.zeros(1, 16, 1, 2, 2))


def test_real_keys_and_stage_weights(golden: Path) -> None:
    """The real model on the meta device has the real keys and shapes; each key belongs to exactly one stage."""
    expected = {k: tuple(v) for k, v in json.loads((golden / "checkpoint" / "keys_vae.json").read_text()).items()}
    with torch.device("meta"):
        vae = VAE(VAEConfig(96))
    assert {name: tuple(p.shape) for name, p in vae.state_dict().items()} == expected
    used: dict[str, set[str]] = {}
    for definition in definitions(VAEConfig(96)):
        with torch.device("meta"):
            module = definition.build(FP16)
        shapes = {name: tuple(p.shape) for name, p in module.state_dict().items()}
        assert {n: expected[source] for n, (source,) in definition.weights.items()} == shapes
        used[definition.name] = set(definition.weights)
    assert used["vae.encode_step"] | used["vae.decode_step"] == set(expected)
    for half in ("encode", "decode"):
        missing = used[f"vae.{half}_step"] - used[f"vae.{half}_first"]
        assert missing
        assert all(".time_conv." in name for name in missing)


def test_stage_definitions_real_size() -> None:
    """Names, families and caches of the real model: the first stage returns the caches that step takes and returns."""
    stages = definitions(VAEConfig(96))
    assert [d.name for d in stages] == ["vae.encode_first", "vae.encode_step", "vae.decode_first", "vae.decode_step"]
    assert all(d.family == d.name and d.component == "vae" for d in stages)
    for first, step in (stages[:2], stages[2:]):
        made = first.io(FP16)[1][1:]
        taken, given_back = step.io(FP16)[0][1:], step.io(FP16)[1][1:]
        assert [s.dims for s in made] == [s.dims for s in taken] == [s.dims for s in given_back]
        assert [s.name for s in made] == [s.name for s in given_back] == [f"{s.name}_out" for s in taken]
        assert {s.dtype for s in taken} == {torch.float16}
    video, latent = stages[0].io(FP16)[0][0], stages[0].io(FP16)[1][0]
    assert (video.dims, video.dtype) == ((1, 3, 1, "8*h", "8*w"), torch.float16)
    assert (latent.dims, latent.dtype) == ((1, 16, 1, "h", "w"), torch.float32)
    assert stages[1].io(FP16)[0][1].dims == (1, 3, 2, "8*h", "8*w")


@pytest.mark.parametrize(
    "config",
    [VAEConfig(4, z_dim=48), VAEConfig(4, dim_mult=(1, 2, 4)), VAEConfig(4, temporal_downsample=(False, False, True))],
)
def test_other_kinds_of_vae_are_refused(config: VAEConfig) -> None:
    with pytest.raises(InputError, match=r"Wan 2\.1"):
        VAE(config)
    with pytest.raises(InputError, match=r"Wan2\.1_VAE file"):
        definitions(config)


@pytest.mark.parametrize("kernel", [(3, 3, 3), (3, 1, 1), (1, 1, 1)])
@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 1, 1)])
def test_the_fast_convolution_of_a_cpu_is_the_plain_one(
    kernel: tuple[int, int, int], stride: tuple[int, int, int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(s, generator=generator) for s in ((1, 5, 6, 7, 9), (4, 5, *kernel), (4,)))
    padding = (0, kernel[1] // 2, kernel[2] // 2)
    plain = F.conv3d(x, weight, bias, stride, padding)
    with torch.inference_mode():
        torch.testing.assert_close(conv3d(x, weight, bias, stride, padding), plain, atol=1e-5, rtol=1e-5)
