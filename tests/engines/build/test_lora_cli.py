"""LoRA files from users' reports, through the installed command: fused weights, messages, and the manifest."""

import json
import math
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from scail2_rt.export.checkpoint.lora import FusedSource, LoRASpec, apply_loras
from scail2_rt.export.checkpoint.open import open_checkpoint
from scail2_rt.export.checkpoint.tensors import MappingSource
from scail2_rt.kernels.errors import InputError
from tests.support.command import Run, error_of, one_json
from tests.support.repackaged import Tensors, tensors_of

pytest_plugins = ["tests.support.runtime_fixtures"]

Q, FFN = "blocks.1.self_attn.q", "blocks.0.ffn.0"
TO_WAN = {  # diffusers → Wan, written out for the test
    "attn1.to_out.0": "self_attn.o", "attn2.to_out.0": "cross_attn.o",
    "attn1.to_": "self_attn.", "attn2.to_": "cross_attn.",
    "attn2.add_k_proj": "cross_attn.k_img", "attn2.add_v_proj": "cross_attn.v_img",
    "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1", "proj_out": "head.head",
}  # fmt: skip


@pytest.fixture(scope="module")
def reports() -> Path:
    """Folder of the reported LoRAs: `SCAIL2_REPORTS/lora`, or `../shared/reports/lora` beside the repository."""
    beside = Path(__file__).resolve().parents[4] / "shared" / "reports"
    folder = Path(os.environ.get("SCAIL2_REPORTS", beside)) / "lora"
    if not folder.is_dir():
        pytest.skip(f"no reported LoRAs at {folder}; set SCAIL2_REPORTS to the folder above it")
    return folder


@pytest.fixture(scope="module")
def base(tiny_checkpoint: Path) -> Tensors:
    return tensors_of(open_checkpoint(tiny_checkpoint, components=("dit",)).sources["dit"])


@pytest.fixture
def fused(scail2: Run, tiny_checkpoint: Path, tmp_path: Path):
    """Convert with LoRAs. Returns the weights and the command's output."""

    def convert(*loras: object, partial: bool = False) -> tuple[Tensors, str]:
        words = [word for lora in loras for word in ("--lora", lora)] + ["--lora-partial"] * partial
        output = tmp_path / "out" / "fused.safetensors"
        result = scail2("convert", tiny_checkpoint, "-o", output, "--dtype", "fp32", "--overwrite", *words)
        assert result.returncode == 0, result.stderr
        return load_file(output), result.stdout

    return convert


def assert_weights(found: Tensors, base: Tensors, expected: Tensors) -> None:
    for name, tensor in base.items():
        torch.testing.assert_close(found[name], expected.get(name, tensor.float()), atol=2e-6, rtol=1e-5)


def pairs_added(base: Tensors, lora: Tensors, scale: float, names: tuple[str, str] = ("lora_B", "lora_A")) -> Tensors:
    expected = {}
    for name, up in lora.items():
        if f".{names[0]}." in name:
            module = name.partition(f".{names[0]}.")[0].removeprefix("transformer.").removeprefix("diffusion_model.")
            down = lora[name.replace(names[0], names[1])]
            expected[f"{module}.weight"] = base[f"{module}.weight"].float() + scale * (up.float() @ down.float())
    return expected


def modules_of(lora: Tensors, suffix: str) -> dict[str, str]:
    """Prefix in the file → Wan weight, for names that end with `suffix`."""
    found = {}
    for name in lora:
        if name.endswith(suffix):
            prefix = name.removesuffix(suffix)
            module = prefix.removeprefix("diffusion_model.")
            if module.startswith("lora_unet_"):  # blocks_0_self_attn_q: the underscore of `self_attn` stays
                module = re.sub(r"_(?!attn|img)", ".", module.removeprefix("lora_unet_"))
            found[prefix] = f"{module}.weight"
    return found


class TestReports:
    def test_alpha_and_rslora_of_the_header(self, reports: Path, base: Tensors, fused, scail2: Run) -> None:
        for file, scale in (("metadata_alpha", 4.0), ("metadata_rslora", 2.0)):
            path = reports / f"{file}.safetensors"
            found, said = fused(path)
            assert_weights(found, base, pairs_added(base, load_file(path), scale))
            assert "alpha: from header (lora_adapter_metadata: lora_alpha)" in said
        text = scail2("inspect", reports / "metadata_alpha.safetensors").stdout
        assert "alpha: 16 (24 pairs), from header (lora_adapter_metadata: lora_alpha)" in text
        assert "alpha/rank: 4 (24 pairs)" in text
        text = scail2("inspect", reports / "metadata_rslora.safetensors").stdout
        assert "alpha/√rank (rsLoRA): 2 (24 pairs)" in text

    def test_a_foreign_configuration_is_ignored(self, reports: Path, base: Tensors, fused) -> None:
        path = reports / "foreign_config" / "other_lora.safetensors"
        assert_weights(fused(path)[0], base, pairs_added(base, load_file(path), 1.0))

    def test_diffusers_names(self, reports: Path, base: Tensors, fused) -> None:
        path = reports / "diffusers_all.safetensors"
        renamed = {}
        for name, tensor in load_file(path).items():
            for theirs, ours in TO_WAN.items():
                name = name.replace(theirs, ours)
            renamed[name] = tensor
        expected = pairs_added(base, renamed, 1.0)
        assert len(expected) == len(renamed) // 2
        assert_weights(fused(path)[0], base, expected)

    def test_lokr(self, reports: Path, base: Tensors, fused, scail2: Run) -> None:
        lokr = pytest.importorskip("lycoris.functional.lokr", reason="lycoris-lora is not installed")
        path = reports / "aitoolkit_lokr_full.safetensors"
        lora, expected = load_file(path), {}
        for prefix, name in modules_of(lora, ".lokr_w1").items():
            w1, w2 = lora[f"{prefix}.lokr_w1"], lora[f"{prefix}.lokr_w2"]
            expected[name] = base[name].float() + lokr.kron_weight(w1, None, None, w2, None, None)
        assert_weights(fused(path)[0], base, expected)
        assert "LoKr" in scail2("inspect", path).stdout

    def test_loha(self, reports: Path, base: Tensors, fused, scail2: Run) -> None:
        loha = pytest.importorskip("lycoris.functional.loha", reason="lycoris-lora is not installed")
        path = reports / "musubi_loha.safetensors"
        lora, expected = load_file(path), {}
        for prefix, name in modules_of(lora, ".hada_w1_a").items():
            w1a, w1b, w2a, w2b = (lora[f"{prefix}.hada_{part}"] for part in ("w1_a", "w1_b", "w2_a", "w2_b"))
            scale = lora[f"{prefix}.alpha"] / w1b.shape[0]
            expected[name] = base[name].float() + loha.diff_weight(w1b, w1a, w2b, w2a, None, None, gamma=scale)
        assert_weights(fused(path)[0], base, expected)
        assert "LoHa" in scail2("inspect", path).stdout

    def test_dora(self, reports: Path, base: Tensors, fused, scail2: Run) -> None:
        general = pytest.importorskip("lycoris.functional.general", reason="lycoris-lora is not installed")
        path = reports / "musubi_dora.safetensors"
        lora, expected = load_file(path), {}
        for prefix, name in modules_of(lora, ".lora_up.weight").items():
            up, down = lora[f"{prefix}.lora_up.weight"], lora[f"{prefix}.lora_down.weight"]
            merged = base[name].float() + lora[f"{prefix}.alpha"] / len(down) * (up @ down)
            expected[name] = general.weight_decompose(merged, lora[f"{prefix}.dora_scale"])
        assert_weights(fused(path)[0], base, expected)
        assert "LoRA with DoRA magnitudes" in scail2("inspect", path).stdout

    def test_lightx2v(
        self, reports: Path, base: Tensors, fused, scail2: Run, tiny_checkpoint: Path, tmp_path: Path, case: Path
    ) -> None:
        path = reports / "lightx2v_i2v_full.safetensors"
        lora = load_file(path)
        expected = pairs_added(base, lora, 1.0, ("lora_up", "lora_down"))
        suffixes = {".diff": "weight", ".diff_b": "bias", ".diff_m": "modulation"}
        for name, tensor in lora.items():
            module, dot, suffix = name.removeprefix("diffusion_model.").rpartition(".")
            if (parameter := suffixes.get(dot + suffix)) and module != "patch_embedding":
                expected[f"{module}.{parameter}"] = base[f"{module}.{parameter}"].float() + tensor
        found, said = fused(path)
        assert_weights(found, base, expected)
        lines = [line for line in said.splitlines() if "left out" in line]
        assert lines == [f"{path}: patch_embedding is left out: it is for 36 channels, this transformer has 20"]
        assert f"{len(lora) - 2} tensors applied" in said
        remembers_distilled(scail2, tiny_checkpoint, tmp_path, case, path)


def remembers_distilled(scail2: Run, checkpoint: Path, folder: Path, case: Path, lora: Path) -> None:
    """The manifest of built engines lists the LoRA; `generate` with 40 steps and a distilled LoRA suggests the
    preset."""
    words = ("--backend", "torch", "--precision", "fp32", "--lora", lora)
    result = scail2("build-engines", checkpoint, "-o", folder / "e", *words)
    assert result.returncode == 0, result.stderr
    assert "step-distilled" in result.stdout
    manifest = json.loads((folder / "e" / "manifest.json").read_text())
    assert manifest["loras"][0]["distilled"]
    assert "step-distilled" in scail2("inspect", folder / "e").stdout
    run = ("generate", folder / "e", "--case", case, "-o", folder / "v.mp4", "--size", "64x96", "--dry-run", "--json")
    (hint,) = [text for text in one_json(scail2(*run))["warnings"] if "--preset fast" in text]
    assert "40 steps with guidance 5" in hint
    assert not any("--preset" in text for text in one_json(scail2(*run, "--preset", "fast"))["warnings"])


def pair(module: str, rows: int, columns: int, seed: int = 0, rank: int = 4) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{module}.lora_B.weight": torch.randn(rows, rank, generator=generator) / 9,
        f"{module}.lora_A.weight": torch.randn(rank, columns, generator=generator) / 9,
    }


def apply(base: Tensors, lora: Path, partial: bool = False) -> FusedSource:
    return apply_loras(MappingSource(base), [LoRASpec(lora)], partial)


class TestMade:
    """The same kinds in other forms, made by the test."""

    @pytest.mark.parametrize(
        ("header", "scale"),
        [
            ({"lora_alpha": "16"}, 4.0),
            ({"alpha": "2", "rank": "4"}, 0.5),
            ({"network_alpha": "8.0"}, 2.0),
            ({"ss_network_dim": "4", "ss_network_alpha": "2", "ss_tag_frequency": '{"alpha": 3}'}, 0.5),
            ({"transformer.lora_alpha": "64", "transformer.r": "4"}, 16.0),
            ({"transformer.lora_alpha": "8", "text_encoder.lora_alpha": "1"}, 2.0),
            ({"lora_alpha": "8", "use_rslora": "True"}, 4.0),
            ({"adapter_config": '{"lora_alpha": 8, "use_rslora": true}'}, 4.0),
            ({"lora_adapter_metadata": '{"transformer.lora_alpha": 8, "transformer.alpha_pattern": {"q": 2}}'}, 0.5),
            ({"ss_network_alpha": "None", "format": "pt"}, 1.0),
        ],
    )
    def test_headers(self, base: Tensors, tmp_path: Path, header: dict[str, str], scale: float) -> None:
        tensors, name = pair(f"transformer.{Q}", 256, 256), f"{Q}.weight"
        save_file(tensors, tmp_path / "l.safetensors", header)
        expected = pairs_added(base, tensors, scale)[name]
        torch.testing.assert_close(apply(base, tmp_path / "l.safetensors").get(name), expected, atol=2e-6, rtol=1e-5)
        tensors[f"transformer.{Q}.alpha"] = torch.tensor(6.0)  # a tensor has the last word, the square root stays
        save_file(tensors, tmp_path / "l.safetensors", header)
        root = any("rslora" in key + value for key, value in header.items())
        expected = pairs_added(base, tensors, 6 / (math.sqrt(4) if root else 4))[name]
        torch.testing.assert_close(apply(base, tmp_path / "l.safetensors").get(name), expected, atol=2e-6, rtol=1e-5)

    @pytest.mark.parametrize(
        ("header", "said"),
        [
            ({"lora_alpha": "8", "alpha": "4"}, "has different values of alpha in its header (alpha 4, lora_alpha 8)"),
            ({"use_rslora": "true"}, "has use_rslora but no alpha"),
        ],
    )
    def test_headers_that_cannot_be_followed(
        self, scail2: Run, tiny_checkpoint: Path, tmp_path: Path, header: dict[str, str], said: str
    ) -> None:
        save_file(pair(Q, 256, 256), tmp_path / "l.safetensors", header)
        words = ("convert", tiny_checkpoint, "-o", tmp_path / "o.safetensors", "--lora", tmp_path / "l.safetensors")
        assert said in error_of(scail2(*words))

    def test_old_diffusers_names(self, base: Tensors, tmp_path: Path) -> None:
        tensors, expected = {}, dict(base)
        names = {
            "transformer.blocks.0.attn1.to_q.lora_linear_layer": "self_attn.q",
            "blocks.0.attn1.processor.to_k_lora": "self_attn.k",
            "transformer.blocks.0.attn2.processor.to_out_lora": "cross_attn.o",
        }
        for i, (name, end) in enumerate(names.items()):
            up, down = pair("x", 256, 256, seed=i).values()
            tensors |= {f"{name}.up.weight": up, f"{name}.down.weight": down}
            expected[f"blocks.0.{end}.weight"] = base[f"blocks.0.{end}.weight"].float() + up @ down
        save_file(tensors, tmp_path / "l.safetensors")
        assert_weights(tensors_of(apply(base, tmp_path / "l.safetensors")), expected, {})

    @pytest.mark.parametrize("channels", [16, 36, 48])
    def test_patch_embedding_of_another_model(self, base: Tensors, tmp_path: Path, channels: int) -> None:
        """Also as a pair, in diffusers' names; other tensors of the module are handled with it."""
        tensors = pair(f"transformer.{Q}", 256, 256)
        expected = pairs_added(base, tensors, 1.0)
        tensors["transformer.patch_embedding.lora_A.weight"] = torch.ones(4, channels, 1, 2, 2)
        tensors["transformer.patch_embedding.lora_B.weight"] = torch.ones(256, 4, 1, 1, 1)
        tensors["transformer.patch_embedding.diff_b"] = torch.ones(256)
        save_file(tensors, tmp_path / "l.safetensors")
        fused = apply(base, tmp_path / "l.safetensors")
        assert_weights(tensors_of(fused), base, expected)
        assert f"it is for {channels} channels, this transformer has 20" in fused.report[0].text

    def test_a_peft_folder(self, base: Tensors, fused, scail2: Run, tmp_path: Path) -> None:
        folder = tmp_path / "adapter"
        folder.mkdir()
        tensors = pair(f"base_model.model.{Q}", 256, 256) | pair(f"base_model.model.{FFN}", 512, 256, rank=2)
        bias = torch.randn(256)
        save_file(tensors | {f"base_model.model.{Q}.base_layer.bias": bias}, folder / "adapter_model.safetensors")
        config = {"r": 4, "lora_alpha": 8, "rank_pattern": {"ffn.0": 2}, "alpha_pattern": {r"ffn\.0": 3}, "bias": "all"}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        ups = [tensors[f"base_model.model.{m}.lora_B.weight"] @ tensors[f"base_model.model.{m}.lora_A.weight"]
               for m in (Q, FFN)]  # fmt: skip
        expected = {
            f"{Q}.weight": base[f"{Q}.weight"].float() + 0.5 * 2 * ups[0],
            f"{FFN}.weight": base[f"{FFN}.weight"].float() + 0.5 * 1.5 * ups[1],
            f"{Q}.bias": torch.lerp(base[f"{Q}.bias"].float(), bias, 0.5),
        }
        found, said = fused(f"{folder}:0.5")
        assert_weights(found, base, expected)
        assert "alpha: from adapter_config.json" in said
        text = scail2("inspect", folder).stdout
        assert "alpha: 3 (1 pair), 8 (1 pair), from adapter_config.json" in text
        assert "step-distilled: unknown" in text

    def test_a_changed_configuration_is_other_weights(self, scail2: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
        folder = tmp_path / "adapter"
        folder.mkdir()
        save_file(pair(f"base_model.model.{Q}", 256, 256), folder / "adapter_model.safetensors")
        words = ("build-engines", tiny_checkpoint, "-o", tmp_path / "e", "--backend", "torch", "--precision", "fp32")
        words = (*words, "--lora", folder)
        (folder / "adapter_config.json").write_text('{"lora_alpha": 8}')
        assert scail2(*words).returncode == 0
        again = scail2(*words)
        assert "nothing to do" in again.stdout
        (folder / "adapter_config.json").write_text('{"lora_alpha": 16}')
        assert "loras: the folder has adapter_model.safetensors" in error_of(scail2(*words))

    @pytest.mark.parametrize("how", ["name", "header", "difference tensors"])
    def test_step_distilled_is_told(self, scail2: Run, tmp_path: Path, how: str) -> None:
        tensors = pair(f"diffusion_model.{Q}", 256, 256)
        if how == "difference tensors":
            tensors |= {f"diffusion_model.{Q}.diff_b": torch.ones(256)}
            tensors |= {"diffusion_model.blocks.1.norm3.diff": torch.ones(256)}
        path = tmp_path / ("Wan21_I2V_14B_4steps_rank64.safetensors" if how == "name" else "style.safetensors")
        save_file(tensors, path, {"description": "CFG and step distilled"} if how == "header" else {"ss_steps": "4"})
        assert f"step-distilled: yes, according to its {how}: use --preset fast" in scail2("inspect", path).stdout


REFUSED: dict[str, tuple[Tensors, str]] = {
    "Stand-In": (
        {f"blocks.{i}.self_attn.{x}_loras.{end}.weight": torch.ones(4, 4)
         for i in (0, 1) for x in "qkv" for end in ("up", "down")},
        "is a Stand-In adapter",
    ),
    "another width": (pair("diffusion_model.blocks.0.self_attn.q", 1536, 1536),
        "was made for another model, of 1536 channels (Wan 1.3B); this transformer has 256 channels"),
    "another width, LoHa": (
        {f"lora_unet_blocks_0_self_attn_q.hada_{name}": torch.ones(5120, 2) if name[-1] == "a" else torch.ones(2, 5120)
         for name in ("w1_a", "w1_b", "w2_a", "w2_b")},
        "was made for another model, of 5120 channels (the 14B models)",
    ),
    "ControlNet LoRA": (
        {**pair(f"diffusion_model.{Q}", 256, 256), "diffusion_model.patch_embedding.reshape_weight": torch.ones(5)},
        "is a ControlNet LoRA",
    ),
    "ControlNet LoRA, marked": ({"lora_controlnet": torch.ones(1), **pair(Q, 256, 256)}, "is a ControlNet LoRA"),
    "VACE": (pair("diffusion_model.vace_blocks.0.self_attn.q", 256, 256) | pair(Q, 256, 256), "is a LoRA for VACE"),
    "Flux": (pair("transformer.single_transformer_blocks.0.attn.to_q", 64, 64), "seems to be for Flux or HunyuanVideo"),
    "a checkpoint": ({f"{Q}.weight": torch.ones(4, 4), f"{Q}.bias": torch.ones(4)}, "is a checkpoint, not a LoRA"),
    "OFT": ({f"{Q}.oft_blocks": torch.ones(4, 4, 4)}, "is an OFT or BOFT adapter"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_called_by_its_name(
    scail2: Run, tiny_checkpoint: Path, base: Tensors, tmp_path: Path, case: str
) -> None:
    """With --lora-partial too, which the message does not suggest."""
    tensors, said = REFUSED[case]
    save_file(tensors, tmp_path / "l.safetensors")
    words = ("convert", tiny_checkpoint, "-o", tmp_path / "o.safetensors", "--lora", tmp_path / "l.safetensors")
    plain = error_of(scail2(*words))
    assert said in plain
    assert "--lora-partial" not in plain
    with pytest.raises(InputError, match=re.escape(said)):
        apply(base, tmp_path / "l.safetensors", partial=True)
    assert not (tmp_path / "o.safetensors").exists()


def test_partial_is_suggested_where_it_helps(
    scail2: Run, tiny_checkpoint: Path, base: Tensors, fused, tmp_path: Path
) -> None:
    tensors = pair(f"diffusion_model.{Q}", 256, 256)
    whole = dict(tensors)
    tensors |= pair(f"diffusion_model.{FFN}", 512, 256) | {f"diffusion_model.{FFN}.diff_b": torch.ones(500)}
    save_file(tensors, tmp_path / "l.safetensors")
    words = ("convert", tiny_checkpoint, "-o", tmp_path / "o.safetensors", "--lora", tmp_path / "l.safetensors")
    assert "use --lora-partial" in error_of(scail2(*words))
    found, said = fused(tmp_path / "l.safetensors", partial=True)
    assert_weights(found, base, pairs_added(base, whole, 1.0))
    assert "2 tensors applied, 3 skipped" in said


def test_conversion_keeps_types_and_knows_its_loras(scail2: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    save_file(pair(Q, 256, 256), tmp_path / "l.safetensors")
    output = tmp_path / "o.safetensors"
    plain = ("convert", tiny_checkpoint, "-o", output)
    assert scail2(*plain).returncode == 0
    with safe_open(output, "pt") as file:
        dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    words = (*plain, "--lora", f"{tmp_path / 'l.safetensors'}:0.5")
    assert "was made from other files or with another --dtype or --lora" in error_of(scail2(*words))
    report = one_json(scail2(*words, "--overwrite", "--json"))
    assert (report["loras"][0]["applied"], report["files"][0]["up_to_date"]) == (2, False)
    with safe_open(output, "pt") as file:
        assert {name: file.get_slice(name).get_dtype() for name in file.keys()} == dtypes  # noqa: SIM118
    assert one_json(scail2(*words, "--json"))["files"][0]["up_to_date"]
    other = (*plain, "--lora", f"{tmp_path / 'l.safetensors'}:0.6")
    assert "was made from other files or with another --dtype or --lora" in error_of(scail2(*other))
    itself = ("convert", tiny_checkpoint, "-o", tmp_path / "l.safetensors", "--lora", tmp_path / "l.safetensors")
    assert "is the LoRA file" in error_of(scail2(*itself, "--overwrite"))
