"""The object store: files and records that all nodes reach, in a shared folder or any fsspec URL (s3://, gs://, …).

    records/ID.json            a job: one JSON object, written only by the ledger
    uploads/ID.json, uploads/ID   a stored file
    jobs/ID/inputs/…           the inputs of a job; written once, before its record
    jobs/ID/N/…                files of attempt N: states to resume from, and the result; only that attempt writes here

Writes are atomic: object stores guarantee it, and in a folder a file is synced and then renamed.
"""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from scail2_rt.kernels.errors import InputError


@contextlib.contextmanager
def _whole(place: Path) -> Iterator[BinaryIO]:
    """A temporary file that is synced and renamed to `place` at the end."""
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = place.with_name(f".{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(place)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class Objects:
    """The objects below one URL. Raises InputError for a URL that fsspec does not know."""

    def __init__(self, url: str) -> None:
        try:
            import fsspec

            self._fs, self._root = fsspec.core.url_to_fs(url)
        except ImportError as error:
            raise InputError(f"{url} needs a missing package ({error}). Install it on every node.") from error
        except ValueError as error:
            raise InputError(f"{url} is not a URL that fsspec knows ({error}). Give another URL.") from error
        self.url, self._root = url, self._root.rstrip("/")
        self._folder = "file" in (self._fs.protocol if isinstance(self._fs.protocol, tuple) else (self._fs.protocol,))
        self._fs.use_listings_cache = False

    def put(self, name: str, data: bytes) -> None:
        """Write an object atomically."""
        path = f"{self._root}/{name}"
        if not self._folder:
            self._fs.pipe_file(path, data)
            return
        with _whole(Path(path)) as file:
            file.write(data)

    def put_file(self, file: Path, name: str) -> None:
        """Copy a local file to an object, atomically."""
        path = f"{self._root}/{name}"
        if not self._folder:
            self._fs.put_file(str(file), path)
            return
        with file.open("rb") as source, _whole(Path(path)) as copy:
            shutil.copyfileobj(source, copy, 1 << 20)

    def put_json(self, name: str, document: Mapping[str, Any]) -> None:
        """Write a JSON object atomically."""
        self.put(name, json.dumps(document).encode())

    def get(self, name: str) -> bytes | None:
        """The content of an object; None if it does not exist."""
        try:
            return bytes(self._fs.cat_file(f"{self._root}/{name}"))
        except FileNotFoundError:
            return None

    def fetch(self, name: str, file: Path) -> bool:
        """Copy an object to a local file; False if it does not exist."""
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{secrets.token_hex(8)}")
        try:
            self._fs.get_file(f"{self._root}/{name}", str(temporary))
        except FileNotFoundError:
            temporary.unlink(missing_ok=True)
            return False
        temporary.replace(file)
        return True

    def names(self, folder: str) -> list[str]:
        """The sorted names of all objects below a folder, relative to it."""
        top = f"{self._root}/{folder}".rstrip("/")
        self._fs.invalidate_cache()
        found = [str(path) for path in self._fs.find(top)]
        names = [path[path.index(top) + len(top) + 1 :] for path in found]
        return sorted(name for name in names if not name.rpartition("/")[2].startswith("."))

    def documents(self, folder: str) -> Iterable[dict[str, Any]]:
        """The parsed JSON files of a folder."""
        names = [f"{self._root}/{folder}/{name}" for name in self.names(folder) if name.endswith(".json")]
        found = self._fs.cat(names, on_error="omit") if names else {}
        return [json.loads(data) for data in found.values()]

    def remove(self, name: str) -> None:
        """Remove an object, or everything below a folder; does nothing if it does not exist."""
        path = f"{self._root}/{name}"
        self._fs.invalidate_cache()
        if self._fs.exists(path):
            self._fs.rm(path, recursive=True)
