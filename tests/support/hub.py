"""A local Hugging Face hub with one repository: the list of files with their hashes, and ranges of files.

It answers the requests of the client library, so that the installed command can be tested without a network."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from scail2_rt.runtime.jobs.download import RemoteFile

REPOSITORY = "zai-org/SCAIL-2"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = 100  # bytes from which a file counts as a large one, with a SHA-256


@dataclass(slots=True)
class FakeHub:
    """`files`: path → content. `asked`: (path, first byte) of every range. `lies`: paths whose bytes arrive damaged.
    `stalls`: (path, first byte) from which on nothing is sent until `go` is set. `listed`: another list of files."""

    files: dict[str, bytes]
    asked: list[tuple[str, int]] = field(default_factory=list)
    lies: set[str] = field(default_factory=set)
    stalls: tuple[str, int] | None = None
    go: threading.Event = field(default_factory=threading.Event)
    listed: dict[str, bytes] | None = None
    prefixes: dict[str, str] = field(default_factory=lambda: {REPOSITORY: ""})  # repository → where its files begin
    address: str = ""

    def listing(self, repository: str = REPOSITORY) -> dict[str, object]:
        siblings = []
        prefix = self.prefixes[repository]
        for place, data in (self.listed or self.files).items():
            if not place.startswith(prefix):
                continue
            path = place.removeprefix(prefix)
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            entry: dict[str, object] = {"rfilename": path, "size": len(data), "blobId": blob}
            if len(data) >= LARGE:
                sha256 = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 134}
            siblings.append(entry)
        return {"id": repository, "modelId": repository, "sha": COMMIT, "siblings": siblings}

    def part(self, path: str, first: int, last: int) -> bytes:
        self.asked.append((path, first))
        if self.stalls is not None and path == self.stalls[0] and first >= self.stalls[1]:
            self.go.wait(60)
        data = self.files[path][first : last + 1]
        return bytes([data[0] ^ 1]) + data[1:] if path in self.lies and data else data


@dataclass(slots=True)
class Direct:
    """The same hub without a network, for tests inside this process."""

    hub: FakeHub

    def files(self, repository: str, revision: str) -> tuple[str, list[RemoteFile]]:
        siblings: Any = self.hub.listing()["siblings"]
        hashes = {file["rfilename"]: file.get("lfs", {}).get("sha256") for file in siblings}
        return COMMIT, [RemoteFile(s["rfilename"], s["size"], hashes[s["rfilename"]], s["blobId"]) for s in siblings]

    def read(self, repository: str, commit: str, path: str, start: int, size: int) -> bytes:
        return self.hub.part(path, start, start + size - 1)


@contextmanager
def serve(files: dict[str, bytes]) -> Iterator[FakeHub]:
    """The hub, answering at `hub.address` while the context lasts."""
    hub = FakeHub(dict(files))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path).lstrip("/")
            asked = path.removeprefix("api/models/").removesuffix("/revision/main")
            if path == f"api/models/{asked}/revision/main" and asked in hub.prefixes:
                self.answer(200, json.dumps(hub.listing(asked)).encode(), "application/json")
            elif path.startswith("api/models/"):
                self.answer(404, b"{}", "application/json", {"X-Error-Code": "RepoNotFound"})
            else:
                owner = next((name for name in hub.prefixes if path.startswith(f"{name}/resolve/")), "")
                self.file(hub.prefixes.get(owner, "") + path.removeprefix(f"{owner}/resolve/{COMMIT}/"))

        def file(self, path: str) -> None:
            """A range of a file, by a redirection to the store of large files, as the hub does it."""
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            name = path.removeprefix("store/")
            if name not in hub.files or wanted is None:
                self.answer(404, b"", "text/plain", {"X-Error-Code": "EntryNotFound"})
            elif name == path:
                store = f"http://localhost:{self.server.server_address[1]}/store/{name}"
                self.answer(302, b"", "text/plain", {"Location": store})
            else:
                self.answer(206, hub.part(name, int(wanted[1]), int(wanted[2])), "application/octet-stream")

        def answer(self, code: int, body: bytes, kind: str, extra: dict[str, str] | None = None) -> None:
            self.send_response(code)
            headers = {"Content-Type": kind, "Content-Length": str(len(body)), **(extra or {})}
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words: object) -> None:
            return

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *words: object) -> None:
            return  # a client that was killed

    server = Server(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.go.set()
        server.shutdown()
        server.server_close()
        thread.join()
