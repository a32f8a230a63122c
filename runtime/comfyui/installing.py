"""The folder in ComfyUI's `custom_nodes`: put there, looked at, taken away. Neither torch nor ComfyUI is imported.

The nodes run in ComfyUI's own Python, so what is installed there is asked before anything is written. Nothing of it is
ever changed: what the nodes need and lack is named in a command that adds it, held to the versions that are there by a
constraints file; what is too old for them is listed and refused."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scail2_rt.kernels.errors import InputError, Scail2Error

PACK = Path(__file__).with_name("pack")
NAME = "scail2_rt"  # of the folder in custom_nodes, and of the one for engines in models
MARK = "installed.json"
VERSIONS = "host-versions.txt"
INPUTS = "example_inputs"
COMMAND_ONLY = ("click", "huggingface-hub", "onnx", "onnxscript", "rich", "packaging")  # which no node imports
PYTHONS = (  # beside ComfyUI; the last is its portable build's, in its spelling
    *("{}/.venv/bin/python", "{}/venv/bin/python", "{}/.venv/Scripts/python.exe", "{}/venv/Scripts/python.exe"),
    "{}/../python_embeded/python.exe",
)
_ASK = """
import importlib.metadata, json, sys
found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions() if d.metadata["Name"]}
print(json.dumps({"python": list(sys.version_info[:3]), "packages": found}))
"""


@dataclass(frozen=True, slots=True)
class Found:
    """What there is in a ComfyUI folder.

    version    of ComfyUI
    python     that runs it; python_version; how: why this one was taken
    ours       version of scail2-rt that is installed in it, None: it is not
    torch      its version there
    lacking    requirements of the nodes that are not installed; too_old: a sentence for each that is, in a version that
               the nodes cannot use
    nodes      version of the nodes in custom_nodes, None: there are none
    engines    names of the folders in models/scail2_rt
    models     files in models/diffusion_models that are named for SCAIL"""

    folder: Path
    version: str
    python: Path
    python_version: str
    how: str
    ours: str | None
    torch: str | None
    lacking: tuple[str, ...]
    too_old: tuple[str, ...]
    nodes: str | None
    engines: tuple[str, ...]
    models: tuple[str, ...]

    @property
    def text(self) -> str:
        lines = [
            f"{self.folder}: ComfyUI {self.version}",
            f"Python {self.python_version}, {self.python} ({self.how}); torch {self.torch or 'not installed'}",
            f"scail2-rt in it: {self.ours or 'not installed'}",
            f"nodes: {self.nodes or 'not installed'}",
            f"engines in models/{NAME}: {', '.join(self.engines) or 'none'}",
            f"checkpoints by name: {', '.join(self.models) or 'none'}",
        ]
        lines += [f"lacking: {', '.join(self.lacking)}"] if self.lacking else []
        return "\n".join([*lines, *(f"too old: {sentence}" for sentence in self.too_old)])


@dataclass(frozen=True, slots=True)
class Installed:
    """What was put there. commands: what is to be run next, none where the nodes can start."""

    found: Found
    nodes: Path
    inputs: tuple[str, ...]
    commands: tuple[str, ...]

    @property
    def text(self) -> str:
        lines = [self.found.text, f"wrote {self.nodes}"]
        lines += [f"pictures of the example workflows in input: {', '.join(self.inputs)}"] if self.inputs else []
        if self.commands:
            lines += ["In ComfyUI's Python, nothing of which this changes:", *(f"  {line}" for line in self.commands)]
        return "\n".join([*lines, "Then restart ComfyUI; the workflows are among its templates, under scail2_rt."])


@dataclass(frozen=True, slots=True)
class Removed:
    """What was taken away, and what stays."""

    removed: tuple[str, ...]
    kept: tuple[str, ...]

    @property
    def text(self) -> str:
        return "\n".join([*(f"removed {path}" for path in self.removed), *(f"kept {path}" for path in self.kept)])


def look(folder: Path, python: Path | None = None) -> Found:
    """What is in a ComfyUI folder. InputError where there is none, or one without the V3 node interface."""
    folder = whole(folder)
    version = comfyui_version(folder)
    chosen, how = (whole(python), "it was named") if python is not None else find_python(folder)
    answer = ask(chosen)
    packages = {canonicalize_name(name): value for name, value in answer["packages"].items()}
    lacking, too_old = compare(packages)
    checkpoints = folder / "models" / "diffusion_models"
    return Found(
        folder=folder,
        version=version,
        python=chosen,
        python_version=".".join(map(str, answer["python"])),
        how=how,
        ours=packages.get(canonicalize_name("scail2-rt")),
        torch=packages.get(canonicalize_name("torch")),
        lacking=lacking,
        too_old=too_old,
        nodes=installed_version(folder / "custom_nodes" / NAME),
        engines=tuple(sorted(file.parent.name for file in (folder / "models" / NAME).glob("*/manifest.json"))),
        models=tuple(sorted(file.name for file in checkpoints.glob("*") if "scail" in file.name.lower())),
    )


def whole(path: Path) -> Path:
    return Path(os.path.abspath(path.expanduser()))


def comfyui_version(folder: Path) -> str:
    """InputError for a folder that is none of ComfyUI, or of one that is too old."""
    if not (folder / "main.py").is_file() or not (folder / "custom_nodes").is_dir():
        raise InputError(f"{folder} is no ComfyUI folder: give the one with main.py and custom_nodes in it.")
    file = folder / "comfyui_version.py"
    match = (
        re.search(r'__version__\s*=\s*"([^"]+)"', file.read_text(encoding="utf-8", errors="replace"))
        if file.is_file()
        else None
    )
    version = match[1] if match else "of unknown version"
    if not (folder / "comfy_api" / "latest").is_dir():
        raise InputError(f"ComfyUI {version} in {folder} lacks the V3 node interface: update it to 0.3.64 or newer.")
    return version


def find_python(folder: Path) -> tuple[Path, str]:
    """The Python that runs ComfyUI, and why that one."""
    for pattern in PYTHONS:
        path = Path(pattern.format(folder))
        if path.is_file():
            return path.parent.resolve() / path.name, "beside ComfyUI"  # the link in an environment is its Python
    return Path(sys.executable), "this one: there is none beside ComfyUI; name another one with --python"


def ask(python: Path) -> dict[str, Any]:
    """Version and packages of a Python. InputError when it does not run."""
    try:
        result = subprocess.run([python, "-c", _ASK], capture_output=True, text=True, timeout=120, check=True)
        return dict(json.loads(result.stdout))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise InputError(f"{python} does not run as a Python ({error}): name ComfyUI's with --python.") from error


def own_version() -> str:
    return importlib.metadata.version("scail2-rt")


def requirements() -> list[Requirement]:
    """What the nodes need, of this package's own requirements."""
    lines = map(Requirement, importlib.metadata.requires("scail2-rt") or ())
    return [
        line
        for line in lines
        if line.name not in COMMAND_ONLY and (line.marker is None or line.marker.evaluate({"extra": ""}))
    ]


def compare(packages: Mapping[Any, str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(requirements that are not there, a sentence for each package of a wrong version)."""
    lacking, wrong = [], []
    for requirement in requirements():
        version = packages.get(canonicalize_name(requirement.name))
        if version is None:
            lacking.append(f"{requirement.name}{requirement.specifier}")
        elif not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} is {version} there and the nodes need {requirement.specifier}")
    return tuple(lacking), tuple(wrong)


def install(folder: Path, python: Path | None = None) -> Installed:
    """Put the nodes into `custom_nodes`, replacing an older version of them, and the pictures of the examples into
    `input`. InputError for what `look` refuses, packages that are too old, and a folder of that name that is not ours.

    The folder appears whole or not at all."""
    found = look(folder, python)
    if found.too_old:
        raise InputError(
            f"{'; '.join(found.too_old)}. Nothing was written: bring ComfyUI's Python up to date (ComfyUI's own update "
            "does it), then try again."
        )
    nodes = found.folder / "custom_nodes" / NAME
    if os.path.lexists(nodes) and found.nodes is None:
        raise InputError(f"{nodes} is there and is not of `scail2-rt comfyui install`: move it away first.")
    pictures = found.folder / "input"
    before = set(pictures.iterdir()) if pictures.is_dir() else None
    try:
        inputs = _put_inputs(pictures, _mark(nodes))
        _put_pack(nodes, inputs, ask(found.python)["packages"])
    except OSError as error:
        _take_back(pictures, before)
        raise Scail2Error(f"{nodes} could not be written ({error}): make room or give the right to write.") from error
    found = replace(found, nodes=own_version())
    return Installed(found, nodes, tuple(inputs), _commands(found, nodes))


def _put_pack(nodes: Path, inputs: Mapping[str, str], packages: Mapping[str, str]) -> None:
    with tempfile.TemporaryDirectory(prefix=f".{NAME}-", dir=nodes.parent.parent) as temporary:
        made = Path(temporary) / "new"
        shutil.copytree(PACK, made, ignore=shutil.ignore_patterns("__pycache__", INPUTS))
        files = [file.relative_to(made).as_posix() for file in sorted(made.rglob("*")) if file.is_file()]
        mark = {"package": "scail2-rt", "version": own_version(), "inputs": dict(inputs), "files": files}
        (made / MARK).write_text(json.dumps(mark, indent=2) + "\n", encoding="utf-8")
        pins = [f"{name}=={version.partition('+')[0]}" for name, version in sorted(packages.items())]
        (made / VERSIONS).write_text("\n".join(pins) + "\n", encoding="utf-8")
        for file in _users_files(nodes):
            target = made / file.relative_to(nodes)
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, target)
        old = Path(temporary) / "old"
        if nodes.exists():
            os.replace(nodes, old)
        try:
            os.replace(made, nodes)
        except BaseException:
            if old.exists():
                os.replace(old, nodes)
            raise


def _put_inputs(folder: Path, mark: Mapping[str, Any]) -> dict[str, str]:
    """Name → SHA-256 of the pictures that are ours there; one of the user's under such a name stays."""
    folder.mkdir(exist_ok=True)
    put = {}
    for source in sorted((PACK / INPUTS).iterdir()):
        target, known = folder / source.name, mark.get("inputs", {}).get(source.name)
        if not target.exists() or sha256(target) == known:
            shutil.copyfile(source, target)
        if sha256(target) == sha256(source):
            put[source.name] = sha256(source)
    return put


def _take_back(folder: Path, before: set[Path] | None) -> None:
    """Pictures that were put into a folder; before: what it held, None: it was not there."""
    with contextlib.suppress(OSError):
        for path in set(folder.iterdir()) - (before or set()):
            path.unlink()
        if before is None:
            folder.rmdir()


def _users_files(nodes: Path) -> list[Path]:
    """What lies among the nodes and was not put there by us, nor by Python."""
    ours = {MARK, VERSIONS, *_mark(nodes).get("files", ())}
    files = [file for file in sorted(nodes.rglob("*")) if not file.is_dir() and "__pycache__" not in file.parts]
    return [file for file in files if file.relative_to(nodes).as_posix() not in ours]


def _remove_pack(nodes: Path) -> list[Path]:
    """Take our files away, and the folders that become empty; what stays there."""
    kept = _users_files(nodes)
    if not kept:
        nodes.unlink() if nodes.is_symlink() else shutil.rmtree(nodes)
        return []
    for cache in list(nodes.rglob("__pycache__")):
        shutil.rmtree(cache)
    for path in sorted(nodes.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            with contextlib.suppress(OSError):  # not empty
                path.rmdir()
        elif path not in kept:
            path.unlink()
    return kept


def remove(folder: Path) -> Removed:
    """Take the nodes and the unchanged pictures away; engines, results and the user's own files stay. InputError where
    there are no nodes of ours."""
    folder = whole(folder)
    comfyui_version(folder)
    nodes, engines = folder / "custom_nodes" / NAME, folder / "models" / NAME
    if installed_version(nodes) is None:
        raise InputError(f"{nodes} holds no nodes of `scail2-rt comfyui install`: there is nothing to remove.")
    removed, kept = [str(nodes)], list[str]()
    for name, known in _mark(nodes).get("inputs", {}).items():
        picture = folder / "input" / name
        if picture.is_file():
            (removed if sha256(picture) == known else kept).append(str(picture))
    try:
        kept += map(str, _remove_pack(nodes))
        for path in removed[1:]:
            Path(path).unlink(missing_ok=True)
    except OSError as error:
        raise Scail2Error(
            f"{nodes} could not be taken away ({error}): give the right to write, and try again."
        ) from error
    return Removed(tuple(removed), (*kept, *([str(engines)] if engines.is_dir() else [])))


def installed_version(nodes: Path) -> str | None:
    """Version of our nodes in this folder; None where it is not ours."""
    mark = _mark(nodes)
    return str(mark.get("version")) if mark.get("package") == "scail2-rt" else None


def _mark(nodes: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((nodes / MARK).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _commands(found: Found, nodes: Path) -> tuple[str, ...]:
    """What adds the package and what it lacks to ComfyUI's Python."""
    pip, commands = f'"{found.python}" -m pip install', []
    if found.ours != own_version():
        commands.append(f"{pip} --no-deps {source_of_package()}")
    if found.lacking:
        wanted = " ".join(f'"{requirement}"' for requirement in found.lacking)
        commands.append(f'{pip} --constraint "{nodes / VERSIONS}" {wanted}')
    return tuple(commands)


def source_of_package() -> str:
    """Where pip finds this package: the folder or file that it was installed from, else its name and version."""
    text = importlib.metadata.distribution("scail2-rt").read_text("direct_url.json")
    url = urllib.parse.urlparse(json.loads(text)["url"] if text else "")
    return f'"{urllib.request.url2pathname(url.path)}"' if url.scheme == "file" else f"scail2-rt=={own_version()}"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
