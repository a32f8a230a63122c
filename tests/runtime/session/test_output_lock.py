"""One run per output: for every path of the output, across threads and processes; no lock remains of a dead process."""

import errno
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from scail2_rt.engines.engine_set import Execution
from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.core.progress import Cancelled, Progress
from scail2_rt.runtime.core.request import Output, Request
from scail2_rt.runtime.session.output_lock import lock_files, refuse_second, sole_writer
from scail2_rt.runtime.session.session import Session
from tests.support.command import SCAIL2_RT, SMALL, Run, command_environment, error_of, unmeasured

pytest_plugins = ["tests.support.runtime_fixtures"]
LONG = (*SMALL[:3], "400", *SMALL[4:])  # long enough for a test to end it


@pytest.fixture
def session(engines: Path, tmp_path: Path) -> Session:
    return Session.open(engines, backend="torch", execution=Execution(), prompt_cache=tmp_path / "cache")


def written(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


class TestLock:
    def test_one_holder_and_nothing_left(self, tmp_path: Path) -> None:
        output, notes = tmp_path / "new" / "out.mp4", list[str]()
        refuse_second(output)
        assert not output.parent.exists()
        for _ in range(2):
            with sole_writer(output, notes.append):
                assert written(output.parent) == {".out.lock"}
                with pytest.raises(InputError, match=r"Another run is writing the output .*out\.mp4\. Wait"):
                    refuse_second(output)
                with pytest.raises(InputError, match="Another run"), sole_writer(output, notes.append):
                    pass
            assert not written(output.parent)
            refuse_second(output)
        assert not notes

    def test_every_name_of_the_output(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "a").mkdir()
        (tmp_path / "b").symlink_to(tmp_path / "a")
        (tmp_path / "link.mp4").symlink_to(tmp_path / "a" / "out.mp4")
        monkeypatch.chdir(tmp_path / "a")
        names = (tmp_path / "b" / "out.mp4", Path("out.mp4"), Path("../b/../a/out.mp4"), tmp_path / "link.mp4")
        others = (tmp_path / "out.mp4", tmp_path / "a" / "out2.mp4", tmp_path / "a" / "out.partial.mp4")
        with sole_writer(tmp_path / "a" / "out.mp4", print):
            for name in (*names, tmp_path / "a" / "out.mov"):  # the last one shares partial video and report
                with pytest.raises(InputError, match="Another run"), sole_writer(name, print):
                    pass
            for name in others:
                with sole_writer(name, print):
                    pass
        with sole_writer(tmp_path / "link.mp4", print), pytest.raises(InputError, match="Another run"):
            refuse_second(tmp_path / "a" / "out.mp4")
        assert len(lock_files(tmp_path / "link.mp4")) == 2
        (tmp_path / "nowhere.mp4").symlink_to(tmp_path / "gone" / "out.mp4")
        with sole_writer(tmp_path / "nowhere.mp4", print):
            assert not (tmp_path / "gone").exists()

    def test_many_threads_take_turns(self, tmp_path: Path) -> None:
        """Two writers never hold the lock concurrently, even while lock files are deleted and created."""
        inside, most, taken = 0, 0, 0
        guard = threading.Lock()

        def work() -> None:
            nonlocal inside, most, taken
            for _ in range(40):
                try:
                    with sole_writer(tmp_path / "out.mp4", print):
                        with guard:
                            inside += 1
                            most, taken = max(most, inside), taken + 1
                        time.sleep(0.001)
                        with guard:
                            inside -= 1
                except InputError:
                    continue

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (most, inside) == (1, 0)
        assert taken > 1
        assert not written(tmp_path)

    @pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
    def test_without_locks_one_sentence(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
        without_locks(monkeypatch, code)
        notes: list[str] = []
        with sole_writer(tmp_path / "out.mp4", notes.append):
            refuse_second(tmp_path / "out.mp4")
        sentence = "cannot be locked (no locks here). Do not start another run that writes to it."
        assert notes == [f"The output {tmp_path / 'out.mp4'} {sentence}"]
        assert not written(tmp_path)


def without_locks(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    fcntl = pytest.importorskip("fcntl")

    def fail(*_: object) -> None:
        raise OSError(code, "no locks here")

    monkeypatch.setattr(fcntl, "flock", fail)


class TestSession:
    def test_two_sessions_of_one_process(
        self, session: Session, engines: Path, request_of: Callable[..., Request], tmp_path: Path
    ) -> None:
        """The second run is refused before it computes anything; the first continues; afterwards the output is free."""
        plan = session.check(request_of(steps=2, segment_length=13, guidance=1.0))
        refused: list[str] = []

        def second() -> None:
            with Session.open(engines, backend="torch", prompt_cache=tmp_path / "cache") as other:
                try:
                    other.generate(plan, Output(tmp_path / "v" / ".." / "v" / "out.mp4", overwrite=True))
                except InputError as error:
                    refused.append(str(error))

        def heard(event: Progress) -> None:
            if event.step == 1 and not refused:
                thread = threading.Thread(target=second)
                thread.start()
                thread.join()

        result = session.generate(plan, tmp_path / "v" / "out.mp4", on_progress=heard)
        assert len(refused) == 1
        assert "Another run is writing" in refused[0]
        assert result.report["status"] == "complete"
        assert written(tmp_path / "v") == {"out.mp4", "out.json"}
        with Session.open(engines, backend="torch", prompt_cache=tmp_path / "cache") as other:
            other.generate(plan, Output(tmp_path / "v" / "out.mp4", overwrite=True))

    def test_the_lock_goes_when_a_run_fails(
        self, session: Session, request_of: Callable[..., Request], tmp_path: Path
    ) -> None:
        plan, cancel = session.check(request_of(steps=2, segment_length=13, guidance=1.0)), threading.Event()
        cancel.set()
        with pytest.raises(Cancelled):
            session.generate(plan, tmp_path / "out.mp4", cancel=cancel)
        assert ".out.lock" not in written(tmp_path)
        session.generate(plan, tmp_path / "out.mp4")

    def test_without_locks_one_warning(
        self,
        session: Session,
        request_of: Callable[..., Request],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        without_locks(monkeypatch, errno.ENOSYS)
        result = session.generate(
            session.check(request_of(steps=1, segment_length=13, guidance=1.0)), tmp_path / "out.mp4"
        )
        assert sum("cannot be locked" in warning for warning in result.warnings) == 1
        assert session.warnings == [warning for warning in result.warnings if "cannot be locked" in warning]


class TestCommand:
    @pytest.fixture
    def running(self, engines: Path, case: Path, tmp_path: Path, cache: Path) -> "subprocess.Popen[bytes]":
        """A process that is in the first segment of `out/a.mp4`."""
        words = ["generate", engines, "--case", case, "-o", tmp_path / "out" / "a.mp4", *LONG]
        process = subprocess.Popen(
            [str(SCAIL2_RT), *map(str, words)],
            env=unmeasured(command_environment(cache)),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        assert process.stderr is not None
        for line in process.stderr:  # the first step is reported
            if b"segment 1/" in line:
                return process
        raise AssertionError("the run ended before its first step")

    def test_the_second_process_is_refused_at_once_and_a_killed_one_blocks_nobody(
        self, running: "subprocess.Popen[bytes]", engines: Path, case: Path, tmp_path: Path, scail2: Run
    ) -> None:
        output = tmp_path / "out" / "a.mp4"
        (tmp_path / "batch.txt").write_text(f"None@@{case}\n")
        try:
            for extra in ((), ("--overwrite",), ("--resume",)):
                refused = scail2("generate", engines, "--case", case, "-o", "out/a.mp4", *SMALL, *extra, cwd=tmp_path)
                assert "Another run is writing the output out/a.mp4" in error_of(refused)
                assert "engines:" not in refused.stderr  # nothing was opened
            (tmp_path / "batch").mkdir()
            (tmp_path / "batch" / f"{case.name}.mp4").symlink_to(output)
            batch = scail2("generate", engines, "--batch", tmp_path / "batch.txt", "-o", tmp_path / "batch", *SMALL)
            assert batch.returncode == 1
            assert "Another run is writing the output" in batch.stderr
            assert running.poll() is None
            running.send_signal(signal.SIGKILL)
            running.wait()
            assert (tmp_path / "out" / ".a.lock").is_file()
            assert os.listdir(tmp_path / "batch") == [f"{case.name}.mp4"]
            assert scail2("generate", engines, "--case", case, "-o", output, *SMALL).returncode == 0
            assert written(output.parent) == {"a.mp4", "a.json"}
        finally:
            running.kill()
            running.communicate()
