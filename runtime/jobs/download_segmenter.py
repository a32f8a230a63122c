"""Download of a segmenter from the Hugging Face hub: only the needed files, resumable, checked by hash (as `download`).

A segmenter consists of one or two repositories. Each becomes a folder that `transformers` opens.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from scail2_rt.engines.folder.journal import Journal
from scail2_rt.engines.observer import BuildObserver, SilentObserver
from scail2_rt.kernels.errors import InputError
from scail2_rt.kernels.wording import counted
from scail2_rt.runtime.jobs.download import KEPT, RECORD, Fetching, Hub, unwritable
from scail2_rt.runtime.masks.make.folders import DETECTOR, segmenter_cache

REPOSITORIES: Mapping[str, Mapping[str, str]] = {  # segmenter → subfolder → repository
    "sam2": {".": "facebook/sam2.1-hiera-large", DETECTOR: "IDEA-Research/grounding-dino-tiny"},
    "sam3": {".": "facebook/sam3"},
}
WEIGHTS = re.compile(r"(model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json)")
TEXT = re.compile(
    r"(config|preprocessor_config|processor_config|tokenizer|tokenizer_config|special_tokens_map|vocab)\.json"
)
WORDS = re.compile(r"(vocab|merges)\.txt")


@dataclass(frozen=True, slots=True)
class SegmenterReport:
    """The result of a download.

    repositories   repository → commit
    files          path → the hash that was checked
    size           bytes of all files
    fetched        bytes that were transferred"""

    directory: str
    segmenter: str
    repositories: dict[str, str]
    files: dict[str, str]
    size: int
    fetched: int
    wall_s: float

    @property
    def text(self) -> str:
        from_where = ", ".join(f"{name} at {commit[:12]}" for name, commit in self.repositories.items())
        lines = [
            f"{self.directory}: {self.segmenter}, {counted(len(self.files), 'file')} of {from_where}, "
            f"{self.size / 2**30:.2f} GiB, all verified; {self.fetched / 2**30:.2f} GiB fetched in {self.wall_s:.0f} s"
        ]
        return "\n".join([*lines, *(f"  {digest}  {path}" for path, digest in self.files.items())])


def download_segmenter(
    name: str, hub: Hub, directory: Path | None = None, revision: str = "main", observer: BuildObserver | None = None
) -> SegmenterReport:
    """Complete the folder of a segmenter, by default the one in the cache folder. Raises the errors of `download`."""
    started, observer = time.monotonic(), observer or SilentObserver()
    place = (segmenter_cache() / name if directory is None else directory.expanduser()).absolute()
    if place.exists() and not place.is_dir():
        raise InputError(f"{place} is a file. Give a folder.")
    commits: dict[str, str] = {}
    files: dict[str, str] = {}
    size = fetched = 0
    try:
        for inside, repository in REPOSITORIES[name].items():
            commit, listed = hub.files(repository, revision)
            wanted = [f for f in listed if any(p.fullmatch(f.path) for p in (WEIGHTS, TEXT, WORDS))]
            if not any(f.path == "config.json" for f in wanted) or not any(
                f.path.endswith(".safetensors") for f in wanted
            ):
                raise InputError(
                    f"{repository} at revision {revision} has no config.json or no model.safetensors, so it is not a "
                    "segmenter. Choose another --revision."
                )
            folder = place / inside
            folder.mkdir(parents=True, exist_ok=True)
            run = Fetching(folder, hub, repository, commit, Journal.read(folder / RECORD), observer)
            wanted.sort(key=lambda file: file.size)
            run.check_room(wanted)
            run.fetch(wanted)
            commits[repository] = commit
            files |= {str(Path(inside) / file.path): file.digest for file in wanted}
            size, fetched = size + sum(file.size for file in wanted), fetched + run.fetched
    except OSError as error:
        raise unwritable(place, error) from error
    except KeyboardInterrupt:
        observer.note(KEPT)
        raise
    return SegmenterReport(str(place), name, commits, files, size, fetched, time.monotonic() - started)
