"""Plans are built as documented, checked against the genuine interface of two TensorRT versions; and build errors."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from scail2_rt.engines.backend import ArtefactPlan
from scail2_rt.engines.folder.store import STORE_NAME, StoreLayout
from scail2_rt.engines.observer import BuildStep, SilentObserver
from scail2_rt.engines.tensorrt_backend import preflight
from scail2_rt.engines.tensorrt_backend.builder import PlansReport, build_plans, chosen_stages
from scail2_rt.engines.tensorrt_backend.library import TENSORRT, TENSORRT_RTX, Library, MessageLog, require_library
from scail2_rt.engines.tensorrt_backend.plans import ledger_path, log_path, plan_path, timings_path
from scail2_rt.engines.tensorrt_backend.preflight import (
    GpuFacts,
    check_machine,
    check_resources,
    environment,
    host_memory,
    resident_bytes,
)
from scail2_rt.engines.tensorrt_backend.profiles import PlanOptions
from scail2_rt.engines.tensorrt_backend.times import PlanTimes
from scail2_rt.export.models.precision import FP32
from scail2_rt.kernels.errors import InputError, Scail2Error
from tests.support.tensorrt_api.bindings import ALL, VERSIONS
from tests.support.tensorrt_api.installed import CONFIG, installed, make_folder, small_stages
from tests.support.tensorrt_api.recorder import Recorder


@pytest.fixture(params=ALL)
def recorder(request: pytest.FixtureRequest) -> Iterator[Recorder]:
    with installed(request.param) as recorder:
        yield recorder


class Watching(SilentObserver):
    def __init__(self) -> None:
        self.steps: list[BuildStep] = []

    def done(self, step: BuildStep) -> None:
        self.steps.append(step)


def build(
    recorder: Recorder, folder: Path, layout: StoreLayout, observer: SilentObserver | None = None, **chosen: object
) -> PlansReport:
    stages = small_stages()
    sizes = dict.fromkeys(stages, 1000)
    plan = ArtefactPlan(folder, CONFIG, "fp32", stages, sizes, layout, **chosen)  # type: ignore[arg-type]
    return build_plans(plan, observer or SilentObserver(), recorder.library)


def test_every_stage_is_built_once(recorder: Recorder, tmp_path: Path) -> None:
    layout = make_folder(tmp_path / "e", small_stages(), FP32)
    watching = Watching()
    report = build(recorder, tmp_path / "e", layout, watching)
    assert report.built == tuple(small_stages())
    assert report.kept == ()
    assert [path.name for path in recorder.built] == [f"{name}.trt.onnx" for name in small_stages()]
    steps = [(step.phase, step.name, step.index, step.total) for step in watching.steps]
    numbered = list(enumerate(small_stages(), 1))
    assert steps == [(phase, name, i, 4) for phase in ("graph", recorder.library.name) for i, name in numbered]
    assert watching.steps[-2].remaining_s is not None
    names, timings = [path.name for path in recorder.built], timings_path(tmp_path / "e/stages", recorder.library)
    if recorder.library.timing_cache:
        assert recorder.loaded_timings == [names[:i] for i in range(4)], "a build lacked what others had measured"
        assert json.loads(timings.read_bytes()) == names
    assert timings.exists() == recorder.library.timing_cache
    assert not list((tmp_path / "e").rglob("*.partial"))
    logs = log_path(tmp_path / "e", "dit.head", recorder.library).parent
    assert {path.name for path in logs.iterdir()} == {f"{name}.log" for name in small_stages()}


def test_only_what_changed_is_built_again(recorder: Recorder, tmp_path: Path) -> None:
    layout = make_folder(tmp_path / "e", small_stages(), FP32)
    build(recorder, tmp_path / "e", layout)
    assert build(recorder, tmp_path / "e", layout).kept == tuple(small_stages())
    place = layout.location("dit.head.linear.weight")
    with (tmp_path / "e/stages" / STORE_NAME).open("r+b") as file:
        file.seek(place.offset)
        file.write(b"\x01")
    assert build(recorder, tmp_path / "e", layout).built == ("dit.head",)
    assert build(recorder, tmp_path / "e", layout, options=PlanOptions(max_picture=(1024, 1792))).built == (
        "vae.picture",
    )
    plan_path(tmp_path / "e/stages", "umt5.final", recorder.library).write_bytes(b"cut short")
    assert build(recorder, tmp_path / "e", layout).built == ("umt5.final",)
    ledger_path(tmp_path / "e/stages", recorder.library).write_text("damaged")
    assert build(recorder, tmp_path / "e", layout, patterns=("dit.*",)).built == ("dit.head", "dit.context")
    if not recorder.library.compiles_here:
        chosen = PlanOptions(targets=("sm120",))
        assert build(recorder, tmp_path / "e", layout, options=chosen).built == tuple(small_stages())
        return
    other = GpuFacts("NVIDIA B200", (10, 0), 1 << 40)
    with mock.patch.object(preflight, "find_gpu", return_value=other):
        assert build(recorder, tmp_path / "e", layout, patterns=("dit.*",)).built == ("dit.head", "dit.context")


def test_every_parser_error_is_told(recorder: Recorder, tmp_path: Path) -> None:
    layout = make_folder(tmp_path / "e", small_stages(), FP32)
    recorder.settings.parser_errors = ["Resize does not take BF16", "no such plugin"]
    with pytest.raises(Scail2Error) as caught:
        build(recorder, tmp_path / "e", layout)
    text = str(caught.value)
    assert "dit.head" in text
    assert str(tmp_path / "e/stages/dit.head.trt.onnx") in text
    assert (
        "UNSUPPORTED_NODE: Resize does not take BF16 at node 7 (Resize 'node_7'); UNSUPPORTED_NODE: no such plugin"
        in text
    )
    assert caught.value.exit_code == 1


def test_a_stage_that_cannot_be_built(recorder: Recorder, tmp_path: Path) -> None:
    layout = make_folder(tmp_path / "e", small_stages(), FP32)
    build(recorder, tmp_path / "e", layout, patterns=("dit.head",))
    recorder.settings.build_error = "Error Code 10: Could not find\nany implementation for node gemm"
    with pytest.raises(Scail2Error) as caught:
        build(recorder, tmp_path / "e", layout)
    assert "stage dit.context cannot be built from" in str(caught.value)
    assert "dit.context.trt.onnx" in str(caught.value)
    assert "umt5.final, vae.picture could not be built either." in str(caught.value), "the others were not tried"
    assert "Could not find any implementation for node gemm" in str(caught.value)
    assert "any implementation for node gemm" in log_path(tmp_path / "e", "dit.context", recorder.library).read_text()
    assert not plan_path(tmp_path / "e/stages", "dit.context", recorder.library).exists()
    recorder.settings.build_error = None
    assert "dit.head" in build(recorder, tmp_path / "e", layout).kept


@pytest.mark.parametrize(
    ("setting", "text"), [("no_gpu", "could not start"), ("refuse_profile", "rejects its profile")]
)
def test_other_refusals(recorder: Recorder, tmp_path: Path, setting: str, text: str) -> None:
    layout = make_folder(tmp_path / "e", small_stages(), FP32)
    setattr(recorder.settings, setting, True)
    with pytest.raises(Scail2Error, match=text):
        build(recorder, tmp_path / "e", layout)


@pytest.mark.parametrize("recorder", VERSIONS, indirect=True)
def test_timings_of_another_gpu_are_dropped(recorder: Recorder, tmp_path: Path) -> None:
    layout = make_folder(tmp_path / "e", small_stages(), FP32)
    timings = timings_path(tmp_path / "e/stages", TENSORRT)
    timings.write_text('["measured elsewhere"]')
    recorder.settings.foreign_timings = True
    build(recorder, tmp_path / "e", layout, patterns=("dit.head",))
    assert recorder.loaded_timings == [[]]
    assert json.loads(timings.read_text()) == ["dit.head.trt.onnx"]


def test_what_an_observer_raises_arrives_and_keeps_what_is_done(recorder: Recorder, tmp_path: Path) -> None:
    layout = make_folder(tmp_path / "e", small_stages(), FP32)

    class Stopping(SilentObserver):
        def done(self, step: BuildStep) -> None:
            if step.phase == recorder.library.name:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(recorder, tmp_path / "e", layout, Stopping(), patterns=("dit.*",))
    assert "dit.head" in build(recorder, tmp_path / "e", layout).kept


def test_options_are_kept_for_calls_without_any(recorder: Recorder, tmp_path: Path) -> None:
    """A repair must make a plan for the same target as before."""
    layout = make_folder(tmp_path / "e", small_stages(), FP32)
    build(recorder, tmp_path / "e", layout, options=PlanOptions(max_picture=(1024, 1792)))
    plan_path(tmp_path / "e/stages", "vae.picture", recorder.library).unlink()
    assert build(recorder, tmp_path / "e", layout).built == ("vae.picture",)
    assert build(recorder, tmp_path / "e", layout, options=PlanOptions()).built == ("vae.picture",)


def test_stage_patterns() -> None:
    names = ("dit.head", "dit.blocks.0.ffn", "dit.blocks.1.ffn")
    assert chosen_stages(names, ()) == names
    assert chosen_stages(names, ["*.ffn", "dit.blocks.0*"]) == names[1:]
    with pytest.raises(InputError, match=r"--stages clip matches no stage"):
        chosen_stages(names, ["*.ffn", "clip"])


@pytest.mark.parametrize("recorder", VERSIONS, indirect=True)
def test_machines_that_cannot_build(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    check_machine(TENSORRT, "fp8")
    here = environment(TENSORRT, ())
    assert (here.version, here.place) == (recorder.surface.version, "NVIDIA H200 (sm90)")
    for gpu, precision, text in (
        (None, "bf16", "finds no CUDA GPU"),
        (GpuFacts("Tesla T4", (7, 5), 1 << 34), "fp16", r"8\.0 or newer, and this is Tesla T4 \(sm75\)"),
        (GpuFacts("NVIDIA A100", (8, 0), 1 << 36), "fp8", r"fp8 needs .* use --precision bf16"),
    ):
        monkeypatch.setattr(preflight, "find_gpu", lambda gpu=gpu: gpu)
        with pytest.raises(InputError, match=text):
            check_machine(TENSORRT, precision)  # type: ignore[arg-type]
    monkeypatch.setattr(recorder.module, "__version__", "10.9.0.34")
    with pytest.raises(
        InputError, match=r"needs TensorRT 10\.13 or newer, and 10\.9\.0\.34 is installed. Update it with"
    ):
        require_library(TENSORRT)


@pytest.mark.parametrize("library", [TENSORRT, TENSORRT_RTX], ids=lambda library: library.name)
def test_without_the_library(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library.module, None)
    with pytest.raises(InputError, match=rf"cannot be loaded here .*pip install \"scail2-rt\[{library.name}\]\""):
        require_library(library)


def test_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "find_gpu", lambda: GpuFacts("NVIDIA H200", (9, 0), 1 << 32))
    monkeypatch.setattr(preflight, "host_memory", lambda: 1 << 33)
    check_resources(TENSORRT, {}, tmp_path)
    check_resources(TENSORRT, {"clip": 1 << 29, "dit.head": 1}, tmp_path / "not" / "there")
    for size, text in (
        (1 << 60, "on the disk of"),
        (3 << 30, r"building the stage clip \(3\.00 GiB of weights\) needs 12\.25 GiB of host memory, and 8\.00 GiB"),
        (int(1.8 * 2**30), r"needs 4\.60 GiB of GPU memory, and 4\.00 GiB are free"),
    ):
        with (
            mock.patch("shutil.disk_usage", return_value=mock.Mock(free=1 << 40)),
            pytest.raises(InputError, match=text),
        ):
            check_resources(TENSORRT, {"clip": size, "dit.head": 1}, tmp_path)


def test_host_memory_knows_containers(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    assert host_memory(tmp_path) > 0
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    assert host_memory(tmp_path) == 8000 << 10
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert host_memory(tmp_path) == 8000 << 10
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("5000000\n")
    (tmp_path / "sys/fs/cgroup/memory.current").write_text("4000000\n")
    assert host_memory(tmp_path) == 1000000
    (tmp_path / "sys/fs/cgroup/memory.stat").write_text("anon 5\ninactive_file 200000\nactive_file 100000\n")
    assert host_memory(tmp_path) == 1300000


def test_time_left_follows_the_families() -> None:
    blocks = {f"dit.blocks.{i}.{name}": name for i in range(40) for name in ("qkv", "ffn")}
    times = PlanTimes({**blocks, "clip": "clip"}, dict.fromkeys([*blocks, "clip"], 1 << 26))
    with mock.patch("time.monotonic", side_effect=[100.0, 101.0, 103.0]):
        times.start()
        times.add("dit.blocks.0.qkv", 1.0)
        times.add("dit.blocks.0.ffn", 3.0)
    left = list(blocks)[2:]
    assert times.remaining_s(left) == pytest.approx(39 * 4.0 * 3 / 4), "4 s of work in 3 s"
    guess = times.remaining_s([*left, "clip"]) - 39 * 4.0 * 3 / 4
    assert 0.5 < guess < 5.0, "what is not known yet is guessed from the others"
    with mock.patch("time.monotonic", side_effect=[104.0 + i for i in range(8)]):
        for i in range(7):
            times.add(f"dit.blocks.{i + 1}.qkv", 1.0)
        times.add("clip", 100.0)
    assert times.remaining_s(["dit.blocks.9.qkv"]) == pytest.approx(8 / 15), (
        "a long stage counts where it lies in the window"
    )


def test_weights_that_must_be_there_at_once() -> None:
    sizes = {"umt5.layers.0": 3, "clip": 4, "vae.decode_step": 5, "dit.context": 6, "dit.blocks.0.context_kv": 7}
    assert resident_bytes({**sizes, "dit.blocks.0.qkv": 8, "dit.head": 9}) == {
        "text": 3,
        "image": 4,
        "VAE": 5,
        "context": 13,
        "denoising": 17,
    }


def test_messages(tmp_path: Path) -> None:
    log = MessageLog()
    log.add("WARNING", "a warning")
    assert log.recent() == ["a warning"]
    with log.writing_to(tmp_path / "logs" / "stage.log"):
        assert log.recent() == []
        for severity, text in (
            ("VERBOSE", "noise"),
            ("INFO", "so far"),
            ("VERBOSE", "Layers:\nName: a"),
            ("WARNING", "w"),
            ("INTERNAL_ERROR", "a\n b"),
        ):
            log.add(severity, text)
        log.add("ERROR", "a b")
    assert log.recent() == ["a b"]
    log.add("ERROR", "later")
    assert (
        tmp_path / "logs/stage.log"
    ).read_text() == "[INFO] so far\n[VERBOSE] Layers:\nName: a\n[WARNING] w\n[INTERNAL_ERROR] a\n b\n[ERROR] a b\n"
    assert os.listdir(tmp_path / "logs") == ["stage.log"]
