"""The TensorRT modules with one injected fault, loaded in addition to the real ones."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

from tests.support.tensorrt_api.types import REPOSITORY

PACKAGE = "scail2_rt.engines.tensorrt_backend"
MODULES = (  # as they import one another
    "library",
    "layers",
    "rtx_targets",
    "compiling",
    "children",
    "targets",
    "profiles",
    "plans",
    "preflight",
    "times",
    "builder",
    "rtx",
    "session",
    "engine",
)


@dataclass(frozen=True)
class Fault:
    """Replaces the text `old`, which must occur once in `tensorrt_backend/<module>.py`, by `new`."""

    module: str
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.module}: {' '.join(self.old.split())[:40]} > {' '.join(self.new.split())[:40]}"

    def source(self) -> str:
        text = source_of(self.module)
        assert text.count(self.old) == 1, f"{self.old!r} is {text.count(self.old)} times in {self.module}.py"
        return text.replace(self.old, self.new)


def source_of(module: str) -> str:
    return (REPOSITORY / "engines" / "tensorrt_backend" / f"{module}.py").read_text()


@contextmanager
def broken(fault: Fault | None) -> Iterator[dict[str, ModuleType]]:
    """All modules of `tensorrt_backend` made again by short name, one with the fault (none when it is None)."""
    names = {module: f"{PACKAGE}.{module}" for module in MODULES}
    before = {name: sys.modules.get(name) for name in names.values()}
    made: dict[str, ModuleType] = {}
    try:
        for module, name in names.items():
            made[module] = sys.modules[name] = ModuleType(name)
            made[module].__file__ = str(REPOSITORY / "engines" / "tensorrt_backend" / f"{module}.py")
            text = fault.source() if fault is not None and fault.module == module else source_of(module)
            exec(compile(text, f"tensorrt_backend/{module}.py", "exec"), made[module].__dict__)
        yield made
    finally:
        for name, module_before in before.items():
            sys.modules.pop(name, None) if module_before is None else sys.modules.update({name: module_before})
