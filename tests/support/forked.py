"""The installed command without its start-up time: one process imports all modules, then forks a child per call.

Importing PyTorch takes longer than running the tiny model, and the tests run about two hundred commands. A child runs
`main()` as the console script does, in its own process, with its own environment, working folder, standard streams and
exit code; only the imports are the parent's. `test_cli.py` runs the real script.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import pkgutil
import select
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from tests.support.command import SCAIL2_RT

# Not onnxruntime, whose import starts a thread: a lock that it has at the fork would never be released in the child.
HEAVY = ("av", "numpy", "onnx", "PIL.Image", "rich.console", "rich.table", "tokenizers", "torch")
ROOMS = ("engines", "export", "runtime")


class CommandServer:
    """The parent process, started by the tests. All commands of a test session inherit its environment."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.forked"],
            env=dict(environment),
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(
        self, words: Sequence[str], environment: Mapping[str, str], cwd: Path | None, timeout_s: float
    ) -> subprocess.CompletedProcess[str]:
        """As `subprocess.run` of the console script, captured as text."""
        server = self._process
        assert server.stdin is not None
        assert server.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            streams = [Path(folder) / name for name in ("stdout", "stderr")]
            call = {
                "words": [str(SCAIL2_RT), *words],
                "environment": dict(environment),
                "cwd": str(cwd or Path.cwd()),
                "streams": [str(stream) for stream in streams],
            }
            server.stdin.write(json.dumps(call) + "\n")
            server.stdin.flush()
            if not select.select([server.stdout], [], [], timeout_s)[0]:
                self.close(kill=True)
                raise subprocess.TimeoutExpired([SCAIL2_RT, *words], timeout_s)
            code = int(server.stdout.readline())
            said = [stream.read_text(encoding="utf-8") for stream in streams]
        return subprocess.CompletedProcess(call["words"], code, *said)

    def close(self, kill: bool = False) -> None:
        if kill:
            self._process.kill()
        self._process.communicate()


def serve() -> None:
    """Answer each line of stdin, a call, with the exit code of its child. Returns in a child that is to run a call."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # inherited by a child until it sets its own
    for line in sys.stdin:
        call = json.loads(line)
        child = os.fork()
        if child == 0:
            answers.close()
            become(call)
            return
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)
    sys.exit()


def become(call: dict[str, object]) -> None:
    """Set this process's folder, streams, arguments and environment for a call."""
    words, environment, cwd, streams = (call[name] for name in ("words", "environment", "cwd", "streams"))
    os.chdir(str(cwd))
    os.environ.clear()
    os.environ.update(environment)  # type: ignore[call-overload]
    for number, stream in enumerate(streams, 1):  # type: ignore[call-overload]
        file = os.open(stream, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    sys.argv[:] = words  # type: ignore[call-overload]


def preload() -> None:
    """Import the modules that commands import. Modules that cannot be imported are skipped."""
    names = list(HEAVY)
    for room in ROOMS:
        package = importlib.import_module(f"scail2_rt.{room}")
        names += [module.name for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
    for name in names:
        if not name.endswith("__main__"):
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    threads = Path("/proc/self/task")
    assert not threads.is_dir() or len(list(threads.iterdir())) == 1, "an import started a thread: see HEAVY"


def finish(code: object) -> NoReturn:
    """End this process like `sys.exit(code)`, but without the interpreter's clean-up, which takes a second."""
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    preload()
    gc.freeze()  # a collection in a child would write to every object, and so copy the parent's memory
    serve()
    from scail2_rt.runtime.cli.main import main

    try:
        main()
    except SystemExit as end:
        finish(end.code)
    finish(None)
