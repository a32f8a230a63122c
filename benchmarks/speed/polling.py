"""Simulate many clients that poll the state of jobs at a service on this machine, each with its own connection."""

import asyncio
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

from scail2_rt.kernels.errors import Scail2Error

POLL_S = 5.0


def poll(url: str, paths: Sequence[str], clients: int, seconds: float) -> list[float]:
    """Poll with `clients` clients, each every `POLL_S` seconds with staggered starts, for `seconds` seconds. Returns
    the seconds of each request. Raises Scail2Error for a URL that is not on loopback."""
    parts = urlsplit(url)
    if parts.hostname not in ("127.0.0.1", "localhost", "::1") or parts.port is None:
        raise Scail2Error(f"{url} is not on this machine. Give the URL of a service on this machine.")
    return asyncio.run(_poll(parts.hostname, parts.port, paths, clients, seconds))


async def _poll(host: str, port: int, paths: Sequence[str], clients: int, seconds: float) -> list[float]:
    end = time.monotonic() + seconds
    latencies: list[float] = []

    async def client(number: int) -> None:
        await asyncio.sleep(POLL_S * number / clients)
        reader, writer = await asyncio.open_connection(host, port)
        request = f"GET {paths[number % len(paths)]} HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode()
        while time.monotonic() < end:
            began = time.perf_counter()
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 200"):
                raise Scail2Error(f"The service answered with {head.splitlines()[0].decode()}. Read its log.")
            length = next(line for line in head.lower().splitlines() if line.startswith(b"content-length:"))
            await reader.readexactly(int(length.split(b":")[1]))
            latencies.append(time.perf_counter() - began)
            await asyncio.sleep(POLL_S)
        writer.close()

    await asyncio.gather(*(client(number) for number in range(clients)))
    return latencies
