"""NVIDIA's Python bindings of two TensorRT versions, imported without TensorRT, and those of TensorRT for RTX.

The bindings are a small wheel on PyPI; the library is not. The wheel is unpacked as a package `tensorrt`, and beside it
go three libraries compiled here that export the entry points which the bindings need and do nothing. After that
`import tensorrt` works: enums, signatures and callback classes are the real ones. Everything lies in a cache folder of
the user, made at test time; nothing of it belongs in the repository.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from scail2_rt.engines.tensorrt_backend.library import TENSORRT, TENSORRT_RTX, Library, require_library
from scail2_rt.kernels.cache_folder import cache_directory

VERSIONS = ("11.4.0.106", "10.13.3.9")
RTX = "rtx"  # TensorRT for RTX as it is installed: library and all
ALL = (*VERSIONS, RTX)
DISTRIBUTION = "tensorrt_cu13_bindings"
ENTRY_POINTS = {
    "libnvinfer": (
        "createInferBuilder_INTERNAL",
        "createInferRefitter_INTERNAL",
        "createInferRuntime_INTERNAL",
        "getBuilderPluginRegistry",
        "getPluginRegistry",
    ),
    "libnvinfer_plugin": ("initLibNvInferPlugins",),
    "libnvonnxparser": (
        "createNvOnnxParser_INTERNAL",
        "createNvOnnxParserRefitter_INTERNAL",
        "getNvOnnxParserVersion",
    ),
}


class Unavailable(Exception):
    """The bindings are not available on this machine, with the reason as message."""


def cache_folder() -> Path:
    return cache_directory() / "tensorrt-api"


def library_of(version: str) -> Library:
    return TENSORRT_RTX if version == RTX else TENSORRT


def binary(version: str) -> Path:
    """The bindings' own library."""
    if version == RTX:
        spec = importlib.util.find_spec("tensorrt_rtx_bindings")
        assert spec is not None
        assert spec.origin is not None
        return Path(spec.origin).parent / "tensorrt_rtx.so"
    return bindings(version) / "tensorrt" / "tensorrt.so"


def bindings(version: str) -> Path:
    """A folder that, on the import path, provides the module of this version (for an installed version: a folder for
    files derived from it). Raises Unavailable if PyPI, gcc or the installed library is missing."""
    if version == RTX:
        if not TENSORRT_RTX.installed:
            raise Unavailable("TensorRT for RTX is not installed")
        folder = cache_folder() / f"{RTX}-{require_library(TENSORRT_RTX)}-{sys.implementation.cache_tag}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    folder = cache_folder() / f"{version}-{sys.implementation.cache_tag}"
    if (folder / "tensorrt").is_dir():
        return folder
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise Unavailable("no C compiler (gcc) for the stub libraries")
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
        made = Path(scratch) / "made"
        with zipfile.ZipFile(_download(version, Path(scratch))) as wheel:
            wheel.extractall(made)
        package = made / "tensorrt"
        (made / "tensorrt_bindings").rename(package)
        for library, functions in ENTRY_POINTS.items():
            _compile(compiler, package / f"{library}.so.{version.partition('.')[0]}", functions)
        if not folder.exists():
            made.rename(folder)
    return folder


def run(command: list[str], seconds: float, **environment: str) -> str:
    """The standard output of a command. Raises Unavailable, with the end of its output, if it fails or is slow."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, env={**os.environ, **environment}, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(str(error)) from error
    if done.returncode:
        raise Unavailable(f"{' '.join(command[:4])} failed: {(done.stderr or done.stdout).strip()[-400:]}")
    return done.stdout


def _download(version: str, folder: Path) -> Path:
    options = ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--dest", str(folder)]
    run([sys.executable, "-m", "pip", "download", *options, f"{DISTRIBUTION}=={version}"], 180)
    wheels = list(folder.glob("*.whl"))
    if not wheels:
        raise Unavailable(f"pip found no wheel of {DISTRIBUTION} {version} for this Python")
    return wheels[0]


def _compile(compiler: str, library: Path, functions: tuple[str, ...]) -> None:
    source = library.with_suffix(".c")
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in functions))
    run([compiler, "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-o", str(library), str(source)], 60)
    source.unlink()
