"""The server's side of `check_process`: one process, restarted when it ends.

Results for stored files are kept: the next job with the same files and options, but another prompt or seed, is not
checked again.
"""

import asyncio
import contextlib
import itertools
import json
import sys
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scail2_rt.kernels.errors import Scail2Error
from scail2_rt.runtime.serve.errors import Refusal
from scail2_rt.runtime.serve.fields import request_of
from scail2_rt.runtime.serve.settings import Limits

AT_ONCE = 2  # checks that run concurrently
LINE_BYTES = 4 << 20
KEPT = 64  # results
ANY_VALUE = ("prompt", "negative_prompt", "seed")  # options that do not change the result, as long as they are valid


class Checker:
    """Sends checks to the process that decodes uploads."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._waiting: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self._numbers = itertools.count()
        self._slots, self._starting = asyncio.Semaphore(AT_ONCE), asyncio.Lock()
        self._kept: OrderedDict[str, dict[str, Any]] = OrderedDict()

    async def start(self) -> None:
        """Start the process, unless it runs."""
        async with self._starting:
            if self._reading is not None and not self._reading.done():
                return
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "scail2_rt.runtime.serve.check_process"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=LINE_BYTES,
            )
            self._reading = asyncio.create_task(self._read(self._process))

    async def close(self) -> None:
        """Stop the process; kill it if it still runs after five seconds."""
        process = self._process
        if process is None or process.stdin is None:
            return
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), 5)
        except TimeoutError:
            process.kill()
            await process.wait()

    async def check(self, folder: Path, options: Mapping[str, Any]) -> dict[str, Any]:
        """Check the inputs of a job's folder and return what `check_process.look` returns. Raises Refusal with the
        sentence of the command line; 503 if the process does not answer."""
        limits = {name: getattr(self._limits, name) for name in ("frames", "pixels", "decode_s", "decode_bytes")}
        key = _key(folder, options)
        if key in self._kept and _valid(folder, options):
            self._kept.move_to_end(key)
            return dict(self._kept[key])
        async with self._slots:
            await self.start()
            number = str(next(self._numbers))
            call = {"id": number, "folder": str(folder), "options": dict(options), "limits": limits}
            answer = self._waiting[number] = asyncio.get_running_loop().create_future()
            try:
                assert self._process is not None
                assert self._process.stdin is not None
                self._process.stdin.write(json.dumps(call).encode() + b"\n")
                with contextlib.suppress(ConnectionError):
                    await self._process.stdin.drain()
                found = await asyncio.wait_for(answer, self._limits.decode_s + 30)
            except TimeoutError:
                said = "The process that checks the inputs does not answer. Send the request again."
                raise Refusal(503, said, "check_lost", retry_s=5) from None
            finally:
                del self._waiting[number]
        if "error" in found:
            code = "invalid_input" if found["status"] == 400 else "limit_exceeded"
            raise Refusal(int(found["status"]), str(found["error"]), code)
        if options.get("masking") is None:
            self._kept[key] = found["facts"]
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return dict(found["facts"])

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        while line := await process.stdout.readline():
            answer = json.loads(line)
            waiting = self._waiting.get(answer.get("id", ""))
            if waiting is not None and not waiting.done():
                waiting.set_result(answer)
        await process.wait()
        for waiting in self._waiting.values():
            if not waiting.done():
                lost = {"error": "The check of the inputs was interrupted. Send the request again.", "status": 503}
                waiting.set_result(lost)


def _key(folder: Path, options: Mapping[str, Any]) -> str:
    """The checked options, and what identifies the content of each input: stored files are hard links and never
    change."""
    states = [(path.name, path.stat()) for path in sorted(folder.iterdir())]
    files = [(name, state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns) for name, state in states]
    checked = {name: value for name, value in options.items() if name not in ANY_VALUE}
    return json.dumps([files, checked], sort_keys=True)


def _valid(folder: Path, options: Mapping[str, Any]) -> bool:
    """Whether the options make a request. If not, the complete check names the reason."""
    others = {name: value for name, value in options.items() if name not in ("seconds", "extra_refs", "masking")}
    try:
        request_of(others, folder, options.get("extra_refs", 0))
    except Scail2Error:
        return False
    return True
