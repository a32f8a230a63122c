"""Checks of host, origin and API key before any route, and a timeout for connections that send no request.

A foreign web page must not reach a service on loopback through its visitor's browser: requests with another Host
header (DNS rebinding) or another origin are refused. Every request is compared with all keys in constant time. The
database stores a hash of the key as the owner of a job.
"""

import asyncio
import hashlib
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import SplitResult, urlsplit

from uvicorn.protocols.http.h11_impl import H11Protocol

from scail2_rt.runtime.serve.errors import Refusal
from scail2_rt.runtime.serve.settings import Settings, is_loopback, read_keys

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOCAL = "local"  # the owner of every job if the service has no keys
OPEN = ("/health", "/ready", "/", "/docs")
HEADER_WAIT_S = 15.0
OTHER_ORIGIN = "Pages of other origins may not call this service. Open the service's own page."
SAFE_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "x-frame-options": "DENY",
    "content-security-policy": "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
    "object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
}


class Doors:
    """ASGI middleware around the interface. Sets `scope["state"]["owner"]` to the owner of the request."""

    def __init__(self, app: App, settings: Settings, refused: Callable[[int], None]) -> None:
        self._app, self._refused = app, refused
        self._keys = [hashlib.sha256(key.encode()).digest() for key in read_keys(settings.key_file)]
        self._hosts = {settings.host.lower(), *(name.lower() for name in settings.allow_hosts)}
        if is_loopback(settings.host):
            self._hosts |= {"localhost", "127.0.0.1", "::1"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            self._check_host(headers)
            self._check_origin(headers, scope)
            scope.setdefault("state", {})["owner"] = self._owner(headers, scope["path"])
        except Refusal as refusal:
            self._refused(refusal.status)
            return await _answer(refusal, send)
        return await self._app(scope, receive, _with_headers(send))

    def _check_host(self, headers: dict[str, str]) -> None:
        host = _parts(f"//{headers.get('host', '')}").hostname or ""
        if host not in self._hosts:
            said = "The service does not accept this host name. Ask its operator for --allow-host NAME."
            raise Refusal(403, said, "host_not_allowed")

    def _check_origin(self, headers: dict[str, str], scope: Scope) -> None:
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
        if origin is not None and _parts(origin).netloc != headers.get("host"):
            raise Refusal(403, OTHER_ORIGIN, "origin_not_allowed")
        visit = headers.get("sec-fetch-mode") == "navigate" and scope["method"] == "GET" and scope["path"] == "/"
        if site not in ("none", "same-origin") and not visit:
            raise Refusal(403, OTHER_ORIGIN, "origin_not_allowed")

    def _owner(self, headers: dict[str, str], path: str) -> str:
        if not self._keys:
            return LOCAL
        if path in OPEN or path.startswith("/page/"):
            return ""
        kind, _, key = headers.get("authorization", "").partition(" ")
        given = hashlib.sha256(key.strip().encode()).digest()
        found = [known for known in self._keys if hmac.compare_digest(known, given)]
        if kind.lower() != "bearer" or not found:
            said = "The API key is missing or wrong. Send one of this service's keys: Authorization: Bearer KEY."
            raise Refusal(401, said, "invalid_api_key")
        return hashlib.sha256(found[0]).hexdigest()[:32]


def _parts(url: str) -> SplitResult:
    """The parts of a URL; all are empty if it is malformed."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")


def _with_headers(send: Send) -> Send:
    """Add `SAFE_HEADERS` to every response."""
    extra = [(name.encode(), value.encode()) for name, value in SAFE_HEADERS.items()]

    async def told(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", []), *extra]
        await send(message)

    return told


async def _answer(refusal: Refusal, send: Send) -> None:
    body = json.dumps(refusal.body).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
    if refusal.status == 401:
        headers["www-authenticate"] = "Bearer"
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


class PatientProtocol(H11Protocol):
    """uvicorn's h11 protocol with a timeout that uvicorn lacks: a connection is closed if its request line and headers
    have not arrived after `HEADER_WAIT_S` seconds."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        if self._timer is None and (before is None or before.response_complete):
            self._wait()
        super().data_received(data)
        if self.cycle is not before:
            self._stop()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete and self.conn.trailing_data[0]:  # part of the next request has arrived
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._stop()
        self._timer = self.loop.call_later(HEADER_WAIT_S, self.transport.close)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
