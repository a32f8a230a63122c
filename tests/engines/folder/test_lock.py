"""The lock of a folder: one writer at a time, no lock left by a dead process, and file systems without locks."""

import errno
import signal
from pathlib import Path

import pytest

from scail2_rt.engines.build.build import build
from scail2_rt.engines.folder.lock import LOCK, alone
from scail2_rt.kernels.errors import InputError
from tests.engines.build.test_build_interrupted import run_python
from tests.support.small import Steps, request, small_checkpoint


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    notes: list[str] = []
    for _ in range(2):
        with alone(tmp_path, "another one", notes.append):
            assert (tmp_path / LOCK).is_file()
            with pytest.raises(InputError, match="another one"), alone(tmp_path, "another one", notes.append):
                pass
        assert not list(tmp_path.iterdir())
    assert notes == []


def test_a_killed_holder_blocks_nobody(tmp_path: Path) -> None:
    script = """
        import os, signal, sys
        from pathlib import Path
        from scail2_rt.engines.folder.lock import alone

        with alone(Path(sys.argv[1]), "held", print):
            os.kill(os.getpid(), signal.SIGKILL)
    """
    killed = run_python(script, tmp_path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]
    report = build(request(tmp_path), small_checkpoint())  # nor may it remove another process's file
    assert report.added == ("torch",)
    assert not (tmp_path / LOCK).exists()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def fail(*_: object) -> None:
        raise OSError(code, "no locks here")

    monkeypatch.setattr(fcntl, "flock", fail)
    steps = Steps()
    assert build(request(tmp_path / "e"), small_checkpoint(), steps).added == ("torch",)
    assert [note for note in steps.notes if "cannot be locked" in note] == [
        f"{tmp_path / 'e'} cannot be locked (no locks here). Do not let another program write to it meanwhile."
    ]
    assert not (tmp_path / "e" / LOCK).exists()
