"""The CLIP tower: golden data, and the stage against the reference."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from scail2_rt.export.models.clip import CLIPVisual, unused
from scail2_rt.export.models.config import CLIPConfig
from scail2_rt.export.models.precision import BF16, FP16, FP32, Numerics
from scail2_rt.export.stages.clip import definitions

CONFIG = CLIPConfig(image_size=24, patch=4, dim=48, heads=3, layers=3, mlp_dim=64)
VIT_H = CLIPConfig(image_size=224, patch=14, dim=1280, heads=16, layers=32, mlp_dim=5120)
TOLERANCE = 5e-5


def random_tower(config: CLIPConfig = CONFIG) -> CLIPVisual:
    tower, generator = CLIPVisual(config).eval(), torch.Generator().manual_seed(0)
    for name, weight in tower.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if name.endswith("embedding") or weight.ndim == 1:
            weight.data = noise if "embedding" in name else 0.2 * noise + ("norm" in name)
        else:
            weight.data = noise / math.sqrt(weight[0].numel())
    return tower


def run_stage(config: CLIPConfig, tower: CLIPVisual, numerics: Numerics, pixels: Tensor) -> Tensor:
    (definition,) = definitions(config)
    weights, module = tower.state_dict(), definition.build(numerics).eval()
    state = module.state_dict()
    assert set(state) == set(definition.weights)
    module.load_state_dict(
        {
            name: weights[source].reshape(state[name].shape).to(state[name].dtype)
            for name, (source,) in definition.weights.items()
        }
    )
    given, made = definition.io(numerics)
    assert tuple(pixels.shape) == given[0].dims
    with torch.inference_mode():
        features = module(pixels.to(given[0].dtype))
    assert (tuple(features.shape), features.dtype) == (made[0].dims, made[0].dtype)
    return features


@torch.inference_mode()
def test_golden(golden: Path) -> None:
    """Reference and stage, with every tensor of the file either loaded or known to be unused."""
    path = golden / "clip" / "vision.safetensors"
    with safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()["config"])
    config = CLIPConfig(
        meta["image_size"],
        meta["patch_size"],
        meta["dim"],
        meta["num_heads"],
        meta["num_layers"],
        meta["dim"] * meta["mlp_ratio"],
    )
    case = load_file(path)
    weights = {name[2:]: tensor.float() for name, tensor in case.items() if name.startswith("w.")}
    tower = CLIPVisual(config).eval()
    tower.load_state_dict({k: v for k, v in weights.items() if not unused(k, config)}, strict=True)
    expected = case["out.penultimate"]
    features = tower(case["in.pixels"])
    assert (features - expected).abs().max() < TOLERANCE
    assert (features - case["aux.after_all_blocks"]).abs().max() > 100 * TOLERANCE
    for image, wanted in zip(case["in.pixels"], expected, strict=True):
        assert (run_stage(config, tower, FP32, image[None]) - wanted).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    ("numerics", "tolerance"),
    [(FP32, 1e-6), (Numerics(torch.float16, torch.float32), 2e-3), (FP16, 5e-3), (BF16, 3e-2)],
    ids=str,
)
@torch.inference_mode()
def test_stage_agrees_with_the_reference(numerics: Numerics, tolerance: float) -> None:
    tower = random_tower()
    pixels = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    expected = tower(pixels)[0]
    features = run_stage(CONFIG, tower, numerics, pixels)
    error = (features - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < tolerance
    assert numerics == FP32 or error > 0


def test_patches_are_read_row_by_row() -> None:
    """Only the token of the changed patch moves before the blocks mix tokens: token 1 + row·side + column."""
    config = CLIPConfig(image_size=12, patch=4, dim=8, heads=2, layers=1, mlp_dim=8)
    tower = random_tower(config)
    pixels = torch.zeros(1, 3, 12, 12)
    changed = pixels.clone()
    changed[:, :, 4:8, 8:12] = 1.0
    moved = (run_stage(config, tower, FP32, changed) != run_stage(config, tower, FP32, pixels)).any(1)
    assert moved.nonzero().flatten().tolist() == [1 + 1 * 3 + 2]


def test_real_keys_and_stage_weights(golden: Path) -> None:
    text = (golden / "checkpoint" / "keys_clip_visual.json").read_text()
    expected = {name: tuple(shape) for name, shape in json.loads(text).items()}
    with torch.device("meta"):
        state = CLIPVisual(VIT_H).state_dict()
    used = {name: shape for name, shape in expected.items() if not unused(name, VIT_H)}
    assert {name: tuple(p.shape) for name, p in state.items()} == used
    rest = set(expected) - set(used)
    assert {"log_scale", "visual.head", "visual.post_norm.weight", "visual.post_norm.bias"} < rest
    assert all("visual.transformer.31." in name for name in rest if "transformer" in name)
    assert len(rest) == 4 + 12
    (definition,) = definitions(VIT_H)
    with torch.device("meta"):
        module = definition.build(FP16).state_dict()
    assert {source for (source,) in definition.weights.values()} == set(used)
    assert all(module[n].numel() == math.prod(used[s]) for n, (s,) in definition.weights.items())


def test_definition() -> None:
    (definition,) = definitions(VIT_H)
    (pixels,), (features,) = definition.io(FP16)
    assert (definition.name, definition.family, definition.component) == ("clip", "clip", "clip")
    assert (pixels.name, pixels.dtype, pixels.dims) == ("pixels", torch.float16, (1, 3, 224, 224))
    assert (features.name, features.dtype, features.dims) == ("features", torch.float32, (257, 1280))
