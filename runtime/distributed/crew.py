"""One set of ranks beside the leader: start them, talk to them, notice failures, end them.

Each rank has a connection that closes when either side ends. If it was started here, a thread also waits for its
process. The first failure ends all ranks and releases every wait for them in this process. The caller that ends the
crew joins its threads and frees its resources: a thread that is inside a library when the interpreter exits would crash
the process.
"""

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import AuthenticationError
from typing import IO, Any

import torch

from scail2_rt.kernels.errors import Scail2Error
from scail2_rt.runtime.distributed.channel import KEY_BYTES, Channel, listener
from scail2_rt.runtime.distributed.peers import Groups
from scail2_rt.runtime.distributed.torchrun import Place, announce
from scail2_rt.runtime.distributed.worker import Opener, Start

LOCAL = "127.0.0.1"
START_S = 300.0  # limit for all ranks to import, connect and open their engines
END_S = 3.0  # limit for a rank that was told to close
JOIN_S = 5.0  # limit for a thread whose process or connection has ended
DOUBT_S = 5.0  # wait for the report that a rank died, which may arrive after the error that its death caused here


class Crew:
    """One set of ranks, from start to end. The leader is rank 0. With `place`, torchrun has started the ranks;
    otherwise they are started here."""

    def __init__(self, size: int, device: torch.device, opener: Opener, place: Place | None) -> None:
        import torch.distributed as dist

        self.size, self.device, self._opener = size, device, opener
        self._host = LOCAL if place is None else place.host
        self.failure: Scail2Error | None = None
        self.in_call = False
        self._groups: Groups | None = None
        self._changed = threading.Condition()
        self._ready: set[int] = set()
        self._closed: set[int] = set()
        self._closing = False
        self._channels: dict[int, Channel] = {}
        self._key = secrets.token_bytes(KEY_BYTES)
        self._listener = listener(LOCAL if place is None else "0.0.0.0", self._key, size)
        self._port: int = self._listener.address[1]
        self._accepted = threading.Event()
        self._store: Any = dist.TCPStore(self._host, 0, is_master=True, wait_for_workers=False)
        started = range(1, size) if place is None else ()
        self._logs = [tempfile.TemporaryFile() for _ in started]  # noqa: SIM115 (closed by _release)
        self.processes = [self._launch(rank, log) for rank, log in enumerate(self._logs, 1)]
        if place is not None:
            announce(self._host, self._port, self._key)
        self._threads = [threading.Thread(target=self._accept, name="scail2-rt accept", daemon=True)]
        self._threads += [
            threading.Thread(target=self._watch, args=(rank, process), name="scail2-rt watch", daemon=True)
            for rank, process in enumerate(self.processes, 1)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def groups(self) -> Groups:
        assert self._groups is not None
        return self._groups

    def wait_ready(self) -> None:
        """Wait until all ranks have opened their engines and joined the groups. Raises Scail2Error if a rank fails."""
        if self._groups is None:
            self._wait(lambda: len(self._ready) == self.size - 1)
            self.call("join")
            self._threads.append(threading.Thread(target=self._join, name="scail2-rt join", daemon=True))
            self._threads[-1].start()
            self._wait(lambda: self._groups is not None)
        self.check()

    def _join(self) -> None:
        """Create the groups, in a separate thread: it waits for the other ranks, one of which may have ended."""
        try:
            groups = Groups(self._store, 0, self.size, self.device, local=self._host == LOCAL)
        except Exception as error:
            self._fail(f"Rank 0 cannot reach the other ranks ({' '.join(str(error).split())[:200]})")
            return
        with self._changed:
            self._groups = groups
            self._changed.notify_all()

    def _wait(self, done: Callable[[], bool]) -> None:
        limit = time.monotonic() + START_S
        with self._changed:
            while self.failure is None and not done():
                self._changed.wait(0.2)
                if time.monotonic() > limit:
                    ranks = f"The {self.size} ranks of this session"
                    raise Scail2Error(f"{ranks} did not start in {START_S:.0f} s. Run the command again.")
        self.check()

    def check(self) -> None:
        if self.failure is not None:
            raise self.failure

    def call(self, name: str, *arguments: Any) -> None:
        for channel in self._channels.values():
            channel.send((name, arguments))

    def failure_behind(self, error: BaseException) -> Scail2Error | None:
        """Return the failure of another rank that caused an error here: its report may arrive a moment later."""
        if isinstance(error, RuntimeError | OSError) and not isinstance(error, torch.OutOfMemoryError):
            with self._changed:
                self._changed.wait_for(lambda: self.failure is not None, DOUBT_S if self.in_call else 0)
        return self.failure if isinstance(error, Exception) and error is not self.failure else None

    def end(self) -> None:
        self._closing = True
        for process in self.processes:
            process.kill()
        self._release()

    def close(self) -> None:
        self._closing = True
        with contextlib.suppress(OSError):
            self.call("close")
        limit = time.monotonic() + END_S
        with self._changed:  # the only way to wait for ranks that this process did not start
            self._changed.wait_for(lambda: self.failure is not None or len(self._closed) == len(self._channels), END_S)
        for process in self.processes:
            try:
                process.wait(max(limit - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                process.kill()
        self._release()

    def _release(self) -> None:
        """Free all resources in this thread: some wait for other threads, so garbage collection must not do it."""
        for process in self.processes:
            process.wait()
        if self._groups is not None:
            self._threads += self._groups.abort()
        self._groups = self._store = None
        if not self._accepted.is_set():  # closing does not wake a thread that accepts
            with contextlib.suppress(OSError):
                socket.create_connection((self._host, self._port), 1.0).close()
        with contextlib.suppress(OSError):
            self._listener.close()
        for channel in self._channels.values():
            with contextlib.suppress(OSError):
                channel.close()
        for thread in list(self._threads):
            thread.join(JOIN_S)
        for log in self._logs:
            log.close()

    def _launch(self, rank: int, log: IO[bytes]) -> "subprocess.Popen[bytes]":
        """Start a rank in a separate process session, so that Ctrl-C in a terminal reaches the leader only."""
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
        process = subprocess.Popen(
            [sys.executable, "-m", "scail2_rt.runtime.distributed.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
        where = {"host": LOCAL, "port": self._port, "key": self._key.hex(), "rank": rank}
        assert process.stdin is not None
        process.stdin.write(json.dumps(where).encode() + b"\n")
        process.stdin.close()
        return process

    def _accept(self) -> None:
        try:
            for _ in range(1, self.size):
                channel = Channel(self._listener.accept())
                _, (rank, local_rank) = channel.receive()
                device = f"cuda:{local_rank}" if self.device.type == "cuda" else "cpu"
                store = (self._host, self._store.port)
                channel.send(Start(rank, self.size, store, self._host == LOCAL, device, self._opener))
                self._channels[rank] = channel
                self._threads.append(channel.listen(partial(self._on_message, rank), partial(self._on_close, rank)))
        except (AttributeError, AuthenticationError, EOFError, OSError):
            return  # this crew was released, or the connecting rank ended: `_watch` reports which
        finally:
            self._accepted.set()

    def _on_message(self, rank: int, message: tuple[str, Any]) -> None:
        what, detail = message
        if what in ("ready", "closed"):
            with self._changed:
                (self._ready if what == "ready" else self._closed).add(rank)
                self._changed.notify_all()
        elif what == "failed":
            self._fail(f"Rank {rank} of {self.size} failed: {detail.rstrip('.')}")

    def _on_close(self, rank: int) -> None:
        """Handle the end of a connection. `_watch` reports how the process ended if it was started here."""
        if not self.processes:
            self._fail(f"The connection to rank {rank} of {self.size} was lost")

    def _watch(self, rank: int, process: "subprocess.Popen[bytes]") -> None:
        code = process.wait()
        time.sleep(0.05)  # let its own report, if any, arrive first
        how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        self._fail(f"Rank {rank} of {self.size} {how}{self._last_line(rank)}")

    def _last_line(self, rank: int) -> str:
        """Return the last line that a rank wrote, in brackets, or nothing."""
        try:
            log = self._logs[rank - 1]
            log.seek(0)
            lines = log.read().decode(errors="replace").split("\n")
        except (OSError, ValueError):
            return ""
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f" ({last[:200]})" if last else ""

    def _fail(self, what: str) -> None:
        with self._changed:
            if self._closing or self.failure is not None:
                return
            self.failure = Scail2Error(f"{what}; all ranks of this run were stopped. Run the command again.")
            self._changed.notify_all()
        for process in self.processes:
            process.kill()
        if self._groups is not None:
            self._groups.abort()
