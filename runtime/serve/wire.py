"""An HTTP client for the interface, with the standard library only, so that commands start fast."""

import contextlib
import http.client
import json
import os
import re
import secrets
import ssl
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlencode, urlsplit

from scail2_rt.kernels.errors import InputError, Scail2Error

ANSWER_S = 180.0  # covers the check of a long clip
PIECE = 1 << 20


class Wire:
    """A connection factory for one service. key: API key, or None. Raises InputError for a malformed URL."""

    def __init__(self, url: str, key: str | None) -> None:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/"):
            raise InputError(f"{url} is not the address of a service. Write it as in http://127.0.0.1:8000.")
        self.url, self._secure = f"{parts.scheme}://{parts.netloc}", parts.scheme == "https"
        self._host, self._port = parts.hostname, parts.port
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    def _connect(self) -> http.client.HTTPConnection:
        if self._secure:
            return http.client.HTTPSConnection(
                self._host, self._port, timeout=ANSWER_S, context=ssl.create_default_context()
            )
        return http.client.HTTPConnection(self._host, self._port, timeout=ANSWER_S)

    @contextlib.contextmanager
    def open(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        """Send a request and yield its response. Raises InputError (4xx) and Scail2Error (5xx) with the service's
        sentence, OSError if the service cannot be reached."""
        connection = self._connect()
        try:
            connection.request(method, path, body, {**self._headers, **(headers or {})})
            response = connection.getresponse()
            if response.status >= 400:
                raise _refused(response)
            yield response
        except http.client.HTTPException as error:
            raise ConnectionError(f"{type(error).__name__}") from error
        finally:
            connection.close()

    def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None, **headers: str) -> dict[str, Any]:
        """Send a JSON body and return the JSON response. headers: underscores in names become hyphens."""
        told = {name.replace("_", "-"): value for name, value in headers.items()}
        data = None if body is None else json.dumps(body)
        if data is not None:
            told["Content-Type"] = "application/json"
        with self.open(method, path, data, told) as response:
            return dict(json.loads(response.read()))

    def keep(self, path: Path, sha256: str) -> str:
        """The id at the service of a file with this hash; the file is sent if the service does not have it."""
        found = self.ask("GET", f"/v1/files?{urlencode({'sha256': sha256, 'limit': 1})}")["data"]
        return str(found[0]["id"]) if found else self._send(path)

    def _send(self, path: Path) -> str:
        boundary = secrets.token_hex(16)
        name = re.sub(r"[^\w.-]", "_", path.name, flags=re.ASCII)
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n'
        tail = f"\r\n--{boundary}--\r\n"
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            headers = {
                "Content-Type": f"multipart/form-data; boundary={boundary}",
                "Content-Length": str(len(head) + size + len(tail)),
            }
            pieces = _pieces(head.encode(), file, tail.encode())
            with self.open("POST", "/v1/files", pieces, headers) as response:
                return str(json.loads(response.read())["id"])

    def download(self, path: str, file: IO[bytes]) -> None:
        """Write a response's body to a file. Raises ConnectionError for an incomplete body."""
        with self.open("GET", path) as response:
            expected, received = int(response.headers["Content-Length"]), 0
            while piece := response.read(PIECE):
                file.write(piece)
                received += len(piece)
        if received != expected:
            raise ConnectionError(f"received {received} of {expected} bytes")

    def events(self, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield server-sent events as (kind, document), until the service ends the stream."""
        with self.open("GET", path) as response:
            kind = ""
            for line in response:
                name, _, value = line.decode().rstrip("\r\n").partition(": ")
                if name == "event":
                    kind = value
                elif name == "data":
                    yield kind, json.loads(value)


def _pieces(head: bytes, file: IO[bytes], tail: bytes) -> Iterator[bytes]:
    yield head
    while piece := file.read(PIECE):
        yield piece
    yield tail


def _refused(response: http.client.HTTPResponse) -> Scail2Error:
    body = response.read(1 << 16)
    try:
        said = str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        said = f"The service answers with {response.status} {response.reason}."
    return (InputError if response.status < 500 else Scail2Error)(said)
