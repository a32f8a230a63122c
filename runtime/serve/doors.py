"""Who comes in: hosts, origins and keys, before any route; and connections that say nothing.

A web page elsewhere must not reach a service on loopback through its visitor's browser: requests that name another host
(DNS rebinding) or come from another origin are refused. Keys are compared in constant time, all of them each time; an
owner's name in the database is a hash of its key.
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

LOCAL = "local"  # the owner of everything where there are no keys
OPEN = ("/health", "/ready", "/", "/docs")
HEADER_WAIT_S = 15.0
SAFE_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "x-frame-options": "DENY",
    "content-security-policy": "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
    "object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
}


class Doors:
    """ASGI middleware around the whole interface. `scope["state"]["owner"]` says whose request it is."""

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
            raise Refusal(403, "The service is not called by this name here (see --allow-host).", "host_not_allowed")

    def _check_origin(self, headers: dict[str, str], scope: Scope) -> None:
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
        if origin is not None and _parts(origin).netloc != headers.get("host"):
            raise Refusal(403, "Pages of other origins may not call this service.", "origin_not_allowed")
        visit = headers.get("sec-fetch-mode") == "navigate" and scope["method"] == "GET" and scope["path"] == "/"
        if site not in ("none", "same-origin") and not visit:
            raise Refusal(403, "Pages of other origins may not call this service.", "origin_not_allowed")

    def _owner(self, headers: dict[str, str], path: str) -> str:
        if not self._keys:
            return LOCAL
        if path in OPEN or path.startswith("/page/"):
            return ""
        kind, _, key = headers.get("authorization", "").partition(" ")
        given = hashlib.sha256(key.strip().encode()).digest()
        found = [known for known in self._keys if hmac.compare_digest(known, given)]
        if kind.lower() != "bearer" or not found:
            raise Refusal(401, "Give a key of this service: Authorization: Bearer KEY.", "invalid_api_key")
        return hashlib.sha256(found[0]).hexdigest()[:32]


def _parts(url: str) -> SplitResult:
    """The parts of an address; all empty where it is none."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")


def _with_headers(send: Send) -> Send:
    """Every answer carries `SAFE_HEADERS`."""
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
    """uvicorn's own, which lets go of a connection whose request line and headers are not there after
    `HEADER_WAIT_S`: it has no limit for that."""

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
        if self.cycle.response_complete and self.conn.trailing_data[0]:  # the beginning of another request came with it
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
