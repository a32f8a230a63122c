"""An engine folder with TensorRT plans: built, opened and run through the interfaces that all backends share."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from scail2_rt.engines.build.build import BuildReport, BuildRequest, SilentObserver, build
from scail2_rt.engines.engine_set import DEFAULT_EXECUTION, Execution, open_engines
from scail2_rt.engines.folder.manifest import read_manifest
from scail2_rt.engines.folder.sums import DamagedError
from scail2_rt.engines.tensorrt_backend import backend, builder, preflight, session, trust
from scail2_rt.engines.tensorrt_backend.backend import BACKENDS
from scail2_rt.engines.tensorrt_backend.library import TENSORRT_RTX
from scail2_rt.engines.tensorrt_backend.preflight import GpuFacts
from scail2_rt.engines.tensorrt_backend.profiles import PlanOptions, plan_options
from scail2_rt.kernels.errors import InputError
from tests.support.damage import flip
from tests.support.small import small_checkpoint
from tests.support.tensorrt_api.bindings import RTX, VERSIONS
from tests.support.tensorrt_api.installed import installed
from tests.support.tensorrt_api.recorder import Recorder


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    with installed(VERSIONS[0]) as recorder:
        monkeypatch.setattr(session, "CudaDevice", lambda device: recorder.device)
        monkeypatch.setattr("scail2_rt.engines.build.assemble.gpu", lambda: "NVIDIA H200 (sm90)")
        yield recorder


@pytest.fixture
def rtx(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """The other library, on a card that runs it."""
    with installed(RTX) as recorder:
        monkeypatch.setattr(session, "CudaDevice", lambda device: recorder.device)
        monkeypatch.setattr("scail2_rt.engines.registry.gpu", lambda: "NVIDIA GeForce RTX 4090 (sm89)")
        yield recorder


def make(folder: Path, backends: tuple[str, ...] = ("tensorrt",), seed: int = 0, **chosen: object) -> BuildReport:
    request = BuildRequest(Path("small"), folder, backends, "fp32", **chosen)  # type: ignore[arg-type]
    return build(request, small_checkpoint(seed))


def test_runs_like_the_torch_executor(recorder: Recorder, tmp_path: Path) -> None:
    report = make(tmp_path / "e", ("tensorrt", "torch"))
    assert report.added == ("tensorrt", "torch")
    record = read_manifest(tmp_path / "e").executors[0]
    assert (record.backend, record.versions, record.gpu) == (
        "tensorrt",
        {"tensorrt": recorder.surface.version},
        "NVIDIA H200 (sm90)",
    )
    x, mod = torch.randn(50, 32), torch.randn(2, 32)
    with (
        open_engines(tmp_path / "e", "tensorrt", Execution(max_rows=16), device="cpu") as plans,
        open_engines(tmp_path / "e", "torch", device="cpu") as reference,
    ):
        torch.testing.assert_close(
            plans.run("dit.head", x, mod), reference.run("dit.head", x, mod), atol=1e-5, rtol=1e-5
        )
        assert plans.loaded == ("dit.head",)
    assert make(tmp_path / "e").up_to_date


def test_plans_of_another_place_are_refused(recorder: Recorder, tmp_path: Path) -> None:
    make(tmp_path / "e")
    manifest = tmp_path / "e" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("NVIDIA H200", "NVIDIA B200"))
    with pytest.raises(InputError, match=r"executors\.tensorrt\.gpu: .*NVIDIA B200.*build-engines small .*--rebuild"):
        open_engines(tmp_path / "e", "tensorrt")


def test_a_subset_then_the_rest(recorder: Recorder, tmp_path: Path) -> None:
    first = make(tmp_path / "e", stages=("dit.*",))
    assert first.added == ()
    assert any("the same command without --stages" in note for note in first.notes)
    assert not (tmp_path / "e/manifest.json").exists()
    built = len(recorder.built)
    assert make(tmp_path / "e").added == ("tensorrt",)
    names = [path.name for path in recorder.built[built:]]
    assert names
    assert all(name.startswith("umt5.") for name in names)


def test_other_weights_and_options_keep_what_is_good(recorder: Recorder, tmp_path: Path) -> None:
    make(tmp_path / "e", ("tensorrt", "torch"))
    recorder.built.clear()
    request = BuildRequest(Path("small"), tmp_path / "e", ("tensorrt", "torch"), "fp32", rebuild=True)
    build(request, small_checkpoint(0, head__head__bias=torch.zeros(64)))
    assert [path.name for path in recorder.built] == ["dit.head.trt.onnx"]
    recorder.built.clear()
    build(
        BuildRequest(Path("small"), tmp_path / "e", ("tensorrt",), "fp32", plan_options=PlanOptions(max_rows=99)),
        small_checkpoint(0, head__head__bias=torch.zeros(64)),
    )
    assert recorder.built
    assert not any("context" in path.name or "umt5" in path.name for path in recorder.built)
    with open_engines(tmp_path / "e", "tensorrt", device="cpu") as plans, pytest.raises(InputError, match="rows = 99"):
        plans.run("dit.head", torch.randn(100, 32), torch.randn(2, 32))


def test_a_damaged_plan_is_refused_and_built_alone(recorder: Recorder, tmp_path: Path) -> None:
    make(tmp_path / "e")
    flip(tmp_path / "e/stages/dit.head.plan", 30)
    inputs = torch.randn(5, 32), torch.randn(2, 32)
    with open_engines(tmp_path / "e", "tensorrt", device="cpu") as plans:
        message = r"stage dit\.head of .*file stages/dit\.head\.plan does not match.*small -o .* --backend tensorrt$"
        with pytest.raises(DamagedError, match=message):
            plans.run("dit.head", *inputs)
    recorder.built.clear()
    assert make(tmp_path / "e").repaired == ("dit.head",)
    assert [path.name for path in recorder.built] == ["dit.head.trt.onnx"]
    assert make(tmp_path / "e").up_to_date
    with open_engines(tmp_path / "e", "tensorrt", device="cpu") as plans:
        plans.run("dit.head", *inputs)


def test_nothing_is_left_behind_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    with pytest.raises(InputError, match=r'pip install "scail2-rt\[tensorrt\]"'):
        make(tmp_path / "e")
    assert not (tmp_path / "e").exists()


def test_a_folder_of_both_libraries_keeps_them_apart(rtx: Recorder, tmp_path: Path) -> None:
    with installed(VERSIONS[0]):
        make(tmp_path / "e", ("tensorrt",))
        plan = tmp_path / "e/stages/dit.head.plan"
        before = plan.read_bytes()
    with installed(RTX):
        make(tmp_path / "e", ("tensorrt-rtx",))
    assert plan.read_bytes() == before
    records = {record.backend: record for record in read_manifest(tmp_path / "e").executors}
    assert records["tensorrt-rtx"].gpu is None
    assert records["tensorrt-rtx"].targets == ("sm89",), "this machine's card"
    assert records["tensorrt"].targets == ()
    files = [artefact.path for artefact in read_manifest(tmp_path / "e").artefacts]
    assert len(files) == len(set(files))


def test_what_a_card_must_hold_is_said_before_anything_is_made(rtx: Recorder, tmp_path: Path) -> None:
    class Stopping(SilentObserver):
        def note(self, text: str) -> None:
            raise KeyboardInterrupt(text)

    request = BuildRequest(Path("small"), tmp_path / "e", ("tensorrt-rtx",), "fp32")
    with pytest.raises(KeyboardInterrupt, match=r"a GPU must hold 0\.0 GiB of them at once .* --vram-limit"):
        build(request, small_checkpoint(), Stopping())
    assert not (tmp_path / "e").exists()


def test_steps_are_recorded_on_a_gpu(rtx: Recorder, tmp_path: Path) -> None:
    for device, recorded in (("cuda", True), ("cpu", False)):
        folder: Any = None  # nothing is opened before it is run
        executor = BACKENDS["tensorrt-rtx"].open(folder, torch.device(device), DEFAULT_EXECUTION)
        assert executor.cuda_graphs is recorded
        assert executor.follows_stream


def test_auto_waits_for_verify(rtx: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` chooses torch until a record says that these plans have passed on this card. A record of another card or
    plan does not count."""
    folder = tmp_path / "e"
    make(folder, ("tensorrt-rtx", "torch"))
    obstacle = lambda: BACKENDS["tensorrt-rtx"].auto_obstacle(folder, read_manifest(folder))  # noqa: E731
    assert obstacle().startswith("tensorrt-rtx waits until its plans have passed on this card: scail2-rt verify /")
    with open_engines(folder, device="cpu") as engines:
        assert engines.backend == "torch"
        assert " and tensorrt-rtx waits until its plans have passed" in engines.reason
    BACKENDS["tensorrt-rtx"].remember(folder, read_manifest(folder), True)
    with open_engines(folder, device="cpu") as engines:
        assert engines.backend == "tensorrt-rtx"
    other = GpuFacts("NVIDIA GeForce RTX 4080", (8, 9), 1)
    for module in (backend, preflight, trust):
        monkeypatch.setattr(module, "find_gpu", lambda: other)
    assert "waits until" in str(obstacle())
    hopper = GpuFacts("NVIDIA H200", (9, 0), 1)
    for module in (backend, preflight, trust):
        monkeypatch.setattr(module, "find_gpu", lambda: hopper)
    assert "tensorrt-rtx cannot run here (TensorRT for RTX does not run on NVIDIA H200" in str(obstacle())


def test_a_failed_verify_takes_the_record_away(rtx: Recorder, tmp_path: Path) -> None:
    folder = tmp_path / "e"
    make(folder, ("tensorrt-rtx",))
    maker = BACKENDS["tensorrt-rtx"]
    maker.remember(folder, read_manifest(folder), True)
    assert maker.auto_obstacle(folder, read_manifest(folder)) is None
    maker.remember(folder, read_manifest(folder), False)
    assert maker.auto_obstacle(folder, read_manifest(folder)) is not None
    (folder / trust.VERIFIED).write_text("damaged")
    assert maker.auto_obstacle(folder, read_manifest(folder)) is not None
    maker.remember(folder, read_manifest(folder), True)
    make(folder, ("tensorrt-rtx",), plan_options=PlanOptions(targets=("sm89", "sm120")))
    assert read_manifest(folder).executors[0].targets == ("sm89", "sm120")
    assert maker.auto_obstacle(folder, read_manifest(folder)) is not None, "other plans"


@pytest.mark.parametrize(
    ("targets", "precision", "text"),
    [
        (
            ("sm90",),
            "fp32",
            r"--target sm90 cannot be built: TensorRT for RTX builds for sm75, sm80.*--backend torch\.$",
        ),
        (
            ("sm86", "sm89"),
            "fp8",
            r"needs an architecture among sm89, sm120, sm121, which sm86 is not\. .*fp32 or bf16 or fp16\.$",
        ),
        (("sm75",), "bf16", r"among sm80, .* which sm75 is not\. Use --precision fp32\.$"),
    ],
)
def test_targets_that_cannot_be(
    rtx: Recorder, tmp_path: Path, targets: tuple[str, ...], precision: str, text: str
) -> None:
    request = BuildRequest(
        Path("small"), tmp_path / "e", ("tensorrt-rtx",), precision, plan_options=PlanOptions(targets=targets)
    )
    with pytest.raises(InputError, match=text):
        build(request, small_checkpoint())
    assert not (tmp_path / "e").exists()


def test_the_command_that_replaces_a_folder_keeps_the_options_of_plans(rtx: Recorder, tmp_path: Path) -> None:
    chosen = plan_options((512, 512), 4.0, "sm120, sm89")
    make(tmp_path / "e", ("tensorrt-rtx",), plan_options=chosen)
    words = r"--backend tensorrt-rtx --target sm120,sm89 --max-picture 512x512 --workspace-gib 4 --rebuild$"
    with pytest.raises(InputError, match=words):
        make(tmp_path / "e", ("tensorrt-rtx",), seed=1, plan_options=chosen)


def test_some_stages_for_another_card(rtx: Recorder, tmp_path: Path) -> None:
    make(tmp_path / "e", ("tensorrt-rtx",), plan_options=PlanOptions(targets=("sm89",)))
    rtx.built.clear()
    with pytest.raises(InputError, match=r"--target sm120 would leave plans for different cards in .* has sm89\. "):
        make(tmp_path / "e", ("tensorrt-rtx",), plan_options=PlanOptions(targets=("sm120",)), stages=("dit.head",))
    assert rtx.built == []
    make(tmp_path / "e", ("tensorrt-rtx",), plan_options=PlanOptions(targets=("sm120",)))
    assert rtx.built


@pytest.mark.parametrize("damage", ["missing", "cut short"])
def test_a_plan_that_is_not_whole_is_built_alone(recorder: Recorder, tmp_path: Path, damage: str) -> None:
    make(tmp_path / "e")
    file = tmp_path / "e/stages/dit.head.plan"
    whole = file.read_bytes()
    file.unlink() if damage == "missing" else file.write_bytes(whole[:9])
    with pytest.raises(InputError, match=r"dit\.head\.plan: .*Repair only this with: .* --backend tensorrt$"):
        open_engines(tmp_path / "e", "tensorrt", device="cpu")
    recorder.built.clear()
    assert make(tmp_path / "e").repaired == ("dit.head",)
    assert [path.name for path in recorder.built] == ["dit.head.trt.onnx"]
    assert file.read_bytes() == whole
    assert make(tmp_path / "e").up_to_date


def test_a_target_without_a_card() -> None:
    with pytest.raises(InputError, match="--target names no card"):
        plan_options(None, None, " ,")


def test_a_target_is_for_one_library_alone(recorder: Recorder, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="backend tensorrt builds for the GPU of this machine only"):
        make(tmp_path / "e", plan_options=PlanOptions(targets=("sm89",)))


def test_default_targets(rtx: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default target is this machine's card; without one, or with an unknown one, all that support the
    precision."""
    for name, gpu, wanted in (
        ("a", None, TENSORRT_RTX.targets[1:]),
        ("b", GpuFacts("NVIDIA H200", (9, 0), 1), TENSORRT_RTX.targets[1:]),
        ("c", GpuFacts("RTX 5090", (12, 0), 1), ("sm120",)),
    ):
        for module in (backend, builder, preflight, trust):
            monkeypatch.setattr(module, "find_gpu", lambda gpu=gpu: gpu)
        build(BuildRequest(Path("small"), tmp_path / name, ("tensorrt-rtx",), "fp16"), small_checkpoint())
        assert read_manifest(tmp_path / name).executors[0].targets == wanted
