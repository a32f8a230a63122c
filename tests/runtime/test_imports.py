"""Modules can be imported, and a video can be made on a CPU, without `fcntl` and `resource` (as on Windows).

The test blocks both imports in a separate process. It runs on Linux, so other differences of Windows are not tested."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.command import SMALL, command_environment, read_video, unmeasured

pytest_plugins = ["tests.support.runtime_fixtures"]

BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name in ("fcntl", "resource"):
            raise ImportError(f"No module named {name!r} (as on Windows)", name=name)

for name in ("fcntl", "resource"):
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Blocked())
"""

# Prints a JSON object: module → result of its import; and the blocked modules that were imported nevertheless.
EVERY_MODULE = """
import importlib, json, pkgutil
failed, count = {}, 0
for floor in ("kernels", "export", "engines", "runtime"):
    package = importlib.import_module(f"scail2_rt.{floor}")
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if module.name.endswith("__main__"):
            continue
        count += 1
        try:
            importlib.import_module(module.name)
        except ImportError as error:
            failed[module.name] = [str(error.name), str(error)]
there = [name for name in ("fcntl", "resource") if name in sys.modules]
print(json.dumps({"count": count, "failed": failed, "there": there}))
"""

COMMAND = """
from scail2_rt.runtime.cli.main import main
main(sys.argv[1:])
"""


def run(code: str, cache: Path, *words: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", BLOCKED + code, *map(str, words)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=unmeasured(command_environment(cache)), timeout=600
    )


@pytest.fixture(scope="module")
def imported(cache: Path) -> dict[str, object]:
    result = run(EVERY_MODULE, cache)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_every_module_imports(imported: dict[str, object]) -> None:
    """All modules except Triton kernels, if Triton is not installed, and nodes, which need ComfyUI."""
    assert imported["count"] > 100  # type: ignore[operator]
    assert imported["there"] == []
    failed: dict[str, tuple[str, str]] = imported["failed"]  # type: ignore[assignment]
    lacking = ("triton", "comfy_api", "comfy")
    assert {module: said for module, (name, said) in failed.items() if name.partition(".")[0] not in lacking} == {}


def test_a_video_is_made(cache: Path, engines: Path, case: Path, tmp_path: Path) -> None:
    words = ("generate", engines, "--case", case, "-o", tmp_path / "a.mp4", *SMALL, "--json")
    result = run(COMMAND, cache, *words)
    assert result.returncode == 0, result.stderr
    assert read_video(tmp_path / "a.mp4").frames == 21
    assert json.loads((tmp_path / "a.json").read_text())["status"] == "complete"


def test_engines_are_built(cache: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    words = ("build-engines", tiny_checkpoint, "-o", tmp_path / "e", "--backend", "torch", "--precision", "fp32")
    result = run(COMMAND, cache, *words)
    assert result.returncode == 0, result.stderr
