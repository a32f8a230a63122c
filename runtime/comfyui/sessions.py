"""The session behind the nodes: one at a time, opened when it is first needed, kept between runs of the graph.

To ComfyUI it is one of its models (`engine_model`): it is asked to make room before the session's weights load, and
takes the memory back when another model needs it or when the user says "unload models". The session is closed then;
the next run opens it again."""

import threading
from dataclasses import dataclass
from pathlib import Path

from scail2_rt.engines.backend import Execution
from scail2_rt.engines.folder.manifest import MANIFEST
from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.session.session import Session


@dataclass(frozen=True, slots=True)
class Engines:
    """What the Engines node hands on: which folder, how it is to run, and which state of the folder that is."""

    folder: Path
    backend: str = "auto"
    execution: Execution = Execution()
    state: str = ""

    @classmethod
    def of(cls, folder: Path, backend: str = "auto", execution: Execution | None = None) -> "Engines":
        """InputError when the folder holds no engines."""
        return cls(folder, backend, execution or Execution(), folder_state(folder))


def folder_state(folder: Path) -> str:
    """Changes when an engine folder is built again. InputError where none is."""
    try:
        file = (folder / MANIFEST).stat()
    except OSError:
        raise InputError(
            f"{folder} holds no engines: build them with the node Build engines or with `scail2-rt build-engines`."
        ) from None
    return f"{file.st_mtime_ns}-{file.st_size}"


class WarmSession:
    """The one session that is kept."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._engines: Engines | None = None
        self._session: Session | None = None

    def get(self, engines: Engines) -> Session:
        """The session of these engines; that of others is closed. InputError when they do not open."""
        with self._lock:
            if self._session is not None and self._engines == engines:
                return self._session
            self._close()
            self._session = Session.open(engines.folder, backend=engines.backend, execution=engines.execution)
            self._engines = engines
            return self._session

    def drop(self) -> None:
        """Close the session and give its memory back."""
        with self._lock:
            self._close()

    @property
    def is_open(self) -> bool:
        return self._session is not None

    def _close(self) -> None:
        session, self._session, self._engines = self._session, None, None
        if session is not None:
            session.close()


WARM = WarmSession()
