"""Progress lines while a service starts, which takes minutes with a large model. The estimate of the time left is the
duration of the last start with the same engines."""

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

STARTS = "starts.json"  # in the data folder: engine folder → seconds of its last start
FIRST_S, EVERY_S = 2.0, 10.0


@contextlib.asynccontextmanager
async def progress_lines(data: Path, engines: Path) -> AsyncIterator[None]:
    """Print progress lines on stderr while the body runs. If it ends without an error, store its duration."""
    began, before = time.monotonic(), _read(data)
    teller = asyncio.create_task(_tell(began, before.get(str(engines))))
    try:
        yield
    finally:
        teller.cancel()
    with contextlib.suppress(OSError):
        (data / STARTS).write_text(json.dumps(before | {str(engines): round(time.monotonic() - began, 1)}))


async def _tell(began: float, last_s: float | None) -> None:
    await asyncio.sleep(FIRST_S)
    while True:
        took = time.monotonic() - began
        left = "" if last_s is None else f", about {max(last_s - took, 0):.0f} s left"
        print(f"starting: loading the engines, {took:.0f} s so far{left}", file=sys.stderr, flush=True)
        await asyncio.sleep(EVERY_S)


def _read(data: Path) -> dict[str, float]:
    try:
        return {str(name): float(seconds) for name, seconds in json.loads((data / STARTS).read_text()).items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
