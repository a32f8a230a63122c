"""Shell completion: the output of the command with `_SCAIL2_RT_COMPLETE`, and the completions in bash."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runtime.cli.test_cli import HEAVY
from tests.support.command import SCAIL2_RT, Run

pytest_plugins = ["tests.support.runtime_fixtures"]


def completions(scail2: Run, words: str, position: int) -> list[str]:
    """Return the "type,value" lines for the word at this position."""
    variables = {"_SCAIL2_RT_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(position)}
    return scail2(**variables).stdout.split()


@pytest.mark.parametrize(
    ("words", "position", "expected"),
    [
        ("scail2-rt gen", 1, "plain,generate"),
        ("scail2-rt generate --vram", 2, "plain,--vram-limit"),
        ("scail2-rt generate e --preset ", 4, "plain,fast"),
        ("scail2-rt generate --case a", 3, "dir,a"),
        ("scail2-rt generate --image a", 3, "file,a"),
        ("scail2-rt build-engines c --lora a", 4, "file,a"),
        ("scail2-rt serve e", 2, "file,e"),
        ("scail2-rt bench all --weights r", 4, "plain,random"),
        ("scail2-rt masks make --conf", 3, "plain,--config"),
    ],
)
def test_words_are_completed(scail2: Run, words: str, position: int, expected: str) -> None:
    assert expected in completions(scail2, words, position)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_has_its_script(scail2: Run, shell: str) -> None:
    script = scail2(_SCAIL2_RT_COMPLETE=f"{shell}_source").stdout
    assert f"_SCAIL2_RT_COMPLETE={shell}_complete" in script


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes(tmp_path: Path) -> None:
    (tmp_path / "my_case").mkdir()
    program = f"""
        PATH={SCAIL2_RT.parent}:$PATH
        eval "$(_SCAIL2_RT_COMPLETE=bash_source scail2-rt)"
        compopt() {{ :; }}
        COMP_WORDS=(scail2-rt generate engines --codec h) COMP_CWORD=4
        _scail2_rt_completion scail2-rt && echo "${{COMPREPLY[@]}}"
        complete -p scail2-rt
    """
    result = subprocess.run(["bash", "-c", program], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.stdout.splitlines() == [
        "h264 hevc",
        "complete -o nosort -F _scail2_rt_completion scail2-rt",
    ], result.stderr


def test_completion_imports_nothing_heavy() -> None:
    code = (
        "import os, sys; from scail2_rt.runtime.cli.main import main\n"
        "os.environ |= {'_SCAIL2_RT_COMPLETE': 'bash_complete', 'COMP_WORDS': 'scail2-rt b', 'COMP_CWORD': '1'}\n"
        f"try: main([])\nexcept SystemExit: print([m for m in {HEAVY!r} if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout.splitlines() == ["plain,bench", "plain,build-engines", "[]"]
