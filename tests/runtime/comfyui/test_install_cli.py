"""`scail2-rt comfyui` through the installed command, on a folder that looks like ComfyUI's."""

import json
import os
import stat
from importlib.metadata import version
from pathlib import Path

import pytest

from scail2_rt.kernels.errors import Scail2Error
from scail2_rt.runtime.comfyui import installing
from scail2_rt.runtime.comfyui.installing import COMMAND_ONLY, requirements
from tests.support.command import Run, error_of, one_json

pytest_plugins = ["tests.support.runtime_fixtures"]

WORKFLOWS = {"scail2_animate.json", "scail2_replace.json", "scail2_animate.jpg", "scail2_replace.jpg"}


@pytest.fixture
def comfyui(tmp_path: Path) -> Path:
    folder = tmp_path / "ComfyUI"
    for name in ("custom_nodes", "comfy_api/latest", "models/diffusion_models"):
        (folder / name).mkdir(parents=True)
    (folder / "main.py").touch()
    (folder / "models" / "diffusion_models" / "wan2.1_SCAIL2_fp8.safetensors").touch()
    (folder / "comfyui_version.py").write_text('__version__ = "0.3.64"\n')
    return folder


def python_with(folder: Path, **packages: str) -> Path:
    """A stand-in for a Python that reports these packages."""
    answer = json.dumps({"python": [3, 12, 1], "packages": packages})
    path = folder / "python"
    path.write_text(f"#!/bin/sh\necho '{answer}'\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def right_versions() -> dict[str, str]:
    return {requirement.name: version(requirement.name) for requirement in requirements()}


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_install_check_and_remove(scail2: Run, comfyui: Path) -> None:
    before = tree(comfyui)
    result = scail2("comfyui", "install", comfyui)
    assert result.returncode == 0, result.stderr
    nodes = comfyui / "custom_nodes" / "scail2_rt"
    assert "comfy_entrypoint" in (nodes / "__init__.py").read_text()
    assert {path.name for path in (nodes / "example_workflows").iterdir()} == WORKFLOWS
    pins = (nodes / "host-versions.txt").read_text().splitlines()
    assert f"numpy=={version('numpy')}" in pins
    assert not [pin for pin in pins if "+" in pin]
    found = one_json(scail2("comfyui", "check", comfyui, "--json"))
    assert (found["version"], found["nodes"], found["lacking"]) == ("0.3.64", version("scail2-rt"), [])
    assert found["models"] == ["wan2.1_SCAIL2_fp8.safetensors"]
    changed = comfyui / "input" / "scail2_animate_ref.png"
    changed.write_bytes(b"mine")
    result = scail2("comfyui", "remove", comfyui)
    assert result.returncode == 0, result.stderr
    assert f"kept {changed}" in result.stdout
    assert tree(comfyui) - before == {"input", "input/scail2_animate_ref.png"}


def test_a_second_install_replaces_the_first_and_keeps_the_users_files(scail2: Run, comfyui: Path) -> None:
    before = tree(comfyui)
    assert scail2("comfyui", "install", comfyui).returncode == 0
    nodes, picture = comfyui / "custom_nodes" / "scail2_rt", comfyui / "input" / "scail2_animate_ref.png"
    mark, mine = nodes / "installed.json", nodes / "example_workflows" / "mine.json"
    known = json.loads(mark.read_text())
    mark.write_text(json.dumps({**known, "files": [*known["files"], "old.py"]}))
    (nodes / "old.py").touch()
    for file in (picture, mine):
        file.write_bytes(b"mine")
    assert scail2("comfyui", "install", comfyui).returncode == 0
    assert not (nodes / "old.py").exists()
    assert picture.read_bytes() == mine.read_bytes() == b"mine"
    assert not [name for name in tree(comfyui) if ".scail2_rt-" in name]
    (nodes / "__pycache__").mkdir()
    result = scail2("comfyui", "remove", comfyui)
    assert f"kept {mine}" in result.stdout
    assert {path for path in tree(comfyui) - before if not (comfyui / path).is_dir()} == {
        str(file.relative_to(comfyui)) for file in (picture, mine)
    }
    assert "has no nodes of `scail2-rt comfyui install`" in error_of(scail2("comfyui", "remove", comfyui))
    assert "Move it away first" in error_of(scail2("comfyui", "install", comfyui))


def test_an_install_that_fails_leaves_nothing(comfyui: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree(comfyui)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(installing.shutil, "copytree", full)
    with pytest.raises(Scail2Error, match="could not be written"):
        installing.install(comfyui)
    assert tree(comfyui) == before


def test_what_cannot_be_taken_away_is_said(comfyui: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installing.install(comfyui)

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(installing.shutil, "rmtree", refused)
    with pytest.raises(Scail2Error, match="could not be removed"):
        installing.remove(comfyui)


def test_what_is_lacking_becomes_a_command(scail2: Run, comfyui: Path) -> None:
    packages = right_versions()
    for name in ("xxhash", "ftfy"):
        del packages[name]
    python = python_with(comfyui, **packages)
    result = one_json(scail2("comfyui", "install", comfyui, "--python", python, "--json"))
    package, missing = result["commands"]
    assert package.startswith(f'"{python}" -m pip install --no-deps ')
    assert missing.startswith(f'"{python}" -m pip install --constraint ')
    assert '"ftfy' in missing
    assert '"xxhash' in missing
    assert not any(f'"{name}' in missing for name in ("torch", *COMMAND_ONLY))


def test_what_is_too_old_is_listed_and_refused(scail2: Run, comfyui: Path) -> None:
    python = python_with(comfyui, **{**right_versions(), "torch": "2.4.0", "numpy": "1.24.0"})
    before = tree(comfyui)
    said = error_of(scail2("comfyui", "install", comfyui, "--python", python))
    assert "torch is 2.4.0 in ComfyUI; the nodes need >=2.11" in said
    assert "numpy is 1.24.0 in ComfyUI" in said
    assert "Nothing was written" in said
    assert tree(comfyui) == before


def test_other_folders_are_refused(scail2: Run, comfyui: Path, tmp_path: Path) -> None:
    assert "is not a ComfyUI folder" in error_of(scail2("comfyui", "install", tmp_path))
    assert "has no nodes of `scail2-rt comfyui install`" in error_of(scail2("comfyui", "remove", comfyui))
    (comfyui / "custom_nodes" / "scail2_rt").mkdir()
    assert "Move it away first" in error_of(scail2("comfyui", "install", comfyui))
    assert "does not run as a Python" in error_of(scail2("comfyui", "check", comfyui, "--python", tmp_path / "no"))
    os.rmdir(comfyui / "comfy_api" / "latest")
    assert "lacks the V3 node interface" in error_of(scail2("comfyui", "check", comfyui))


def test_sprites_are_built_for_the_examples(scail2: Run, comfyui: Path) -> None:
    assert scail2("comfyui", "install", comfyui, "--sprites").returncode == 0
    assert one_json(scail2("comfyui", "check", comfyui, "--json"))["engines"] == ["sprites"]


def test_the_packs_version_is_the_packages() -> None:
    from scail2_rt.runtime.comfyui.installing import PACK

    text = (PACK / "pyproject.toml").read_text()  # Python 3.10 has no tomllib
    assert f'version = "{version("scail2-rt")}"' in text
    assert f'dependencies = ["scail2-rt=={version("scail2-rt")}"]' in text
