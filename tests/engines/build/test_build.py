"""Building engine folders: values in the store, no repeated work, resuming, refusing, replacing, adding."""

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from scail2_rt.engines import registry
from scail2_rt.engines.build.build import BuildRequest, BuildStep, SilentObserver, build
from scail2_rt.engines.folder import sources
from scail2_rt.engines.folder.journal import JOURNAL
from scail2_rt.engines.folder.manifest import MANIFEST, read_manifest
from scail2_rt.engines.folder.store import StoreReader
from scail2_rt.export.checkpoint.lora import LoRASpec
from scail2_rt.export.checkpoint.open import Checkpoint, open_checkpoint
from scail2_rt.kernels.errors import InputError, Scail2Error
from tests.support.small import DIT, Steps, build_small, request, small_checkpoint

STORE = "stages/weights.safetensors"
TOUCHED = "blocks.0.self_attn.q.weight"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: Path) -> Checkpoint:
    return open_checkpoint(tiny_checkpoint)


class TestValues:
    def test_stacked_weights_in_fp32(self, tmp_path: Path) -> None:
        build_small(tmp_path / "e")
        store, dit = StoreReader(tmp_path / "e" / STORE), small_checkpoint().sources["dit"]
        stacked = torch.cat([dit.get(f"blocks.1.self_attn.{part}.weight") for part in "qkv"])
        assert torch.equal(store.get("dit.blocks.1.qkv.linear.weight"), stacked)
        patches = dit.get("patch_embedding.weight").reshape(DIT.dim, -1)
        assert torch.equal(store.get("dit.embed.patch.weight"), patches)
        tables = load_file(tmp_path / "e" / "tables.safetensors")
        assert torch.equal(tables["head.modulation"], dit.get("head.modulation")[0])

    @pytest.mark.parametrize(("precision", "umt5"), [("bf16", torch.bfloat16), ("fp16", torch.bfloat16)])
    def test_sixteen_bits(self, tmp_path: Path, precision: str, umt5: torch.dtype) -> None:
        build_small(tmp_path / "e", precision)
        store, source = StoreReader(tmp_path / "e" / STORE), small_checkpoint().sources
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        assert torch.equal(
            store.get("dit.blocks.0.ffn.up.weight"), source["dit"].get("blocks.0.ffn.0.weight").to(dtype)
        )
        assert torch.equal(store.get("dit.blocks.0.mid.norm3.weight"), source["dit"].get("blocks.0.norm3.weight"))
        assert torch.equal(store.get("dit.head.linear.weight"), source["dit"].get("head.head.weight"))
        embedding = source["umt5"].get("token_embedding.weight").to(umt5)
        assert torch.equal(store.get("umt5.token_embedding.weight"), embedding)

    def test_fp8_has_one_scale_per_output_channel(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            "scail2_rt.engines.folder.weights.PIECE", 100
        )  # pieces of three rows: the last one is smaller
        build_small(tmp_path / "e", "fp8")
        store, dit = StoreReader(tmp_path / "e" / STORE), small_checkpoint().sources["dit"]
        weight = torch.cat([dit.get(f"blocks.0.self_attn.{part}.weight") for part in "qkv"])
        scale = store.get("dit.blocks.0.qkv.linear.scale")
        torch.testing.assert_close(scale, weight.abs().amax(1) / 448)
        back = store.get("dit.blocks.0.qkv.linear.weight").float() * scale[:, None]
        assert (back - weight).abs().max() <= weight.abs().max() / 16  # half a step of three mantissa bits
        assert store.get("dit.blocks.0.qkv.linear.bias").dtype == torch.bfloat16
        assert store.get("dit.blocks.0.context_kv.text.weight").dtype == torch.bfloat16

    def test_pieces_do_not_change_values(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for precision in ("bf16", "fp8"):
            build_small(tmp_path / precision, precision)
            monkeypatch.setattr("scail2_rt.engines.folder.weights.PIECE", 37)
            build_small(tmp_path / f"{precision}-pieces", precision)
            monkeypatch.undo()
            whole, pieces = (tmp_path / name / STORE for name in (precision, f"{precision}-pieces"))
            assert whole.read_bytes() == pieces.read_bytes()

    def test_lora_reaches_weights_and_tables(self, tmp_path: Path) -> None:
        lora = lora_file(tmp_path / "l.safetensors")
        report = build_small(tmp_path / "e", loras=(LoRASpec(lora, 0.5),))
        assert report.loras[0].applied == 2
        source, delta = small_checkpoint().sources["dit"], load_file(lora)
        store = StoreReader(tmp_path / "e" / STORE)
        fused = source.get(TOUCHED) + 0.5 * delta["blocks.0.self_attn.q.diff"]
        torch.testing.assert_close(store.get("dit.blocks.0.qkv.linear.weight")[: DIT.dim], fused)
        norm = source.get("blocks.1.self_attn.norm_q.weight") + 0.5 * delta["blocks.1.self_attn.norm_q.diff"]
        torch.testing.assert_close(load_file(tmp_path / "e" / "tables.safetensors")["blocks.1.norm_q"], norm)

    def test_lora_without_a_transformer_is_refused(self, tmp_path: Path) -> None:
        checkpoint = small_checkpoint()
        del checkpoint.sources["dit"]
        lora = LoRASpec(lora_file(tmp_path / "l.safetensors"))
        with pytest.raises(InputError, match="no transformer"):
            build(request(tmp_path / "e", loras=(lora,)), checkpoint)


def lora_file(path: Path, value: float = 1.0) -> Path:
    tensors = {
        "blocks.0.self_attn.q.diff": torch.full((DIT.dim, DIT.dim), value),
        "blocks.1.self_attn.norm_q.diff": torch.full((DIT.dim,), value),
    }
    save_file(tensors, path)
    return path


class TestBadWeights:
    def test_overflow_names_stage_tensor_and_precision(self, tmp_path: Path) -> None:
        large = torch.full((DIT.dim, DIT.dim), 7e4)
        checkpoint = small_checkpoint(blocks__0__self_attn__q__weight=large)
        with pytest.raises(
            Scail2Error, match=rf"dit\.blocks\.0\.qkv: tensor {TOUCHED}.*7e\+04.*--precision bf16"
        ) as caught:
            build(request(tmp_path / "e", "fp16"), checkpoint)
        assert not isinstance(caught.value, InputError)
        assert not (tmp_path / "e" / MANIFEST).exists()
        build(request(tmp_path / "e", "bf16"), checkpoint)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("name", ["blocks__1__ffn__0__weight", "blocks__1__modulation"])
    def test_values_that_are_not_finite_are_named(self, tmp_path: Path, name: str, value: float) -> None:
        key = name.replace("__", ".")
        bad = small_checkpoint().sources["dit"].get(key).clone()
        bad.view(-1)[5] = value
        with pytest.raises(InputError, match=rf"tensor {key} of the checkpoint has NaN or infinite"):
            build(request(tmp_path / "e"), small_checkpoint(**{name: bad}))

    @pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
    @pytest.mark.parametrize("strength", [1e38, -1e38, 1e60])
    def test_a_lora_that_makes_weights_infinite_is_named(self, tmp_path: Path, strength: float, precision: str) -> None:
        """Its tensors and the checkpoint's are finite."""
        small, large = lora_file(tmp_path / "s.safetensors"), lora_file(tmp_path / "l.safetensors", value=10.0)
        specs = LoRASpec(small, 0.5), LoRASpec(large, strength)
        with pytest.raises(InputError) as caught:
            build(request(tmp_path / "e", precision, loras=specs), small_checkpoint())
        assert str(caught.value) == (
            f"tensor {TOUCHED} has NaN or infinite values once the LoRA is fused into it: {small} at strength 0.5 and "
            f"{large} at strength {strength:g}. Use a smaller strength."
        )
        assert not (tmp_path / "e" / MANIFEST).exists()

    def test_a_lora_on_a_table_is_named(self, tmp_path: Path) -> None:
        save_file({"blocks.1.self_attn.norm_q.diff": torch.full((DIT.dim,), 10.0)}, tmp_path / "n.safetensors")
        asked = request(tmp_path / "e", loras=(LoRASpec(tmp_path / "n.safetensors", 1e38),))
        with pytest.raises(
            InputError, match=r"norm_q\.weight has NaN.*n\.safetensors at strength 1e\+38. Use a smaller"
        ):
            build(asked, small_checkpoint())

    def test_a_tensor_that_was_damaged_before_is_not_the_loras_fault(self, tmp_path: Path) -> None:
        bad = small_checkpoint().sources["dit"].get(TOUCHED).clone()
        bad[3, 4] = float("nan")
        asked = request(tmp_path / "e", loras=(LoRASpec(lora_file(tmp_path / "l.safetensors")),))
        with pytest.raises(InputError, match=rf"tensor {TOUCHED} of the checkpoint has NaN.*Get an intact file"):
            build(asked, small_checkpoint(blocks__0__self_attn__q__weight=bad))

    def test_a_lora_that_the_precision_cannot_hold_is_named(self, tmp_path: Path) -> None:
        asked = request(tmp_path / "e", "fp16", loras=(LoRASpec(lora_file(tmp_path / "l.safetensors"), 1e5),))
        with pytest.raises(
            Scail2Error, match=r"1e\+05.*float16.*It holds the LoRA .*l\.safetensors at strength 100000\."
        ):
            build(asked, small_checkpoint())

    @pytest.mark.parametrize("precision", ["fp32", "fp8"])
    def test_a_wrong_shape_is_named(self, tmp_path: Path, precision: str) -> None:
        bad = torch.zeros(DIT.dim * 2, DIT.dim // 2)
        checkpoint = small_checkpoint(blocks__0__ffn__0__weight=bad)
        with pytest.raises(InputError, match=r"blocks\.0\.ffn\.0\.weight have shapes \[\[64, 16\]\].*\[48, 32\]"):
            build(request(tmp_path / "e", precision), checkpoint)

    @pytest.mark.parametrize("name", ["head.head.bias", "head.modulation"])
    def test_a_missing_tensor_is_named(self, tmp_path: Path, name: str) -> None:
        checkpoint = small_checkpoint()
        del checkpoint.sources["dit"]._tensors[name]  # type: ignore[attr-defined]
        with pytest.raises(InputError, match=rf"no tensor {name}"):
            build(request(tmp_path / "e"), checkpoint)


class TestSecondCall:
    def test_checks_and_writes_nothing(self, tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = BuildRequest(tiny.path, tmp_path / "e", ("torch",), "bf16")
        first, steps = Steps(), Steps()
        report = build(asked, tiny, first)
        assert (report.up_to_date, report.added, report.backends) == (False, ("torch",), ("torch",))
        assert len(first.names("hash")) == 5  # transformer, VAE, umT5, CLIP, tokenizer
        assert len(first.names("weights")) == report.stages + 1  # and the token embedding
        assert next((s.index, s.total) for s in first.steps if s.phase == "weights") == (1, report.stages + 1)
        assert first.steps[-1].remaining_s == 0
        before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in (tmp_path / "e").rglob("*")}

        def unread(*_: object) -> str:
            raise AssertionError("hashed again")

        monkeypatch.setattr(sources, "hash_file", unread)
        again = build(asked, tiny, steps)
        assert again.up_to_date
        assert again.added == ()
        assert [step.phase for step in steps.steps] == ["check"]
        assert "nothing to do" in steps.notes[-1]
        assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in (tmp_path / "e").rglob("*")} == before

    def test_without_precision_takes_the_folders(self, tmp_path: Path) -> None:
        build_small(tmp_path / "e", "bf16")
        report = build_small(tmp_path / "e", None)
        assert report.up_to_date
        assert report.precision == "bf16"

    def test_a_touched_file_is_hashed_once_more(self, tmp_path: Path) -> None:
        lora = lora_file(tmp_path / "l.safetensors")
        build_small(tmp_path / "e", loras=(LoRASpec(lora),))
        os.utime(lora, ns=(1, 1))
        for expected in ([str(lora)], []):
            steps = Steps()
            assert build(request(tmp_path / "e", loras=(LoRASpec(lora),)), small_checkpoint(), steps).up_to_date
            assert steps.names("hash") == expected
        assert not (tmp_path / "e" / JOURNAL).exists()


class TestDifferences:
    def refused(self, message: str, folder: Path, checkpoint: Checkpoint | None = None, **more: object) -> None:
        before = contents(folder)
        with pytest.raises(InputError, match=message) as caught:
            build(request(folder, **more), checkpoint or small_checkpoint())  # type: ignore[arg-type]
        assert "--rebuild" in str(caught.value)
        after = contents(folder)
        after.pop(JOURNAL, None)  # hashes that were made on the way
        assert after == before

    def test_precision(self, tmp_path: Path) -> None:
        build_small(tmp_path / "e", "bf16")
        self.refused(r"precision: the folder has bf16, the request is fp32", tmp_path / "e")

    def test_weights(self, tmp_path: Path) -> None:
        build_small(tmp_path / "e")
        message = r"sources\.dit: the folder has memory \(sha256 \w+.*the request is memory.*sources\.umt5"
        self.refused(message, tmp_path / "e", small_checkpoint(seed=3))

    def test_components_and_sizes(self, tmp_path: Path) -> None:
        build_small(tmp_path / "e")
        checkpoint = small_checkpoint()
        del checkpoint.sources["umt5"]
        partial = Checkpoint(checkpoint.path, type(checkpoint.config)(dit=DIT), checkpoint.sources, None)
        self.refused(r"model\.umt5\.dim: the folder has 24, the request is none", tmp_path / "e", partial)

    def test_lora(self, tmp_path: Path) -> None:
        lora = lora_file(tmp_path / "l.safetensors")
        build_small(tmp_path / "e")
        message = r"loras: the folder has none, the request is l\.safetensors \(sha256 \w+\) at strength 0\.5"
        self.refused(message, tmp_path / "e", loras=(LoRASpec(lora, 0.5),))
        build_small(tmp_path / "f", loras=(LoRASpec(lora, 0.5),))
        self.refused(r"at strength 0\.5, the request is .*at strength 1\b", tmp_path / "f", loras=(LoRASpec(lora),))
        lora_file(lora, value=2.0)
        self.refused(r"loras: ", tmp_path / "f", loras=(LoRASpec(lora, 0.5),))

    def test_the_command_in_the_message_is_complete(self, tmp_path: Path) -> None:
        lora = lora_file(tmp_path / "l.safetensors")
        build_small(tmp_path / "e", "bf16")
        with pytest.raises(InputError) as caught:
            build_small(
                tmp_path / "e", loras=(LoRASpec(lora, 0.5),), lora_partial=True, components={"umt5": Path("a b.pth")}
            )
        command = str(caught.value).partition("Replace it with: ")[2]
        assert command == (
            f"scail2-rt build-engines small --t5 'a b.pth' -o {tmp_path / 'e'} --precision fp32 "
            f"--lora {lora}:0.5 --lora-partial --backend torch --rebuild"
        )

    def test_rebuild_replaces(self, tmp_path: Path) -> None:
        build_small(tmp_path / "e", "bf16")
        (tmp_path / "e" / "notes.txt").write_text("mine")
        report = build_small(tmp_path / "e", "fp32", rebuild=True)
        assert not report.up_to_date
        build_small(tmp_path / "fresh", "fp32")
        assert (tmp_path / "e" / STORE).read_bytes() == (tmp_path / "fresh" / STORE).read_bytes()
        assert read_manifest(tmp_path / "e").precision == "fp32"
        assert (tmp_path / "e" / "notes.txt").read_text() == "mine"
        assert build_small(tmp_path / "e").up_to_date

    def test_rebuild_mends_a_damaged_folder(self, tmp_path: Path) -> None:
        build_small(tmp_path / "e")
        (tmp_path / "e" / STORE).write_bytes(b"broken")
        self.refused(r"weights\.safetensors: the manifest has \d+ bytes, the file has 6", tmp_path / "e")
        (tmp_path / "e" / MANIFEST).write_text("{")
        self.refused("cannot be read", tmp_path / "e")
        build_small(tmp_path / "e", rebuild=True)
        assert StoreReader(tmp_path / "e" / STORE).get("dit.head.linear.bias").shape == (64,)


class TestPlace:
    def test_a_file_or_a_foreign_folder_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "f").write_text("x")
        with pytest.raises(InputError, match="is a file"):
            build_small(tmp_path / "f")
        with pytest.raises(InputError, match=r"cannot be made: .*/f is not writable"):
            build_small(tmp_path / "f" / "e")
        with pytest.raises(InputError, match="contains other files"):
            build_small(tmp_path)
        assert (tmp_path / "f").read_text() == "x"

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_a_folder_without_the_right_to_write(self, tmp_path: Path) -> None:
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(InputError, match="cannot be written"):
            build_small(tmp_path / "locked" / "e")

    def test_too_little_room_is_said_with_both_numbers(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        usage = type("Usage", (), {"free": 3 << 20})()
        monkeypatch.setattr("scail2_rt.engines.build.build.shutil.disk_usage", lambda path: usage)
        with pytest.raises(
            InputError, match=r"needs 0\.06 GiB on the disk of .*, which has 0\.00 GiB free. Free some space"
        ):
            build_small(tmp_path / "e")
        assert not (tmp_path / "e").exists()

    def test_two_builds_at_once(self, tmp_path: Path) -> None:
        class Second(SilentObserver):
            refused = ""

            def started(self, step: BuildStep) -> None:
                if step.name == "dit.head":
                    with pytest.raises(InputError, match="another build is writing"):
                        build_small(tmp_path / "e")
                    self.refused = step.name

        observer = Second()
        build(request(tmp_path / "e"), small_checkpoint(), observer)
        assert observer.refused == "dit.head"

    def test_nothing_is_left_when_a_source_cannot_be_read(self, tiny: Checkpoint, tmp_path: Path) -> None:
        gone = Checkpoint(tiny.path, tiny.config, tiny.sources, tmp_path / "tokenizer.json")
        with pytest.raises(InputError, match=r"tokenizer\.json cannot be read"):
            build(BuildRequest(tiny.path, tmp_path / "e", ("torch",), "fp32"), gone)
        assert not (tmp_path / "e").exists()

    def test_other_errors_of_the_system_become_sentences(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object) -> None:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr("scail2_rt.engines.folder.store.os.fsync", fail)
        with pytest.raises(Scail2Error, match=r"failed: .*Input/output error"):
            build_small(tmp_path / "e")


class TestOptions:
    def test_tensorrt_needs_its_library(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("scail2_rt.engines.registry.installed", lambda name: name != "tensorrt")
        with pytest.raises(InputError, match=r"tensorrt is not installed .*pip install \"scail2-rt\[tensorrt\]\""):
            build(BuildRequest(Path("small"), tmp_path / "e", ("tensorrt",)), small_checkpoint())
        assert not (tmp_path / "e").exists()

    def test_unknown_names(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="backend 'tpu' is unknown"):
            build(BuildRequest(Path("small"), tmp_path / "e", ("tpu",)), small_checkpoint())
        with pytest.raises(InputError, match=r"precision 'int4' is unknown. Use one of fp32"):
            build_small(tmp_path / "e", "int4")

    def test_auto_and_default_precision_are_explained(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(registry, "installed", lambda name: name == "torch")
        monkeypatch.setattr(registry, "gpu", lambda: None)
        monkeypatch.setattr(registry, "device_of", lambda name: "cpu")
        steps = Steps()
        report = build(BuildRequest(Path("small"), tmp_path / "e"), small_checkpoint(), steps)
        assert (report.backends, report.precision) == (("torch",), "fp32")
        assert steps.notes[0].startswith("backend torch, because this machine has no CUDA GPU")
        assert steps.notes[1] == "precision fp32, because computation is on the CPU"
        assert report.notes == tuple(steps.notes)

    @pytest.mark.parametrize(("capability", "expected"), [((9, 0), "fp8"), ((8, 9), "fp8"), ((8, 0), "bf16")])
    def test_default_precision_on_a_gpu(
        self, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: str
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
        precision, reason = registry.default_precision(["torch"])
        assert precision == expected
        assert f"Some GPU (sm{capability[0]}{capability[1]})" in reason


def test_adding_a_backend_leaves_the_rest_alone(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """ONNX Runtime's files are added to an existing store, and both backends then agree."""
    pytest.importorskip("onnxruntime")
    from scail2_rt.engines.engine_set import open_engines

    checkpoint = open_checkpoint(tiny_checkpoint, components=("umt5",))
    folder = tmp_path / "e"
    build(BuildRequest(tiny_checkpoint, folder, ("torch",), "bf16"), checkpoint)
    before = {name: (folder / name).stat() for name in (STORE, "tables.safetensors", "tokenizer/tokenizer.json")}
    steps = Steps()
    report = build(BuildRequest(tiny_checkpoint, folder, ("onnxruntime", "torch")), checkpoint, steps)
    assert (report.added, report.backends) == (("onnxruntime",), ("torch", "onnxruntime"))
    assert steps.names("onnxruntime") == ["umt5.layers.0", "umt5.layers.1", "umt5.final"]
    assert not steps.names("weights")
    for name, state in before.items():
        assert ((folder / name).stat().st_mtime_ns, (folder / name).stat().st_ino) == (state.st_mtime_ns, state.st_ino)
    listed = {artefact.path for artefact in read_manifest(folder).artefacts}
    assert {"stages/umt5.final.onnx", STORE, "tokenizer/tokenizer.json"} <= listed
    assert build(BuildRequest(tiny_checkpoint, folder, ("onnxruntime",)), checkpoint).up_to_date
    inputs = (torch.randn(5, 64), torch.zeros(5, 5, dtype=torch.int64), torch.ones(5))
    with open_engines(folder, "torch") as one, open_engines(folder, "onnxruntime", device="cpu") as other:
        assert one.tokenizer_path.is_file()
        assert other.compute_dtype("umt5.layers.0") == torch.float32  # stored bf16, computed in fp32
        (want,), (have,) = one.run("umt5.layers.0", *inputs), other.run("umt5.layers.0", *inputs)
        assert (want - have).norm() <= 0.02 * want.norm()
    (folder / "stages" / "umt5.final.onnx").unlink()
    with pytest.raises(InputError, match=r"stages/umt5\.final\.onnx.*the file is missing"):
        open_engines(folder)
