"""Install, inspect and remove the folder in ComfyUI's `custom_nodes`. Imports neither torch nor ComfyUI.

The nodes run in ComfyUI's own Python, so its installed packages are read before anything is written. They are never
changed. For missing packages a pip command is printed, with a constraints file that keeps the installed versions.
Packages that are too old for the nodes are listed and the installation is refused."""

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
NAME = "scail2_rt"  # name of the folder in custom_nodes, and of the engines' folder in models
MARK = "installed.json"
VERSIONS = "host-versions.txt"
INPUTS = "example_inputs"
COMMAND_ONLY = ("click", "huggingface-hub", "onnx", "onnxscript", "rich", "packaging")  # not imported by any node
PYTHONS = (  # paths relative to ComfyUI; the last one (so spelled) is that of its portable build
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
    """The state of a ComfyUI folder.

    version    version of ComfyUI
    python     the Python that runs it; python_version: its version; how: why it was chosen
    ours       version of scail2-rt installed in that Python; None: not installed
    torch      version of torch installed in it; None: not installed
    lacking    requirements of the nodes that are not installed
    too_old    one sentence per installed package whose version the nodes cannot use
    nodes      version of the nodes in custom_nodes; None: not installed
    engines    names of the folders in models/scail2_rt
    models     files in models/diffusion_models with "scail" in their name"""

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
            f"scail2-rt in this Python: {self.ours or 'not installed'}",
            f"nodes: {self.nodes or 'not installed'}",
            f"engines in models/{NAME}: {', '.join(self.engines) or 'none'}",
            f'checkpoints with "scail" in the name: {", ".join(self.models) or "none"}',
        ]
        lines += [f"missing: {', '.join(self.lacking)}"] if self.lacking else []
        return "\n".join([*lines, *(f"too old: {sentence}" for sentence in self.too_old)])


@dataclass(frozen=True, slots=True)
class Installed:
    """The result of an installation. inputs: names of the example inputs; commands: commands that the user must run
    next; empty if the nodes can start."""

    found: Found
    nodes: Path
    inputs: tuple[str, ...]
    commands: tuple[str, ...]

    @property
    def text(self) -> str:
        lines = [self.found.text, f"wrote {self.nodes}"]
        lines += [f"inputs of the example workflows in input: {', '.join(self.inputs)}"] if self.inputs else []
        if self.commands:
            lines += ["Run these commands (they keep all installed versions):", *(f"  {c}" for c in self.commands)]
        return "\n".join([*lines, "Then restart ComfyUI. The workflows are among its templates, under scail2_rt."])


@dataclass(frozen=True, slots=True)
class Removed:
    """The result of a removal: removed and kept paths."""

    removed: tuple[str, ...]
    kept: tuple[str, ...]

    @property
    def text(self) -> str:
        return "\n".join([*(f"removed {path}" for path in self.removed), *(f"kept {path}" for path in self.kept)])


def look(folder: Path, python: Path | None = None) -> Found:
    """Inspect a ComfyUI folder. python: the Python that runs it, if not found beside it. Raises InputError for another
    folder, for a ComfyUI without the V3 node interface and for a Python that does not run."""
    folder = absolute(folder)
    version = comfyui_version(folder)
    chosen, how = (absolute(python), "given by --python") if python is not None else find_python(folder)
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


def absolute(path: Path) -> Path:
    """The absolute path, with ~ expanded and symbolic links kept."""
    return Path(os.path.abspath(path.expanduser()))


def comfyui_version(folder: Path) -> str:
    """The version of ComfyUI. Raises InputError for another folder and for a ComfyUI that is too old."""
    if not (folder / "main.py").is_file() or not (folder / "custom_nodes").is_dir():
        raise InputError(f"{folder} is not a ComfyUI folder. Give the folder that contains main.py and custom_nodes.")
    file = folder / "comfyui_version.py"
    match = (
        re.search(r'__version__\s*=\s*"([^"]+)"', file.read_text(encoding="utf-8", errors="replace"))
        if file.is_file()
        else None
    )
    version = match[1] if match else "of unknown version"
    if not (folder / "comfy_api" / "latest").is_dir():
        raise InputError(f"ComfyUI {version} in {folder} lacks the V3 node interface. Update it to 0.3.64 or newer.")
    return version


def find_python(folder: Path) -> tuple[Path, str]:
    """(the Python that runs ComfyUI, why it was chosen)."""
    for pattern in PYTHONS:
        path = Path(pattern.format(folder))
        if path.is_file():
            # the last part may be a link, which must stay: it selects the virtual environment
            return path.parent.resolve() / path.name, "beside ComfyUI"
    return Path(sys.executable), "this command's Python, because none is beside ComfyUI; choose another with --python"


def ask(python: Path) -> dict[str, Any]:
    """The version ("python") and installed packages ("packages") of a Python. Raises InputError if it does not run."""
    try:
        result = subprocess.run([python, "-c", _ASK], capture_output=True, text=True, timeout=120, check=True)
        return dict(json.loads(result.stdout))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise InputError(f"{python} does not run as a Python ({error}). Give ComfyUI's with --python.") from error


def own_version() -> str:
    """The version of this package."""
    return importlib.metadata.version("scail2-rt")


def requirements() -> list[Requirement]:
    """The requirements of this package that the nodes need."""
    lines = map(Requirement, importlib.metadata.requires("scail2-rt") or ())
    return [
        line
        for line in lines
        if line.name not in COMMAND_ONLY and (line.marker is None or line.marker.evaluate({"extra": ""}))
    ]


def compare(packages: Mapping[Any, str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(missing requirements, one sentence per package of a wrong version). packages: name → version."""
    lacking, wrong = [], []
    for requirement in requirements():
        version = packages.get(canonicalize_name(requirement.name))
        if version is None:
            lacking.append(f"{requirement.name}{requirement.specifier}")
        elif not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} is {version} in ComfyUI; the nodes need {requirement.specifier}")
    return tuple(lacking), tuple(wrong)


def install(folder: Path, python: Path | None = None) -> Installed:
    """Install the nodes in `custom_nodes`, replacing an older version, and the example inputs in `input`. The folder is
    renamed into place when it is complete. Raises InputError for inputs that `look` refuses, for packages that are too
    old and for a foreign folder of that name; Scail2Error if it cannot be written."""
    found = look(folder, python)
    if found.too_old:
        raise InputError(
            f"{'; '.join(found.too_old)}. Nothing was written. Update the packages of ComfyUI's Python (ComfyUI's own "
            "update does), then try again."
        )
    nodes = found.folder / "custom_nodes" / NAME
    if os.path.lexists(nodes) and found.nodes is None:
        raise InputError(f"{nodes} exists but was not made by `scail2-rt comfyui install`. Move it away first.")
    pictures = found.folder / "input"
    before = set(pictures.iterdir()) if pictures.is_dir() else None
    try:
        inputs = _put_inputs(pictures, _mark(nodes))
        _put_pack(nodes, inputs, ask(found.python)["packages"])
    except OSError as error:
        _take_back(pictures, before)
        raise Scail2Error(
            f"{nodes} could not be written ({error}). Free disk space or grant write permission."
        ) from error
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
    """Copy the example inputs; a user's file of the same name is kept. Returns name → SHA-256 of those in place."""
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
    """Undo `_put_inputs`. before: the folder's earlier files; None: the folder did not exist."""
    with contextlib.suppress(OSError):
        for path in set(folder.iterdir()) - (before or set()):
            path.unlink()
        if before is None:
            folder.rmdir()


def _users_files(nodes: Path) -> list[Path]:
    """The files in the nodes' folder that neither this command nor Python has written."""
    ours = {MARK, VERSIONS, *_mark(nodes).get("files", ())}
    files = [file for file in sorted(nodes.rglob("*")) if not file.is_dir() and "__pycache__" not in file.parts]
    return [file for file in files if file.relative_to(nodes).as_posix() not in ours]


def _remove_pack(nodes: Path) -> list[Path]:
    """Remove the installed files and empty folders. Returns the user's files, which stay."""
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
    """Remove the nodes and the unchanged example inputs. Engines, results and the user's files stay. Raises InputError
    if the nodes are not installed, Scail2Error if they cannot be removed."""
    folder = absolute(folder)
    comfyui_version(folder)
    nodes, engines = folder / "custom_nodes" / NAME, folder / "models" / NAME
    if installed_version(nodes) is None:
        raise InputError(f"{nodes} has no nodes of `scail2-rt comfyui install`. Check the folder of ComfyUI.")
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
        raise Scail2Error(f"{nodes} could not be removed ({error}). Grant write permission and try again.") from error
    return Removed(tuple(removed), (*kept, *([str(engines)] if engines.is_dir() else [])))


def installed_version(nodes: Path) -> str | None:
    """The version of the nodes installed in this folder; None if it has none or is a foreign folder."""
    mark = _mark(nodes)
    return str(mark.get("version")) if mark.get("package") == "scail2-rt" else None


def _mark(nodes: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((nodes / MARK).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _commands(found: Found, nodes: Path) -> tuple[str, ...]:
    """The commands that install this package and missing requirements in ComfyUI's Python."""
    pip, commands = f'"{found.python}" -m pip install', []
    if found.ours != own_version():
        commands.append(f"{pip} --no-deps {source_of_package()}")
    if found.lacking:
        wanted = " ".join(f'"{requirement}"' for requirement in found.lacking)
        commands.append(f'{pip} --constraint "{nodes / VERSIONS}" {wanted}')
    return tuple(commands)


def source_of_package() -> str:
    """The pip requirement for this package: the folder or file it was installed from, else name and version."""
    text = importlib.metadata.distribution("scail2-rt").read_text("direct_url.json")
    url = urllib.parse.urlparse(json.loads(text)["url"] if text else "")
    return f'"{urllib.request.url2pathname(url.path)}"' if url.scheme == "file" else f"scail2-rt=={own_version()}"


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
