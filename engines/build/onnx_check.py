"""Check whether a TensorRT library supports the nodes of exported files, with Polygraphy, NVIDIA's inspection tool.

`polygraphy inspect capability` lets the library's parser read a file and lists each node that it rejects, with the
reason. It needs no GPU. Polygraphy chooses its library once per process, by an environment variable, so it runs in a
separate process; TensorRT for RTX is used if installed, else TensorRT.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from scail2_rt.engines.tensorrt_backend.library import TENSORRT, TENSORRT_RTX, Library
from scail2_rt.kernels.errors import InputError, Scail2Error

RTX_SWITCH = "POLYGRAPHY_USE_TENSORRT_RTX"
_CALL = "import sys; from polygraphy.tools import main; sys.exit(main())"
_LISTED = 8


def parser_library() -> Library:
    """Return the library to check with. Raises InputError if there is none, or no Polygraphy."""
    found = next((library for library in (TENSORRT_RTX, TENSORRT) if library.installed), None)
    if found is None or importlib.util.find_spec("polygraphy") is None:
        raise InputError(
            "--check needs Polygraphy and a TensorRT library, which are not installed. Install them: "
            f"{TENSORRT_RTX.install}."
        )
    return found


def check_capability(files: Iterable[Path]) -> str:
    """Return title and version of the library, which supports every node of these ONNX files.

    Raises Scail2Error with the nodes that it rejects."""
    library = parser_library()
    refused = [f"{file.name}: {node}" for file in files for node in refused_nodes(file, library)]
    if refused:
        more = f"; and {len(refused) - _LISTED} more" if len(refused) > _LISTED else ""
        raise Scail2Error(
            f"{library.title} rejects the exported graphs: {'; '.join(refused[:_LISTED])}{more}. Leave out --check to "
            "write the files anyway."
        )
    return f"{library.title} {library.api().__version__}"


def refused_nodes(file: Path, library: Library) -> list[str]:
    """Return operator, node and reason of each rejected node. Raises Scail2Error if the file cannot be read."""
    with tempfile.TemporaryDirectory(prefix="scail2-rt-check.") as scratch:
        done = subprocess.run(
            [sys.executable, "-c", _CALL, "inspect", "capability", str(file), "-o", scratch],
            env={**os.environ, RTX_SWITCH: "1" if library is TENSORRT_RTX else "0"},
            cwd=scratch,
            capture_output=True,
            text=True,
            check=False,
        )
        results = Path(scratch) / "results.txt"
        if results.is_file():
            rows = [line.split("|") for line in results.read_text().splitlines() if line.count("|") >= 3]
            cells = [[cell.strip() for cell in row[1:]] for row in rows[1:]]
            return [f"{operator} {node} ({'|'.join(reason)})" for operator, node, *reason in cells]
    if done.returncode or "fully supported" not in done.stdout:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise Scail2Error(f"Polygraphy could not inspect {file}: {' '.join(last) or 'it said nothing'}.")
    return []
