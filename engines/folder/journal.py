"""The journal of unfinished work, from which the next call continues.

`.build.json` in an engine folder (conversions and downloads have similar files) holds the fingerprint of the request,
the steps that are on disk, the checksums of what they wrote, and hashes of source files. It is replaced atomically
after each step and removed when the work is done. From a journal of another request, only the hashes are used.
"""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

from scail2_rt.engines.folder.manifest import SourceFile, write_json

JOURNAL = ".build.json"


class Journal:
    """The journal in one file. Reading never fails: a damaged journal counts as empty."""

    def __init__(self, path: Path, fingerprint: str = "", done: Iterable[str] = ()) -> None:
        self.path = path
        self.fingerprint = fingerprint
        self.done = list(done)
        self.hashed: list[SourceFile] = []
        self.sums: dict[str, str] = {}  # tensor → checksum

    @classmethod
    def load(cls, directory: Path) -> "Journal":
        """Read the journal of an engine folder."""
        return cls.read(directory / JOURNAL)

    @classmethod
    def read(cls, path: Path) -> "Journal":
        journal = cls(path)
        try:
            document = json.loads(journal.path.read_text())
            journal.hashed = [SourceFile(**file) for file in document["hashed"]]
            journal.sums = {str(name): str(value) for name, value in document.get("sums", {}).items()}
            journal.done = [str(step) for step in document["done"]]
            journal.fingerprint = str(document["fingerprint"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return cls(journal.path)
        return journal

    def begin(self, fingerprint: str, afresh: bool = False) -> bool:
        """Start or continue a request. Returns False, and forgets the known steps, if they belong to another request or
        `afresh` is set."""
        same = fingerprint == self.fingerprint and not afresh
        if not same:
            self.fingerprint, self.done, self.sums = fingerprint, [], {}
        self.save()
        return same

    def has(self, phase: str, step: str) -> bool:
        return f"{phase}/{step}" in self.done

    def add(self, phase: str, step: str) -> None:
        self.done.append(f"{phase}/{step}")
        self.save()

    def forget(self, phase: str) -> None:
        self.done = [step for step in self.done if not step.startswith(f"{phase}/")]
        self.save()

    def remember(self, file: SourceFile) -> None:
        """Keep the hash of a source file."""
        self.hashed.append(file)
        self.save()

    def save(self) -> None:
        write_json(
            self.path,
            {
                "fingerprint": self.fingerprint,
                "done": self.done,
                "sums": self.sums,
                "hashed": [dataclasses.asdict(file) for file in self.hashed],
            },
        )

    def remove_if_idle(self) -> None:
        """Remove a journal that holds only hashes: the manifest has them now."""
        if not self.done:
            self.remove()

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
