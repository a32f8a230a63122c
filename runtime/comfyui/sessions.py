"""The session behind the nodes: at most one, opened on first use and kept between runs of the graph.

ComfyUI manages it as one of its models (`engine_model`): it unloads other models before the session's weights load, and
closes the session when another model needs the memory or the user chooses "unload models". The next run opens it
again."""

import logging
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scail2_rt.engines.backend import Execution
from scail2_rt.engines.folder.manifest import MANIFEST
from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.core.plan import Plan
from scail2_rt.runtime.session.session import Session


@dataclass(frozen=True, slots=True)
class Engines:
    """The output of the Engines node. state: identifies the folder's current build."""

    folder: Path
    backend: str
    execution: Execution
    state: str

    @classmethod
    def of(cls, folder: Path, backend: str = "auto", execution: Execution | None = None) -> "Engines":
        """The engines in a folder. Raises InputError if it has none."""
        return cls(folder, backend, execution or Execution(), folder_state(folder))


def folder_state(folder: Path) -> str:
    """A text that changes when an engine folder is built again. Raises InputError if the folder has no engines."""
    try:
        file = (folder / MANIFEST).stat()
    except OSError:
        raise InputError(
            f"{folder} has no engines. Build them with the node Build engines or with `scail2-rt build-engines`."
        ) from None
    return f"{file.st_mtime_ns}-{file.st_size}"


class WarmSession:
    """Holds the one open session."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._engines: Engines | None = None
        self._session: Session | None = None
        self._model: Any = None  # one for all sessions, because ComfyUI keeps it in its list

    def get(self, engines: Engines) -> Session:
        """The session of these engines, opened if necessary; a session of other engines is closed. Raises InputError if
        the engines cannot be opened."""
        from scail2_rt.runtime.comfyui.engine_model import EngineModel

        with self._lock:
            if self._session is None or self._engines != engines:
                self.drop()
                self._session = Session.open(engines.folder, backend=engines.backend, execution=engines.execution)
                self._engines, self._model = engines, self._model or EngineModel(self.drop)
                logging.info("SCAIL-2: engines of %s opened: %s", engines.folder, self._session.choice)
            self._session.others = _nobody
            return self._session

    def with_room(self, engines: Engines, plan: Plan) -> Session:
        """The session of these engines, after ComfyUI has unloaded models until the plan's run fits. The plan was
        checked as if all other models were unloaded; from here on the memory of the remaining ones counts."""
        on_gpu = self.get(engines).engines.device.type == "cuda"
        self._model.make_room(plan.estimate.peak if on_gpu and plan.estimate is not None else 0)
        session = self.get(engines)  # opens it again if ComfyUI has unloaded it too
        session.others = self._model.others
        return session

    def drop(self) -> None:
        """Close the session and release its memory."""
        with self._lock:
            session, self._session, self._engines = self._session, None, None
            if self._model is not None:
                self._model.held = 0
            if session is not None:
                session.close()
                logging.info("SCAIL-2: engines closed")

    @property
    def is_open(self) -> bool:
        return self._session is not None


def _nobody() -> int:
    return 0


WARM = WarmSession()
