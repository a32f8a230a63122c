"""LoRA files of every format give the weights of the formula, and files that do not fit are refused with a list."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from scail2_rt.export.checkpoint.derive import dit_shapes
from scail2_rt.export.checkpoint.lora import FusedSource, LoRASpec, apply_loras, parse_lora
from scail2_rt.export.checkpoint.random_checkpoint import PRESETS, random_tensor
from scail2_rt.export.checkpoint.tensors import MappingSource, open_safetensors
from scail2_rt.kernels.errors import InputError

RANK = 4
SHAPES = dit_shapes(PRESETS["tiny"].dit)
SAT = "model.diffusion_model.transformer.layers.1."


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.1


@pytest.fixture(scope="module")
def base() -> MappingSource:
    return MappingSource({name: random_tensor("dit", name, shape, 0).bfloat16() for name, shape in SHAPES.items()})


def fuse(base: MappingSource, path: Path, tensors: dict[str, Tensor], strength: float = 1.0, partial: bool = False):
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    else:
        torch.save({"module": tensors}, path)
    return apply_loras(base, [LoRASpec(path, strength)], partial)


def assert_fused(fused: FusedSource, base: MappingSource, deltas: dict[str, Tensor]) -> None:
    """Exactly the tensors of `deltas` are changed, by these amounts, and come in fp32."""
    assert fused.touched == set(deltas)
    for name, delta in deltas.items():
        assert fused.dtype(name) == fused.get(name).dtype == torch.float32
        assert fused.shape(name) == base.shape(name)
        torch.testing.assert_close(fused.get(name), base.get(name).float() + delta, atol=1e-6, rtol=0)
    untouched = next(name for name in base.keys() if name not in deltas)  # noqa: SIM118
    assert fused.get(untouched) is base.get(untouched)
    assert fused.dtype(untouched) == torch.bfloat16


@pytest.mark.parametrize("name", ["lora_plain", "lora_prefixed", "lora_alpha"])
def test_golden_fusions(golden, name):
    expected_file = golden / f"lora/{name}_expected.safetensors"
    expected, metadata = load_file(expected_file), open_safetensors([expected_file]).metadata
    spec = LoRASpec(golden / f"lora/{name}.safetensors", float(metadata["strength"]))
    fused = apply_loras(open_safetensors([golden / metadata["base"]]), [spec])
    rules = ("complete.", "alpha_over_rank.")
    wanted = {key.partition(".")[2]: value for key, value in expected.items() if key.startswith(rules)}
    assert fused.touched == set(wanted)
    for key, value in wanted.items():
        torch.testing.assert_close(fused.get(key), value, atol=1e-6, rtol=0)
    (report,) = fused.report
    assert (report.applied, report.changed, report.skipped) == (len(load_file(spec.path)), len(wanted), ())


LINEAR = "blocks.1.cross_attn.k_img"


@pytest.mark.parametrize(
    ("down_name", "up_name", "alpha_name"),
    [
        ("{m}.lora_down.weight", "{m}.lora_up.weight", "{m}.alpha"),
        ("diffusion_model.{m}.lora_down.weight", "diffusion_model.{m}.lora_up.weight", "diffusion_model.{m}.alpha"),
        ("{m}.lora_A.weight", "{m}.lora_B.weight", "{m}.alpha"),
        ("base_model.model.{m}.lora_A.default.weight", "base_model.model.{m}.lora_B.default.weight", None),
        ("transformer.{m}.lora_A.weight", "transformer.{m}.lora_B.weight", "transformer.{m}.alpha"),
        (
            "base_model.model.diffusion_model.{m}.lora_A.weight",
            "base_model.model.diffusion_model.{m}.lora_B.weight",
            None,
        ),
        ("lora_unet_{u}.lora_down.weight", "lora_unet_{u}.lora_up.weight", "lora_unet_{u}.alpha"),
        ("lora_unet__{u}.lora_down.weight", "lora_unet__{u}.lora_up.weight", "lora_unet__{u}.alpha"),
    ],
)
def test_name_conventions_of_a_pair(base, tmp_path, down_name, up_name, alpha_name):
    names = {"m": LINEAR, "u": LINEAR.replace(".", "_")}
    up, down = noise(256, RANK), noise(RANK, 256, seed=1)
    tensors = {down_name.format(**names): down, up_name.format(**names): up}
    fused = fuse(base, tmp_path / "plain.safetensors", tensors, 0.5)
    assert_fused(fused, base, {f"{LINEAR}.weight": 0.5 * (up @ down)})
    if alpha_name:
        tensors[alpha_name.format(**names)] = torch.tensor(6.0)
        fused = fuse(base, tmp_path / "alpha.safetensors", tensors, 0.5)
        assert_fused(fused, base, {f"{LINEAR}.weight": 0.5 * 6 / RANK * (up @ down)})
        assert fused.report[0].applied == 3


def test_every_linear_of_the_transformer_is_found_by_its_kohya_name(base, tmp_path):
    linears = [name.removesuffix(".weight") for name, shape in SHAPES.items() if len(shape) == 2]
    tensors = {}
    for i, linear in enumerate(linears):
        rows, columns = SHAPES[f"{linear}.weight"]
        kohya = "lora_unet_" + linear.replace(".", "_")
        tensors |= {f"{kohya}.lora_up.weight": noise(rows, 2, seed=i), f"{kohya}.lora_down.weight": noise(2, columns)}
    fused = fuse(base, tmp_path / "all.safetensors", tensors)
    assert fused.touched == {f"{linear}.weight" for linear in linears}


class TestSAT:
    def test_official_names_give_each_projection_its_own_pair(self, base, tmp_path):
        """The names of the released bias-aware DPO and relighting files."""
        parts = {
            "attention.query_key_value.lora_layer.0": "self_attn.q",
            "attention.query_key_value.lora_layer.2": "self_attn.v",
            "attention.dense.lora_layer": "self_attn.o",
            "cross_attention.query.lora_layer": "cross_attn.q",
            "cross_attention.key_value.lora_layer.0": "cross_attn.k",
            "cross_attention.key_value.lora_layer.1": "cross_attn.v",
            "mlp.dense_h_to_4h.lora_layer": "ffn.0",
            "mlp.dense_4h_to_h.lora_layer": "ffn.2",
        }
        tensors, deltas = {}, {}
        for i, (sat, wan) in enumerate(parts.items()):
            rows, columns = SHAPES[f"blocks.1.{wan}.weight"]
            up, down = noise(rows, RANK, seed=i), noise(RANK, columns, seed=i + 50)
            tensors |= {f"{SAT}{sat}.down.weight": down, f"{SAT}{sat}.up.weight": up}
            deltas[f"blocks.1.{wan}.weight"] = up @ down
        tensors[f"{SAT}mlp.dense_4h_to_h.lora_layer.diff_b"] = noise(256, seed=99)
        deltas["blocks.1.ffn.2.bias"] = noise(256, seed=99)
        assert_fused(fuse(base, tmp_path / "dpo.pt", tensors), base, deltas)

    def test_swissarmytransformer_matrices(self, base, tmp_path):
        up, down = noise(256, RANK), noise(RANK, 256, seed=1)
        name = f"{SAT}cross_attention.key_value"
        fused = fuse(base, tmp_path / "sat.pt", {f"{name}.matrix_A.1": down, f"{name}.matrix_B.1": up}, 2)
        assert_fused(fused, base, {"blocks.1.cross_attn.v.weight": 2 * (up @ down)})

    def test_a_pair_for_a_fused_projection_is_cut_by_rows_of_up(self, base, tmp_path):
        up, down, bias = noise(768, RANK), noise(RANK, 256, seed=1), noise(768, seed=2)
        name = f"{SAT}attention.query_key_value"
        tensors = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.diff_b": bias}
        deltas = {
            f"blocks.1.self_attn.{part}.weight": up[i * 256 : (i + 1) * 256] @ down for i, part in enumerate("qkv")
        }
        deltas |= {f"blocks.1.self_attn.{part}.bias": bias[i * 256 : (i + 1) * 256] for i, part in enumerate("qkv")}
        assert_fused(fuse(base, tmp_path / "fused.pt", tensors), base, deltas)

    def test_a_fused_pair_beside_one_of_its_parts_is_refused(self, base, tmp_path):
        name = f"{SAT}attention.query_key_value"
        tensors = {f"{name}.lora_up.weight": noise(768, 4), f"{name}.lora_down.weight": noise(4, 256)}
        tensors |= {f"{name}.lora_layer.1.up.weight": noise(256, 4), f"{name}.lora_layer.1.down.weight": noise(4, 256)}
        with pytest.raises(InputError, match="also part of"):
            fuse(base, tmp_path / "twice.pt", tensors)

    def test_a_part_that_does_not_exist_is_unknown(self, base, tmp_path):
        name = f"{SAT}attention.query_key_value.lora_layer.3"
        with pytest.raises(InputError, match=r"lora_layer\.3\.up\.weight \(unknown tensor\)"):
            fuse(base, tmp_path / "x.pt", {f"{name}.up.weight": noise(256, 4), f"{name}.down.weight": noise(4, 256)})


def test_differences_of_every_kind(base, tmp_path):
    deltas = {
        "blocks.0.norm3.weight": noise(256),
        "blocks.0.norm3.bias": noise(256, seed=1),
        "blocks.0.self_attn.norm_q.weight": noise(256, seed=2),
        "patch_embedding.weight": noise(256, 20, 1, 2, 2, seed=3),
        "blocks.1.modulation": noise(1, 6, 256, seed=4),
        "head.modulation": noise(1, 2, 256, seed=5),
    }
    tensors = {
        "diffusion_model.blocks.0.norm3.diff": deltas["blocks.0.norm3.weight"],
        "diffusion_model.blocks.0.norm3.diff_b": deltas["blocks.0.norm3.bias"],
        "diffusion_model.blocks.0.self_attn.norm_q.diff": deltas["blocks.0.self_attn.norm_q.weight"],
        "diffusion_model.patch_embedding.diff": deltas["patch_embedding.weight"],
        "diffusion_model.blocks.1.diff_m": deltas["blocks.1.modulation"],
        "diffusion_model.head.modulation.diff": deltas["head.modulation"],
    }
    fused = fuse(base, tmp_path / "diff.safetensors", tensors, -0.5)
    assert_fused(fused, base, {name: -0.5 * delta for name, delta in deltas.items()})


@pytest.mark.parametrize("flat", [True, False])
def test_low_rank_convolution(base, tmp_path, flat):
    up, down = noise(256, 3), noise(3, 20 * 4, seed=1)
    shaped = {"up": up, "down": down} if flat else {"up": up[:, :, None, None, None], "down": down.view(3, 20, 1, 2, 2)}
    tensors = {f"patch_embedding.lora_{kind}.weight": tensor for kind, tensor in shaped.items()}
    fused = fuse(base, tmp_path / "conv.safetensors", tensors)
    assert_fused(fused, base, {"patch_embedding.weight": (up @ down).view(256, 20, 1, 2, 2)})


def test_loras_stack(base, tmp_path):
    name = "blocks.0.ffn.0"
    up, down, diff = noise(512, 2), noise(2, 256, seed=1), noise(512, 256, seed=2)
    save_file({f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}, tmp_path / "a.safetensors")
    save_file({f"{name}.diff": diff}, tmp_path / "b.safetensors")
    specs = [LoRASpec(tmp_path / "a.safetensors", 0.5), LoRASpec(tmp_path / "b.safetensors", 2)]
    fused = apply_loras(base, [*specs, specs[0]])
    assert_fused(fused, base, {f"{name}.weight": up @ down + 2 * diff})
    assert [(report.path.name, report.applied) for report in fused.report] == [
        ("a.safetensors", 2),
        ("b.safetensors", 1),
        ("a.safetensors", 2),
    ]
    assert fused.files == ()
    assert apply_loras(base, []).touched == frozenset()


def test_fusing_leaves_the_checkpoint_file_alone(base, tmp_path):
    weights = {"blocks.0.ffn.0.weight": torch.ones(512, 256), "blocks.0.ffn.0.bias": torch.ones(512)}
    save_file(weights, tmp_path / "base.safetensors")
    before = (tmp_path / "base.safetensors").read_bytes()
    save_file({"blocks.0.ffn.0.diff": torch.ones(512, 256)}, tmp_path / "lora.safetensors")
    fused = apply_loras(open_safetensors([tmp_path / "base.safetensors"]), [LoRASpec(tmp_path / "lora.safetensors")])
    assert fused.get("blocks.0.ffn.0.weight").eq(2).all()
    assert fused.get("blocks.0.ffn.0.weight").eq(2).all()
    assert (tmp_path / "base.safetensors").read_bytes() == before
    assert fused.files == (tmp_path / "base.safetensors",)


GOOD = {"blocks.0.ffn.0.lora_up.weight": noise(512, 4), "blocks.0.ffn.0.lora_down.weight": noise(4, 256)}
NAN = torch.full((4, 256), float("nan"))
BAD: dict[str, tuple[dict[str, Tensor], dict[str, str]]] = {
    "unknown": (
        {"text_model.layers.0.q.lora_up.weight": noise(4, 4), "blocks.7.ffn.0.diff_b": noise(512)},
        {"text_model.layers.0.q.lora_up.weight": "unknown tensor", "blocks.7.ffn.0.diff_b": "unknown tensor"},
    ),
    "magnitude alone": (
        {"blocks.0.ffn.2.dora_scale": noise(256, 1)},
        {"blocks.0.ffn.2.dora_scale": "no matching up"},
    ),
    "magnitude of another shape": (
        {
            "blocks.1.ffn.0.dora_scale": noise(500, 1),
            "blocks.1.ffn.0.lora_down.weight": noise(4, 256),
            "blocks.1.ffn.0.lora_up.weight": noise(512, 4),
            "blocks.1.ffn.0.diff_b": noise(512),
        },
        {"blocks.1.ffn.0.dora_scale": "shape [500, 1] is not a magnitude for [512, 256]"}
        | dict.fromkeys(
            (
                "blocks.1.ffn.0.lora_down.weight",
                "blocks.1.ffn.0.lora_up.weight",
                "blocks.1.ffn.0.diff_b",
            ),
            "belongs to blocks.1.ffn.0.dora_scale",
        ),
    ),
    "bias of another shape": (
        {
            "blocks.1.ffn.0.lora_down.weight": noise(4, 256),
            "blocks.1.ffn.0.lora_up.weight": noise(512, 4),
            "blocks.1.ffn.0.diff_b": noise(500),
        },
        {"blocks.1.ffn.0.diff_b": "shape [500] instead of [512]"}
        | dict.fromkeys(
            ("blocks.1.ffn.0.lora_down.weight", "blocks.1.ffn.0.lora_up.weight"), "belongs to blocks.1.ffn.0.diff_b"
        ),
    ),
    "a tensor of an unknown kind beside a pair": (
        {
            "blocks.1.ffn.0.lora_down.weight": noise(4, 256),
            "blocks.1.ffn.0.lora_up.weight": noise(512, 4),
            "blocks.1.ffn.0.lora_gate.weight": noise(4),
        },
        {"blocks.1.ffn.0.lora_gate.weight": "unknown tensor"}
        | dict.fromkeys(
            ("blocks.1.ffn.0.lora_down.weight", "blocks.1.ffn.0.lora_up.weight"),
            "belongs to blocks.1.ffn.0.lora_gate.weight",
        ),
    ),
    "half of a LoKr": (
        {"blocks.1.ffn.0.lokr_w1": noise(16, 16), "blocks.1.ffn.0.lokr_w2_a": noise(32, 2)},
        dict.fromkeys(("blocks.1.ffn.0.lokr_w1", "blocks.1.ffn.0.lokr_w2_a"), "no matching lokr_w2"),
    ),
    "half of a LoHa": (
        {"blocks.1.ffn.0.hada_w1_a": noise(512, 2), "blocks.1.ffn.0.hada_w1_b": noise(2, 256)},
        dict.fromkeys(("blocks.1.ffn.0.hada_w1_a", "blocks.1.ffn.0.hada_w1_b"), "no matching hada_w2_a"),
    ),
    "no up": (
        {"blocks.0.ffn.2.lora_down.weight": noise(4, 512)},
        {"blocks.0.ffn.2.lora_down.weight": "no matching up"},
    ),
    "no down": (
        {"blocks.0.ffn.2.lora_up.weight": noise(256, 4)},
        {"blocks.0.ffn.2.lora_up.weight": "no matching down"},
    ),
    "alpha alone": ({"blocks.0.ffn.2.alpha": torch.tensor(4.0)}, {"blocks.0.ffn.2.alpha": "no matching up"}),
    "misshapen pair": (
        {"blocks.0.ffn.2.lora_up.weight": noise(256, 4), "blocks.0.ffn.2.lora_down.weight": noise(4, 511)},
        dict.fromkeys(
            ("blocks.0.ffn.2.lora_up.weight", "blocks.0.ffn.2.lora_down.weight"),
            "up [256, 4] and down [4, 511] do not give [256, 512]",
        ),
    ),
    "other ranks": (
        {"blocks.0.ffn.2.lora_up.weight": noise(256, 5), "blocks.0.ffn.2.lora_down.weight": noise(4, 512)},
        dict.fromkeys(
            ("blocks.0.ffn.2.lora_up.weight", "blocks.0.ffn.2.lora_down.weight"),
            "up [256, 5] and down [4, 512] do not go together",
        ),
    ),
    "misshapen difference": (
        {"blocks.0.norm3.diff": noise(255)},
        {"blocks.0.norm3.diff": "shape [255] instead of [256]"},
    ),
    "not finite": (
        {"blocks.1.ffn.0.lora_down.weight": NAN, "blocks.1.ffn.0.lora_up.weight": noise(512, 4)},
        {
            "blocks.1.ffn.0.lora_down.weight": "not finite",
            "blocks.1.ffn.0.lora_up.weight": "belongs to blocks.1.ffn.0.lora_down.weight",
        },
    ),
    "alpha not finite": (
        {
            "blocks.1.ffn.0.alpha": torch.tensor(float("inf")),
            "blocks.1.ffn.0.lora_down.weight": noise(4, 256),
            "blocks.1.ffn.0.lora_up.weight": noise(512, 4),
        },
        {
            "blocks.1.ffn.0.alpha": "not finite",
            "blocks.1.ffn.0.lora_down.weight": "belongs to blocks.1.ffn.0.alpha",
            "blocks.1.ffn.0.lora_up.weight": "belongs to blocks.1.ffn.0.alpha",
        },
    ),
    "alpha with a shape": (
        {
            "blocks.1.ffn.0.alpha": torch.ones(2),
            "blocks.1.ffn.0.lora_down.weight": noise(4, 256),
            "blocks.1.ffn.0.lora_up.weight": noise(512, 4),
        },
        dict.fromkeys(
            ("blocks.1.ffn.0.alpha", "blocks.1.ffn.0.lora_down.weight", "blocks.1.ffn.0.lora_up.weight"),
            "alpha of shape [2] instead of one number",
        ),
    ),
    "integers": (
        {"blocks.1.norm3.diff": torch.ones(256, dtype=torch.int32)},
        {"blocks.1.norm3.diff": "type torch.int32"},
    ),
    "bias of a norm without": (
        {"blocks.1.self_attn.norm_q.diff_b": noise(256)},
        {"blocks.1.self_attn.norm_q.diff_b": "blocks.1.self_attn.norm_q.bias is not in this transformer"},
    ),
    "pair on a parameter": (
        {"blocks.1.modulation.lora_up.weight": noise(6, 4), "blocks.1.modulation.lora_down.weight": noise(4, 256)},
        dict.fromkeys(
            ("blocks.1.modulation.lora_up.weight", "blocks.1.modulation.lora_down.weight"),
            "blocks.1.modulation.weight is not in this transformer",
        ),
    ),
    "twice": (
        {
            "blocks.1.ffn.0.lora_down.weight": noise(4, 256),
            "blocks.1.ffn.0.lora_up.weight": noise(512, 4),
            "diffusion_model.blocks.1.ffn.0.lora_up.weight": noise(512, 4),
        },
        {"diffusion_model.blocks.1.ffn.0.lora_up.weight": "a duplicate of blocks.1.ffn.0.lora_up.weight"}
        | dict.fromkeys(
            ("blocks.1.ffn.0.lora_down.weight", "blocks.1.ffn.0.lora_up.weight"),
            "belongs to diffusion_model.blocks.1.ffn.0.lora_up.weight",
        ),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_files_that_do_not_fit_are_refused_or_applied_in_part(base, tmp_path, case):
    tensors, problems = BAD[case]
    path = tmp_path / "bad.pt"
    with pytest.raises(InputError) as caught:
        fuse(base, path, {**GOOD, **tensors})
    assert f"{path} is refused: {len(problems)} of its tensors cannot be applied" in str(caught.value)
    assert "--lora-partial" in str(caught.value)
    for name, reason in problems.items():
        assert f"{name} ({reason})" in str(caught.value)
    fused = fuse(base, path, {**GOOD, **tensors}, partial=True)
    up, down = GOOD.values()
    assert_fused(fused, base, {"blocks.0.ffn.0.weight": up @ down})
    assert set(fused.report[0].skipped) == {f"{name}: {reason}" for name, reason in problems.items()}


def test_long_lists_are_cut_and_a_file_without_anything_is_refused(base, tmp_path):
    tensors = {f"te.{i}.lora_up.weight": noise(2, 2) for i in range(20)}
    with pytest.raises(InputError, match=r"20 of its tensors.*and 12 more.*--lora-partial"):
        fuse(base, tmp_path / "te.safetensors", {**GOOD, **tensors})
    for partial in (False, True):  # no option helps, so none is named
        with pytest.raises(InputError, match="has no tensor that fits this transformer") as caught:
            fuse(base, tmp_path / "te.safetensors", tensors, partial)
        assert "--lora-partial" not in str(caught.value)


class TestPeftFolder:
    def write(self, folder: Path, config: dict[str, object]) -> tuple[Path, dict[str, Tensor]]:
        (folder / "adapter_config.json").write_text(json.dumps(config))
        names = [f"base_model.model.{LINEAR}.lora_{kind}.weight" for kind in "BA"]
        return folder / "adapter_model.safetensors", {names[0]: noise(256, RANK), names[1]: noise(RANK, 256, seed=1)}

    def test_alpha_of_the_adapter_config(self, base, tmp_path):
        path, tensors = self.write(tmp_path, {"lora_alpha": 8, "use_dora": False, "alpha_pattern": {}})
        up, down = tensors.values()
        assert_fused(fuse(base, path, tensors), base, {f"{LINEAR}.weight": 8 / RANK * (up @ down)})

    @pytest.mark.parametrize(
        ("config", "said"),
        [
            ({"r": 8}, "no readable alpha"),
            ({"lora_alpha": 8, "use_dora": True}, "DoRA without a magnitude"),
            ({"lora_alpha": 8, "peft_type": "VERA"}, "a PEFT adapter of the kind VERA"),
            ({"lora_alpha": 8, "init_lora_weights": "pissa_niter_4"}, "changes the checkpoint's weights"),
            ({"lora_alpha": 8, "alpha_pattern": {"(": 4}}, "an alpha or rank pattern that cannot be read"),
        ],
    )
    def test_what_cannot_be_fused_is_refused(self, base, tmp_path, config, said):
        path, tensors = self.write(tmp_path, config)
        with pytest.raises(InputError) as caught:
            fuse(base, path, tensors)
        assert said in str(caught.value)
        assert "--lora-partial" not in str(caught.value)

    def test_a_configuration_beside_another_file_name_is_ignored(self, base, tmp_path):
        _, tensors = self.write(tmp_path, {"lora_alpha": 64, "use_dora": True})
        up, down = tensors.values()
        assert_fused(fuse(base, tmp_path / "other.safetensors", tensors), base, {f"{LINEAR}.weight": up @ down})

    def test_a_folder_stands_for_its_adapter(self, base, tmp_path):
        path, tensors = self.write(tmp_path, {"lora_alpha": 8})
        save_file(tensors, path)
        spec = parse_lora(f"{tmp_path}:0.5")
        assert spec == LoRASpec(path, 0.5)
        assert spec.files == (path, tmp_path / "adapter_config.json")
        up, down = tensors.values()
        assert_fused(apply_loras(base, [spec]), base, {f"{LINEAR}.weight": 0.5 * 8 / RANK * (up @ down)})

    def test_a_folder_without_an_adapter(self, tmp_path):
        (tmp_path / "style.safetensors").touch()
        with pytest.raises(InputError, match=r"is not a PEFT adapter.*it holds style\.safetensors\. Name one of them"):
            parse_lora(str(tmp_path))


class TestParse:
    @pytest.fixture
    def folder(self, tmp_path, monkeypatch):
        for name in ("a.safetensors", "b:1.safetensors", "c.safetensors:0.5"):
            (tmp_path / name).write_bytes(b"")
        monkeypatch.chdir(tmp_path)
        return tmp_path

    @pytest.mark.parametrize(
        ("spec", "path", "strength"),
        [
            ("a.safetensors", "a.safetensors", 1),
            ("a.safetensors:0.8", "a.safetensors", 0.8),
            ("a.safetensors:-1e-1", "a.safetensors", -0.1),
            ("b:1.safetensors", "b:1.safetensors", 1),
            ("b:1.safetensors:0", "b:1.safetensors", 0),
            ("c.safetensors:0.5", "c.safetensors:0.5", 1),
            ("c.safetensors:0.5:2", "c.safetensors:0.5", 2),
        ],
    )
    def test_accepted(self, folder, spec, path, strength):
        assert parse_lora(spec) == LoRASpec(Path(path), strength)

    @pytest.mark.parametrize(
        ("spec", "said"),
        [
            ("nowhere.safetensors", "no LoRA file nowhere.safetensors"),
            ("nowhere.safetensors:0.5", "no LoRA file nowhere.safetensors. Give"),
            ("C:nowhere", "no LoRA file C:nowhere"),
            ("a.safetensors:strong", "'strong' in 'a.safetensors:strong' is not a number"),
            ("a.safetensors:", "is not a number"),
            ("a.safetensors:nan", "is not finite"),
            ("a.safetensors:inf", "is not finite"),
            ("", "no LoRA file"),
        ],
    )
    def test_refused(self, folder, spec, said):
        with pytest.raises(InputError) as caught:
            parse_lora(spec)
        assert said in str(caught.value)
