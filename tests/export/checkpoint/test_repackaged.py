"""Repackaged files such as ComfyUI's: other names, prefixes, 8-bit weights with scales. They give the same tensors and
engines as the checkpoint they were made from; unknown storage is refused by name."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from scail2_rt.export.checkpoint.open import Checkpoint, open_checkpoint
from scail2_rt.export.checkpoint.random_checkpoint import CLIP_FILE, TOKENIZER_FILE, UMT5_FILE, VAE_FILE
from scail2_rt.kernels.errors import InputError
from tests.support.command import Run, error_of, one_json
from tests.support.repackaged import (
    LINEARS,
    PREFIX,
    Tensors,
    assert_same,
    fp8_scaled,
    hugging_face_clip,
    hugging_face_umt5,
    opened_dit,
    refused,
    tensors_of,
)

pytest_plugins = ["tests.support.runtime_fixtures"]

UMT5_LINEARS = r"encoder\.block\.\d+\.layer\.\d\.(SelfAttention\.[qkvo]|DenseReluDense\.\w+)\.weight"
FORMS = ("scale_weight", "comfy_quant", "metadata", "uint8")


class TestHuggingFaceNames:
    def test_umt5_comes_back_tensor_for_tensor(self, tiny_checkpoint: Path, opened: Checkpoint, tmp_path: Path) -> None:
        wan = tensors_of(opened.sources["umt5"])
        save_file(hugging_face_umt5(wan), tmp_path / "umt5.safetensors")
        found = open_checkpoint(tiny_checkpoint, umt5=tmp_path / "umt5.safetensors", tokenizer=opened.tokenizer)
        assert_same(found.sources["umt5"], wan)
        assert found.config == opened.config

    def test_umt5_whose_table_has_only_the_encoders_name(
        self, tiny_checkpoint: Path, opened: Checkpoint, tmp_path: Path
    ) -> None:
        wan = tensors_of(opened.sources["umt5"])
        stored = hugging_face_umt5(wan)
        del stored["shared.weight"]
        save_file(stored, tmp_path / "umt5.safetensors")
        found = open_checkpoint(tiny_checkpoint, umt5=tmp_path / "umt5.safetensors", tokenizer=opened.tokenizer)
        assert_same(found.sources["umt5"], wan)

    def test_clip_comes_back_with_q_k_v_put_together(
        self, tiny_checkpoint: Path, opened: Checkpoint, tmp_path: Path
    ) -> None:
        wan = tensors_of(opened.sources["clip"])
        save_file(hugging_face_clip(wan), tmp_path / "clip.safetensors")
        found = open_checkpoint(tiny_checkpoint, clip=tmp_path / "clip.safetensors")
        unused = ("visual.head", "log_scale")
        assert_same(found.sources["clip"], {name: tensor for name, tensor in wan.items() if name not in unused})
        assert found.config == opened.config

    def test_a_missing_projection_and_an_unknown_tensor_are_named(
        self, tiny_checkpoint: Path, opened: Checkpoint, tmp_path: Path
    ) -> None:
        stored = hugging_face_clip(tensors_of(opened.sources["clip"]))
        whole = {**stored, "vision_model.encoder.layers.0.gate": torch.zeros(3)}
        del stored["vision_model.encoder.layers.1.self_attn.k_proj.weight"]
        for tensors, said in ((stored, "has no k_proj"), (whole, "vision_model.encoder.layers.0.gate [3] is unknown")):
            save_file(tensors, tmp_path / "clip.safetensors")
            with pytest.raises(InputError, match=re.escape(said)):
                open_checkpoint(tiny_checkpoint, clip=tmp_path / "clip.safetensors")


class TestScaled:
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("rows", [False, True])
    def test_every_form_is_weight_times_scale(self, dit: Tensors, tmp_path: Path, form: str, rows: bool) -> None:
        named = {PREFIX + name: tensor.half() for name, tensor in dit.items()}
        stored, metadata, meant = fp8_scaled(named, LINEARS, form, rows)
        save_file(stored, tmp_path / "dit.safetensors", metadata=metadata)
        source = opened_dit(tmp_path / "dit.safetensors")
        assert_same(source, {name.removeprefix(PREFIX): tensor for name, tensor in meant.items()})
        weight = source.get("blocks.0.ffn.0.weight")
        assert weight.dtype == torch.float32
        error = (weight - dit["blocks.0.ffn.0.weight"]).norm() / dit["blocks.0.ffn.0.weight"].norm()
        assert 0.01 < error < 0.04  # e4m3 has three bits of mantissa

    @pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
    def test_one_number_in_any_shape(self, dit: Tensors, tmp_path: Path, shape: tuple[int, ...]) -> None:
        stored, metadata, meant = fp8_scaled(dit, LINEARS, "scale_weight")
        scaled = {n: t.reshape(shape) if n.endswith("scale_weight") else t for n, t in stored.items()}
        save_file(scaled, tmp_path / "dit.safetensors", metadata=metadata)
        assert_same(opened_dit(tmp_path / "dit.safetensors"), meant)

    def test_plain_8_bit_weights_without_scales_are_taken_as_they_are(self, dit: Tensors, tmp_path: Path) -> None:
        stored = {n: t.to(torch.float8_e4m3fn) if t.dim() == 2 else t for n, t in dit.items()}
        save_file(stored, tmp_path / "dit.safetensors")
        source = opened_dit(tmp_path / "dit.safetensors")
        assert source.dtype("blocks.1.ffn.2.weight") == torch.float8_e4m3fn
        assert torch.equal(
            source.get("blocks.1.ffn.2.weight").view(torch.uint8), stored["blocks.1.ffn.2.weight"].view(torch.uint8)
        )

    @pytest.mark.parametrize(
        ("note", "named"),
        [
            ({"format": "convrot_w4a4"}, "quantised as convrot_w4a4"),
            ({"format": "int8_blockwise", "group_size": 128}, "quantised as int8_blockwise"),
            ({"format": "awq_w4a16", "params": {"group_size": 64}}, "quantised as awq_w4a16"),
            ({"group_size": 3}, "quantisation notes are damaged"),
            ([1], "quantisation notes are damaged"),
        ],
    )
    def test_other_formats_are_refused_by_name(self, dit: Tensors, tmp_path: Path, note: object, named: str) -> None:
        stored, metadata, _ = fp8_scaled(dit, LINEARS, "comfy_quant")
        stored["blocks.1.ffn.0.comfy_quant"] = torch.tensor(list(json.dumps(note).encode()), dtype=torch.uint8)
        save_file(stored, tmp_path / "dit.safetensors", metadata=metadata)
        message = refused(tmp_path / "dit.safetensors", components=("dit",))
        assert named in message
        assert "fp8_scaled" in message

    def test_scales_that_do_not_fit_are_refused(self, dit: Tensors, tmp_path: Path) -> None:
        stored, _, _ = fp8_scaled(dit, LINEARS, "comfy_quant")
        scale, weight = "blocks.0.ffn.0.weight_scale", "blocks.0.ffn.0.weight"
        cases: list[tuple[Tensors, str]] = [
            ({scale: torch.ones(4, 2)}, f"the scale {scale} is [4, 2] for a weight [512, 256]"),
            ({scale: torch.ones(256)}, f"the scale {scale} is [256] for a weight [512, 256]"),
            ({scale: torch.ones(1, dtype=torch.int32)}, "int32, which is not supported"),
            ({weight: stored[weight].float()}, "only 8-bit floats and int8 are supported"),
        ]
        for changed, said in cases:
            save_file({**stored, **changed}, tmp_path / "dit.safetensors")
            assert said in refused(tmp_path / "dit.safetensors", components=("dit",))
        for gone, said in ((scale, "blocks.0.ffn.0 has no weight_scale"), (weight, f"but no {weight}")):
            save_file({n: t for n, t in stored.items() if n != gone}, tmp_path / "dit.safetensors")
            assert said in refused(tmp_path / "dit.safetensors", components=("dit",))


@pytest.fixture(scope="module")
def comfy(tiny_checkpoint: Path, opened: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a folder of repackaged files as ComfyUI's model folders hold them, the same values as a plain checkpoint)."""
    folder, plain = tmp_path_factory.mktemp("comfy"), tmp_path_factory.mktemp("plain")
    for name in ("diffusion_models", "vae", "text_encoders", "clip_vision"):
        (folder / name).mkdir()
    named = {PREFIX + name: tensor for name, tensor in tensors_of(opened.sources["dit"]).items()}
    dit, notes, dit_meant = fp8_scaled(named, LINEARS, "scale_weight")
    save_file(dit, folder / "diffusion_models/scail2_fp8_scaled.safetensors", metadata=notes)
    umt5 = hugging_face_umt5(tensors_of(opened.sources["umt5"]))
    table = umt5.pop("encoder.embed_tokens.weight")
    umt5, _, umt5_meant = fp8_scaled(umt5, UMT5_LINEARS, "scale_weight")
    save_file(umt5, folder / "text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors")
    save_file(tensors_of(opened.sources["vae"]), folder / "vae/wan_2.1_vae.safetensors")
    save_file(hugging_face_clip(tensors_of(opened.sources["clip"])), folder / "clip_vision/clip_vision_h.safetensors")
    save_file({n: t.contiguous() for n, t in dit_meant.items()}, plain / "dit.safetensors")
    (plain / "umt5").mkdir()
    save_file({**umt5_meant, "encoder.embed_tokens.weight": table}, plain / "umt5/umt5.safetensors")
    shutil.copy(tiny_checkpoint / TOKENIZER_FILE, plain / "umt5/tokenizer.json")
    for file in (VAE_FILE, CLIP_FILE):
        shutil.copy(tiny_checkpoint / file, plain)
    return folder, plain


def test_engines_of_repackaged_files_are_those_of_their_values(
    scail2: Run, comfy: tuple[Path, Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder, plain = comfy
    build = ("--backend", "torch", "--precision", "bf16", "--json")
    tokenizer = ("--tokenizer", tiny_checkpoint / TOKENIZER_FILE)
    first = scail2("build-engines", folder, "-o", tmp_path / "comfy", *tokenizer, *build)
    assert first.returncode == 0, first.stderr
    second = scail2("build-engines", plain, "-o", tmp_path / "plain", *build)
    assert second.returncode == 0, second.stderr
    stores = [load_file(tmp_path / name / "stages/weights.safetensors") for name in ("comfy", "plain")]
    assert set(stores[0]) == set(stores[1])
    for name, tensor in stores[0].items():
        assert torch.equal(tensor, stores[1][name]), name
    assert one_json(first)["stages"] == one_json(second)["stages"]


def test_without_a_tokenizer_the_repackaged_folder_says_what_is_needed(scail2: Run, comfy: tuple[Path, Path]) -> None:
    folder, _ = comfy
    message = error_of(scail2("build-engines", folder, "-o", folder / "e", "--backend", "torch"))
    assert "There is no tokenizer.json" in message


def test_converting_repackaged_files_makes_a_checkpoint_of_its_own(
    scail2: Run, comfy: tuple[Path, Path], tiny_checkpoint: Path, opened: Checkpoint, tmp_path: Path
) -> None:
    folder, plain = comfy
    output = tmp_path / "all/scail2.safetensors"
    words = ("--all", "--dtype", "fp32", "--tokenizer", tiny_checkpoint / TOKENIZER_FILE)
    result = scail2("convert", folder, "-o", output, *words)
    assert result.returncode == 0, result.stderr
    found = open_checkpoint(output.parent)
    assert found.config == opened.config
    assert_same(found.sources["dit"], tensors_of(open_checkpoint(plain).sources["dit"]))
    umt5 = found.sources["umt5"]
    exact = open_checkpoint(plain).sources["umt5"]
    for name in umt5.keys():  # noqa: SIM118
        assert umt5.dtype(name) == torch.bfloat16, name
        assert torch.equal(umt5.get(name), exact.get(name).bfloat16()), name
    assert Path(UMT5_FILE).name not in {path.name for path in output.parent.iterdir()}
