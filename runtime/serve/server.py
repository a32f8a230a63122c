"""`scail2-rt serve`: locks the data folder, starts the processes and runs uvicorn."""

import asyncio
import contextlib
import os
import signal
import socket
import sqlite3
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import uvicorn

from scail2_rt.engines.folder.lock import alone
from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.serve.api import make_app
from scail2_rt.runtime.serve.doors import Doors, PatientProtocol
from scail2_rt.runtime.serve.service import Service
from scail2_rt.runtime.serve.settings import Settings, address_of
from scail2_rt.runtime.serve.starting import progress_lines
from scail2_rt.runtime.serve.store import Store

CONNECTIONS = 1000
STOP_S = 5
KEEP_ALIVE_S = 75


def default_data() -> Path:
    """The default data folder: scail2-rt/serve in $XDG_DATA_HOME or ~/.local/share."""
    xdg = Path(os.environ.get("XDG_DATA_HOME", ""))
    return (xdg if xdg.is_absolute() else Path.home() / ".local" / "share") / "scail2-rt" / "serve"


def run(settings: Settings) -> None:
    """Serve until Ctrl-C or SIGTERM. Raises InputError if another service uses the data folder, the port is in use or
    the engines cannot be opened."""
    os.umask(0o077)
    try:
        settings.data.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise InputError(
            f"The data folder {settings.data} cannot be created ({error.strerror}). Give another folder with --data."
        ) from error
    refusal = f"Another service uses {settings.data}. Stop it, or give another folder with --data."
    with alone(settings.data, refusal, lambda reason: print(f"warning: {reason}", file=sys.stderr)):
        listener = _listen(settings)
        try:
            store = Store(settings.data)
        except sqlite3.Error as error:
            listener.close()
            raise InputError(
                f"{settings.data}/service.sqlite cannot be used ({error}). Free disk space, or repair or move the file."
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
        listener.listen()  # now, since another service that is starting may have bound the same port
    except OSError as error:
        listener.close()
        raise InputError(
            f"The service cannot listen on {address_of(settings.host, settings.port)} ({error.strerror}). Give another "
            "--port or --host."
        ) from error
    return listener


def _serve(settings: Settings, store: Store, listener: socket.socket) -> None:
    service = Service(settings, store)
    failure: list[InputError | KeyboardInterrupt] = []

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        try:
            async with progress_lines(settings.data, settings.engines):
                await _unless_ended(service.start(), server)
            yield
        except (InputError, KeyboardInterrupt) as error:
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
        timeout_keep_alive=KEEP_ALIVE_S,  # longer than the interval of polling clients
        timeout_graceful_shutdown=STOP_S,
        server_header=False,
        proxy_headers=False,
    )
    server = Server(config, lambda: _greet(settings, service, listener))
    with contextlib.suppress(SystemExit):  # uvicorn raises it if the start fails
        server.run([listener])
    if failure:
        raise failure[0]


async def _unless_ended(start: Coroutine[Any, Any, None], server: uvicorn.Server) -> None:
    """Wait for the start of the service, which takes minutes with a large model. Raises KeyboardInterrupt if Ctrl-C or
    SIGTERM comes meanwhile."""
    starting = asyncio.create_task(start)
    while not starting.done() and not server.should_exit:
        await asyncio.wait([starting], timeout=0.1)
    if not starting.done():
        starting.cancel()
        await asyncio.wait([starting])
        raise KeyboardInterrupt
    await starting


class Server(uvicorn.Server):
    """uvicorn's server; calls `greet` when it listens, and returns after Ctrl-C or SIGTERM instead of raising it."""

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
    """Print engines and licence note to stderr and the address to stdout."""
    about = service.pool.workers[0].about or {}
    print(f"engines: {about.get('choice')}", file=sys.stderr)
    if hosting := about.get("hosting"):
        print(f"licence: {hosting}", file=sys.stderr)
    print(f"http://{address_of(settings.host, listener.getsockname()[1])}", flush=True)
