"""Sizes from shapes, shapes from sizes, and the errors for tensors that do not fit."""

import json
from pathlib import Path

import pytest

from scail2_rt.export.checkpoint.derive import (
    check_shapes,
    clip_config,
    clip_shapes,
    dit_config,
    dit_shapes,
    umt5_config,
    umt5_shapes,
    vae_config,
    vae_shapes,
)
from scail2_rt.export.checkpoint.sat_names import SAT_PREFIX, sat_to_wan, wan_to_sat
from scail2_rt.export.models.config import CLIPConfig, DiTConfig, UMT5Config, VAEConfig
from scail2_rt.kernels.errors import InputError

SMALL = DiTConfig(dim=256, heads=2, layers=2, ffn_dim=512, freq_dim=64, text_dim=64, clip_dim=160)


def listed(golden: Path, name: str) -> dict[str, tuple[int, ...]]:
    return {key: tuple(shape) for key, shape in json.loads((golden / "checkpoint" / name).read_text()).items()}


@pytest.mark.parametrize(
    ("name", "derive", "shapes_of", "sizes"),
    [
        ("keys_dit_14b_wan.json", dit_config, dit_shapes, DiTConfig(5120, 40, 40, 13824)),
        ("keys_vae.json", vae_config, vae_shapes, VAEConfig(96)),
        ("keys_umt5_xxl_encoder.json", umt5_config, umt5_shapes, UMT5Config(256384, 4096, 4096, 10240, 64, 24)),
        ("keys_clip_visual.json", clip_config, clip_shapes, CLIPConfig(224, 14, 1280, 16, 32, 5120)),
    ],
)
def test_real_networks(golden, name, derive, shapes_of, sizes):
    shapes = listed(golden, name)
    assert derive(shapes, {}) == sizes
    assert shapes_of(sizes) == shapes


def test_sat_names_of_the_real_checkpoint(golden):
    wan, sat = listed(golden, "keys_dit_14b_wan.json"), listed(golden, "keys_dit_14b_sat.json")
    assert {SAT_PREFIX + name for name in wan_to_sat(set(wan))} == set(sat)
    for name, shape in sat.items():
        targets = sat_to_wan(name.removeprefix(SAT_PREFIX))
        assert targets is not None
        assert shape == (len(targets) * wan[targets[0]][0], *wan[targets[0]][1:])


def test_unknown_sat_names_have_no_translation():
    assert sat_to_wan("transformer.layers.0.attention.rotary.weight") is None
    assert sat_to_wan("mixins.adaln_layer.adaLN_modulations") is None


@pytest.mark.parametrize(
    "config",
    [
        DiTConfig(dim=1536, heads=12, layers=30, ffn_dim=8960),  # the 1.3B layout
        SMALL,
        DiTConfig(dim=128, heads=1, layers=1, ffn_dim=192, text_dim=32, clip_dim=400),
    ],
)
def test_any_transformer_derives_back(config):
    assert dit_config(dit_shapes(config)) == config


@pytest.mark.parametrize(
    ("derive", "shapes_of", "config"),
    [
        (vae_config, vae_shapes, VAEConfig(dim=6)),
        (vae_config, vae_shapes, VAEConfig(dim=8, z_dim=4, dim_mult=(1, 3), res_blocks=1, temporal_downsample=(True,))),
        (umt5_config, umt5_shapes, UMT5Config(300, 64, 32, 128, 4, 2)),
        (clip_config, clip_shapes, CLIPConfig(56, 14, 240, 3, 4, 700)),
    ],
)
def test_any_other_network_derives_back(derive, shapes_of, config):
    assert derive(shapes_of(config), {}) == config


@pytest.mark.parametrize("settings", [{"num_heads": 4}, {"head_dim": 64}, {"num_heads": 4, "head_dim": 999}])
def test_metadata_sets_the_head_width(settings):
    assert dit_config(dit_shapes(SMALL), {"config": json.dumps(settings)}).heads == 4


def test_metadata_sets_clip_heads_and_constants():
    tower = clip_shapes(CLIPConfig(56, 14, 64, 4, 2, 256))
    assert clip_config(tower, {"config": '{"num_heads": 4}'}).heads == 4
    config = dit_config(dit_shapes(SMALL), {"config": '{"eps": 1e-5, "text_len": 256}'})
    assert (config.eps, config.text_len) == (1e-5, 256)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ('{"num_heads": 3}', "multiple of its heads"),
        ('{"num_heads": 0}', "multiple of its heads"),
        ('{"num_heads": "two"}', "Write a number"),
        ("[2]", "JSON object"),
        ("{", "not JSON"),
    ],
)
def test_bad_metadata_is_refused(settings, said):
    with pytest.raises(InputError, match=said):
        dit_config(dit_shapes(SMALL), {"config": settings})


def test_widths_that_are_no_whole_heads_ask_for_a_config():
    odd = DiTConfig(dim=160, heads=2, layers=1, ffn_dim=320)
    with pytest.raises(InputError, match=r"160 channels wide.*config\.json"):
        dit_config(dit_shapes(odd))
    with pytest.raises(InputError, match=r"64 channels wide.*config\.json"):
        clip_config(clip_shapes(CLIPConfig(56, 14, 64, 4, 2, 256)))


def test_each_missing_tensor_of_a_transformer_is_named_with_its_shape():
    whole = dit_shapes(SMALL)
    for name, shape in whole.items():
        if name in ("time_embedding.0.weight", "text_embedding.0.weight"):
            shape = (256, 256) if "time" in name else (256, 4096)  # nothing else shows these widths: the real ones
        rest = {other: value for other, value in whole.items() if other != name}
        with pytest.raises(InputError) as caught:
            check_shapes(rest, dit_shapes(dit_config(rest)), "The transformer")
        assert f"{name} is missing (expected {list(shape)})" in str(caught.value)
        assert "1 tensor does not fit" in str(caught.value)


def test_each_misshapen_tensor_of_a_transformer_is_named_with_its_shape():
    whole = dit_shapes(SMALL)
    for name, shape in whole.items():
        wrong = {**whole, name: (shape[0] + 1, *shape[1:])}
        with pytest.raises(InputError) as caught:
            check_shapes(wrong, dit_shapes(dit_config(wrong)), "The transformer")
        assert f"1 tensor does not fit: {name} is {[shape[0] + 1, *shape[1:]]} (expected {list(shape)})" in str(
            caught.value
        )


def test_several_problems_are_counted_and_unknown_tensors_named():
    whole = dit_shapes(SMALL)
    rest = {name: shape for name, shape in whole.items() if "cross_attn" not in name}
    with pytest.raises(InputError, match=r"30 tensors do not fit.*and 25 more"):
        check_shapes(rest, whole, "The transformer")
    with pytest.raises(InputError, match=r"blocks\.0\.scale_weight \[1\] is unknown here"):
        check_shapes({**whole, "blocks.0.scale_weight": (1,)}, whole, "The transformer")


@pytest.mark.parametrize(
    ("derive", "shapes", "said"),
    [
        (dit_config, {"blocks.0.ffn.0.bias": (8,)}, "no tensor that shows one of its sizes"),
        (dit_config, {"patch_embedding.bias": (128,)}, "has no blocks"),
        (vae_config, {"conv1.weight": (32, 32, 1, 1, 1)}, "Give a Wan 2.1 VAE"),
        (umt5_config, {"token_embedding.weight": (8, 8)}, "pos_embedding"),
        (clip_config, {"visual.pos_embedding": (1, 257, 80)}, "no tensor that shows"),
    ],
)
def test_fragments_say_what_they_lack(derive, shapes, said):
    with pytest.raises(InputError, match=said):
        derive(shapes, {})


def test_impossible_sizes_are_refused():
    umt5 = umt5_shapes(UMT5Config(300, 64, 64, 128, 5, 2))
    with pytest.raises(InputError, match="does not divide into the 5 heads"):
        umt5_config(umt5)
    clip = clip_shapes(CLIPConfig(56, 14, 80, 1, 2, 160)) | {"visual.pos_embedding": (1, 19, 80)}
    with pytest.raises(InputError, match="19 rows"):
        clip_config(clip)
    vae = vae_shapes(VAEConfig(6)) | {f"encoder.downsamples.3.residual.{i}": (7, 6) for i in ("2.bias", "3.gamma")}
    with pytest.raises(InputError, match="not multiples of its base width 6"):
        vae_config(vae)
