"""Plans built for real, by the genuine library of TensorRT for RTX, which needs no GPU to compile; and its refusals."""

import os
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from scail2_rt.benchmarks.sprites.shipped import CHECKPOINT
from scail2_rt.engines.folder.manifest import read_manifest
from scail2_rt.engines.tensorrt_backend.children import Child
from scail2_rt.engines.tensorrt_backend.compiling import Outcome, PlanJob
from scail2_rt.engines.tensorrt_backend.library import TENSORRT_RTX
from scail2_rt.engines.tensorrt_backend.plans import plan_path
from tests.support.command import SCAIL2_RT, error_of, sabotage, unmeasured

pytestmark = pytest.mark.skipif(not TENSORRT_RTX.installed, reason="TensorRT for RTX has wheels for Linux x86-64 only")

BUILD = ("--backend", "tensorrt-rtx", "--target", "sm89,sm120")


def scail2(*arguments: object, env: dict[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    command = [str(SCAIL2_RT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every stage of the tiny checkpoint in fp8, built by the installed command."""
    folder = tmp_path_factory.mktemp("rtx") / "e"
    done = scail2("build-engines", tiny_checkpoint, "-o", folder, "--precision", "fp8", *BUILD)
    assert done.returncode == 0, done.stderr
    assert "plans for sm89, sm120" in done.stderr
    assert "a GPU must hold" in done.stderr
    return folder


def whole(folder: Path) -> None:
    """Every stage has its plan, and the manifest says for which cards and version."""
    manifest = read_manifest(folder)
    (record,) = manifest.executors
    assert (record.backend, record.gpu, record.targets) == ("tensorrt-rtx", None, ("sm89", "sm120"))
    assert record.versions == {"tensorrt-rtx": TENSORRT_RTX.api().__version__}
    for stage in manifest.stages:
        assert plan_path(folder / "stages", stage.name, TENSORRT_RTX).stat().st_size > 10_000
    assert not list(folder.rglob("*.partial"))


@pytest.mark.slow
def test_every_stage_of_the_tiny_checkpoint_in_fp8(tiny: Path) -> None:
    whole(tiny)


@pytest.mark.slow
def test_every_stage_of_the_sprite_checkpoint_in_bf16(tmp_path: Path) -> None:
    done = scail2("build-engines", CHECKPOINT, "-o", tmp_path / "e", "--precision", "bf16", *BUILD)
    assert done.returncode == 0, done.stderr
    whole(tmp_path / "e")
    shutil.rmtree(tmp_path / "e")  # pytest would keep it


# A build that goes wrong, through the installed command


def test_what_a_target_cannot_do_is_refused_before_anything_is_built(tiny_checkpoint: Path, tmp_path: Path) -> None:
    where = ("build-engines", tiny_checkpoint, "-o", tmp_path / "e", "--backend", "tensorrt-rtx")
    message = error_of(scail2(*where, "--precision", "fp8", "--target", "sm86,sm89"))
    assert "precision fp8 needs an architecture among sm89, sm120, sm121, which sm86 is not" in message
    assert message.endswith("Use --precision fp32 or bf16 or fp16.")
    assert "TensorRT for RTX builds for sm75, sm80" in error_of(scail2(*where, "--target", "sm90"))
    assert not (tmp_path / "e").exists()


def test_one_stage_fails_the_others_go_on_and_a_second_call_continues(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The compiler of one stage kills itself, so that it is the same stage on every machine."""
    changes = unmeasured()
    code = """
import os, sys
if "scail2_rt.engines.tensorrt_backend.compiling" in sys.orig_argv:
    from scail2_rt.engines.tensorrt_backend import library
    cls, begin = library.MessageLog, library.MessageLog.writing_to
    def killed(self, path):
        if path.name == "dit.time.log":
            os.kill(os.getpid(), 11)
        return begin(self, path)
    cls.writing_to = killed
"""
    changes |= sabotage(tmp_path, code)
    where = ("build-engines", tiny_checkpoint, "-o", tmp_path / "e", "--precision", "fp8", *BUILD)
    dit = ("--stages", "dit.time", "--stages", "dit.[eh]*", "--stages", "dit.context")
    failed = scail2(*where, *dit, env=changes)
    message = error_of(failed, 1)
    assert message.startswith("stage dit.time cannot be built from ")
    assert "was ended by the signal SIGSEGV" in message
    assert message.endswith("All other plans (3) are kept. Run the same command again to build the missing ones.")
    assert not (tmp_path / "e/manifest.json").exists()
    again = scail2(*where, *dit)
    assert again.returncode == 0, again.stderr
    assert [line.split()[2] for line in again.stderr.splitlines() if line.startswith("tensorrt-rtx")] == ["dit.time:"]


def test_a_disk_that_fills_up(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The size of files is limited in the compilers, which has the same effect as a full disk."""
    code = """
import resource, signal, sys
if "scail2_rt.engines.tensorrt_backend.compiling" in sys.orig_argv:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
"""
    where = ("build-engines", tiny_checkpoint, "-o", tmp_path / "e", "--precision", "fp8", *BUILD, "--stages", "dit.*")
    message = error_of(scail2(*where, env=unmeasured() | sabotage(tmp_path, code)), 1)
    assert message.startswith(
        f"the disk of {tmp_path / 'e'} is full. Finished steps are kept; correct this and run the same command"
    )
    assert not list((tmp_path / "e").rglob("*.partial"))


def test_ctrl_c_ends_the_compilers_too(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Interrupted in the middle of a plan; finished plans are kept."""
    where = ("build-engines", tiny_checkpoint, "-o", tmp_path / "e", "--precision", "fp8", *BUILD, "--stages", "[cv]*")
    command = [str(SCAIL2_RT), *map(str, where)]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=unmeasured())
    assert running.stderr is not None
    for line in running.stderr:
        if line.startswith("tensorrt-rtx 1/"):
            break
    children = compilers_of(running.pid)
    assert children, "nothing was at work"
    pressed = time.monotonic()
    running.send_signal(signal.SIGINT)
    said = running.stderr.read()
    assert running.wait() == 130
    print(f"{time.monotonic() - pressed:.2f} s from Ctrl-C to the end")
    assert said.splitlines()[-1] == "error: interrupted"
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
    assert not list((tmp_path / "e").rglob("*.partial"))
    again = scail2(*where)
    assert again.returncode == 0, again.stderr
    assert "clip" not in "".join(line for line in again.stderr.splitlines() if line.startswith("tensorrt-rtx"))


def compilers_of(pid: int) -> list[int]:
    """The children of a process."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


# Failures of a single plan


@pytest.fixture
def job(tiny: Path, tmp_path: Path) -> PlanJob:
    """The job of the feed-forward stage in fp8, in a separate folder."""
    name = "dit.blocks.0.ffn"
    graph = tmp_path / f"{name}.trt.onnx"
    for file in (graph.name, "weights.safetensors"):
        shutil.copy(tiny / "stages" / file, tmp_path / file)
    dim = 256
    profile = dict.fromkeys(("x", "attention"), ((1, dim), (64, dim), (128, dim)))
    inputs = {"x": "FLOAT", "attention": "BF16", "mod": "FLOAT"}
    return PlanJob(
        TENSORRT_RTX.name,
        name,
        str(graph),
        str(tmp_path / "ffn.rtx"),
        str(tmp_path / "ffn.log"),
        inputs,
        (profile,),
        1 << 30,
        3,
        ("sm89", "sm120"),
        fp8_products=3,
    )


def compiled(job: PlanJob) -> Outcome:
    child = Child(job, {})
    while (outcome := child.outcome()) is None:
        time.sleep(0.01)
    assert (outcome.error is None) == Path(job.plan).exists()
    assert not list(Path(job.plan).parent.glob("*.partial"))
    return outcome


def test_a_plan(job: PlanJob) -> None:
    outcome = compiled(job)
    assert outcome.error is None
    assert outcome.peak_bytes > 50 << 20
    assert "LayerType: gemm" in Path(job.log).read_text()


def refused(job: PlanJob) -> str:
    """The error sentence, which always contains stage, graph and log."""
    error = compiled(job).error
    assert error is not None
    assert error.startswith(f"stage {job.stage} cannot be built from {job.graph}: ")
    assert error.endswith(f"Its log is {job.log}.")
    assert "\n" not in error
    print(error)  # to be read by a person: pytest -rP
    return error


def without_quantisation(job: PlanJob, which: list[int], activation: bool = True) -> None:
    """Rewrite the graph: the named products (in order) take a weight that was dequantised, and, with `activation`,
    an activation that never was quantised."""
    model = onnx.load(job.graph, load_external_data=False)
    makers = {output: node for node in model.graph.node for output in node.output}
    products = [n for n in model.graph.node if n.op_type == "MatMul" and is_dequantised(n.input[0], makers)]
    assert len(products) == 3
    for index in which:
        product = products[index]
        transposed = makers[product.input[1]]
        dequantise = makers[transposed.input[0]]
        name = dequantise.input[0]
        weight = next(tensor for tensor in model.graph.initializer if tensor.name == name)
        plain = np.full(list(weight.dims), 0.01, np.float32)
        del weight.external_data[:]
        weight.CopyFrom(numpy_helper.from_array(plain, name))
        weight.CopyFrom(helper.make_tensor(name, TensorProto.BFLOAT16, weight.dims, plain.ravel().tolist()))
        transposed.input[0] = name
        model.graph.node.remove(dequantise)
        if activation:
            quantise = makers[makers[product.input[0]].input[0]]
            product.input[0] = quantise.input[0]
    Path(job.graph).write_bytes(model.SerializeToString())


def is_dequantised(name: str, makers: dict[str, onnx.NodeProto]) -> bool:
    return name in makers and makers[name].op_type == "DequantizeLinear"


@pytest.mark.parametrize(("which", "kept"), [([0], 2), ([1], 2), ([2], 2), ([0, 1, 2], 0)])
def test_products_that_lost_their_quantisation(job: PlanJob, which: list[int], kept: int) -> None:
    without_quantisation(job, which)
    assert f"{kept} of its 3 fp8 products multiply fp8 operands" in refused(job)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_weight_that_lost_its_quantisation(job: PlanJob, which: int) -> None:
    without_quantisation(job, [which], activation=False)
    assert "2 of its 3 fp8 products multiply fp8 operands" in refused(job)


def test_a_bad_profile(job: PlanJob) -> None:
    profile = {**job.profiles[0], "x": ((1, 256), (64, 255), (128, 256))}
    text = refused(replace(job, profiles=(profile,)))
    assert "rejects its profile" in text
    assert "MIN<=OPT<=MAX" in text
    assert "driver" not in text, "which a machine that only compiles need not have"
    assert "its inputs attention, x have sizes without a range" in refused(replace(job, profiles=()))


def test_missing_weights(job: PlanJob, tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").unlink()
    assert f"Failed to open file: {tmp_path / 'weights.safetensors'}" in refused(job)


def test_another_signature(job: PlanJob) -> None:
    assert "the parser gave the inputs" in refused(replace(job, inputs={**job.inputs, "x": "HALF"}))


def test_an_unsupported_operator(job: PlanJob) -> None:
    model = onnx.load(job.graph, load_external_data=False)
    model.graph.node[3].op_type = "MaxUnpool"
    Path(job.graph).write_bytes(model.SerializeToString())
    assert "said: UNSUPPORTED_NODE: false at node 3 (MaxUnpool 'node_abs_1')" in refused(job)


def test_a_target_that_cannot_do_the_precision(job: PlanJob) -> None:
    assert "Cannot compile for target(s) sm86" in refused(replace(job, targets=("sm86",)))


def test_a_refusal_of_any_length(job: PlanJob) -> None:
    """The text is longer than the buffer of a pipe that is read only after the process has ended."""
    assert len(refused(replace(job, stage="s" * 100_000, targets=("sm86",)))) > 100_000


def test_a_killed_compiler(job: PlanJob, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in set(os.environ) - set(unmeasured()):
        monkeypatch.delenv(name)
    child = Child(job, {})
    os.kill(child._process.pid, signal.SIGKILL)
    while (outcome := child.outcome()) is None:
        time.sleep(0.01)
    assert "the compiler of TensorRT for RTX was ended by the signal SIGKILL, which happens when memory" in str(
        outcome.error
    )


def test_a_crash_of_the_compiler(job: PlanJob, tmp_path: Path) -> None:
    """Two Attention nodes that share Q crash this version. Only the plan's own process dies."""
    shape = [1, 2, "L", 32]
    inputs = [helper.make_tensor_value_info(name, TensorProto.BFLOAT16, shape) for name in ("q", "k", "v")]
    outputs = [helper.make_tensor_value_info("out", TensorProto.BFLOAT16, shape)]
    nodes = [
        helper.make_node("Attention", ["q", "k", "v"], ["a"]),
        helper.make_node("Attention", ["q", "v", "k"], ["b"]),
        helper.make_node("Add", ["a", "b"], ["out"]),
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "crash", inputs, outputs), opset_imports=[helper.make_opsetid("", 23)], ir_version=11
    )
    Path(job.graph).write_bytes(model.SerializeToString())
    profile = dict.fromkeys(("q", "k", "v"), ((1, 2, 1, 32), (1, 2, 64, 32), (1, 2, 128, 32)))
    text = refused(replace(job, inputs=dict.fromkeys("qkv", "BF16"), profiles=(profile,), fp8_products=0))
    assert "was ended by the signal SIG" in text
