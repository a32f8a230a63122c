"""TensorRT as a library: is it there, is it recent enough, and what does it say.

Nothing here, or in any `tensorrt_*` module, imports TensorRT before it is used. TensorRT knows one logger a process (a
second one is ignored with a warning), so there is one, made once and never dropped: it outlives every builder, runtime
and engine. It passes messages to a `MessageLog`, which keeps the last ones for our exceptions and copies all to the
file of the stage being built. TensorRT calls logger and error recorder from threads of its own.
"""

import contextlib
import functools
import importlib
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from scail2_rt.kernels.errors import InputError

if TYPE_CHECKING:
    import tensorrt as trt

KEPT_MESSAGES = 8


@dataclass(frozen=True, slots=True)
class Library:
    """A library of TensorRT's family. name: of the backend; module: what is imported; title: for people; minimum: the
    first version that will do; install: the command that installs it."""

    name: str
    module: str
    title: str
    minimum: tuple[int, int]
    install: str


TENSORRT = Library("tensorrt", "tensorrt", "TensorRT", (10, 13), 'pip install "scail2-rt[tensorrt]"')


def require_library(library: Library = TENSORRT) -> str:
    """Version of the installed library. InputError when there is none, it cannot be loaded, or it is too old."""
    try:
        module = importlib.import_module(library.module)
    except (ImportError, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"backend {library.name} was asked for, but the {library.title} library cannot be loaded here ({reason}); "
            f"install it with {library.install}, or use --backend torch."
        ) from error
    version = str(module.__version__)
    if _numbers(version) < library.minimum:
        raise InputError(
            f"backend {library.name} needs {library.title} {'.'.join(map(str, library.minimum))} or newer, and "
            f"{version} is installed; update it with {library.install} --upgrade, or use --backend torch."
        )
    return version


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


class MessageLog:
    """The last errors and warnings, and a file for everything but verbose messages. Safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._errors: deque[str] = deque(maxlen=KEPT_MESSAGES)
        self._warnings: deque[str] = deque(maxlen=KEPT_MESSAGES)
        self._file: TextIO | None = None

    def add(self, severity: str, text: str) -> None:
        """severity: TensorRT's name (INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE)."""
        if severity == "VERBOSE":
            return
        with self._lock:
            if "ERROR" in severity:
                self._errors.append(text)
            elif severity == "WARNING":
                self._warnings.append(text)
            if self._file is not None:
                self._file.write(f"[{severity}] {text}\n")
                self._file.flush()

    def recent(self) -> list[str]:
        """The last errors, or, when there was none, the last warnings; each on one line, none twice."""
        with self._lock:
            return list(dict.fromkeys(" ".join(text.split()) for text in self._errors or self._warnings))

    def clear(self) -> None:
        with self._lock:
            self._errors.clear()
            self._warnings.clear()

    @contextlib.contextmanager
    def writing_to(self, path: Path) -> Iterator[None]:
        """Forget earlier messages and copy those to come into a new file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            self.clear()
            with self._lock:
                self._file = file
            try:
                yield
            finally:
                with self._lock:
                    self._file = None


@functools.cache
def process_log() -> MessageLog:
    """Where the process's one logger writes."""
    return MessageLog()


@functools.cache
def process_logger() -> "trt.ILogger":
    """The one logger of the process."""
    import tensorrt as trt

    messages = process_log()

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # the bindings need the base initialised by name

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            messages.add(severity.name, msg)

    return Logger()


class ErrorList:
    """Errors that TensorRT reported to an error recorder, in order."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._errors: list[tuple[object, str]] = []

    def add(self, code: object, text: str) -> None:
        with self._lock:
            self._errors.append((code, text))

    def get(self, index: int) -> tuple[object, str]:
        with self._lock:
            return self._errors[index]

    def count(self) -> int:
        with self._lock:
            return len(self._errors)

    def texts(self) -> list[str]:
        """Each error on one line, none twice."""
        with self._lock:
            return list(dict.fromkeys(" ".join(text.split()) for _, text in self._errors))

    def clear(self) -> None:
        with self._lock:
            self._errors.clear()


def error_recorder(errors: ErrorList) -> "trt.IErrorRecorder":
    """A recorder that fills `errors`; whoever sets it must keep it."""
    from typing import Any, SupportsInt

    import tensorrt as trt

    class Recorder(trt.IErrorRecorder):
        def __init__(self) -> None:
            trt.IErrorRecorder.__init__(self)

        def num_errors(self) -> int:
            return errors.count()

        def get_num_errors(self) -> int:  # the name under which the bindings look the method up
            return errors.count()

        def get_error_code(self, arg0: SupportsInt) -> Any:
            return errors.get(int(arg0))[0]

        def get_error_desc(self, arg0: SupportsInt) -> str:
            return errors.get(int(arg0))[1]

        def has_overflowed(self) -> bool:
            return False

        def clear(self) -> None:
            errors.clear()

        def report_error(self, arg0: trt.ErrorCodeTRT, arg1: str) -> bool:
            errors.add(arg0, arg1)
            return False  # whether to go on is for the caller to see

    return Recorder()
