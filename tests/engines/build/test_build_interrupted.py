"""Builds that end early (killed, interrupted, disk full) and resume; and the memory of a build."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from scail2_rt.engines.build.build import BuildStep, SilentObserver, build
from scail2_rt.engines.folder.journal import JOURNAL
from scail2_rt.engines.folder.manifest import MANIFEST, read_manifest
from scail2_rt.export.models.config import DiTConfig
from tests.support.command import unmeasured
from tests.support.small import Steps, build_small, request, small_checkpoint

STORE = "stages/weights.safetensors"


class TestInterruption:
    def test_sigkill_then_resume(self, tmp_path: Path) -> None:
        """After a killed process, the next call writes only the missing tensors, and the result is the same."""
        script = """
            import os, signal, sys
            from pathlib import Path
            from scail2_rt.engines.build.build import BuildRequest, SilentObserver, build
            from tests.support.small import small_checkpoint

            class Killer(SilentObserver):
                def started(self, step):
                    if step.name == "dit.blocks.0.mid":
                        os.kill(os.getpid(), signal.SIGKILL)

            build(BuildRequest(Path("small"), Path(sys.argv[1]), ("torch",), "fp8"), small_checkpoint(), Killer())
        """
        killed = run_python(script, tmp_path / "e")
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert not (tmp_path / "e" / MANIFEST).exists()
        steps = Steps()
        report = build(request(tmp_path / "e", "fp8"), small_checkpoint(), steps)
        written = steps.names("weights")
        assert written[0] == "dit.blocks.0.mid"
        assert len(written) + report.resumed_steps == report.stages + 1
        assert "continuing an interrupted build" in steps.notes[0]
        build_small(tmp_path / "whole", "fp8")
        for name in (STORE, "tables.safetensors"):
            assert (tmp_path / "e" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        assert not (tmp_path / "e" / JOURNAL).exists()
        assert not list((tmp_path / "e").rglob("*.partial"))

    @pytest.mark.parametrize("step", ["umt5.token_embedding", "dit.head", "tables.safetensors"])
    def test_interrupt_then_resume(self, tmp_path: Path, step: str) -> None:
        class Interrupt(SilentObserver):
            def started(self, started: BuildStep) -> None:
                if started.name == step:
                    raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            build(request(tmp_path / "e"), small_checkpoint(), Interrupt())
        assert not (tmp_path / "e" / MANIFEST).exists()
        build_small(tmp_path / "e")
        build_small(tmp_path / "whole")
        assert (tmp_path / "e" / STORE).read_bytes() == (tmp_path / "whole" / STORE).read_bytes()

    def test_what_was_begun_for_another_request_is_dropped(self, tmp_path: Path) -> None:
        class Interrupt(SilentObserver):
            def started(self, started: BuildStep) -> None:
                if started.name == "dit.head":
                    raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            build(request(tmp_path / "e"), small_checkpoint(seed=5), Interrupt())
        steps = Steps()
        build(request(tmp_path / "e"), small_checkpoint(), steps)
        assert len(steps.names("weights")) == len(read_manifest(tmp_path / "e").stages) + 1
        build_small(tmp_path / "whole")
        assert (tmp_path / "e" / STORE).read_bytes() == (tmp_path / "whole" / STORE).read_bytes()

    def test_a_damaged_journal_is_an_empty_one(self, tmp_path: Path) -> None:
        (tmp_path / "e").mkdir()
        (tmp_path / "e" / JOURNAL).write_text('{"done": 3}')
        assert build_small(tmp_path / "e").resumed_steps == 0

    def test_a_disk_that_fills_up(self, tmp_path: Path) -> None:
        """The size of files is limited in the child, which has the same effect as a full disk."""
        script = """
            import resource, signal, sys
            from pathlib import Path
            import torch
            from scail2_rt.engines.build.build import BuildRequest, build
            from tests.support.small import small_checkpoint
            checkpoint = small_checkpoint()
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
            try:
                build(BuildRequest(Path("small"), Path(sys.argv[1]), ("torch",), "fp32"), checkpoint)
            except Exception as error:
                print(type(error).__name__, error)
        """
        found = run_python(script, tmp_path / "e")
        assert found.stdout.startswith("Scail2Error the disk of"), found.stdout + found.stderr
        assert "run the same command again" in found.stdout
        assert build_small(tmp_path / "e").stages > 0


def run_python(script: str, *arguments: Path) -> "subprocess.CompletedProcess[str]":
    root = Path(__file__).resolve().parents[3]
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, env=unmeasured())


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A fp32 checkpoint of 1.2 GB becomes a bf16 store: anonymous memory stays at a few pieces of 64 MiB."""
    script = """
        import json, sys, threading
        from pathlib import Path
        import torch
        from scail2_rt.engines.build.build import BuildRequest, build
        from scail2_rt.export.checkpoint.open import open_checkpoint

        def anonymous():
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) << 10

        checkpoint = open_checkpoint(sys.argv[1])
        stop, base, peak = threading.Event(), anonymous(), 0
        def watch():
            global peak
            while not stop.wait(0.005):
                peak = max(peak, anonymous())
        thread = threading.Thread(target=watch)
        thread.start()
        report = build(BuildRequest(Path(sys.argv[1]), Path(sys.argv[2]), ("torch",), "bf16"), checkpoint)
        stop.set()
        thread.join()
        print(json.dumps({"grown": peak - base, "weights": report.weight_bytes}))
    """
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc/self/status to measure memory")
    from scail2_rt.export.checkpoint.random_checkpoint import PRESETS, make_checkpoint

    dit = DiTConfig(dim=2048, heads=16, layers=4, ffn_dim=5632, text_dim=64, clip_dim=160)
    make_checkpoint(tmp_path / "c", dataclasses.replace(PRESETS["tiny"], dit=dit, sparse=True))
    found = run_python(script, tmp_path / "c", tmp_path / "e")
    for folder in ("c", "e"):
        shutil.rmtree(tmp_path / folder)  # pytest would keep it
    assert found.returncode == 0, found.stderr
    measured = json.loads(found.stdout.splitlines()[-1])
    assert measured["weights"] > 600e6
    assert measured["grown"] < 300e6
