"""Quantised checkpoints through the installed command: every tensor equals the result of the format's own library, and
`inspect` names the format. Missing, misshapen or foreign tensors are refused by name."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from scail2_rt.export.checkpoint.find import open_group
from scail2_rt.export.checkpoint.hf_names import UMT5_TO_WAN
from scail2_rt.export.checkpoint.open import Checkpoint
from scail2_rt.kernels.errors import InputError
from tests.support.command import Run, error_of, one_json
from tests.support.quantised_files import (
    FORMS,
    Made,
    comfy_convrot,
    comfy_nvfp4,
    fp8_blocks,
    lightx2v_int8,
    matching,
    quanto_int8,
    write_gguf,
)
from tests.support.repackaged import PREFIX, Tensors, assert_same, hugging_face_umt5, opened_dit, refused, tensors_of

pytest_plugins = ["tests.support.runtime_fixtures"]

Q = "blocks.0.self_attn.q"


def refused_tensors(tensors: Tensors, path: Path) -> str:
    """The sentence that a file with these tensors is refused with."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return refused(path, components=("dit",))


@pytest.mark.parametrize("form", FORMS)
def test_converted_by_the_command_every_tensor_is_the_librarys(
    scail2: Run, dit: Tensors, tmp_path: Path, form: str
) -> None:
    made = FORMS[form](dit)
    file = made.save(tmp_path / f"{form}.safetensors")
    result = scail2("convert", file, "-o", tmp_path / "out/dit.safetensors", "--dtype", "fp32")
    assert result.returncode == 0, result.stderr
    out = load_file(tmp_path / "out/dit.safetensors")
    assert set(out) == set(made.meant)
    for name, tensor in made.meant.items():
        assert torch.equal(out[name], tensor.float()), name
    shown = scail2("inspect", file).stdout
    assert f"{len(matching(dit))} weights in {made.shown}" in shown
    assert "problem:" not in shown


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("prefix", [PREFIX, "diffusion_model."])
def test_prefixes(dit: Tensors, tmp_path: Path, form: str, prefix: str) -> None:
    made = FORMS[form]({prefix + name: tensor.half() for name, tensor in dit.items()})
    source = opened_dit(made.save(tmp_path / "dit.safetensors"))
    assert_same(source, {name.removeprefix(prefix): tensor for name, tensor in made.meant.items()})


@pytest.mark.parametrize("form", [name for name in FORMS if name.startswith("comfy")])
def test_formats_described_in_the_metadata_alone(dit: Tensors, tmp_path: Path, form: str) -> None:
    made = FORMS[form](dit)
    notes = {name: tensor for name, tensor in made.stored.items() if name.endswith(".comfy_quant")}
    layers = {name.removesuffix(".comfy_quant"): json.loads(bytes(note.tolist())) for name, note in notes.items()}
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    stored = {name: tensor for name, tensor in made.stored.items() if name not in notes}
    assert_same(opened_dit(Made(stored, made.meant, "", metadata).save(tmp_path / "dit.safetensors")), made.meant)


class TestComfy:
    @pytest.mark.parametrize("group", [16, 64, 256])
    def test_rotated_groups_of_any_size(self, dit: Tensors, tmp_path: Path, group: int) -> None:
        made = comfy_convrot(dit, group)
        source = opened_dit(made.save(tmp_path / "dit.safetensors"))
        assert_same(source, made.meant)
        weight = source.get(f"{Q}.weight")
        assert (weight - dit[f"{Q}.weight"]).norm() / dit[f"{Q}.weight"].norm() < 0.01

    def test_rows_from_the_middle_of_a_tile_of_scales(self, dit: Tensors, tmp_path: Path) -> None:
        for form in ("comfy_mxfp8", "comfy_nvfp4"):
            made = FORMS[form](dit)
            source = opened_dit(made.save(tmp_path / f"{form}.safetensors"))
            whole = made.meant["blocks.1.ffn.0.weight"]
            for start, stop in ((0, 5), (100, 300), (384, 512), (511, 600)):
                assert torch.equal(source.rows("blocks.1.ffn.0.weight", start, stop), whole[start:stop])

    def test_older_types_for_the_same_bytes(self, dit: Tensors, tmp_path: Path) -> None:
        for form in ("comfy_mxfp8", "comfy_nvfp4"):
            made = FORMS[form](dit)
            small = (torch.float8_e4m3fn, torch.float8_e8m0fnu)
            stored = {n: t.view(torch.uint8) if t.dtype in small else t for n, t in made.stored.items()}
            assert_same(opened_dit(Made(stored, {}, "", {}).save(tmp_path / f"{form}.safetensors")), made.meant)

    def test_a_scale_of_the_input_is_put_into_the_weight(self, dit: Tensors, tmp_path: Path) -> None:
        made = comfy_nvfp4(dit)
        factor = torch.linspace(0.5, 2, 256)
        stored = {**made.stored, f"{Q}.pre_quant_scale": factor}
        source = opened_dit(Made(stored, {}, "", {}).save(tmp_path / "dit.safetensors"))
        assert_same(source, {**made.meant, f"{Q}.weight": made.meant[f"{Q}.weight"] * factor})

    @pytest.mark.parametrize("form", ["comfy_int8", "comfy_convrot", "comfy_mxfp8", "comfy_nvfp4"])
    def test_without_the_library_the_extra_is_named(
        self, dit: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
    ) -> None:
        file = FORMS[form](dit).save(tmp_path / "dit.safetensors")
        _hide(monkeypatch, "comfy_kitchen")
        with pytest.raises(InputError, match=r"comfy-kitchen.*pip install 'scail2-rt\[comfy\]'"):
            opened_dit(file)

    def test_what_does_not_fit_is_named(self, dit: Tensors, tmp_path: Path) -> None:
        rotated, packed = comfy_convrot(dit).stored, comfy_nvfp4(dit).stored
        note = json.dumps({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 100}).encode()
        cases: list[tuple[Tensors, str]] = [
            ({**rotated, f"{Q}.comfy_quant": torch.tensor(list(note), dtype=torch.uint8)}, "in groups of 100"),
            ({**rotated, f"{Q}.weight_scale": torch.ones(3, 1)}, "weight_scale is [3, 1] for a weight [256, 256]"),
            ({**rotated, f"{Q}.weight": dit[f"{Q}.weight"]}, "is not a weight in int8_tensorwise"),
            ({**packed, f"{Q}.weight_scale_2": torch.ones(2)}, "weight_scale_2 is [2]"),
            ({name: t for name, t in packed.items() if name != f"{Q}.weight_scale_2"}, "has no weight_scale_2"),
        ]
        for tensors, said in cases:
            assert said in refused_tensors(tensors, tmp_path / "dit.safetensors")


class TestOthers:
    def test_blocks_that_end_early_and_other_sizes(self, dit: Tensors, tmp_path: Path) -> None:
        for block in (64, 128):
            made = fp8_blocks(dit, block)
            assert_same(opened_dit(made.save(tmp_path / f"{block}.safetensors")), made.meant)
        weight = {"blocks.0.ffn.0.weight": torch.randn(300, 200)}
        made = fp8_blocks(weight)
        assert made.stored["blocks.0.ffn.0.weight_scale_inv"].shape == (3, 2)
        assert_same(open_group((made.save(tmp_path / "odd.safetensors"),)), made.meant)

    def test_one_number_or_one_for_each_row(self, dit: Tensors, tmp_path: Path) -> None:
        made = fp8_blocks(dit)
        for scale in (torch.tensor(0.5), torch.linspace(0.1, 1, 256)[:, None]):
            stored = {**made.stored, f"{Q}.weight_scale_inv": scale}
            source = opened_dit(Made(stored, {}, "", {}).save(tmp_path / "dit.safetensors"))
            assert torch.equal(source.get(f"{Q}.weight"), made.stored[f"{Q}.weight"].float() * scale)

    def test_what_does_not_fit_is_named(self, dit: Tensors, tmp_path: Path) -> None:
        blocks, quanto, light = fp8_blocks(dit).stored, quanto_int8(dit).stored, lightx2v_int8(dit).stored
        bare = {name: tensor for name, tensor in light.items() if name != f"{Q}.weight_scale"}
        cases: list[tuple[Tensors, str]] = [
            ({**blocks, f"{Q}.weight_scale_inv": torch.ones(3, 3)}, "weight_scale_inv is [3, 3]"),
            ({**quanto, f"{Q}.weight._shift": torch.zeros(256, 1)}, "int4 or int2 by quanto"),
            ({**quanto, f"{Q}.weight._scale": torch.ones(1, 256)}, "is [1, 256]"),
            ({n: t for n, t in quanto.items() if n != f"{Q}.weight._scale"}, "has no _scale"),
            (bare, f"{Q}.weight is int8 without a known scale"),
            ({**bare, f"{Q}.SCB": torch.ones(256)}, "quantised by bitsandbytes"),
        ]
        for tensors, said in cases:
            message = refused_tensors(tensors, tmp_path / "dit.safetensors")
            assert said in message
            assert "fp16" in message


class TestGGUF:
    @pytest.mark.parametrize("kind", ["BF16", "Q8_0", "Q5_1"])
    def test_a_transformer_through_the_command(self, scail2: Run, dit: Tensors, tmp_path: Path, kind: str) -> None:
        file = tmp_path / "scail2.gguf"
        meant = write_gguf(file, dit, kind)
        result = scail2("convert", file, "-o", tmp_path / "out/dit.safetensors", "--dtype", "fp32")
        assert result.returncode == 0, result.stderr
        out = load_file(tmp_path / "out/dit.safetensors")
        assert set(out) == set(meant)
        for name, tensor in meant.items():
            assert torch.equal(out[name], tensor), name
        shown = one_json(scail2("inspect", file, "--json"))["parts"][0]
        assert shown["formats"] == ({} if kind in ("F16", "BF16") else {f"GGUF {kind}": 24})
        assert next(iter(shown["dtypes"])) == {"F16": "float16", "BF16": "bfloat16"}.get(kind, kind)

    def test_every_type_that_the_library_dequantises(self, tmp_path: Path) -> None:
        gguf = pytest.importorskip("gguf", reason="gguf is not installed (the extra `gguf`)")
        generator = np.random.default_rng(0)
        writer = gguf.GGUFWriter(str(tmp_path / "types.gguf"), "wan")
        meant = {}
        for number, (block, size) in gguf.GGML_QUANT_SIZES.items():
            data = generator.integers(0, 255, (20, 512 // block * size), dtype=np.uint8)
            try:
                with np.errstate(all="ignore"):
                    meant[number.name] = torch.from_numpy(gguf.dequantize(data, number).copy())
            except NotImplementedError:
                continue
            writer.add_tensor(number.name, data, raw_dtype=number)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        assert {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ2_XXS", "MXFP4", "TQ2_0"} <= set(meant)
        source = open_group((tmp_path / "types.gguf",))
        for name, values in meant.items():
            assert torch.allclose(source.get(name).float(), values, 0, 0, equal_nan=True), name
            assert torch.allclose(source.rows(name, 5, 17).float(), values[5:17], 0, 0, equal_nan=True), name

    def test_prefixes_lost_dimensions_and_files_named_otherwise(self, dit: Tensors, tmp_path: Path) -> None:
        squeezed = {n: t[0] if n.endswith("modulation") else t for n, t in dit.items()}
        squeezed = {
            n: t.squeeze(2) if n.startswith("patch_embedding") and t.dim() > 1 else t for n, t in squeezed.items()
        }
        meant = write_gguf(tmp_path / "a.gguf", {PREFIX + n: t for n, t in squeezed.items()}, "Q8_0")
        assert_same(opened_dit(tmp_path / "a.gguf"), {n: meant[PREFIX + n].reshape(t.shape) for n, t in dit.items()})
        (tmp_path / "a.gguf").rename(tmp_path / "b.safetensors")
        assert len(list(opened_dit(tmp_path / "b.safetensors").keys())) == len(dit)

    @pytest.mark.parametrize("names", ["llama.cpp", "Hugging Face"])
    def test_umt5_through_the_command(
        self, scail2: Run, tiny_checkpoint: Path, opened: Checkpoint, tmp_path: Path, names: str
    ) -> None:
        gguf = pytest.importorskip("gguf", reason="gguf is not installed (the extra `gguf`)")
        wan = tensors_of(opened.sources["umt5"])
        theirs = {n: t for n, t in hugging_face_umt5(wan).items() if n not in ("spiece_model",)}
        theirs.pop("encoder.embed_tokens.weight")
        table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, 2)
        if names == "llama.cpp":
            theirs = {table.get_name(name, try_suffixes=(".weight",)): tensor for name, tensor in theirs.items()}
        pattern = (
            r"token_embd.weight|.*(attn_[qkvo]|ffn_(up|gate|down))\.weight|.*(SelfAttention\.[qkvo]|wi_0|wi_1|wo).*"
        )
        meant = write_gguf(tmp_path / "umt5.gguf", theirs, "Q8_0", pattern, "t5encoder", vocabulary=300)
        back = dict(zip(theirs, wan, strict=True))
        assert set(UMT5_TO_WAN)
        tokenizer = tiny_checkpoint / "umt5-xxl/tokenizer.json"
        words = ("--all", "--t5", tmp_path / "umt5.gguf", "--tokenizer", tokenizer)
        result = scail2("convert", tiny_checkpoint, "-o", tmp_path / "out/dit.safetensors", *words)
        assert result.returncode == 0, result.stderr
        out = load_file(tmp_path / "out/umt5.safetensors")
        assert set(out) == set(wan)
        for name, tensor in meant.items():
            assert torch.equal(out[back[name]], tensor.to(out[back[name]].dtype)), name
        shown = one_json(scail2("inspect", tmp_path / "umt5.gguf", "--json"))["parts"][0]
        assert shown["names"] == f"{names} names"
        assert set(shown["formats"]) == {"GGUF Q8_0"}

    def test_without_the_library_the_extra_is_named(
        self, dit: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_gguf(tmp_path / "dit.gguf", dit, "Q8_0")
        _hide(monkeypatch, "gguf")
        with pytest.raises(InputError, match=r"pip install 'scail2-rt\[gguf\]'"):
            opened_dit(tmp_path / "dit.gguf")

    def test_damaged_files_and_unknown_types(self, scail2: Run, dit: Tensors, tmp_path: Path) -> None:
        write_gguf(tmp_path / "dit.gguf", dit, "Q8_0")
        data = (tmp_path / "dit.gguf").read_bytes()
        for kept, said in (
            (0, "not a GGUF file"),
            (3, "not a GGUF file"),
            (50, "truncated"),
            (len(data) - 99, "is truncated"),
        ):
            (tmp_path / "cut.gguf").write_bytes(data[:kept])
            assert said in error_of(scail2("inspect", tmp_path / "cut.gguf")), kept
        (tmp_path / "cut.gguf").write_bytes(data[:4] + (9).to_bytes(4, "little") + data[8:])
        assert "has version 9" in error_of(scail2("inspect", tmp_path / "cut.gguf"))
        name = b"blocks.0.self_attn.q.weight"
        at = data.index(name) + len(name) + 4 + 16
        (tmp_path / "cut.gguf").write_bytes(data[:at] + (77).to_bytes(4, "little") + data[at + 4 :])
        assert "type 77, which the library gguf cannot dequantise" in error_of(scail2("inspect", tmp_path / "cut.gguf"))


def _hide(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == module else found(name, *rest))
