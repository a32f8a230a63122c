"""Checksums of an engine folder, so that a flipped bit is found when what it lies in is loaded.

A tensor is summed in pieces of 32 MiB, which is what a thread of the loader reads at once: every piece has a 64-bit
xxh3 sum, and the tensor's sum is the xxh3 sum of those. So pieces can be read by several threads in any order, a check
needs no second pass, and there is one number a tensor to keep. Files (tables, graphs, plans) are summed likewise. xxh3
is no protection against people; the manifest's SHA-256 is, at a tenth of the speed. Sums are made of what a build
writes, before the disk has it. `SumChecker` compares; it knows the command that repairs.
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
    """What a build wrote. header: of the weight store; tensors: of the store, by name; files: of the other artefacts,
    by path."""

    header: str
    tensors: Mapping[str, str]
    files: Mapping[str, str]


def piece_sum(data: "bytes | memoryview") -> bytes:
    """The sum of one piece. Other threads run meanwhile."""
    return xxh3_64_digest(data)


def joined(pieces: Iterable[bytes]) -> str:
    """The sum of a tensor or a file from the sums of its pieces, in order."""
    return xxh3_64_hexdigest(b"".join(pieces))


def sum_of(data: "bytes | memoryview") -> str:
    running = RunningSum()
    running.add(memoryview(data))
    return running.hex


def sum_of_file(path: Path) -> str:
    pieces = []
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            pieces.append(piece_sum(piece))
    return joined(pieces)


class RunningSum:
    """The sum of bytes that come one after the other, in parts of any length."""

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
    """A stage or a file of an engine folder is not what the build wrote."""


class SumChecker:
    """Compares what is read of an open folder with its sums. `remedy`: the command that repairs; `whole`: stages and
    files that were checked and need not be again."""

    def __init__(self, directory: Path, sums: Sums, remedy: str) -> None:
        self.directory, self.sums, self.remedy = directory, sums, remedy
        self.whole: set[str] = set()

    def tensor(self, stage: str, name: str, pieces: Iterable[bytes]) -> None:
        """DamagedError when a tensor of the store is not what its sum says."""
        if joined(pieces) != self.sums.tensors.get(name):
            raise DamagedError(sentence(self.directory, stage, f"tensor {name}", self.remedy))

    def header(self, header: bytes) -> None:
        """DamagedError when the header of the store is not what the build wrote."""
        if sum_of(header) != self.sums.header:
            raise DamagedError(sentence(self.directory, "", HEADER, self.remedy))

    def file(self, path: str, stage: str = "") -> None:
        """DamagedError when a file of the folder is not what its sum says. Once for each file."""
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
    """What is damaged and what to do. stage: "" for what belongs to none; part: `tensor NAME` or `file PATH`."""
    of = f"stage {stage} of {directory}" if stage else f"the engine folder {directory}"
    alone = "this stage alone" if stage else "it"
    return f"{of} is damaged: {part} has another checksum than the build gave it. Repair {alone} with: {remedy}"
