"""Place the inputs of a job in its folder, under fixed names.

An uploaded file is moved; a stored file is linked (deleting it later does not affect the job); a `data:` URL is
decoded; an `http(s)` URL is fetched if the operator allows its host. The first bytes of a file decide its format.
Formats that refer to other files or addresses (playlists, concat scripts, PostScript) are refused.
"""

import asyncio
import base64
import binascii
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scail2_rt.runtime.serve.errors import Refusal, not_found, wrong
from scail2_rt.runtime.serve.fields import REFERENCES, Asked
from scail2_rt.runtime.serve.multipart import Form, Receiver, Upload
from scail2_rt.runtime.serve.remote_files import fetch
from scail2_rt.runtime.serve.settings import Limits
from scail2_rt.runtime.serve.store import Store

PICTURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*", b"GIF8")
MOVIE_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")


def is_picture(head: bytes) -> bool:
    """Whether a file's first bytes are those of a PNG, JPEG, WebP, BMP, TIFF or GIF file."""
    return head.startswith(PICTURES) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def is_clip(head: bytes) -> bool:
    """Whether a file's first bytes are those of an MP4, MOV, Matroska, WebM, AVI, MPEG-TS, GIF or WebP file."""
    if head[4:8] in MOVIE_BOXES or head.startswith((b"\x1a\x45\xdf\xa3", b"GIF8")):
        return True
    if head[:4] == b"RIFF" and head[8:12] in (b"AVI ", b"WEBP"):
        return True
    return len(head) > 188 and head[0] == 0x47 and head[188] == 0x47


def check_kind(path: Path, name: str) -> None:
    """Raises Refusal (400) if the first bytes are not those of an image (or, for video fields, a clip)."""
    with path.open("rb") as file:
        head = file.read(256)
    if not head:
        raise wrong(f"{name} is empty (0 bytes). Send it again.", name)
    if "video" in name:
        if not is_clip(head):
            raise wrong(f"{name} is not a supported video. Send MP4, MOV, MKV, WebM, AVI, TS, GIF or WebP.", name)
    elif not is_picture(head):
        raise wrong(f"{name} is not a supported image. Send a PNG, JPEG or WebP file.", name)


class Inputs:
    """Places the inputs of one request in its job's folder. hashes: file name → SHA-256."""

    def __init__(self, store: Store, owner: str, limits: Limits, fetch_hosts: tuple[str, ...]) -> None:
        self._store, self._owner, self._limits, self._hosts = store, owner, limits, fetch_hosts
        self.hashes: dict[str, str] = {}

    async def place(self, form: Form, asked: Asked, folder: Path) -> None:
        """Place all inputs of a request. Raises Refusal for a stored file that does not exist, an unexpected file and
        an unsupported format."""
        for name, field in REFERENCES.items():
            if name in form.files and field in asked.references:
                raise wrong(f"{name} is given twice, as a file and as a field. Send one of them.", name)
            if name in form.files:
                upload = form.files.pop(name)
                await asyncio.to_thread(upload.path.replace, folder / name)
                self._placed(folder / name, name, upload.sha256)
            elif field in asked.references:
                await self._refer(asked.references[field], folder / name, name)
        if form.files:
            extra = next(iter(form.files))[:80]
            raise wrong(f"The file field {extra!r} is not known. Use {', '.join(REFERENCES)}.", extra)
        for number, (image, mask) in enumerate(asked.extra_refs, 1):
            await self._refer(image, folder / f"extra_ref_{number}", f"extra_ref_{number}")
            await self._refer(mask, folder / f"extra_ref_{number}_mask", f"extra_ref_{number}_mask")

    async def _refer(self, reference: Mapping[str, Any], place: Path, name: str) -> None:
        if file_id := reference.get("file_id"):
            row = self._store.file(file_id, self._owner)
            if row is None:
                raise not_found("file", file_id)
            try:
                os.link(self._store.upload(row), place)
            except FileNotFoundError:  # deleted meanwhile
                raise not_found("file", file_id) from None
            except OSError:  # a file system without links
                await asyncio.to_thread(shutil.copyfile, self._store.upload(row), place)
            self._placed(place, name, row.sha256)
            return
        upload = await self._download(str(reference["url"]), name)
        upload.path.replace(place)
        self._placed(place, name, upload.sha256)

    async def _download(self, url: str, name: str) -> Upload:
        if url.startswith("data:"):
            return await asyncio.to_thread(_decode_data, url, Receiver(self._store.incoming, name), name)
        if not url.startswith(("http://", "https://")):
            raise wrong(f"{name} must be a data:, http: or https: URL.", name)
        return await asyncio.to_thread(
            fetch, url, Receiver(self._store.incoming, name), self._hosts, self._limits.upload_bytes, name
        )

    def _placed(self, place: Path, name: str, sha256: str) -> None:
        self.hashes[name] = sha256
        check_kind(place, name)


def _decode_data(url: str, receiver: Receiver, name: str) -> Upload:
    head, comma, text = url.partition(",")
    try:
        if not comma or not head.endswith(";base64"):
            raise wrong(f"{name}: a data: URL must be base64.", name)
        receiver.write(base64.b64decode(re.sub(r"\s", "", text), validate=True))
        return receiver.done()
    except BaseException as error:
        receiver.abort()
        if isinstance(error, binascii.Error | ValueError):
            raise wrong(f"{name}: the data: URL cannot be decoded ({error}). Encode it again.", name) from None
        raise


def check_complete(hashes: Mapping[str, str], masks_made: bool) -> None:
    """Raises Refusal (400) if an input is missing. masks_made: the service makes the masks, so both may be missing."""
    wanted = [name for name in REFERENCES if not (masks_made and "mask" in name)]
    if missing := [name for name in wanted if name not in hashes]:
        said = f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing. Send each as a file, "
        said += 'as {"file_id": …} after POST /v1/files, or as {"url": "data:…"}.'
        if len(missing) == 1 and "mask" in missing[0]:
            said += " If you send no mask at all, the service makes both."
        raise Refusal(400, said, "missing_input", param=missing[0])
