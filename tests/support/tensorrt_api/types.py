"""mypy over source files with the genuine types of TensorRT."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mypy import api

from tests.support.tensorrt_api.stubs import stubs

REPOSITORY = Path(__file__).resolve().parents[3]
CONFIGURATION = """[mypy]
namespace_packages = True
explicit_package_bases = True
check_untyped_defs = True
disallow_untyped_defs = True
warn_unreachable = True
[mypy-torch.*,numpy.*,onnx.*]
follow_imports = skip
[mypy-tensorrt.*]
ignore_errors = True
[mypy-tensorrt_rtx.*]
ignore_missing_imports = True
"""


def type_errors(version: str, sources: Sequence[Path], folder: Path) -> list[str]:
    """mypy's errors in `sources` against the stubs of this TensorRT version. `folder`: for its configuration."""
    configuration = folder / f"mypy-{version}.ini"
    configuration.write_text(CONFIGURATION)
    paths = os.pathsep.join([str(stubs(version)), str(REPOSITORY / ".typecheck")])
    before = os.environ.get("MYPYPATH")
    os.environ["MYPYPATH"] = paths
    try:
        arguments = ["--config-file", str(configuration), "--cache-dir", str(stubs(version).parent / "mypy-cache")]
        executable = ["--python-executable", sys.executable, "--no-error-summary", "--hide-error-context"]
        out, problem, _ = api.run([*arguments, *executable, *map(str, sources)])
    finally:
        os.environ.pop("MYPYPATH") if before is None else os.environ.update(MYPYPATH=before)
    assert not problem, problem
    assert "[syntax]" not in out, f"mypy stopped: {out}"
    names = {source.name for source in sources}
    return [line for line in out.splitlines() if ": error:" in line and Path(line.split(":")[0]).name in names]
