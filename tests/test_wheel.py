"""The content of the wheel, and the installed wheel in an environment that has nothing else of ours."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from tests.support.command import read_video, unmeasured

ROOT = Path(__file__).parents[1]
FLOORS = ("benchmarks", "engines", "export", "kernels", "runtime")
TRAINING = "benchmarks/sprites/training"
LICENCES = ("LICENSE", "docs/licences.md")
MOST_BYTES = 40 << 20  # 25 MB of them are the sprite checkpoint and the small segmenter


def run(*words: object, cwd: Path = ROOT) -> str:
    """What a command prints; it must succeed."""
    environment = {name: value for name, value in unmeasured().items() if name != "PYTHONPATH"}
    command = [str(word) for word in words]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=cwd)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def pip(*words: object) -> None:
    run(sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *words)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, because setuptools leaves a build folder whose old files would get into the next wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    unwanted = shutil.ignore_patterns("__pycache__", "results")
    for floor in FLOORS:
        shutil.copytree(ROOT / floor, folder / "source" / floor, ignore=unwanted)
    for name in ("pyproject.toml", "README.md", *LICENCES):
        (folder / "source" / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / "source" / name)
    pip("wheel", folder / "source", "--no-deps", "--no-build-isolation", "-w", folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts' folder of a fresh environment with the wheel. Dependencies are those of this environment: a `.pth`
    file adds its folder, whose own `.pth` files (the editable install) Python then ignores."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    scripts = folder / ("Scripts" if os.name == "nt" else "bin")
    pip("--python", scripts / "python", "install", "--no-deps", "--no-index", wheel)
    packages = run(scripts / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    Path(packages, "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return scripts


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


def test_pages_markers_and_licences_are_in_it_and_tests_are_not(wheel: Path, files: set[str]) -> None:
    assert {f"scail2_rt/{floor}/py.typed" for floor in FLOORS} <= files
    pages = {name for name in files if "/serve/page/" in name}
    assert pages == {f"scail2_rt/runtime/serve/page/{path.name}" for path in (ROOT / "runtime/serve/page").iterdir()}
    assert {name.split("/")[1] for name in files} == set(FLOORS)
    with zipfile.ZipFile(wheel) as archive:
        for name in LICENCES:
            (inside,) = (entry for entry in archive.namelist() if entry.endswith(f".dist-info/licenses/{name}"))
            assert archive.read(inside) == (ROOT / name).read_bytes()
    assert wheel.stat().st_size < MOST_BYTES


@pytest.mark.slow
def test_the_command_and_an_example_run_from_it(environment: Path, tmp_path: Path) -> None:
    where = run(environment / "python", "-c", "import scail2_rt.runtime as r; print(r.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(environment.parent)
    assert "generate" in run(environment / "scail2-rt", "--help", cwd=tmp_path)
    said = run(environment / "scail2-rt", "demo", "-o", "out", cwd=tmp_path)
    assert f"checkpoint  {environment.parent}" in said
    assert read_video(tmp_path / "out" / "demo.mp4").frames == 33
    assert Image.open(tmp_path / "out" / "contact_sheet.png").width > 6 * 128
    run(environment / "python", ROOT / "examples" / "python_api.py", "out/engines", "out/case", "api.mp4", cwd=tmp_path)
    assert read_video(tmp_path / "api.mp4").frames == 33


def test_a_type_checker_reads_its_types(environment: Path, tmp_path: Path) -> None:
    """Of a module without PyTorch, whose types take mypy a minute. Without `py.typed` it would be untyped."""
    (tmp_path / "user.py").write_text("from scail2_rt.kernels.errors import InputError\nreveal_type(InputError('x'))\n")
    command = (sys.executable, "-m", "mypy", "--python-executable", environment / "python", "--cache-dir", tmp_path)
    said = run(*command, "--config-file", os.devnull, "user.py", cwd=tmp_path)
    assert 'Revealed type is "scail2_rt.kernels.errors.InputError"' in said
