"""Ctrl-C during imports: one line, exit code 130, and no unfinished files."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.command import Run, sabotage

pytest_plugins = ["tests.support.runtime_fixtures"]

# The process sends itself the signal when it starts to import a module, so the speed of the machine does not matter.
_SIGNAL_AT_IMPORT = """
import os, signal, sys
def heard(event, arguments):
    if event == "import" and arguments[0] == {module!r}:
        os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(heard)
"""
MODULES = ("click", "scail2_rt.runtime.cli.options", "numpy", "torch._C", "torch.nn", "scail2_rt.engines.registry")


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("module", MODULES)
def test_an_interrupted_import_is_one_line(installed: Run, tmp_path: Path, module: str) -> None:
    environment = sabotage(tmp_path, _SIGNAL_AT_IMPORT.format(module=module))
    result = installed("doctor", measured=False, **environment)
    lines = [line for line in result.stderr.splitlines() if line and not line.startswith("checking the libraries")]
    assert (result.returncode, lines) == (130, ["error: interrupted"])


_SIGNAL_AT_WORK = """
import os, signal, sys
from scail2_rt.runtime.jobs import doctor
def signalled(*given):
    os.kill(os.getpid(), signal.SIGINT)
doctor._encoders = signalled
"""


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_an_interrupted_command_says_the_same(installed: Run, tmp_path: Path) -> None:
    result = installed("doctor", "--json", measured=False, **sabotage(tmp_path, _SIGNAL_AT_WORK))
    assert result.returncode == 130
    assert result.stderr.splitlines()[-1] == "error: interrupted"
    assert "Traceback" not in result.stderr
    assert '"exit_code": 130' in result.stdout


_SIGNAL_AT_FRAME = """
import os, signal, time
from scail2_rt.runtime.masks import files
frames_of = files.frames_of
def signalled(*given):
    yield from frames_of(*given)
    {end}
    time.sleep(60)  # until the signal comes again
files.frames_of = signalled
"""


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("end", ["import ends", "os.kill(os.getpid(), signal.SIGTERM)"])
def test_an_ended_command_that_writes_leaves_nothing(installed: Run, tmp_path: Path, end: str) -> None:
    """Ctrl-C while a library imports one of its modules, and SIGTERM, when the mask is written."""
    modules, matte = tmp_path / "modules", tmp_path / "matte.png"
    modules.mkdir()
    (modules / "ends.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    Image.fromarray(np.eye(64, dtype=np.uint8) * 255).save(matte)
    words = ("masks", "from-grey", matte, "--mode", "animate", "-o", tmp_path / "mask.png")
    result = installed(*words, measured=False, **sabotage(modules, _SIGNAL_AT_FRAME.format(end=end)))
    assert (result.returncode, result.stderr.split()) == (130, ["error:", "interrupted"])
    assert {path.name for path in tmp_path.iterdir()} == {"modules", "matte.png"}


_SIGNAL_AT_START = """
import os, signal
from scail2_rt.runtime.serve.pool import Pool
start = Pool.start
async def signalled(self):
    os.kill(os.getpid(), signal.SIGINT)
    await start(self)
Pool.start = signalled
"""


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_service_that_starts_does_not_open_its_engines_first(installed: Run, engines: Path, tmp_path: Path) -> None:
    words = ("serve", engines, "--data", tmp_path / "data", "--port", "0")
    result = installed(*words, measured=False, **sabotage(tmp_path, _SIGNAL_AT_START))
    assert (result.returncode, result.stdout) == (130, "")
    assert result.stderr.splitlines()[-1] == "error: interrupted"
    assert "Traceback" not in result.stderr
