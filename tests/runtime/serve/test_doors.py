"""Refused requests: other origins and host names, wrong keys, other clients' jobs, slow and hostile clients."""

import io
import socket
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest

from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.serve import multipart
from scail2_rt.runtime.serve.settings import Settings, is_loopback, read_keys
from tests.support.command import sabotage
from tests.support.served import Served, serving, wait_for

pytest_plugins = ["tests.support.runtime_fixtures"]
KEYS = ("first-key-of-a-client-0001", "second-key-of-a-client-002")


def test_pages_of_other_origins_and_other_names_are_refused(served: Served, body: dict[str, Any]) -> None:
    """Requests that a browser sends for a foreign page, and DNS rebinding."""
    own = served.url.removeprefix("http://")
    for headers in (
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "no-cors"},
        {"Host": "evil.example"},
        {"Host": "evil.example:8000"},
        {"Host": ""},
    ):
        for method, path, data in (
            ("GET", "/v1/videos", None),
            ("POST", "/v1/videos", body),
            ("GET", "/metrics", None),
        ):
            answer = served.ask(method, path, data, **headers)
            assert answer.status == 403, (headers, answer.body)
            assert "access-control-allow-origin" not in answer.headers
    assert served.ask("OPTIONS", "/v1/videos", Origin="https://evil.example").status == 403
    assert served.ask("GET", "/", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate").status == 200
    assert served.ask("GET", "/v1/videos", Origin=served.url).status == 200
    assert served.ask("GET", "/v1/videos", Host=own.replace("127.0.0.1", "localhost")).status == 200
    answer = served.ask("GET", "/")
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_keys_and_what_they_see(engines: Path, case: Path, cache: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# people\n" + "\n".join(KEYS) + "\n")
    with serving(engines, tmp_path / "data", cache, "--api-key-file", str(keys), measured=True) as own:
        for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": KEYS[0]}, {"Authorization": "Bearer "}):
            for path in ("/v1/videos", "/v1/files", "/metrics", "/v1/models", "/openapi.json"):
                assert own.ask("GET", path, **headers).status == 401
        for path in ("/health", "/ready", "/", "/docs", "/page/app.js"):
            assert own.ask("GET", path).status == 200
        own.key = KEYS[0]
        body = own.case(case)
        video = own.post(body, Idempotency_Key="k")
        file = body["video_reference"]["file_id"]
        own.done(video["id"])
        own.key = KEYS[1]
        for method, path in (
            ("GET", f"/v1/videos/{video['id']}"),
            ("GET", f"/v1/videos/{video['id']}/content"),
            ("GET", f"/v1/videos/{video['id']}/events"),
            ("DELETE", f"/v1/videos/{video['id']}"),
            ("GET", f"/v1/files/{file}"),
            ("GET", f"/v1/files/{file}/content"),
            ("DELETE", f"/v1/files/{file}"),
        ):
            assert own.ask(method, path).status == 404, path
        assert own.ask("POST", "/v1/videos", body).status == 404
        for path in ("/v1/videos", "/v1/files"):
            assert own.ask("GET", path).json["data"] == []
        for after in (video["id"], "video_of_nobody"):
            assert own.ask("GET", f"/v1/videos?after={after}").status == 400
        mine = own.case(case)
        assert own.post(mine, Idempotency_Key="k")["id"] != video["id"]
        own.key = KEYS[0]
        assert own.video(video["id"])["status"] == "completed"
        stored = (own.data / "service.sqlite").read_bytes() + (own.data / "service.sqlite-wal").read_bytes()
        assert KEYS[0].encode() not in stored


def test_keys_that_can_be_guessed_and_hosts_without_keys_are_refused(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    for text in ("", "# nobody\n", "short\n", "ключ-ключ-ключ-ключ\n"):
        keys.write_text(text)
        with pytest.raises(InputError):
            read_keys(keys)
    with pytest.raises(InputError, match="--api-key-file"):
        Settings(tmp_path, tmp_path, host="0.0.0.0")
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "::", "example.com")] == [
        *(True, True, True, False, False, False)
    ]


def connected(served: Served) -> socket.socket:
    host, port = served.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), 60)


def test_clients_that_say_nothing_are_let_go(engines: Path, cache: Path, tmp_path: Path) -> None:
    """Half a header, half a second header on a kept connection, half a body; meanwhile other clients get answers."""
    patience = "from scail2_rt.runtime.serve import doors, settings\ndoors.HEADER_WAIT_S = 1.0\n"
    patience += "settings.Limits.__init__.__defaults__ = (*settings.Limits.__init__.__defaults__[:-1], 1.0)\n"
    folder = tmp_path / "patience"
    folder.mkdir()
    own = Served(engines, tmp_path / "data", cache)
    own._environment |= sabotage(folder, patience)
    try:
        own.start()
        host = own.url.removeprefix("http://").encode()
        begin = b"GET /health HTTP/1.1\r\nHost: " + host + b"\r\n"
        upload = b"POST /v1/files HTTP/1.1\r\nHost: " + host + b"\r\nContent-Type: multipart/form-data; boundary=b\r\n"
        part = b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
        half_body = upload + b"Content-Length: 1000000\r\n\r\n" + part + b"x" * 1000
        for said, answers in ((b"", 0), (begin, 0), (begin + b"\r\n" + begin, 1), (half_body, 1)):
            with connected(own) as client:
                client.sendall(said)
                assert own.ask("GET", "/health").status == 200
                heard = b""
                while piece := client.recv(1 << 16):
                    heard += piece
                assert heard.count(b"HTTP/1.1 ") == answers
        assert b" 408 " in heard
        with connected(own) as client:  # an upload that is broken off
            client.sendall(half_body)
        wait_for(lambda: not list((own.data / "incoming").iterdir()), 20)
        with connected(own) as client:
            client.sendall(b"\x16\x03\x01 no HTTP at all\r\n\r\n")
            assert client.recv(100).startswith(b"HTTP/1.1 400")
    finally:
        own.kill()


def png(width: int, height: int) -> bytes:
    """A picture of zeros: small as a file, large as pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer, rows = zlib.compressobj(9), io.BytesIO()
    for _ in range(height):
        rows.write(packer.compress(bytes(1 + 3 * width)))
    rows.write(packer.flush())
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows.getvalue()) + chunk(b"IEND", b"")


def test_hostile_files(served: Served, body: dict[str, Any], case: Path, tmp_path: Path) -> None:
    """Formats that refer to other files, decompression bombs, and garbage: refused, and the service continues."""
    for name, data in {
        "playlist": b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n",
        "concat": b"ffconcat version 1.0\nfile /etc/passwd\n",
        "sdp": b"v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=video 5 RTP/AVP 96\n",
        "rubbish": bytes(range(256)) * 20,
        "empty movie": b"\0\0\0\x14ftypisom\0\0\0\0isom",
        "cut": (case / "rendered_v2.mp4").read_bytes()[:500],
    }.items():
        answer = served.ask("POST", "/v1/videos", {**body, "video_reference": {"file_id": kept(served, data)}})
        assert answer.status == 400, (name, answer.body)
    for name, data in {
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "half": png(64, 64)[:60],
    }.items():
        answer = served.ask("POST", "/v1/videos", {**body, "input_reference": {"file_id": kept(served, data)}})
        assert answer.status == 400, (name, answer.body)
    answer = served.ask(
        "POST", "/v1/videos", {**body, "input_reference": {"file_id": kept(served, png(30_000, 30_000))}}
    )
    assert (answer.status, answer.json["error"]["code"]) == (422, "limit_exceeded")
    assert "30000x30000" in answer.error
    for path in ("/v1/videos/..%2f..%2fservice.sqlite/content", "/page/..%2fapi.py", "/v1/files/..%2f..%2fx/content"):
        assert served.ask("GET", path).status == 404
    served.done(served.post(body)["id"])


def kept(served: Served, data: bytes) -> str:
    return served.client().files.create(file=("f", data), purpose="vision").id


def test_names_of_files_are_for_showing_only() -> None:
    shown = {"../../a.mp4": "a.mp4", "c:\\x\\b.png": "b.png", "": "upload", "a\0\n\u202eb": "ab", "x" * 500: "x" * 200}
    assert {name: multipart.shown_name(name) for name in shown} == shown


def test_a_header_without_end_is_cut_off(served: Served) -> None:
    with connected(served) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nX: ")
        with pytest.raises(ConnectionError):
            pour(client)


def pour(client: socket.socket) -> None:
    """A gigabyte."""
    for _ in range(10_000):
        client.sendall(b"y" * 100_000)
