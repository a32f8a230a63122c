"""The bindings' interface as data: classes, every overload of every method, properties, enum values, callback names.

Classes and signatures are read from the repaired stubs; enum values and the names under which the bindings look up
overridden methods come from the bindings themselves, loaded in a process of their own, because two versions cannot be
loaded into one.
"""

import ast
import functools
import inspect
import json
import sys
from dataclasses import dataclass, field

from tests.support.tensorrt_api.bindings import binary, bindings, library_of, run
from tests.support.tensorrt_api.stubs import stubs

DUMP = """
import importlib, inspect, json, sys
tensorrt = importlib.import_module(sys.argv[1])
def members(owner):
    return {n: {k: int(v) for k, v in c.__members__.items()}
            for n, c in vars(owner).items() if inspect.isclass(c) and hasattr(c, "__members__")}
found = members(tensorrt)
found["ILogger.Severity"] = members(tensorrt.ILogger)["Severity"]
assert tuple(tensorrt.Dims([2, 3])) == tuple(tensorrt.Dims((2, 3))) == (2, 3)
print(json.dumps({"version": tensorrt.__version__, "enums": found}))
"""


@dataclass
class ClassSurface:
    """One class. methods: name → the signatures of its overloads, without self; properties: name → can it be set?"""

    name: str
    bases: tuple[str, ...]
    methods: dict[str, list[inspect.Signature]] = field(default_factory=dict)
    properties: dict[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Surface:
    version: str
    classes: dict[str, ClassSurface]
    enums: dict[str, dict[str, int]]
    binary: bytes  # of the bindings, to look names up in

    def method(self, owner: str, name: str) -> list[inspect.Signature]:
        """The overloads of a method of a class or its bases; empty if there is no such method."""
        known = self.classes.get(owner)
        if known is None:
            return []
        return known.methods.get(name) or [s for base in known.bases for s in self.method(base, name)]

    def settable(self, owner: str, name: str) -> bool | None:
        """Whether this property can be set; None if it does not exist."""
        known = self.classes.get(owner)
        if known is None:
            return None
        if name in known.properties:
            return known.properties[name]
        return next((s for s in (self.settable(base, name) for base in known.bases) if s is not None), None)


@functools.cache
def surface(version: str) -> Surface:
    """The interface of this version. Unavailable when the bindings cannot be had."""
    folder = bindings(version)
    tree = ast.parse((stubs(version) / "tensorrt" / "tensorrt.pyi").read_text())
    command = [sys.executable, "-c", DUMP, library_of(version).module]
    dumped = json.loads(run(command, 60, PYTHONPATH=str(folder)))
    classes = {node.name: _class(node) for node in tree.body if isinstance(node, ast.ClassDef)}
    return Surface(dumped["version"], classes, dumped["enums"], binary(version).read_bytes())


def _class(node: ast.ClassDef) -> ClassSurface:
    found = ClassSurface(node.name, tuple(ast.unparse(base) for base in node.bases))
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            found.properties[item.target.id] = True
        if not isinstance(item, ast.FunctionDef):
            continue
        decorators = [ast.unparse(decorator) for decorator in item.decorator_list]
        if "property" in decorators:
            found.properties.setdefault(item.name, False)
        elif f"{item.name}.setter" in decorators:
            found.properties[item.name] = True
        else:
            found.methods.setdefault(item.name, []).append(_signature(item.args, "staticmethod" not in decorators))
    return found


def _signature(arguments: ast.arguments, bound: bool) -> inspect.Signature:
    names = arguments.args[1:] if bound else arguments.args
    defaults = [inspect.Parameter.empty] * (len(names) - len(arguments.defaults)) + [
        None if ast.unparse(value) == "None" else ... for value in arguments.defaults[-len(names) :] if names
    ]
    return inspect.Signature(
        [
            inspect.Parameter(
                argument.arg,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=default,
                annotation=ast.unparse(argument.annotation) if argument.annotation else "",
            )
            for argument, default in zip(names, defaults, strict=True)
        ]
    )
