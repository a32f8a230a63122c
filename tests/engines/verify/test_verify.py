"""The acceptance test of engine folders passes good folders and finds each kind of damage with the intended check."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from scail2_rt.engines.build.build import BuildRequest, build
from scail2_rt.engines.engine_set import EngineSet
from scail2_rt.engines.folder.damage import sums_now
from scail2_rt.engines.folder.manifest import MANIFEST, read_manifest, write_manifest
from scail2_rt.engines.folder.sources import hash_file
from scail2_rt.engines.folder.store import STORE_NAME, StoreLayout
from scail2_rt.engines.folder.sums import DamagedError
from scail2_rt.engines.verify.stage_check import TOLERANCES, level, stage_inputs, worst_error
from scail2_rt.engines.verify.verify import VerifyReport, VerifyRequest, open_for, verify
from scail2_rt.export.checkpoint.lora import LoRASpec
from scail2_rt.export.checkpoint.open import Checkpoint, open_checkpoint
from scail2_rt.export.models.config import ModelConfig
from scail2_rt.export.models.precision import BF16, FP16, FP32, PRECISIONS, Numerics
from scail2_rt.export.stages.definitions import stage_definitions
from scail2_rt.kernels.errors import InputError, Scail2Error
from scail2_rt.runtime.core.as_json import plain
from tests.support.damage import flip
from tests.support.small import DIT, build_small, small_checkpoint

STORE = f"stages/{STORE_NAME}"
FP8 = Numerics(torch.bfloat16, torch.bfloat16, fp8=True)


def run(folder: Path, checkpoint: Checkpoint, *backends: str) -> VerifyReport:
    return verify(VerifyRequest(folder, backends), checkpoint)


def verdicts(report: VerifyReport) -> dict[str, bool | None]:
    return {check.name: check.passed for check in report.checks}


def failed(report: VerifyReport) -> set[tuple[str, str]]:
    return {(result.stage, result.backend) for result in report.stages if not result.passed}


def rewrite_hash(folder: Path, name: str) -> None:
    """Record the file's present hash in the manifest."""
    manifest = read_manifest(folder)
    file = folder / name
    artefacts = tuple(
        dataclasses.replace(a, size=file.stat().st_size, sha256=hash_file(file)) if a.path == name else a
        for a in manifest.artefacts
    )
    assert manifest.sums is not None
    sums = sums_now(folder, manifest.sums.files)
    write_manifest(folder, dataclasses.replace(manifest, artefacts=artefacts, sums=sums))


def change_value(folder: Path, tensor: str, index: int, xor: int) -> None:
    """Flip bits in one byte of a tensor of the store."""
    store = folder / STORE
    place = StoreLayout.read(store).location(tensor)
    with store.open("r+b") as file:
        file.seek(place.offset + index)
        byte = file.read(1)[0]
        file.seek(place.offset + index)
        file.write(bytes([byte ^ xor]))


def set_value(folder: Path, tensor: str, index: int, value: bytes) -> None:
    """Write one value of a tensor of the store."""
    place = StoreLayout.read(folder / STORE).location(tensor)
    with (folder / STORE).open("r+b") as file:
        file.seek(place.offset + index * len(value))
        file.write(value)


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: Path) -> Checkpoint:
    return open_checkpoint(tiny_checkpoint)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    build_small(tmp_path / "e")
    return tmp_path / "e"


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_good_folders_of_the_tiny_checkpoint_pass(tiny: Checkpoint, tmp_path: Path, precision: str) -> None:
    build(BuildRequest(tiny.path, tmp_path / "e", ("torch", "onnxruntime"), precision), tiny)
    report = run(tmp_path / "e", tiny)
    assert report.passed, report.text
    names = set(stage_definitions(tiny.config))
    assert {(r.stage, r.backend) for r in report.stages} == {(n, b) for n in names for b in ("torch", "onnxruntime")}
    assert all(result.median_s > 0 for result in report.stages)
    assert all(result.error is not None and result.error <= TOLERANCES[result.level] for result in report.stages)
    worst = {
        key: max(r.error or 0 for r in report.stages if r.level == key) for key in {r.level for r in report.stages}
    }
    if precision != "fp32":
        assert worst[precision] > TOLERANCES["fp32"]  # a lower precision was really run
    assert verdicts(report) == {
        "checksums": True,
        "files": True,
        "sources": True,
        "weights": True,
        "tables": True,
        "graph against eager": None,
        "operand types": None,
    }


class TestDamage:
    def test_one_value_and_the_hash_rewritten(self, tiny: Checkpoint, tmp_path: Path) -> None:
        """The acceptance criterion; the lowest bit of one fp32 weight is too small for any numerical test."""
        build(BuildRequest(tiny.path, tmp_path / "e", ("torch", "onnxruntime"), "fp32"), tiny)
        change_value(tmp_path / "e", "dit.blocks.1.ffn.up.weight", 4 * 777, 1)
        rewrite_hash(tmp_path / "e", STORE)
        report = run(tmp_path / "e", tiny)
        assert not report.passed
        assert verdicts(report)["files"] is True
        (check,) = [check for check in report.checks if check.passed is False]
        assert check.name == "weights"
        assert "dit.blocks.1.ffn.up.weight (1 value, the first at 777" in check.detail
        assert report.text.splitlines()[-1].startswith(f"FAIL {tmp_path / 'e'}: weights")

    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_a_large_change_shows_in_the_stage_as_well(self, tmp_path: Path, precision: str) -> None:
        build_small(tmp_path / "e", precision)
        tensor = "dit.blocks.0.qkv.linear.weight"
        width = StoreLayout.read(tmp_path / "e" / STORE).location(tensor).dtype.itemsize
        if precision == "fp8":  # scale a column by 2 or 1/2: one weight alone cannot change enough
            change_value(tmp_path / "e", "dit.blocks.0.qkv.linear.scale", 4 * 5 + 2, 0x80)
        else:
            change_value(tmp_path / "e", tensor, 5 * width + width - 1, 0x40)  # the highest bit of the exponent
        rewrite_hash(tmp_path / "e", STORE)
        report = run(tmp_path / "e", small_checkpoint())
        assert failed(report) == {("dit.blocks.0.qkv", "torch")}
        assert verdicts(report)["weights"] is False

    @pytest.mark.parametrize("tensor", ["umt5.token_embedding.weight", "dit.blocks.0.ffn.up.scale"])
    def test_what_no_stage_shows(self, tmp_path: Path, tensor: str) -> None:
        build_small(tmp_path / "e", "fp8")
        change_value(tmp_path / "e", tensor, 0, 1)
        rewrite_hash(tmp_path / "e", STORE)
        report = run(tmp_path / "e", small_checkpoint())
        assert verdicts(report)["weights"] is False
        assert not failed(report)

    @pytest.mark.parametrize(("precision", "tensor"), [("fp32", "weight"), ("bf16", "weight"), ("fp8", "scale")])
    def test_a_value_that_is_not_a_number(self, tmp_path: Path, precision: str, tensor: str) -> None:
        build_small(tmp_path / "e", precision)
        name = f"dit.blocks.1.ffn.up.{tensor}"
        width = StoreLayout.read(tmp_path / "e" / STORE).location(name).dtype.itemsize
        set_value(tmp_path / "e", name, 7, b"\x00\x00\xc0\x7f"[-width:])
        rewrite_hash(tmp_path / "e", STORE)
        report = run(tmp_path / "e", small_checkpoint())
        (check,) = [check for check in report.checks if check.passed is False]
        assert check.name == "weights"
        assert f"{name} (1 NaN or infinite value, the first at 7)" in check.detail
        assert failed(report) == {("dit.blocks.1.ffn", "torch")}

    def test_a_table_that_is_not_of_numbers(self, small: Path) -> None:
        tables = load_file(small / "tables.safetensors")
        tables["blocks.1.norm_q"][3] = float("inf")
        save_file(tables, small / "tables.safetensors")
        rewrite_hash(small, "tables.safetensors")
        (check,) = [check for check in run(small, small_checkpoint()).checks if check.passed is False]
        assert "blocks.1.norm_q (1 NaN or infinite value, the first at 3)" in check.detail

    def test_the_hash_alone(self, small: Path) -> None:
        change_value(small, "dit.head.linear.bias", 0, 1)
        report = run(small, small_checkpoint())
        (check,) = [check for check in report.checks if check.name == "checksums"]
        assert check.passed is False
        assert "stage dit.head of" in check.detail
        assert "tensor dit.head.linear.bias does not match its checksum" in check.detail
        assert f"scail2-rt build-engines small -o {small} --precision fp32 --backend torch" in check.detail
        (check,) = [check for check in report.checks if check.name == "files"]
        assert check.passed is False
        assert STORE in check.detail

    def test_a_damaged_header_is_refused(self, small: Path) -> None:
        flip(small / STORE, 60)
        with pytest.raises(DamagedError, match=r"the header of the weight store.*build-engines small"):
            run(small, small_checkpoint())

    def test_a_folder_without_sums(self, small: Path) -> None:
        write_manifest(small, dataclasses.replace(read_manifest(small), sums=None))
        report = run(small, small_checkpoint())
        assert report.passed
        assert verdicts(report)["checksums"] is None
        assert "Add them, without rebuilding, with: scail2-rt build-engines small" in report.text

    def test_a_graph_of_another_block(self, tmp_path: Path) -> None:
        """Weights and tables are right and every hash agrees: only running the stage finds it."""
        request = BuildRequest(Path("small"), tmp_path / "e", ("torch", "onnxruntime"), "fp32")
        build(request, small_checkpoint())
        stages = tmp_path / "e" / "stages"
        shutil.copy(stages / "dit.blocks.1.mid.onnx", stages / "dit.blocks.0.mid.onnx")
        rewrite_hash(tmp_path / "e", "stages/dit.blocks.0.mid.onnx")
        report = run(tmp_path / "e", small_checkpoint())
        assert failed(report) == {("dit.blocks.0.mid", "onnxruntime")}
        assert [check.name for check in report.checks if check.passed is False] == []
        assert not report.passed

    def test_a_stage_that_cannot_run_does_not_hide_the_others(self, tmp_path: Path) -> None:
        request = BuildRequest(Path("small"), tmp_path / "e", ("onnxruntime",), "fp32")
        build(request, small_checkpoint())
        graph = tmp_path / "e" / "stages" / "dit.time.onnx"
        graph.write_bytes(b"\0" * graph.stat().st_size)
        report = run(tmp_path / "e", small_checkpoint())
        assert failed(report) == {("dit.time", "onnxruntime")}
        (result,) = [result for result in report.stages if result.stage == "dit.time"]
        assert result.error is None
        assert "cannot load the stage" in str(result.fault)
        json.dumps(plain(report), allow_nan=False)

    def test_a_table(self, small: Path) -> None:
        tables = load_file(small / "tables.safetensors")
        tables["blocks.1.norm_q"][3] += 1e-6
        save_file(tables, small / "tables.safetensors")
        rewrite_hash(small, "tables.safetensors")
        report = run(small, small_checkpoint())
        (check,) = [check for check in report.checks if check.passed is False]
        assert (check.name, "blocks.1.norm_q" in check.detail) == ("tables", True)

    def test_another_checkpoint_of_the_same_sizes(self, small: Path) -> None:
        report = run(small, small_checkpoint(seed=7))
        assert verdicts(report)["sources"] is False
        assert verdicts(report)["weights"] is False
        assert verdicts(report)["files"] is True
        assert len(failed(report)) == len(report.stages)

    def test_another_tokenizer(self, tiny: Checkpoint, tmp_path: Path) -> None:
        build(BuildRequest(tiny.path, tmp_path / "e", ("torch",), "fp32"), tiny)
        tokenizer = tmp_path / "e" / "tokenizer" / "tokenizer.json"
        tokenizer.write_text(tokenizer.read_text() + " ")
        rewrite_hash(tmp_path / "e", "tokenizer/tokenizer.json")
        report = run(tmp_path / "e", tiny)
        (check,) = [check for check in report.checks if check.passed is False]
        assert (check.name, "tokenizer/tokenizer.json" in check.detail) == ("sources", True)


class TestLoRA:
    @pytest.fixture
    def lora(self, tmp_path: Path) -> Path:
        tensors = {
            "blocks.0.ffn.0.lora_down.weight": torch.randn(4, DIT.dim) / 8,
            "blocks.0.ffn.0.lora_up.weight": torch.randn(DIT.ffn_dim, 4) / 8,
            "blocks.1.self_attn.norm_k.diff": torch.full((DIT.dim,), 0.5),
        }
        save_file(tensors, tmp_path / "l.safetensors")
        return tmp_path / "l.safetensors"

    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_it_is_applied_to_the_reference(self, tmp_path: Path, lora: Path, precision: str) -> None:
        build_small(tmp_path / "e", precision, loras=(LoRASpec(lora, 0.7),))
        report = run(tmp_path / "e", small_checkpoint())
        assert report.passed, report.text

    def test_a_changed_value_of_a_touched_tensor_is_found(self, tmp_path: Path, lora: Path) -> None:
        build_small(tmp_path / "e", loras=(LoRASpec(lora, 0.7),))
        change_value(tmp_path / "e", "dit.blocks.0.ffn.up.weight", 4 * 9 + 2, 0x04)
        rewrite_hash(tmp_path / "e", STORE)
        assert verdicts(run(tmp_path / "e", small_checkpoint()))["weights"] is False

    def test_another_strength_in_the_manifest(self, tmp_path: Path, lora: Path) -> None:
        build_small(tmp_path / "e", loras=(LoRASpec(lora, 0.7),))
        text = (tmp_path / "e" / MANIFEST).read_text().replace('"strength": 0.7', '"strength": 0.8')
        (tmp_path / "e" / MANIFEST).write_text(text)
        report = run(tmp_path / "e", small_checkpoint())
        assert failed(report) == {("dit.blocks.0.ffn", "torch")}
        assert verdicts(report)["tables"] is False

    def test_a_strength_in_the_manifest_that_leaves_no_numbers(self, tmp_path: Path, lora: Path) -> None:
        build_small(tmp_path / "e", loras=(LoRASpec(lora, 0.7),))
        text = (tmp_path / "e" / MANIFEST).read_text().replace('"strength": 0.7', '"strength": 1e+60')
        (tmp_path / "e" / MANIFEST).write_text(text)
        report = run(tmp_path / "e", small_checkpoint())
        (check,) = [check for check in report.checks if check.name == "weights"]
        assert check.passed is False
        assert f"tensor blocks.0.ffn.0.weight has NaN or infinite values once the LoRA is fused into it: {lora}" in (
            check.detail
        )
        assert "at strength 1e+60. Use a smaller strength" in check.detail

    def test_a_lora_that_changed_or_is_gone(self, tmp_path: Path, lora: Path) -> None:
        build_small(tmp_path / "e", loras=(LoRASpec(lora, 0.7),))
        tensors = load_file(lora)
        save_file({name: tensor * 1.1 for name, tensor in tensors.items()}, lora)
        assert verdicts(run(tmp_path / "e", small_checkpoint()))["sources"] is False
        lora.unlink()
        with pytest.raises(InputError, match=r"l\.safetensors, which does not exist"):
            run(tmp_path / "e", small_checkpoint())


class TestRefusals:
    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="not a finished engine folder"):
            run(tmp_path, small_checkpoint())

    def test_another_model(self, small: Path, tiny: Checkpoint) -> None:
        with pytest.raises(InputError, match=r"not the model of the engine folder: model\.dit\.dim"):
            run(small, tiny)

    def test_an_executor_that_is_not_in_the_folder(self, small: Path) -> None:
        with pytest.raises(InputError, match=r"holds no onnxruntime engines.*--backend torch"):
            run(small, small_checkpoint(), "onnxruntime")

    def test_numbers(self, small: Path) -> None:
        with pytest.raises(InputError, match="at least 3 repeats"):
            VerifyRequest(small, repeats=2)


class TestStageInputs:
    def test_nothing_is_degenerate(self, tiny: Checkpoint) -> None:
        for definition in stage_definitions(tiny.config).values():
            specs = definition.io(FP32)[0]
            for spec, x in zip(specs, stage_inputs(definition, tiny.config, 64, 0), strict=True):
                assert x.ndim == len(spec.dims)
                assert x.dtype == spec.dtype
                assert len(x.unique()) > 1, (definition.name, spec.name)
                assert x.float().abs().max() < 40

    def test_seeds(self, tiny: Checkpoint) -> None:
        stage = stage_definitions(tiny.config)["dit.head"]
        first, again, other = (stage_inputs(stage, tiny.config, 8, seed)[0] for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_a_transformer_alone(self) -> None:
        config = ModelConfig(dit=DIT)
        text, clip = stage_inputs(stage_definitions(config)["dit.context"], config, 64, 0)
        assert (text.shape, clip.shape) == ((512, DIT.text_dim), (257, DIT.clip_dim))


def test_levels() -> None:
    assert [level(n) for n in (FP32, FP16, BF16, FP8)] == ["fp32", "fp16", "bf16", "fp8"]
    assert level(BF16.in_arithmetic(torch.float32)) == "bf16"


def test_errors_of_outputs() -> None:
    e = torch.tensor([1.0, -4.0])
    zero = torch.zeros(2)
    assert worst_error([e + 0.4, zero], [e, zero]) == pytest.approx(0.1)
    assert worst_error([e, zero + 0.5], [e, zero]) == pytest.approx(0.5)
    assert worst_error([e * float("nan")], [e]) is None
    assert worst_error([e[:1]], [e]) is None
    with pytest.raises(Scail2Error, match="All outputs of the fp32 stage are zero"):
        worst_error([zero], [zero])


def plan_report(*types: str, kind: str = "gemm") -> str:
    inputs = [{"Name": f"i{n}", "Dimensions": [64, 64], "Format/Datatype": text} for n, text in enumerate(types)]
    other = {"Name": "norm", "LayerType": "kgen", "Inputs": [{"Name": "x", "Format/Datatype": "Row major linear FP32"}]}
    return json.dumps({"Layers": [other, {"Name": "product", "LayerType": kind, "Inputs": inputs}], "Bindings": []})


class TestOperands:
    def test_it_fails_the_stage(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        build_small(tmp_path / "e", "fp8")
        request = VerifyRequest(tmp_path / "e")
        monkeypatch.setattr(EngineSet, "plan_report", lambda engines, stage: plan_report("FP8", "Half"))
        report = verify(request, small_checkpoint())
        kinds = {stage.rpartition(".")[2] for stage, _ in failed(report)}
        assert kinds == {"qkv", "mid", "ffn"}
        assert not report.passed


def test_progress_hears_every_line(small: Path) -> None:
    lines: list[str] = []
    report = verify(VerifyRequest(small), small_checkpoint(), lines.append)
    assert len(lines) == len(report.checks) + len(report.stages)  # one backend: one line per stage
    assert set(lines) <= set(report.text.splitlines())


def test_a_graph_that_differs_fails_the_stage(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The report of a CUDA graph's difference; recording a graph needs a GPU."""
    monkeypatch.setattr("scail2_rt.engines.verify.verify.has_graphs", lambda engines: True)
    differences = {"dit.time": 0.25}
    running: list[str] = []
    original = EngineSet.run

    def run_noted(self: EngineSet, name: str, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        running.append(name)
        return original(self, name, *inputs)

    monkeypatch.setattr(EngineSet, "run", run_noted)
    monkeypatch.setattr(
        "scail2_rt.engines.verify.verify.replayed", lambda call, eager: differences.get(running[-1], 0.0)
    )
    report = run(small, small_checkpoint())
    assert failed(report) == {("dit.time", "torch")}
    assert verdicts(report)["graph against eager"] is False
    assert "differs from the eager one by 0.25" in report.text


def test_the_checkpoint_is_opened_as_the_build_did(tiny: Checkpoint, tmp_path: Path) -> None:
    """A component that was given separately to the build is found through the manifest."""
    apart = tmp_path / "apart.pth"
    shutil.copy(tiny.sources["clip"].files[0], apart)
    copy = tmp_path / "checkpoint"
    shutil.copytree(tiny.path, copy)
    (copy / tiny.sources["clip"].files[0].relative_to(tiny.path)).unlink()
    request = BuildRequest(copy, tmp_path / "e", ("torch",), "fp32", components={"clip": apart})
    build(request, open_checkpoint(copy, clip=apart))
    checkpoint = open_for(tmp_path / "e", copy)
    assert checkpoint.sources["clip"].files == (apart,)
    assert run(tmp_path / "e", checkpoint).passed


class TestAgainstOnnxRuntime:
    @pytest.mark.parametrize("precision", ["fp32", "fp8"])
    def test_executors_agree(self, tmp_path: Path, precision: str) -> None:
        build(BuildRequest(Path("small"), tmp_path / "e", ("torch", "onnxruntime"), precision), small_checkpoint())
        report = verify(VerifyRequest(tmp_path / "e", ("torch",), against="onnxruntime"), small_checkpoint())
        assert report.passed, report.text
        assert {result.backend for result in report.stages} == {"torch"}
        assert all(result.against is not None and result.against <= result.tolerance for result in report.stages)
        assert "against the other executor" in report.text

    def test_one_that_differs_is_named_with_its_output(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        build(BuildRequest(Path("small"), tmp_path / "e", ("torch", "onnxruntime"), "fp32"), small_checkpoint())
        run = EngineSet.run

        def off(self: EngineSet, name: str, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            outputs = run(self, name, *inputs)
            wrong = name == "dit.blocks.0.mid" and self.backend == "onnxruntime"
            return (outputs[0], outputs[1] + 0.1) if wrong else outputs

        monkeypatch.setattr(EngineSet, "run", off)
        report = verify(VerifyRequest(tmp_path / "e", ("torch",), against="onnxruntime"), small_checkpoint())
        (result,) = [result for result in report.stages if not result.passed]
        assert result.stage == "dit.blocks.0.mid"
        assert str(result.fault).startswith("differs from onnxruntime in q by ")

    def test_without_the_tool(self, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("scail2_rt.engines.verify.against.importlib.util.find_spec", lambda name: None)
        with pytest.raises(InputError, match=r"Polygraphy, which is not installed\. Install it with: pip install"):
            verify(VerifyRequest(small, against="onnxruntime"), small_checkpoint())
