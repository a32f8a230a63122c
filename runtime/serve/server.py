"""`scail2-rt serve`: a data folder that nobody else serves, the processes, and uvicorn."""

import contextlib
import os
import signal
import socket
import sqlite3
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import uvicorn

from scail2_rt.engines.folder.lock import alone
from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.serve.api import make_app
from scail2_rt.runtime.serve.doors import Doors, PatientProtocol
from scail2_rt.runtime.serve.service import Service
from scail2_rt.runtime.serve.settings import Settings, address_of
from scail2_rt.runtime.serve.starting import told
from scail2_rt.runtime.serve.store import Store

CONNECTIONS = 1000
STOP_S = 5
KEEP_ALIVE_S = 75


def default_data() -> Path:
    """scail2-rt/serve in $XDG_DATA_HOME or ~/.local/share."""
    xdg = Path(os.environ.get("XDG_DATA_HOME", ""))
    return (xdg if xdg.is_absolute() else Path.home() / ".local" / "share") / "scail2-rt" / "serve"


def run(settings: Settings) -> None:
    """Serve until Ctrl-C or SIGTERM. InputError when the folder is served already, the port is taken or the engines
    cannot be opened."""
    os.umask(0o077)
    try:
        settings.data.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise InputError(
            f"The data folder {settings.data} cannot be made ({error.strerror}): give --data another."
        ) from error
    refusal = f"Another service uses {settings.data}: stop it, or give --data another folder."
    with alone(settings.data, refusal, lambda reason: print(f"warning: {reason}", file=sys.stderr)):
        listener = _listen(settings)
        try:
            store = Store(settings.data)
        except sqlite3.Error as error:
            listener.close()
            raise InputError(
                f"{settings.data}/service.sqlite cannot be used ({error}): make room, or mend it."
            ) from error
        try:
            _serve(settings, store, listener)
        finally:
            store.close()
            listener.close()


def _listen(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise InputError(
            f"The service cannot listen on {address_of(settings.host, settings.port)} ({error.strerror}): give another "
            "--port or --host."
        ) from error
    return listener


def _serve(settings: Settings, store: Store, listener: socket.socket) -> None:
    service = Service(settings, store)
    failure: list[InputError] = []

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        try:
            async with told(settings.data, settings.engines):
                await service.start()
            yield
        except InputError as error:
            failure.append(error)
            raise
        finally:
            await service.close()

    app = make_app(service)
    app.router.lifespan_context = lifespan
    doors = Doors(app, settings, lambda status: service.metrics.refused.labels(status).inc())
    config = uvicorn.Config(
        doors,
        http=PatientProtocol,
        ws="none",
        log_level="critical",
        access_log=False,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=KEEP_ALIVE_S,  # clients that poll every few seconds keep their connection
        timeout_graceful_shutdown=STOP_S,
        server_header=False,
        proxy_headers=False,
    )
    with contextlib.suppress(SystemExit):  # its way to say that the start has failed
        Server(config, lambda: _greet(settings, service, listener)).run([listener])
    if failure:
        raise failure[0]


class Server(uvicorn.Server):
    """uvicorn's, which says when it listens, and after Ctrl-C or SIGTERM returns instead of raising it again."""

    def __init__(self, config: uvicorn.Config, greet: Callable[[], None]) -> None:
        super().__init__(config)
        self._greet = greet

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._greet()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, self.handle_exit) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)


def _greet(settings: Settings, service: Service, listener: socket.socket) -> None:
    """What runs and where, on stderr; the address alone on stdout."""
    about = service.pool.workers[0].about or {}
    print(f"engines: {about.get('choice')}", file=sys.stderr)
    if hosting := about.get("hosting"):
        print(f"licence: {hosting}", file=sys.stderr)
    print(f"http://{address_of(settings.host, listener.getsockname()[1])}", flush=True)
