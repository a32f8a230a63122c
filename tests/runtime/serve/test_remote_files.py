"""Inputs by URL: allowed hosts, public addresses, redirections, sizes."""

import http.server
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scail2_rt.runtime.serve import remote_files
from scail2_rt.runtime.serve.errors import Refusal
from scail2_rt.runtime.serve.multipart import Receiver
from tests.support.served import Served

pytest_plugins = ["tests.support.runtime_fixtures"]
HOST = "files.example"


class Site(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
            return
        self.send_response(404 if self.path == "/no" else 200)
        self.end_headers()
        if self.path == "/much":
            for _ in range(100):
                self.wfile.write(bytes(10_000))
        self.wfile.write(b"content of " + self.headers["Host"].encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`files.example` is a server on this machine, to which requests for port 80 are redirected."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    connect, find = socket.create_connection, socket.getaddrinfo

    def to_site(address: tuple[str, int], *more: Any) -> socket.socket:
        assert address == ("203.0.113.9", 80) or address[1] == server.server_port
        return connect(("127.0.0.1", server.server_port), *more)

    def names(host: str, *more: Any, **options: Any) -> Any:
        return find({HOST: "203.0.113.9", "inside.example": "10.0.0.1"}.get(host, host), *more, **options)

    monkeypatch.setattr(socket, "create_connection", to_site)
    monkeypatch.setattr(socket, "getaddrinfo", names)
    # 203.0.113.0/24 is reserved for documentation; here it stands for a public address.
    monkeypatch.setattr(remote_files, "is_public", lambda address: str(address) == "203.0.113.9")
    yield
    server.shutdown()
    server.server_close()


def got(url: str, folder: Path, hosts: tuple[str, ...] = (HOST, "inside.example"), limit: int = 1000) -> bytes:
    try:
        return remote_files.fetch(url, Receiver(folder, "x"), hosts, limit, "video_reference").path.read_bytes()
    except Refusal:
        assert not list(folder.iterdir())
        raise


@pytest.mark.usefixtures("site")
def test_what_is_fetched_and_what_is_not(tmp_path: Path) -> None:
    assert got(f"http://{HOST}/a", tmp_path) == b"content of files.example"
    for path in tmp_path.iterdir():
        path.unlink()
    assert got(f"http://{HOST}/to//a", tmp_path) == b"content of files.example"
    for path in tmp_path.iterdir():
        path.unlink()
    for url, said in {
        f"http://{HOST}/no": "answers with 404",
        f"http://{HOST}/much": "exceeds the limit of",
        f"http://{HOST}:8080/a": "ports 80 and 443",
        f"http://{HOST}/to/http://inside.example/a": "not public",
        f"http://{HOST}/to/http://other.example/a": "from files.example",
        f"http://{HOST}/to/file:///etc/passwd": "from files.example",
        f"http://{HOST}/to/{'to/' * 5}a": "redirects more than 3 times",
        "http://inside.example/a": "not public",
        "http://127.0.0.1/a": "from files.example",
        f"http://{HOST}@127.0.0.1/a": "from files.example",
        f"http://user@{HOST}/a": "from files.example",
        "http://other.example/a": "from files.example",
    }.items():
        with pytest.raises(Refusal, match=said):
            got(url, tmp_path)


@pytest.mark.parametrize(
    "address",
    [
        *(
            "127.0.0.1",
            "10.1.2.3",
            "172.16.0.1",
            "192.168.1.1",
            "169.254.169.254",
            "100.64.0.1",
            "0.0.0.0",
            "224.0.0.1",
        ),
        *(
            "::1",
            "fe80::1",
            "fc00::1",
            "::ffff:127.0.0.1",
            "::ffff:169.254.169.254",
            "64:ff9b::7f00:1",
            "2002:7f00:1::",
        ),
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    with pytest.raises(Refusal, match="not public"):
        remote_files.public_address(address, 80, "x")


def test_names_with_a_star() -> None:
    allowed = remote_files.allowed
    assert allowed("a.example.com", ("*.example.com",))
    assert not allowed("example.com", ("*.example.com",))
    assert not allowed("evilexample.com", ("*.example.com",))
    assert not allowed("", ("*.example.com",))


def test_nothing_is_fetched_by_default(served: Served, body: dict[str, Any]) -> None:
    answer = served.ask("POST", "/v1/videos", {**body, "video_reference": f"{served.url}/health"})
    assert (answer.status, answer.json["error"]["code"]) == (400, "url_not_allowed")
