"""`scail2-rt inspect`, partly through the installed command: checkpoints, single networks, LoRAs, engine folders, and
other files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from scail2_rt.engines.build.build import BuildStep
from scail2_rt.engines.folder.manifest import MANIFEST
from scail2_rt.export.checkpoint.open import open_checkpoint
from scail2_rt.export.checkpoint.random_checkpoint import CLIP_FILE, SAT_FILE, TOKENIZER_FILE, UMT5_FILE, VAE_FILE
from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.jobs.inspection import inspect
from tests.support.command import Run, error_of, one_json
from tests.support.repackaged import PREFIX, Tensors, fp8_scaled, hugging_face_clip, tensors_of
from tests.support.small import Steps, build, request, small_checkpoint

pytest_plugins = ["tests.support.runtime_fixtures"]

Q = "blocks.{i}.self_attn.q"


def pairs(module: str, down: str, up: str, rank: int = 4, alpha: float | None = 2.0, rows: int = 256) -> Tensors:
    """Return low-rank factors of `module` in two blocks, under these suffixes."""
    tensors: Tensors = {}
    for i in range(2):
        tensors[f"{module.format(i=i)}.{down}"] = torch.ones(rank, 256)
        tensors[f"{module.format(i=i)}.{up}"] = torch.ones(rows, rank)
        if alpha is not None:
            tensors[f"{module.format(i=i)}.alpha"] = torch.tensor(alpha)
    return tensors


class TestCheckpoint:
    def test_the_official_folder(self, scail2: Run, tiny_checkpoint: Path) -> None:
        reply = one_json(scail2("inspect", tiny_checkpoint, "--json"))
        assert (reply["kind"], reply["layout"], reply["missing"]) == ("checkpoint", "official layout (SAT)", [])
        dit, vae, umt5, clip = reply["parts"]
        assert dit["names"] == f"SAT names (prefix {PREFIX})"
        assert (dit["tensors"], dit["config"]["heads"], dit["config"]["layers"]) == (91, 2, 2)
        assert dit["dtypes"] == {"float32": dit["parameters"]}
        assert (list(umt5["dtypes"]), list(clip["dtypes"])) == (["bfloat16"], ["float16"])
        assert vae["files"] == [str(tiny_checkpoint / VAE_FILE)]
        files = (SAT_FILE, VAE_FILE, UMT5_FILE, CLIP_FILE)
        assert reply["size"] == sum((tiny_checkpoint / file).stat().st_size for file in files)
        text = scail2("inspect", tiny_checkpoint).stdout
        assert "transformer: 2,612,256 parameters in 91 tensors" in text
        assert f"tokenizer: {tiny_checkpoint / TOKENIZER_FILE}" in text

    def test_what_is_missing_and_what_is_damaged(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        folder = tmp_path / "c"
        shutil.copytree(tiny_checkpoint, folder)
        (folder / CLIP_FILE).unlink()
        (folder / TOKENIZER_FILE).unlink()
        data = (folder / VAE_FILE).read_bytes()
        (folder / VAE_FILE).write_bytes(data[: len(data) // 2])
        found = inspect(folder)
        assert [part.component for part in found.parts] == ["transformer", "umT5 encoder"]
        assert found.missing == ("VAE", "CLIP tower", "tokenizer (tokenizer.json)")
        (problem,) = found.problems
        assert f"{folder / VAE_FILE} is truncated or damaged" in problem
        assert "missing: VAE, CLIP tower, tokenizer (tokenizer.json)" in found.text

    def test_a_damaged_transformer_beside_good_parts(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        folder = tmp_path / "c"
        shutil.copytree(tiny_checkpoint, folder)
        (folder / SAT_FILE).write_bytes(b"PK\x03\x04" + bytes(1000))
        found = inspect(folder)
        assert [part.component for part in found.parts] == ["VAE", "umT5 encoder", "CLIP tower"]
        assert found.layout == "parts without a transformer"
        assert "is truncated or damaged" in found.problems[0]

    def test_shards_8_bit_scales_and_a_tensor_that_does_not_fit(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        tensors = tensors_of(open_checkpoint(tiny_checkpoint, components=("dit",)).sources["dit"])
        stored, metadata, _ = fp8_scaled(
            {f"diffusion_model.{n}": t.half() for n, t in tensors.items()}, r".*ffn\.\d\.weight", "uint8"
        )
        names = sorted(stored)
        for i in range(2):
            part = {name: stored[name] for name in names[i::2]}
            save_file(part, tmp_path / f"m-{i + 1:05}-of-00002.safetensors", metadata=metadata)
        found = inspect(tmp_path / "m-00002-of-00002.safetensors")
        (part,) = found.parts
        assert found.layout == "Wan names (prefix diffusion_model.), 2 shards"
        assert (part.formats, part.problem) == ({"float8_e4m3fn scaled": 4}, None)
        assert part.dtypes == {"float16": part.parameters - 4 * 512 * 256, "float8_e4m3fn": 4 * 512 * 256}
        assert "4 weights in float8_e4m3fn scaled" in found.text
        save_file(tensors | {"blocks.0.norm3.bias": torch.zeros(9)}, tmp_path / "dit.safetensors")
        shutil.rmtree(tmp_path / "m", ignore_errors=True)
        (part,) = inspect(tmp_path / "dit.safetensors").parts
        assert part.problem is not None
        assert "blocks.0.norm3.bias is [9] (expected [256])" in part.problem
        assert part.tensors == 91

    def test_one_network(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        found = inspect(tiny_checkpoint / VAE_FILE)
        assert (found.kind, found.parts[0].component, found.layout) == ("network", "VAE", "Wan names, one file")
        wan = tensors_of(open_checkpoint(tiny_checkpoint).sources["clip"])
        save_file(hugging_face_clip(wan), tmp_path / "clip.safetensors")
        (part,) = inspect(tmp_path / "clip.safetensors").parts
        assert (part.names, part.config["heads"], part.problem) == ("Hugging Face names", 2, None)


class TestLoRA:
    @pytest.mark.parametrize(
        ("tensors", "names", "targets", "kinds"),
        [
            (
                {
                    **pairs(f"diffusion_model.{Q}", "lora_down.weight", "lora_up.weight"),
                    "diffusion_model.blocks.0.norm3.diff": torch.ones(256),
                    "diffusion_model.blocks.0.ffn.0.diff_b": torch.ones(512),
                },
                "ComfyUI / lightx2v",
                {"self_attn.q": 2, "norm3": 1, "ffn.0": 1},
                {"down": 2, "up": 2, "alpha": 2, "weight": 1, "bias": 1},
            ),
            (
                pairs(f"base_model.model.{Q}", "lora_A.weight", "lora_B.weight"),
                "PEFT",
                {"self_attn.q": 2},
                {"down": 2, "up": 2, "alpha": 2},
            ),
            (
                pairs("lora_unet_blocks_{i}_self_attn_q", "lora_down.weight", "lora_up.weight"),
                "kohya",
                {"self_attn.q": 2},
                {"down": 2, "up": 2, "alpha": 2},
            ),
            (
                pairs(
                    "model.diffusion_model.transformer.layers.{i}.cross_attention.key_value.lora_layer",
                    "down.weight",
                    "up.weight",
                    rows=512,
                ),
                "SAT",
                {"cross_attn.k": 2, "cross_attn.v": 2},
                {"down": 2, "up": 2, "alpha": 2},
            ),
        ],
        ids=["lightx2v", "peft", "kohya", "sat"],
    )
    def test_kind_rank_alpha_and_targets(
        self, tmp_path: Path, tensors: Tensors, names: str, targets: dict[str, int], kinds: dict[str, int]
    ) -> None:
        save_file(tensors, tmp_path / "lora.safetensors")
        found = inspect(tmp_path / "lora.safetensors")
        assert found.kind == "lora"
        assert found.lora is not None
        assert (found.lora.names, found.lora.ranks, found.lora.scales) == (names, {4: 2}, {0.5: 2})
        assert (found.lora.targets, found.lora.kinds, found.lora.blocks) == (targets, kinds, 2)
        assert found.lora.unknown == ()

    def test_the_command_says_what_does_not_fit(self, scail2: Run, tmp_path: Path) -> None:
        tensors = pairs(Q, "lora_A.weight", "lora_B.weight", rank=8, alpha=None)
        tensors |= {"single_blocks.0.linear1.lora_A.weight": torch.ones(8, 4)}
        torch.save({"module": tensors}, tmp_path / "lora.pt")
        text = scail2("inspect", tmp_path / "lora.pt").stdout
        assert "rank: 8 (2 pairs)" in text
        assert "alpha/rank: 1 (2 pairs)" in text
        assert "not for SCAIL-2: single_blocks.0.linear1.lora_A.weight" in text


class TestEngines:
    def test_a_folder_and_its_sources(self, scail2: Run, engines: Path, tiny_checkpoint: Path) -> None:
        reply = one_json(scail2("inspect", engines, "--json"))
        assert (reply["kind"], reply["layout"], reply["problems"]) == ("engines", "fp32 for torch", [])
        facts: dict[str, Any] = reply["engines"]
        assert (facts["precision"], facts["stages"], facts["config"]["dit"]["heads"]) == ("fp32", 20, 2)
        assert {file["component"]: file["state"] for file in facts["sources"]} == dict.fromkeys(
            ("dit", "vae", "umt5", "clip", "tokenizer"), "unchanged"
        )
        assert facts["executors"][0]["versions"]["torch"]
        assert f"dit: {tiny_checkpoint / SAT_FILE} (unchanged)" in scail2("inspect", engines).stdout

    def test_lost_files_and_changed_sources_are_told(self, engines: Path, tmp_path: Path) -> None:
        folder = tmp_path / "e"
        shutil.copytree(engines, folder)
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest["sources"][0]["size"] += 1
        manifest["sources"][1]["path"] = str(tmp_path / "gone")
        (folder / MANIFEST).write_text(json.dumps(manifest))
        (folder / "tables.safetensors").unlink()
        found = inspect(folder)
        assert [file["state"] for file in found.engines["sources"][:2]] == ["changed", "missing"]
        assert "file tables.safetensors" in found.problems[0]

    def test_an_interrupted_build(self, tmp_path: Path) -> None:
        class Stop(Steps):
            def started(self, step: BuildStep) -> None:
                if step.name == "dit.head":
                    raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            build(request(tmp_path / "e"), small_checkpoint(), Stop())
        found = inspect(tmp_path / "e")
        assert found.kind == "unfinished engines"
        assert "run the same build-engines command again" in found.text


def _truncated(folder: Path, checkpoint: Path) -> Path:
    save_file({"blocks.0.self_attn.q.weight": torch.zeros(64, 64)}, folder / "x.safetensors")
    (folder / "x.safetensors").write_bytes((folder / "x.safetensors").read_bytes()[:5000])
    return folder / "x.safetensors"


def _other_model(folder: Path, checkpoint: Path) -> Path:
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(4, 4)}, folder / "flux.safetensors")
    return folder / "flux.safetensors"


def _text_file(folder: Path, checkpoint: Path) -> Path:
    (folder / "notes.txt").write_text("hello")
    return folder / "notes.txt"


def _pickle(folder: Path, checkpoint: Path) -> Path:
    data = (checkpoint / VAE_FILE).read_bytes()
    (folder / "vae.pth").write_bytes(data[:-1000])
    return folder / "vae.pth"


def _damaged_manifest(folder: Path, checkpoint: Path) -> Path:
    (folder / MANIFEST).write_text('{"format_version": 1}')
    return folder


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (_truncated, "is truncated: it has 5000 bytes"),
        (_other_model, "neither a network of SCAIL-2 nor a LoRA: it has 1 tensor, for example double_blocks.0"),
        (_text_file, "is not a weights file"),
        (_pickle, "is truncated or damaged"),
        (_damaged_manifest, "is damaged: field 'precision' is missing"),
        (lambda folder, checkpoint: folder, "is not a SCAIL-2 checkpoint: found nothing"),
        (lambda folder, checkpoint: folder / "none", "does not exist"),
    ],
)
def test_what_is_none_of_these_is_refused(
    make: Callable[[Path, Path], Path], said: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        inspect(make(tmp_path, tiny_checkpoint))
    assert said in str(caught.value)


def test_the_command_refuses_in_one_line(scail2: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    result = scail2("inspect", _truncated(tmp_path, tiny_checkpoint))
    assert "is truncated" in error_of(result)
    assert len(result.stderr.splitlines()) == 1
