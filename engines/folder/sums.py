"""Checksums of an engine folder, so that a flipped bit is detected when the data is loaded.

A tensor is summed in pieces of 32 MiB, the unit of a loader thread's reads: every piece has a 64-bit xxh3 sum, and the
tensor's checksum is the xxh3 sum of these. So pieces can be read by several threads in any order, a check needs no
second pass, and there is one number per tensor. Files (tables, graphs, plans) are summed in the same way. xxh3 does not
protect against intentional changes; the manifest's SHA-256 does, at a tenth of the speed. Checksums are computed from
the data as the build writes it, not from the disk. `SumChecker` compares, and knows the command that repairs.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from xxhash import xxh3_64, xxh3_64_digest, xxh3_64_hexdigest

from scail2_rt.kernels.errors import InputError

PIECE = 32 << 20
KIND = "xxh3_64 of the xxh3_64 of every 32 MiB"


@dataclass(frozen=True, slots=True)
class Sums:
    """Checksums of a build's results. header: of the weight store; tensors: of the store, by name; files: of the other
    artefacts, by path."""

    header: str
    tensors: Mapping[str, str]
    files: Mapping[str, str]


def piece_sum(data: "bytes | memoryview") -> bytes:
    """Return the checksum of one piece. Releases the interpreter lock."""
    return xxh3_64_digest(data)


def joined(pieces: Iterable[bytes]) -> str:
    """Return the checksum of a tensor or a file from the checksums of its pieces, in order."""
    return xxh3_64_hexdigest(b"".join(pieces))


def sum_of(data: "bytes | memoryview") -> str:
    """Return the checksum of bytes in memory."""
    running = RunningSum()
    running.add(memoryview(data))
    return running.hex


def sum_of_file(path: Path) -> str:
    """Return the checksum of a file."""
    pieces = []
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            pieces.append(piece_sum(piece))
    return joined(pieces)


class RunningSum:
    """The checksum of consecutive bytes, added in parts of any length."""

    def __init__(self) -> None:
        self.length = 0
        self._pieces: list[bytes] = []
        self._piece = xxh3_64()

    def add(self, data: memoryview) -> None:
        while data:
            room = PIECE - self.length % PIECE
            part, data = data[:room], data[room:]
            self._piece.update(part)
            self.length += len(part)
            if self.length % PIECE == 0:
                self._pieces.append(self._piece.digest())
                self._piece = xxh3_64()

    @property
    def hex(self) -> str:
        return joined([*self._pieces, *([self._piece.digest()] if self.length % PIECE else [])])


class DamagedError(InputError):
    """A stage or a file of an engine folder does not match its checksum."""


class SumChecker:
    """Compares data of an open folder with its checksums. `remedy`: the command that repairs; `whole`: stages and files
    that were checked and are not checked again."""

    def __init__(self, directory: Path, sums: Sums, remedy: str) -> None:
        self.directory, self.sums, self.remedy = directory, sums, remedy
        self.whole: set[str] = set()

    def tensor(self, stage: str, name: str, pieces: Iterable[bytes]) -> None:
        """Raise DamagedError if a tensor of the store does not match its checksum."""
        if joined(pieces) != self.sums.tensors.get(name):
            raise DamagedError(sentence(self.directory, stage, f"tensor {name}", self.remedy))

    def header(self, header: bytes) -> None:
        """Raise DamagedError if the header of the store does not match its checksum."""
        if sum_of(header) != self.sums.header:
            raise DamagedError(sentence(self.directory, "", HEADER, self.remedy))

    def file(self, path: str, stage: str = "") -> None:
        """Raise DamagedError if a file of the folder does not match its checksum. Checked once per file."""
        if path in self.whole:
            return
        try:
            found = sum_of_file(self.directory / path)
        except OSError as error:
            raise DamagedError(
                f"{self.directory / path} cannot be read: {error.strerror}. Repair it with: {self.remedy}"
            ) from error
        if found != self.sums.files.get(path):
            raise DamagedError(sentence(self.directory, stage, f"file {path}", self.remedy))
        self.whole.add(path)


HEADER = "the header of the weight store"


def sentence(directory: Path, stage: str, part: str, remedy: str) -> str:
    """Describe damage and repair. stage: "" for data of no stage; part: `tensor NAME` or `file PATH`."""
    of = f"stage {stage} of {directory}" if stage else f"the engine folder {directory}"
    alone = "only this stage" if stage else "it"
    return f"{of} is damaged: {part} does not match its checksum. Repair {alone} with: {remedy}"
