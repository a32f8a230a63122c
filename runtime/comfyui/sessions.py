"""The session behind the nodes: one at a time, opened when it is first needed, kept between runs of the graph.

To ComfyUI it is one of its models (`engine_model`): it is asked to make room before the session's weights load, and
takes the memory back when another model needs it or when the user says "unload models". The session is closed then;
the next run opens it again."""

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
    """What the Engines node hands on: which folder, how it is to run, and which state of the folder that is."""

    folder: Path
    backend: str
    execution: Execution
    state: str

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
        self._lock = threading.RLock()
        self._engines: Engines | None = None
        self._session: Session | None = None
        self._model: Any = None  # one for all sessions: ComfyUI has it in its list

    def get(self, engines: Engines) -> Session:
        """The session of these engines; that of others is closed. InputError when they do not open."""
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
        """The session of these engines when ComfyUI has unloaded models until the plan's run fits. The plan was checked
        as if they were gone already; from here on those that stay count."""
        on_gpu = self.get(engines).engines.device.type == "cuda"
        self._model.make_room(plan.estimate.peak if on_gpu and plan.estimate is not None else 0)
        session = self.get(engines)  # closed, and opened again, where ComfyUI has unloaded it, too
        session.others = self._model.others
        return session

    def drop(self) -> None:
        """Close the session and give its memory back."""
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
