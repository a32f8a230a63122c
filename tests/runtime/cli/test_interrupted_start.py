"""Ctrl-C during the imports of the command: one line, exit code 130."""

import os
from pathlib import Path

import pytest

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
