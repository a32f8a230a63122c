"""Download of the official checkpoint from the Hugging Face hub: only the needed files, resumable, checked by hash.

`huggingface_hub` provides the list of files with hashes, the addresses, the credentials and the retries. The bytes are
fetched here, a few ranges concurrently, into `FILE.<hash>.partial`, because the library's own download restarts an
interrupted file of 65 GB from the beginning. A file is renamed when its hash matches the hub's (SHA-256 for large
files, git's hash for small ones). `.download.json` in the folder records verified files, so that a second call only
fetches the list.
"""

import hashlib
import os
import re
import shutil
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from scail2_rt.engines.folder.journal import Journal
from scail2_rt.engines.folder.manifest import SourceFile
from scail2_rt.engines.folder.sources import hash_file
from scail2_rt.engines.observer import BuildObserver, Phase, SilentObserver
from scail2_rt.kernels.errors import InputError, Scail2Error
from scail2_rt.kernels.wording import counted

REPOSITORY = "zai-org/SCAIL-2"
LATEST = "model/latest"
PARTS = {  # in the order of the message that names missing ones
    "transformer": re.compile(r"model/[^/]+/[^/]+\.pt"),
    "VAE": re.compile(r"Wan2\.1_VAE\.(pth|safetensors)"),
    "umT5 encoder": re.compile(r"umt5-xxl/[^/]+\.(pth|safetensors)"),
    "CLIP tower": re.compile(r"models_clip[^/]*\.(pth|safetensors)"),
}
TOKENIZER = re.compile(r"(google/)?umt5-xxl/tokenizer\.json")
RECORD = ".download.json"
PIECE = 32 << 20  # bytes per HTTP request
STREAMS = 4
DISK_MARGIN = 1 << 28
KEPT = "The part that was fetched is kept. Run the same command again to continue."


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of the repository. size: bytes; sha256: of a large file (LFS); blob: git's hash of a small file."""

    path: str
    size: int
    sha256: str | None
    blob: str | None

    @property
    def digest(self) -> str:
        return self.sha256 or self.blob or ""


class Hub(Protocol):
    """The operations of the hub that a download needs."""

    def files(self, repository: str, revision: str) -> tuple[str, Sequence[RemoteFile]]:
        """Return (commit, its files). Raises InputError if the repository or revision does not exist, Scail2Error if
        the hub cannot be reached."""

    def read(self, repository: str, commit: str, path: str, start: int, size: int) -> bytes:
        """Return bytes start:start+size of a file. Raises Scail2Error if they cannot be fetched."""


class HuggingFace:
    """The hub, accessed with its client library: at $HF_ENDPOINT if it is set, with the user's token if it exists."""

    def files(self, repository: str, revision: str) -> tuple[str, Sequence[RemoteFile]]:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import (
            GatedRepoError,
            HFValidationError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        try:
            info = HfApi().model_info(repository, revision=revision, files_metadata=True)
        except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError, GatedRepoError) as error:
            reason = _first_line(error)
            raise InputError(
                f"The hub has no {repository} at revision {revision}, or no access to it ({reason}). Check both."
            ) from error
        except Exception as error:  # anything that the HTTP client raises without a connection
            raise _unreachable(error, repository) from error
        found = []
        for file in info.siblings or ():
            lfs = file.lfs.sha256 if file.lfs else None
            found.append(RemoteFile(file.rfilename, int(file.size or 0), lfs, file.blob_id))
        return info.sha or revision, found

    def read(self, repository: str, commit: str, path: str, start: int, size: int) -> bytes:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

        headers = {**build_hf_headers(), "Range": f"bytes={start}-{start + size - 1}", "Accept-Encoding": "identity"}
        try:
            response = http_backoff("GET", hf_hub_url(repository, path, revision=commit), headers=headers, timeout=60)
            hf_raise_for_status(response)
        except Exception as error:
            raise Scail2Error(
                f"{path} cannot be fetched from the hub ({type(error).__name__}: {_first_line(error)}). {KEPT}"
            ) from error
        return response.content


@dataclass(frozen=True, slots=True)
class DownloadReport:
    """The result of a download.

    files     path → the hash that was checked
    size      bytes of all files
    fetched   bytes that were transferred
    missing   files that the repository lacks"""

    directory: str
    repository: str
    commit: str
    files: dict[str, str]
    size: int
    fetched: int
    missing: tuple[str, ...]
    wall_s: float

    @property
    def text(self) -> str:
        lines = [
            f"{self.directory}: {counted(len(self.files), 'file')} of {self.repository} at {self.commit[:12]}, "
            f"{self.size / 2**30:.2f} GiB, all verified; {self.fetched / 2**30:.2f} GiB fetched in {self.wall_s:.0f} s"
        ]
        lines += [f"  {digest}  {path}" for path, digest in self.files.items()]
        lines += [f"  {path} is not in the repository: use the one of google/umt5-xxl" for path in self.missing]
        return "\n".join(lines)


def download(
    directory: Path,
    hub: Hub,
    repository: str = REPOSITORY,
    revision: str = "main",
    observer: BuildObserver | None = None,
) -> DownloadReport:
    """Complete the checkpoint folder `directory`. A call after an interruption continues the download.

    Raises the errors of `Hub`, InputError if the disk is too small or the repository holds no checkpoint, and
    Scail2Error if a file does not have the hub's hash or cannot be written."""
    started = time.monotonic()
    observer = observer or SilentObserver()
    directory = directory.expanduser().absolute()
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is a file. Give a folder.")
    commit, listed = hub.files(repository, revision)
    latest, wanted = _needed(repository, listed)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        run = Fetching(directory, hub, repository, commit, Journal.read(directory / RECORD), observer)
        run.fetch([latest])
        folder = (directory / LATEST).read_text(errors="replace").strip()
        wanted = [file for file in wanted if not file.path.startswith("model/") or file.path.split("/")[1] == folder]
        if not any(PARTS["transformer"].fullmatch(file.path) for file in wanted):
            raise InputError(
                f"{repository}: {LATEST} names {folder[:40]!r}, but the repository has no model/{folder[:40]}/*.pt. "
                "Choose another --revision."
            )
        run.check_room(wanted)
        run.fetch(wanted)
    except OSError as error:
        raise unwritable(directory, error) from error
    except KeyboardInterrupt:
        observer.note(KEPT)
        raise
    files = [latest, *wanted]
    missing = () if any(TOKENIZER.fullmatch(file.path) for file in files) else ("umt5-xxl/tokenizer.json",)
    return DownloadReport(
        directory=str(directory),
        repository=repository,
        commit=commit,
        files={file.path: file.digest for file in files},
        size=sum(file.size for file in files),
        fetched=run.fetched,
        missing=missing,
        wall_s=time.monotonic() - started,
    )


def _needed(repository: str, listed: Sequence[RemoteFile]) -> tuple[RemoteFile, list[RemoteFile]]:
    """Return `model/latest` and the other files that build-engines reads. Raises InputError if parts are missing."""
    latest = next((file for file in listed if file.path == LATEST), None)
    found = {part: [file for file in listed if pattern.fullmatch(file.path)] for part, pattern in PARTS.items()}
    absent = [part for part, files in found.items() if not files] + ([LATEST] if latest is None else [])
    if absent or latest is None:
        raise InputError(
            f"{repository} is not a SCAIL-2 checkpoint in the official layout: it has no {', no '.join(absent)}. Use "
            f"the default repository, {REPOSITORY}."
        )
    wanted = [file for files in found.values() for file in files]
    return latest, sorted([*wanted, *(f for f in listed if TOKENIZER.fullmatch(f.path))], key=lambda file: file.size)


@dataclass(slots=True)
class Fetching:
    """Fetches files of one commit into a folder. fetched: bytes that were transferred."""

    directory: Path
    hub: Hub
    repository: str
    commit: str
    journal: Journal
    observer: BuildObserver
    fetched: int = 0

    def fetch(self, files: Sequence[RemoteFile]) -> None:
        """Fetch the files that are not verified yet. Raises Scail2Error if a file cannot be fetched or is damaged."""
        phase = Phase(self.observer, "download", {file.path: file.size for file in files})
        for file in files:
            if self._verified(file):
                phase.skip(file.path)
                continue
            step = phase.start(file.path)
            unfinished = self._partial(file)
            unfinished.parent.mkdir(parents=True, exist_ok=True)
            with unfinished.open("ab") as output:
                if unfinished.stat().st_size > file.size:
                    output.truncate(0)
                for piece in self._pieces(file, unfinished.stat().st_size):
                    output.write(piece)
                    self.fetched += len(piece)
                    self.observer.advanced(step, output.tell())
                output.flush()
                os.fsync(output.fileno())
            if self._digest(unfinished, file) != file.digest:
                unfinished.unlink()
                raise Scail2Error(
                    f"{file.path} arrived damaged: its hash is not {file.digest}, the hash in {self.repository}. It "
                    "was deleted. Run the same command again to fetch it."
                )
            os.replace(unfinished, self.directory / file.path)
            self._remember(file)
            phase.finish(step)

    def _verified(self, file: RemoteFile) -> bool:
        """Return whether the folder has the file with the right hash, whoever fetched it."""
        path = self.directory / file.path
        if not path.is_file() or path.stat().st_size != file.size:
            return False
        state = path.stat()
        key = (str(path), state.st_size, state.st_mtime_ns, file.digest)
        if key in {(f.path, f.size, f.mtime_ns, f.sha256) for f in self.journal.hashed}:
            return True
        self.observer.note(f"checking the existing file {path}")
        if self._digest(path, file) != file.digest:
            self.observer.note(f"{path} differs from the file in {self.repository} and will be replaced")
            return False
        self._remember(file)
        return True

    def _remember(self, file: RemoteFile) -> None:
        """Record that a file has the hub's hash."""
        path = self.directory / file.path
        state = path.stat()
        self.journal.remember(SourceFile("checkpoint", str(path), state.st_size, state.st_mtime_ns, file.digest))

    def _digest(self, path: Path, file: RemoteFile) -> str:
        """Return the SHA-256, or git's hash if the hub gives no SHA-256."""
        if file.sha256 is None:
            data = path.read_bytes()
            return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        phase = Phase(self.observer, "check", {file.path: file.size})
        step = phase.start(file.path)
        digest = hash_file(path, partial(self.observer.advanced, step))
        phase.finish(step)
        return digest

    def _partial(self, file: RemoteFile) -> Path:
        path = self.directory / file.path
        return path.with_name(f"{path.name}.{file.digest[:12]}.partial")

    def _pieces(self, file: RemoteFile, start: int) -> Iterator[bytes]:
        """Yield the rest of a file in order; `STREAMS` ranges are fetched concurrently."""
        read = partial(self.hub.read, self.repository, self.commit, file.path)
        starts = deque(range(start, file.size, PIECE))
        running: deque[tuple[int, Future[bytes]]] = deque()
        pool = ThreadPoolExecutor(STREAMS)
        try:
            while starts or running:
                while starts and len(running) < STREAMS:
                    first = starts.popleft()
                    size = min(PIECE, file.size - first)
                    running.append((size, pool.submit(read, first, size)))
                size, future = running.popleft()
                piece = future.result()
                if len(piece) != size:
                    raise Scail2Error(
                        f"The hub sent {counted(len(piece), 'byte')} of {file.path} instead of {size:,}. Run the same "
                        "command again."
                    )
                yield piece
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def check_room(self, files: Sequence[RemoteFile]) -> None:
        """Raise InputError if the disk is too small for the bytes that are not fetched yet."""
        needed = 0
        for file in files:
            for path in (self.directory / file.path, self._partial(file)):
                if path.is_file():
                    needed -= min(path.stat().st_size, file.size)
                    break
            needed += file.size
        free = shutil.disk_usage(self.directory).free
        if needed and free < needed + DISK_MARGIN:
            raise InputError(
                f"{needed / 2**30:.1f} GiB are still to be fetched, but the disk of {self.directory} has "
                f"{free / 2**30:.1f} GiB free. Free some space, or give another folder."
            )


def unwritable(directory: Path, error: OSError) -> Scail2Error:
    """Return the error for a folder that cannot be written."""
    return Scail2Error(f"Writing to {directory} failed ({error.strerror or error}). {KEPT}")


def _unreachable(error: Exception, repository: str) -> Scail2Error:
    return Scail2Error(
        f"The hub cannot be reached ({type(error).__name__}: {_first_line(error)}). Check the network, or download the "
        f"files of {repository} on another machine and copy the folder."
    )


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")[:200]
