"""Stages run as documented, through the genuine interfaces of both libraries; ONNX Runtime does the arithmetic."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from scail2_rt.engines.backend import ArtefactPlan
from scail2_rt.engines.folder.manifest import KERNELS, ExecutorRecord
from scail2_rt.engines.folder.store import STORE_NAME, StoreReader
from scail2_rt.engines.observer import SilentObserver
from scail2_rt.engines.row_chunks import RowChunks
from scail2_rt.engines.tensorrt_backend import preflight
from scail2_rt.engines.tensorrt_backend.builder import build_plans
from scail2_rt.engines.tensorrt_backend.engine import MAX_CONTEXTS, TensorRTEngine
from scail2_rt.engines.tensorrt_backend.library import TENSORRT, TENSORRT_RTX
from scail2_rt.engines.tensorrt_backend.plans import plan_path
from scail2_rt.engines.tensorrt_backend.preflight import GpuFacts, check_place
from scail2_rt.engines.tensorrt_backend.rtx import CACHE
from scail2_rt.engines.tensorrt_backend.session import ALIGNMENT, CudaDevice, SharedScratch, TensorRTSession
from scail2_rt.engines.torch_backend.engine import TorchEngine
from scail2_rt.export.models.precision import FP32
from scail2_rt.kernels.errors import InputError, Scail2Error
from tests.support.onnx_case import example_inputs
from tests.support.tensorrt_api.bindings import ALL, RTX, VERSIONS
from tests.support.tensorrt_api.installed import CONFIG, installed, make_folder, small_stages
from tests.support.tensorrt_api.recorder import FakeDevice, Recorder

STAGES = small_stages()
REMEDY = "scail2-rt build-engines somewhere --rebuild"


@pytest.fixture(params=ALL)
def recorder(request: pytest.FixtureRequest) -> Iterator[Recorder]:
    with installed(request.param) as recorder:
        yield recorder


@pytest.fixture
def folder(recorder: Recorder, tmp_path: Path) -> Path:
    layout = make_folder(tmp_path / "e", STAGES, FP32)
    build_plans(ArtefactPlan(tmp_path / "e", CONFIG, "fp32", STAGES, {}, layout), SilentObserver(), recorder.library)
    recorder.calls.clear()
    return tmp_path / "e" / "stages"


@pytest.fixture
def session(recorder: Recorder, tmp_path: Path) -> Iterator[TensorRTSession]:
    session = TensorRTSession(recorder.library, recorder.device, tmp_path / "e")
    yield session
    session.close()


def engine(folder: Path, session: TensorRTSession, name: str) -> TensorRTEngine:
    return TensorRTEngine(STAGES[name], FP32, plan_path(folder, name, session.library), session, REMEDY)


def inputs(name: str, seed: int = 1, **sizes: int) -> list[Tensor]:
    return example_inputs(STAGES[name], FP32, sizes, seed)


def assert_same(folder: Path, name: str, given: list[Tensor], actual: tuple[Tensor, ...]) -> None:
    expected = TorchEngine(STAGES[name], FP32, StoreReader(folder / STORE_NAME), torch.device("cpu"))(*given)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("dit.head", [{"rows": 5}, {"rows": 16384}, {"rows": 1}]),
        ("dit.context", [{"t": 512, "i": 5}]),
        ("umt5.final", [{"n": 3}, {"n": 512}]),
        ("vae.picture", [{"h": 8, "w": 16}, {"h": 160, "w": 88}, {"h": 2, "w": 2}]),
    ],
)
def test_agrees_with_torch(folder: Path, session: TensorRTSession, name: str, sizes: list[dict[str, int]]) -> None:
    run = engine(folder, session, name)
    for values in [*sizes, *sizes]:
        given = inputs(name, seed=len(values), **values)
        assert_same(folder, name, given, run(*given))
    run.close()


def test_results_are_the_callers(folder: Path, session: TensorRTSession) -> None:
    """A later call does not overwrite them; feeding them back does not alias input and output."""
    run = engine(folder, session, "umt5.final")
    (x,) = inputs("umt5.final", n=4)
    (first,) = run(x)
    copy = first.clone()
    (second,) = run(first)
    assert torch.equal(first, copy)
    assert_same(folder, "umt5.final", [first], (second,))


def test_set_up_once_for_a_shape(folder: Path, session: TensorRTSession, recorder: Recorder) -> None:
    run = engine(folder, session, "dit.head")
    given = [recorder.device.empty(t.shape, t.dtype).copy_(t) for t in inputs("dit.head", rows=6)]
    run(*given)
    recorder.calls.clear()
    run(*given)
    names = [name for _, name in recorder.calls]
    assert names.count("execute_async_v3") == 1
    assert set(names) <= {"execute_async_v3", "set_tensor_address"}
    assert names.count("set_tensor_address") <= 1, "only the output can have moved"


def test_the_portrait_profile_is_chosen(folder: Path, session: TensorRTSession, recorder: Recorder) -> None:
    run = engine(folder, session, "vae.picture")
    run(*inputs("vae.picture", h=88, w=160))
    assert ("IExecutionContext", "set_optimization_profile_async") not in recorder.calls
    run(*inputs("vae.picture", h=160, w=88))
    assert ("IExecutionContext", "set_optimization_profile_async") in recorder.calls


def test_too_large_is_refused_with_the_option(folder: Path, session: TensorRTSession) -> None:
    with pytest.raises(InputError) as caught:
        engine(folder, session, "vae.picture")(*inputs("vae.picture", h=160, w=90))
    text = str(caught.value)
    assert "704x1280 and 1280x704 pixels, and this one has 1280x720" in text
    assert text.endswith(f"with: {REMEDY} --max-picture 720x1280")
    with pytest.raises(InputError, match=r"at most rows = 16384, not for rows = 16385. Lower --max-rows"):
        engine(folder, session, "dit.head")(*inputs("dit.head", rows=16385))


def test_memory_that_is_not_readable_is_copied(folder: Path, session: TensorRTSession) -> None:
    (x,) = inputs("umt5.final", n=7)
    for odd in (x.T.contiguous().T, x[1:], x[:, :24].to(torch.float64)):
        assert_same(folder, "umt5.final", [odd.float()], engine(folder, session, "umt5.final")(odd))


def test_row_chunks(folder: Path, session: TensorRTSession) -> None:
    run = engine(folder, session, "dit.head")
    given = inputs("dit.head", rows=50)
    assert_same(folder, "dit.head", given, RowChunks(16).run(run, "dit.head", (run.inputs, run.outputs), given))


def test_a_graph_is_recorded_only_after_a_call(folder: Path, session: TensorRTSession, recorder: Recorder) -> None:
    run = engine(folder, session, "dit.head")
    given = inputs("dit.head", rows=6)
    recorder.device.recording = True
    with pytest.raises(Scail2Error, match=r"captured in a CUDA graph at the shapes \[\[6, 32\], \[2, 32\]\] before"):
        run(*given)
    recorder.device.recording = False
    run(*given)
    recorder.device.recording = True
    assert_same(folder, "dit.head", given, run(*given))
    recorder.device.recording = False
    run(*inputs("dit.head", rows=9))  # another shape has another context
    recorder.device.recording = True
    assert_same(folder, "dit.head", given, run(*given))
    recorder.device.recording = False


def test_scratch_grows_and_contexts_follow(folder: Path, session: TensorRTSession, recorder: Recorder) -> None:
    small = engine(folder, session, "dit.head")
    given = inputs("dit.head", rows=6)
    small(*given)
    recorder.device.recording = True
    small(*given)
    recorder.device.recording = False
    before = session.scratch.pointer
    plan = plan_path(folder, "umt5.final", session.library)
    plan.write_text(plan.read_text().replace('"scratch": 1000', '"scratch": 500000'))
    engine(folder, session, "umt5.final")(*inputs("umt5.final", n=2))
    assert session.scratch.pointer != before, "what a graph has recorded must stay"
    assert session.scratch.size >= 500000
    recorder.device.recording = True
    with pytest.raises(Scail2Error, match="Run it once"):
        small(*given)
    recorder.device.recording = False
    assert_same(folder, "dit.head", given, small(*given))


def test_scratch_is_aligned_and_only_grows() -> None:
    scratch = SharedScratch(FakeDevice())
    assert scratch.pointer == 0
    for size in (1, 1000, 10):
        scratch.reserve(size)
        assert scratch.pointer % ALIGNMENT == 0
    assert scratch.size == 1024
    scratch.close()
    assert (scratch.pointer, scratch.size) == (0, 0)


def test_few_contexts_are_kept(folder: Path, session: TensorRTSession, recorder: Recorder) -> None:
    run = engine(folder, session, "dit.head")
    for rows in (1, 2, 3, 4, 5, 6, 1):
        run(*inputs("dit.head", rows=rows))
    assert len(run._contexts) == MAX_CONTEXTS
    assert recorder.calls.count(("ICudaEngine", "create_execution_context")) == 7


def test_faults_are_told_with_the_stage(folder: Path, session: TensorRTSession, recorder: Recorder) -> None:
    run = engine(folder, session, "dit.head")
    recorder.settings.execute_error = "Cask failure in\nkernel"
    with pytest.raises(Scail2Error, match=r"in the stage dit\.head, which could not be run\. .*Cask failure in kernel"):
        run(*inputs("dit.head", rows=2))
    recorder.settings.execute_error = None
    recorder.settings.no_context = True
    with pytest.raises(Scail2Error, match="gave no execution context"):
        run(*inputs("dit.head", rows=3))
    run.close()
    with pytest.raises(Scail2Error, match=r"dit\.head was closed"):
        run(*inputs("dit.head", rows=2))
    with pytest.raises(Scail2Error, match="takes 2 inputs and was given 1"):
        run(torch.zeros(1, 48))


def test_plans_that_do_not_fit(folder: Path, session: TensorRTSession, recorder: Recorder) -> None:
    with pytest.raises(InputError, match=r"is not of the stage dit\.head of this version: its tensors .* differ"):
        TensorRTEngine(STAGES["dit.head"], FP32, plan_path(folder, "umt5.final", session.library), session, REMEDY)
    plan = plan_path(folder, "dit.head", session.library)
    plan.write_text(plan.read_text().replace(recorder.surface.version, "9.3.0"))
    with pytest.raises(InputError, match=rf"is not compatible with this version\. Build it again with: {REMEDY}"):
        engine(folder, session, "dit.head")
    plan.unlink()
    with pytest.raises(InputError, match=rf"plan of stage dit\.head cannot be read: .*{REMEDY}"):
        engine(folder, session, "dit.head")
    plan.write_bytes(b"")
    with pytest.raises(InputError, match=r"cannot be read: cannot mmap an empty file"):
        engine(folder, session, "dit.head")
    session.close()
    with pytest.raises(Scail2Error, match="after its TensorRT session was closed"):
        engine(folder, session, "dit.head")


@pytest.mark.parametrize("recorder", VERSIONS, indirect=True)
def test_another_place_is_refused_by_field(recorder: Recorder) -> None:
    here = {"tensorrt": recorder.surface.version}
    check_place(TENSORRT, ExecutorRecord("tensorrt", here, "NVIDIA H200 (sm90)"), REMEDY)
    for versions, gpu, text in (
        ({"tensorrt": "10.14.0"}, "NVIDIA H200 (sm90)", r"versions\.tensorrt: the plans were built with 10\.14\.0"),
        (here, "NVIDIA B200 (sm100)", r"tensorrt\.gpu: .* NVIDIA B200 \(sm100\), and this machine has NVIDIA H200"),
    ):
        with pytest.raises(InputError, match=rf"{text}.*{REMEDY}"):
            check_place(TENSORRT, ExecutorRecord("tensorrt", versions, gpu), REMEDY)


@pytest.mark.parametrize("recorder", [RTX], indirect=True)
def test_other_cards_are_told_what_to_do(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"tensorrt-rtx": recorder.surface.version}
    record = ExecutorRecord("tensorrt-rtx", versions, None, ("sm89",))
    check_place(TENSORRT_RTX, record, REMEDY)
    with pytest.raises(InputError, match=rf"versions\.tensorrt-rtx: the plans were built with 1\.0.*{REMEDY}"):
        check_place(TENSORRT_RTX, replace(record, versions={"tensorrt-rtx": "1.0"}), REMEDY)
    for gpu, text in (
        (None, r"runs on an NVIDIA GPU, and PyTorch finds none .* --backend torch"),
        (GpuFacts("NVIDIA H200", (9, 0), 1), r"does not run on NVIDIA H200 \(sm90\): .*Hopper.* Use --backend torch"),
        (
            GpuFacts("NVIDIA B200", (10, 0), 1),
            r"does not run on NVIDIA B200 \(sm100\): .*data-centre Hopper or Blackwell",
        ),
        (
            GpuFacts("RTX 5090", (12, 0), 1),
            rf"targets: .*for sm89, and this is RTX 5090.*{REMEDY} --target sm89,sm120$",
        ),
    ):
        monkeypatch.setattr(preflight, "find_gpu", lambda gpu=gpu: gpu)
        with pytest.raises(InputError, match=text):
            check_place(TENSORRT_RTX, record, REMEDY)


@pytest.mark.parametrize("recorder", [RTX], indirect=True)
def test_kernels_are_kept_in_the_folder(folder: Path, recorder: Recorder) -> None:
    """Compiled once for all contexts of a session, and read by the next one; those of another card are dropped."""
    given = inputs("dit.head", rows=3)
    for read in ([], [["dit.head.trt.onnx"]], [["dit.head.trt.onnx"]]):
        recorder.loaded_kernels.clear()
        session = TensorRTSession(recorder.library, recorder.device, folder.parent)
        run = engine(folder, session, "dit.head")
        assert_same(folder, "dit.head", given, run(*given))
        run(*inputs("dit.head", rows=4))
        run.close()
        session.close()
        assert recorder.loaded_kernels == read
        assert json.loads((folder.parent / KERNELS / CACHE).read_bytes()) == ["dit.head.trt.onnx"]
    recorder.settings.foreign_cache = True
    session = TensorRTSession(recorder.library, recorder.device, folder.parent)
    assert_same(folder, "dit.head", given, engine(folder, session, "dit.head")(*given))
    session.close()


def test_no_runtime_without_a_gpu(recorder: Recorder) -> None:
    recorder.settings.no_gpu = True
    with pytest.raises(Scail2Error, match=r"the runtime of TensorRT.* cannot start on this machine"):
        TensorRTSession(recorder.library, FakeDevice(), Path())
    with pytest.raises(InputError, match="the device cpu was named"):
        CudaDevice(torch.device("cpu"))


def test_the_inspectors_report_reaches_the_caller(folder: Path, session: TensorRTSession) -> None:
    run = engine(folder, session, "dit.head")
    assert [layer["Name"] for layer in json.loads(run.plan_report())["Layers"]] == ["x", "mod", "out"]
    run.close()
    with pytest.raises(Scail2Error, match="closed"):
        run.plan_report()
