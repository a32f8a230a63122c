"""The content of the wheel, and the installed wheel."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.command import unmeasured

ROOT = Path(__file__).parents[1]
FLOORS = ("benchmarks", "engines", "export", "kernels", "runtime")
TRAINING = "benchmarks/sprites/training"


def pip(*words: object) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *map(str, words)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=unmeasured())
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, because setuptools leaves a build folder whose old files would get into the next wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    unwanted = shutil.ignore_patterns("__pycache__", "results")
    for floor in FLOORS:
        shutil.copytree(ROOT / floor, folder / "source" / floor, ignore=unwanted)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    pip("wheel", folder / "source", "--no-deps", "--no-build-isolation", "-w", folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def files(wheel: Path) -> set[str]:
    """The files in the wheel, without its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def on_disk(pattern: str) -> set[str]:
    """Files of the floors as the wheel should name them, without the training of the sprite world."""
    found = {path.relative_to(ROOT).as_posix() for floor in FLOORS for path in (ROOT / floor).rglob(pattern)}
    return {f"scail2_rt/{name}" for name in found if not name.startswith(f"{TRAINING}/")}


def test_every_module_is_in_it_but_those_of_training(files: set[str]) -> None:
    assert {name for name in files if name.endswith(".py")} == on_disk("*.py")
    assert (ROOT / TRAINING / "__init__.py").is_file()


def test_every_folder_of_modules_is_a_package(files: set[str]) -> None:
    """setuptools packs only listed packages; a folder without `__init__.py` works in the checkout but would be missing
    in the wheel."""
    folders = {name.rpartition("/")[0] for name in files if name.endswith(".py")}
    assert {f"{folder}/__init__.py" for folder in folders} <= files


def test_kernels_and_the_sprite_checkpoint_are_in_it(files: set[str]) -> None:
    assert {name for name in files if name.endswith(".cu")} == on_disk("*.cu") != set()
    checkpoint = "scail2_rt/benchmarks/sprites/checkpoint/"
    kept = {name.removeprefix(checkpoint) for name in files if name.startswith(checkpoint)}
    assert {"config.json", "model/latest", "Wan2.1_VAE.pth", "umt5-xxl/tokenizer.json"} <= kept
    assert not [name for name in kept if name.startswith("training/")]
    assert not [name for name in files if "/results/" in name]


def test_it_works_where_it_is_installed(wheel: Path, tmp_path: Path) -> None:
    """Install the wheel in a separate folder that precedes the checkout on the path, with this environment's
    dependencies."""
    pip("install", "--no-deps", "--target", tmp_path / "there", wheel)
    environment = unmeasured({**os.environ, "PYTHONPATH": str(tmp_path / "there")})

    def run(*words: object) -> str:
        command = [str(word) for word in words]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, env=environment, cwd=tmp_path
        ).stdout.strip()

    # the finder of an editable install comes before the path
    first = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)]; "
    where = run(sys.executable, "-c", first + "import scail2_rt.runtime as r; print(r.__file__)")
    assert Path(where) == tmp_path / "there" / "scail2_rt" / "runtime" / "__init__.py"
    shipped = "from scail2_rt.benchmarks.sprites.shipped import shipped_checkpoint; print(shipped_checkpoint())"
    assert Path(run(sys.executable, "-c", first + shipped)).is_relative_to(tmp_path / "there")
    start = first + "from scail2_rt.runtime.cli.main import main; main(sys.argv[1:])"
    assert "generate" in run(sys.executable, "-c", start, "--help")
    script = tmp_path / "there" / "bin" / "scail2-rt"
    assert "generate" in run(sys.executable, script, "--help")
