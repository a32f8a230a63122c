"""The umT5 encoder: golden data, true length against padded length, and its layer stages."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from scail2_rt.export.models.config import UMT5Config
from scail2_rt.export.models.precision import BF16, FP32, Numerics
from scail2_rt.export.models.umt5 import UMT5Encoder, relative_buckets
from scail2_rt.export.stages.umt5 import definitions

CONFIG = UMT5Config(vocab=50, dim=32, attn_dim=48, ffn_dim=40, heads=3, layers=3, buckets=16, max_distance=20)
XXL = UMT5Config(256384, 4096, 4096, 10240, 64, 24)
TOLERANCE = 5e-5


def random_encoder(config: UMT5Config = CONFIG) -> UMT5Encoder:
    encoder, generator = UMT5Encoder(config).eval(), torch.Generator().manual_seed(0)
    for name, weight in encoder.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if "embedding" in name:
            weight.data = noise
        else:
            weight.data = noise / math.sqrt(weight.shape[-1]) if weight.ndim > 1 else 1 + 0.2 * noise
    return encoder


def run_stages(encoder: UMT5Encoder, numerics: Numerics, ids: Tensor, mask: Tensor) -> Tensor:
    """One prompt [n] through the layer stages; the embedding rows as the runtime reads them."""
    config, weights = encoder.config, encoder.state_dict()
    x = weights["token_embedding.weight"][ids]
    buckets = relative_buckets(len(ids), config.buckets, config.max_distance)
    for definition in definitions(config):
        module = definition.build(numerics).eval()
        state = module.state_dict()
        assert set(state) == set(definition.weights)
        module.load_state_dict(
            {
                name: torch.cat([weights[s] for s in sources]).view(state[name].shape).to(state[name].dtype)
                for name, sources in definition.weights.items()
            }
        )
        given, made = definition.io(numerics)
        inputs = (x, buckets, mask.float())[: len(given)]
        assert [(i.dtype, i.ndim) for i in inputs] == [(s.dtype, len(s.dims)) for s in given]
        with torch.inference_mode():
            x = module(*inputs)
        assert (x.dtype, tuple(x.shape)) == (made[0].dtype, (len(ids), config.dim))
    return x


@pytest.fixture(scope="module")
def golden_case(golden: Path) -> tuple[UMT5Encoder, dict[str, Tensor]]:
    path = golden / "t5" / "encoder.safetensors"
    with safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()["config"])
    config = UMT5Config(
        meta["vocab"],
        meta["dim"],
        meta["dim_attn"],
        meta["dim_ffn"],
        meta["num_heads"],
        meta["num_layers"],
        meta["num_buckets"],
        meta["max_dist"],
        meta["eps"],
    )
    tensors = load_file(path)
    encoder = UMT5Encoder(config).eval()
    encoder.load_state_dict({k[2:]: v.float() for k, v in tensors.items() if k.startswith("w.")}, strict=True)
    return encoder, tensors


def test_buckets_golden(golden_case: tuple[UMT5Encoder, dict[str, Tensor]]) -> None:
    _, case = golden_case
    buckets = relative_buckets(512, 32, 128)
    expected = dict(zip(case["bucket.rel_pos"].tolist(), case["bucket.index"].tolist(), strict=True))
    assert len(expected) == 1023
    for query in (0, 17, 511):
        assert buckets[query].tolist() == [expected[key - query] for key in range(512)]


@torch.inference_mode()
def test_encoder_golden(golden_case: tuple[UMT5Encoder, dict[str, Tensor]]) -> None:
    encoder, case = golden_case
    out = encoder(case["in.ids"], case["in.mask"])
    assert (out - case["out.last_hidden"]).abs().max() < TOLERANCE
    assert case["in.mask"].sum(1).tolist() == case["out.seq_lens"].tolist()


@torch.inference_mode()
def test_true_length_equals_padded_golden(golden_case: tuple[UMT5Encoder, dict[str, Tensor]]) -> None:
    """A prompt at its own length, through the stages, gives the rows of the padded run."""
    encoder, case = golden_case
    for row, length in enumerate(case["out.seq_lens"].tolist()):
        expected = case["out.last_hidden"][row, :length]
        ids = case["in.ids"][row, :length]
        assert (encoder(ids[None], torch.ones(1, length))[0] - expected).abs().max() < TOLERANCE
        assert (run_stages(encoder, FP32, ids, torch.ones(length)) - expected).abs().max() < TOLERANCE


@torch.inference_mode()
def test_padded_stages_equal_padded_reference() -> None:
    encoder = random_encoder()
    ids = torch.arange(1, 25)
    mask = (torch.arange(24) < 9).long()
    padded = run_stages(encoder, FP32, ids, mask)[:9]
    assert (padded - encoder(ids[None], mask[None])[0, :9]).abs().max() < 1e-5
    assert (padded - run_stages(encoder, FP32, ids[:9], torch.ones(9))).abs().max() < 1e-5
    other_padding = torch.cat([ids[:9], ids[:15]])
    assert (padded - run_stages(encoder, FP32, other_padding, mask)[:9]).abs().max() < 1e-5
    unmasked = run_stages(encoder, FP32, ids, torch.ones(24))[:9]
    assert (padded - unmasked).abs().max() > 1e-2, "the mask must matter"
    assert torch.equal(encoder(ids[None], mask[None])[0, 9:], torch.zeros(15, CONFIG.dim))


@pytest.mark.parametrize("numerics", [BF16, Numerics(torch.bfloat16, torch.float32)], ids=str)
@torch.inference_mode()
def test_bf16_stages_are_close(numerics: Numerics) -> None:
    encoder = random_encoder()
    ids = torch.arange(3, 23)
    expected = encoder(ids[None], torch.ones(1, 20))[0]
    out = run_stages(encoder, numerics, ids, torch.ones(20))
    error = (out - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert 0 < error < 3e-2


def test_buckets_by_hand() -> None:
    """Eight buckets per direction: the first four exact, then logarithmic up to distance 16; keys after the query are
    shifted."""
    row = relative_buckets(40, 16, 16)[20].tolist()
    assert row[20:24] == [0, 9, 10, 11]
    assert row[19:16:-1] == [1, 2, 3]
    assert row[16] == 4  # distance 4 is the first logarithmic one
    assert row[12] == 6  # distance 8: half way from 4 to 16
    assert row[4] == 7  # distance 16: the last
    assert row[0] == 7
    assert row[39] == 15


def test_position_table_of_each_layer_matters() -> None:
    encoder, ids, mask = random_encoder(), torch.arange(10)[None], torch.ones(1, 10)
    with torch.inference_mode():
        before = encoder(ids, mask)
        for block in encoder.blocks:
            table = block.pos_embedding.embedding.weight
            saved = table.data.clone()
            table.data = saved.flip(0)
            assert (encoder(ids, mask) - before).abs().max() > 1e-3
            table.data = saved


def test_real_keys_and_stage_weights(golden: Path) -> None:
    text = (golden / "checkpoint" / "keys_umt5_xxl_encoder.json").read_text()
    expected = {name: tuple(shape) for name, shape in json.loads(text).items()}
    with torch.device("meta"):
        encoder = UMT5Encoder(XXL)
    assert {name: tuple(p.shape) for name, p in encoder.state_dict().items()} == expected
    used: list[str] = []
    for definition in definitions(XXL):
        with torch.device("meta"):
            state = definition.build(BF16).state_dict()
        assert set(state) == set(definition.weights)
        for name, sources in definition.weights.items():
            assert sum(math.prod(expected[s]) for s in sources) == state[name].numel()
            used += sources
    assert sorted([*used, "token_embedding.weight"]) == sorted(expected)


def test_stage_names_and_families() -> None:
    stages = definitions(CONFIG)
    assert [d.name for d in stages] == ["umt5.layers.0", "umt5.layers.1", "umt5.layers.2", "umt5.final"]
    assert [d.family for d in stages] == ["umt5.layers"] * 3 + ["umt5.final"]
    given, made = stages[0].io(BF16)
    assert [(s.name, s.dtype, s.dims) for s in given] == [
        ("x", torch.float32, ("n", 32)),
        ("buckets", torch.int64, ("n", "n")),
        ("mask", torch.float32, ("n",)),
    ]
    assert [(s.name, s.dims) for s in made] == [("x_out", ("n", 32))]
