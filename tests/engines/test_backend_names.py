"""Only the registry makes decisions by a backend's name: checked on the syntax trees of all packages."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from scail2_rt.engines.registry import BACKENDS

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("kernels", "export", "engines", "runtime", "benchmarks")
REGISTRY = REPOSITORY / "engines" / "registry.py"
NAMES = {*BACKENDS, "tensorrt-rtx"}


def decisions(source: str) -> list[int]:
    """Lines that compare with, look for or match a backend's name, or ask for the prefix of an attention variant's."""
    return sorted({node.lineno for node in ast.walk(ast.parse(source)) if _decides(node)})


def _decides(node: ast.AST) -> bool:
    if isinstance(node, ast.Compare):
        return any(_named(operand) for operand in (node.left, *node.comparators))
    if isinstance(node, ast.MatchValue):
        return _named(node.value)
    return isinstance(node, ast.Call) and _asks_for_a_prefix(node)


def _named(node: ast.AST) -> bool:
    """Whether the node is a backend's name, or a literal collection that contains one."""
    if isinstance(node, ast.Tuple | ast.List | ast.Set):
        return any(_named(element) for element in node.elts)
    if isinstance(node, ast.Dict):
        return any(_named(key) for key in node.keys if key is not None)
    return isinstance(node, ast.Constant) and node.value in NAMES


def _asks_for_a_prefix(call: ast.Call) -> bool:
    """`name.startswith("8bit")`, or with a backend's name, alone or in a tuple."""
    if not isinstance(call.func, ast.Attribute) or call.func.attr != "startswith":
        return False
    constants = [node.value for argument in call.args for node in ast.walk(argument) if isinstance(node, ast.Constant)]
    return any(isinstance(value, str) and (value in NAMES or value.startswith("8bit")) for value in constants)


def modules() -> Iterator[Path]:
    for package in PACKAGES:
        yield from (REPOSITORY / package).rglob("*.py")


def test_only_the_registry_decides_by_name() -> None:
    files = [path for path in modules() if path != REGISTRY]
    assert len(files) > 150, "the packages were not found"
    found = {str(path.relative_to(REPOSITORY)): decisions(path.read_text(encoding="utf-8")) for path in files}
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "line",
    [
        'backend == "torch"',
        '"tensorrt" in backends',
        'backend in ("onnxruntime", "tensorrt-rtx")',
        '(name, place) != ("torch", "cuda")',
        'variant.startswith("8bit")',
        'backend.startswith(("tensorrt", "x"))',
        'name in {"torch": 1}',
    ],
)
def test_what_it_finds(line: str) -> None:
    assert decisions(f"first = 1\nsecond = {line}\n") == [2]


def test_it_finds_a_matched_name_and_passes_what_is_no_decision() -> None:
    assert decisions('match backend:\n    case "cpu" | "torch":\n        pass\n') == [2]
    innocent = 'open_engines(folder, "torch")\nTABLE = {"torch": 1}\ndevice.type == "cuda"\nname.startswith("dit.")\n'
    assert decisions(innocent) == []
