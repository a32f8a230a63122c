"""Receive a request body as a stream, within limits. Files are written under random names.

The files of a multipart body are hashed while they are written and synced at the end; fields stay in memory. The files
of an aborted request are removed. A client's file name is never used as a path.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import re
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import parse_qsl

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.requests import ClientDisconnect, Request

from scail2_rt.runtime.serve.errors import Refusal, no_room, wrong
from scail2_rt.runtime.serve.settings import Limits

FIELDS, FILES, FIELD_BYTES = 200, 20, 1 << 20
JSON_BYTES = 48 << 20  # a JSON body may contain data: URLs


@dataclass(slots=True)
class Upload:
    """A received file. path: temporary file; name: the client's file name, for display only; sha256: hexadecimal."""

    path: Path
    name: str
    bytes: int
    sha256: str


@dataclass(slots=True)
class Form:
    """A parsed request body. fields: (name, value) in order, names may repeat; files: by field name."""

    fields: list[tuple[str, Any]] = field(default_factory=list)
    files: dict[str, Upload] = field(default_factory=dict)

    def discard(self) -> None:
        """Delete the received files that are still at their temporary path."""
        for upload in self.files.values():
            upload.path.unlink(missing_ok=True)


class Receiver:
    """Writes and hashes one file. `done` syncs it to the disk; `abort` deletes it. Raises Refusal (507) if the disk is
    full."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path, self.name = folder / secrets.token_hex(16), shown_name(name)
        self._file: BinaryIO = self.path.open("xb")
        self._digest, self._bytes = hashlib.sha256(), 0

    def write(self, data: bytes) -> None:
        """Append data. Raises Refusal (507) if the disk is full."""
        try:
            self._file.write(data)
        except OSError as error:
            raise no_room(str(error.strerror)) from error
        self._digest.update(data)
        self._bytes += len(data)

    def done(self) -> Upload:
        """Sync and close the file. Raises Refusal (507) if the disk is full."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise no_room(str(error.strerror)) from error
        finally:
            self._file.close()
        return Upload(self.path, self.name, self._bytes, self._digest.hexdigest())

    def abort(self) -> None:
        """Close and delete the file."""
        with contextlib.suppress(OSError):
            self._file.close()
        self.path.unlink(missing_ok=True)


def shown_name(name: str) -> str:
    """The last part of a client's file name, at most 200 characters, without unprintable characters."""
    last = re.split(r"[/\\]", name)[-1]
    return "".join(char for char in last if char.isprintable())[:200] or "upload"


async def body_of(request: Request, limit: int, wait_s: float) -> AsyncIterator[bytes]:
    """Yield the body in pieces. Raises Refusal: 413 for more than `limit` bytes; 408 for a client that sends nothing
    for `wait_s` seconds or, after the first `wait_s`, less than 1 KiB/s; 400 for a closed connection."""
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > limit:
        raise too_large(limit)
    received, clock = 0, asyncio.get_running_loop().time
    began = clock()
    pieces = request.stream()
    while True:
        try:
            piece = await asyncio.wait_for(anext(pieces), wait_s)
        except StopAsyncIteration:
            return
        except TimeoutError as error:
            said = f"No data arrived for {wait_s:g} s. Send the request again."
            raise Refusal(408, said, "timeout") from error
        except ClientDisconnect as error:
            raise Refusal(400, "The client closed the connection during the upload.", "aborted") from error
        received += len(piece)
        if received > limit:
            raise too_large(limit)
        if clock() - began > wait_s + received / 1024:
            raise Refusal(408, "The upload is slower than 1 KiB/s. Send the request again.", "timeout")
        yield piece


def too_large(limit: int) -> Refusal:
    """413: the body, or a fetched file, exceeds `limit` bytes."""
    said = f"The request exceeds the limit of {limit >> 20} MiB. Send less, or ask the operator for --max-upload."
    return Refusal(413, said, "too_large")


async def receive(request: Request, folder: Path, limits: Limits) -> Form:
    """Parse a multipart, form or JSON request; files are written to `folder`. Raises Refusal for a body that is
    malformed (400), too large (413) or of another type (415)."""
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind == b"multipart/form-data":
        return await _receive_multipart(request, options.get(b"boundary", b""), folder, limits)
    if kind in (b"application/json", b"application/x-www-form-urlencoded", b""):
        body = bytearray()
        async for piece in body_of(request, min(limits.upload_bytes, JSON_BYTES), limits.body_wait_s):
            body += piece
        return Form(_fields_of(bytes(body), json_body=kind != b"application/x-www-form-urlencoded"))
    raise Refusal(415, "Send multipart/form-data or application/json.", "unsupported_media_type")


def _fields_of(body: bytes, json_body: bool) -> list[tuple[str, Any]]:
    try:
        if not json_body:
            return list(parse_qsl(body.decode("utf-8"), keep_blank_values=True, max_num_fields=FIELDS))
        document = json.loads(body) if body.strip() else {}
        json.dumps(document, ensure_ascii=False).encode()  # raises for a lone surrogate such as "\ud800"
    except RecursionError:
        raise wrong(
            "The body cannot be read (nested too deeply). Send one flat JSON object.", code="invalid_body"
        ) from None
    except ValueError as error:
        raise wrong(f"The body cannot be read ({error}). Send one JSON object.", code="invalid_body") from None
    if not isinstance(document, dict):
        raise wrong("The body must be one JSON object.", code="invalid_body")
    return list(document.items())


class _Parts:
    """Callbacks of the multipart parser: collect parts as fields and files."""

    def __init__(self, folder: Path) -> None:
        self.form, self._folder = Form(), folder
        self._headers: dict[bytes, bytes] = {}
        self._name, self._value = b"", b""
        self._field = ""
        self._text: bytearray | None = None
        self.receiver: Receiver | None = None

    def on_part_begin(self) -> None:
        self._headers = {}

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def on_header_end(self) -> None:
        self._headers[self._name.lower()] = self._value
        self._name, self._value = b"", b""

    def on_headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        if b"name" not in options:
            raise wrong("A part of the multipart body has no name. Name every part.", code="invalid_body")
        self._field = options[b"name"].decode("utf-8", "replace")[:200]
        if b"filename" in options:
            if len(self.form.files) >= FILES or self._field in self.form.files:
                said = f"A request has at most {FILES} files, and each file field once; {self._field} exceeds this."
                raise wrong(said, self._field)
            self.receiver = Receiver(self._folder, options[b"filename"].decode("utf-8", "replace"))
        else:
            if len(self.form.fields) >= FIELDS:
                raise wrong(f"A request has at most {FIELDS} fields. Send fewer.", code="invalid_body")
            self._text = bytearray()

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self.receiver is not None:
            self.receiver.write(data[start:end])
        elif self._text is not None:
            if len(self._text) + end - start > FIELD_BYTES:
                said = f"The field {self._field} is longer than 1 MiB. Send it as a file."
                raise Refusal(413, said, "too_large", param=self._field)
            self._text += data[start:end]

    def on_part_end(self) -> None:
        if self.receiver is not None:
            self.form.files[self._field] = self.receiver.done()
            self.receiver = None
        elif self._text is not None:
            try:
                self.form.fields.append((self._field, self._text.decode("utf-8")))
            except UnicodeDecodeError:
                raise wrong(f"The field {self._field} is not UTF-8 text. Encode it as UTF-8.", self._field) from None
            self._text = None


async def _receive_multipart(request: Request, boundary: bytes, folder: Path, limits: Limits) -> Form:
    parts = _Parts(folder)
    names = ("part_begin", "header_field", "header_value", "header_end", "headers_finished", "part_data", "part_end")
    ended = False

    def on_end() -> None:
        nonlocal ended
        ended = True

    callbacks: Any = {f"on_{name}": getattr(parts, f"on_{name}") for name in names} | {"on_end": on_end}
    try:
        if not boundary:
            raise wrong("The Content-Type of the multipart body has no boundary. Add it.", code="invalid_body")
        parser = MultipartParser(boundary, callbacks)
        async for piece in body_of(request, limits.upload_bytes, limits.body_wait_s):
            if len(piece) > 1 << 16:
                await asyncio.to_thread(parser.write, piece)
            else:
                parser.write(piece)
        if not ended:
            raise wrong("The multipart body is incomplete. Send the request again.", code="invalid_body")
        return parts.form
    except BaseException as error:
        if parts.receiver is not None:
            parts.receiver.abort()
        parts.form.discard()
        if isinstance(error, FormParserError):
            raise wrong(f"The multipart body is malformed ({error}). Check the client.", code="invalid_body") from None
        raise
