"""The libraries of TensorRT's family: their differences, whether one is installed and recent enough, and its messages.

A `Library` holds all differences; the rest of this folder is one code path. Nothing here imports a library before it is
used, and nothing here imports PyTorch: a process that compiles a plan does not need it. A library accepts one logger
per process (a second one is ignored with a warning), so there is one, created once and never freed: it outlives every
builder, runtime and engine. It passes messages to a `MessageLog`, which keeps the last ones for our exceptions and
copies all to the file of the stage being built. Both are called from the library's threads.
"""

import contextlib
import functools
import importlib
import importlib.util
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsInt, TextIO

from scail2_rt.kernels.errors import InputError

if TYPE_CHECKING:
    import tensorrt as trt

KEPT_MESSAGES = 8
LAYERS = "Layers:"  # first word of a plan's layer list


@dataclass(frozen=True, slots=True)
class Library:
    """A library of TensorRT's family.

    name          of the backend
    module        the imported module
    title         name in messages
    minimum       minimum version
    install       the command that installs it
    suffix        of plan files
    timing_cache  whether builds measure kernels and share the measurements
    targets       architectures that it compiles for, on any machine; none: it compiles for the GPU of this machine
    hosting       what its licence says about hosting a service; "" if nothing"""

    name: str
    module: str
    title: str
    minimum: tuple[int, int]
    install: str
    suffix: str
    timing_cache: bool
    targets: tuple[str, ...] = ()
    hosting: str = ""

    @property
    def compiles_here(self) -> bool:
        """Whether a build needs the GPU that will run the plan."""
        return not self.targets

    @property
    def installed(self) -> bool:
        """Whether it can be imported here."""
        return importlib.util.find_spec(self.module) is not None

    def api(self) -> Any:
        """Import and return the library's module."""
        return importlib.import_module(self.module)


TENSORRT = Library(
    "tensorrt", "tensorrt", "TensorRT", (10, 13), 'pip install "scail2-rt[tensorrt]"', "plan", timing_cache=True
)
TENSORRT_RTX = Library(
    "tensorrt-rtx",
    "tensorrt_rtx",
    "TensorRT for RTX",
    (1, 7),
    'pip install "scail2-rt[tensorrt-rtx]"',
    "rtx",
    timing_cache=False,  # deprecated there, without effect
    targets=("sm75", "sm80", "sm86", "sm89", "sm120", "sm121"),
    hosting="TensorRT for RTX may not be used to host a service for third parties.",
)
LIBRARIES = {library.name: library for library in (TENSORRT, TENSORRT_RTX)}


def require_library(library: Library) -> str:
    """Return the installed library's version. Raises InputError if it is missing, cannot be loaded, or is too old."""
    try:
        module = library.api()
    except (ImportError, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"backend {library.name} was requested, but the {library.title} library cannot be loaded here ({reason}). "
            f"Install it with {library.install}, or use --backend torch."
        ) from error
    version = str(module.__version__)
    if _numbers(version) < library.minimum:
        raise InputError(
            f"backend {library.name} needs {library.title} {'.'.join(map(str, library.minimum))} or newer, and "
            f"{version} is installed. Update it with {library.install} --upgrade, or use --backend torch."
        )
    return version


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


class MessageLog:
    """The last errors and warnings, and a plan's layer list; both, and other messages but verbose ones, also go to a
    file. Safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._errors: deque[str] = deque(maxlen=KEPT_MESSAGES)
        self._warnings: deque[str] = deque(maxlen=KEPT_MESSAGES)
        self._file: TextIO | None = None
        self.layers = ""

    def add(self, severity: str, text: str) -> None:
        """Add a message. severity: TensorRT's name (INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE)."""
        if severity == "VERBOSE" and not text.startswith(LAYERS):
            return
        with self._lock:
            if severity == "VERBOSE":
                self.layers = text
            if "ERROR" in severity:
                self._errors.append(text)
            elif severity == "WARNING":
                self._warnings.append(text)
            if self._file is not None:
                with contextlib.suppress(OSError):  # a full disk: writing the plan will report it
                    self._file.write(f"[{severity}] {text}\n")
                    self._file.flush()

    def recent(self) -> list[str]:
        """Return the last errors, or the last warnings if there was no error; each on one line, without repetition."""
        with self._lock:
            return list(dict.fromkeys(" ".join(text.split()) for text in self._errors or self._warnings))

    def clear(self) -> None:
        with self._lock:
            self._errors.clear()
            self._warnings.clear()

    @contextlib.contextmanager
    def writing_to(self, path: Path) -> Iterator[None]:
        """Forget earlier messages and copy new ones to a new file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            self.clear()
            self.layers = ""
            with self._lock:
                self._file = file
            try:
                yield
            finally:
                with self._lock:
                    self._file = None


@functools.cache
def process_log(library: Library) -> MessageLog:
    """Return the log that the process's only logger of a library writes to."""
    return MessageLog()


@functools.cache
def process_logger(library: Library) -> "trt.ILogger":
    """Return the process's only logger of a library."""
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = library.api()

    messages = process_log(library)

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
        """Return each error on one line, without repetition."""
        with self._lock:
            return list(dict.fromkeys(" ".join(text.split()) for _, text in self._errors))

    def clear(self) -> None:
        with self._lock:
            self._errors.clear()


def error_recorder(library: Library, errors: ErrorList) -> "trt.IErrorRecorder":
    """Return a recorder that fills `errors`; the caller must keep a reference to it."""
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = library.api()

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
            return False  # the caller decides whether to continue

    return Recorder()
