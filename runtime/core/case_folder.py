"""Case folders and batch files as people have them on disk (MODEL §1).

A case folder holds a reference image, its mask, a driving video and its mask video under the official names; where
several names are possible the first of the list wins, and `replace_mask.mp4` means replace mode. A batch file names one
case a line, `prompt@@case_dir`. A video may end in .mov, .mkv and so on as well. Only names are looked at here: whether
a file can be read is found out when it is read.
"""

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from scail2_rt.kernels.errors import InputError

Mode = Literal["animate", "replace"]

_IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
IMAGES = tuple(stem + ending for stem in ("ref", "ref_image") for ending in _IMAGE_ENDINGS)
MASK_IMAGES = tuple(
    stem + ending for stem in ("ref_mask", "ref_image_mask") for ending in (".png", ".jpg", ".jpeg", ".webp")
)
VIDEO_ENDINGS = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".ts", ".gif", ".webp")  # official: .mp4
DRIVING = ("rendered_v2.mp4", "rendered_aligned.mp4", "rendered.mp4", "driving.mp4")
ANIMATE_MASKS = ("rendered_mask_v2.mp4", "rendered_mask.mp4")
REPLACE_MASKS = ("replace_mask.mp4",)
SEPARATOR = "@@"
FILES = ("image", "mask_image", "driving", "mask_video")  # fields of `CaseFiles`, and options where each is named


@dataclass(frozen=True, slots=True)
class CaseFiles:
    """The files of one case and the mode that its folder says."""

    image: Path
    mask_image: Path
    driving: Path
    mask_video: Path
    mode: Mode


@dataclass(frozen=True, slots=True)
class BatchLine:
    """One line of a batch file: the prompt ("" for `None`), the case folder and the line's number from 1."""

    prompt: str
    directory: Path
    number: int


@dataclass(frozen=True, slots=True)
class CaseInputs:
    """How a case was given: a folder, or its files one by one."""

    case: Path | None
    image: Path | None
    mask_image: Path | None
    driving: Path | None
    mask_video: Path | None

    def files(self, instead: str) -> "NamedFiles | None":
        """The files that were named one by one: all four, or None. InputError when some are missing (`instead` says
        what to give) and when a folder is named beside them."""
        given = [name for name in FILES if getattr(self, name) is not None]
        if given and self.case is not None:
            raise InputError(f"--case and {flags(given)} were both given: use the folder or the four files.")
        if not given:
            return None
        if lacking := [name for name in FILES if name not in given]:
            made = ""
            if all("mask" in name for name in lacking):
                made = "; `scail2-rt masks make --image FILE --driving FILE -o DIR` makes a case folder with both masks"
            raise InputError(f"{flags(lacking)} {'is' if len(lacking) == 1 else 'are'} missing: {instead}{made}.")
        return NamedFiles(*(getattr(self, name) for name in FILES))


class NamedFiles(NamedTuple):
    """The four files of a case."""

    image: Path
    mask_image: Path
    driving: Path
    mask_video: Path


def flags(names: Iterable[str]) -> str:
    """`--image, --extra-ref` of the names of options' values."""
    return ", ".join("--" + name.rstrip("s").replace("_", "-") for name in names)


def read_case(directory: Path, mode: Mode | None = None) -> CaseFiles:
    """Finds the files of a case folder; `mode` overrides what the presence of `replace_mask.mp4` says.

    With an overriding mode that mode's mask is preferred and the other one is taken when it is the only one. Raises
    `InputError` that lists every missing file with the names it may have.
    """
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "does not exist"
        raise InputError(
            f"The case folder {directory} {what}: give a folder that holds a reference and a driving video."
        )
    masks = {"replace": REPLACE_MASKS + ANIMATE_MASKS, "animate": ANIMATE_MASKS + REPLACE_MASKS}[mode or "replace"]
    wanted: dict[str, Sequence[str]] = {
        "the reference image (ref.jpg, ref.png, ref_image.jpg or ref_image.png)": IMAGES,
        "the reference mask (ref_mask.png or ref_mask.jpg)": MASK_IMAGES,
        f"the driving video ({' or '.join(DRIVING)})": DRIVING,
        f"the driving mask video ({' or '.join(masks)})": masks,
    }
    there = {path.name.lower(): path for path in sorted(directory.iterdir()) if path.is_file()}
    found = {
        what: next((there[name] for name in _with_other_endings(names) if name in there), None)
        for what, names in wanted.items()
    }
    missing = [what for what, path in found.items() if path is None]
    if missing:
        holds = ", ".join(path.name for path in list(there.values())[:20]) or "no file"
        makes = _makes_masks(found.values()) if any("mask" in what for what in missing) else ""
        raise InputError(f"The case folder {directory} lacks {'; '.join(missing)}. It holds {holds}.{makes}")
    image, mask_image, driving, mask_video = (path for path in found.values() if path is not None)
    says: Mode = "replace" if mask_video.name.lower() in _with_other_endings(REPLACE_MASKS) else "animate"
    return CaseFiles(image, mask_image, driving, mask_video, mode or says)


def _makes_masks(found: Iterable[Path | None]) -> str:
    """How to get masks of the image and the driving video among the files of a case, in the order of `FILES`."""
    image, _, driving, _ = (path and shlex.quote(str(path)) for path in found)
    words = f"scail2-rt masks make --image {image or 'IMAGE'} --driving {driving or 'VIDEO'} -o DIR"
    return f" Make both masks with `{words}`."


def official_files(directory: Path) -> list[Path]:
    """What lies in a folder under one of the official names."""
    names = set(_with_other_endings((*IMAGES, *MASK_IMAGES, *DRIVING, *ANIMATE_MASKS, *REPLACE_MASKS)))
    return sorted(path for path in directory.glob("*") if path.name.lower() in names)


def _with_other_endings(names: Sequence[str]) -> list[str]:
    """The names; each video's (`.mp4`) is followed by the same with the other endings that videos have."""
    return [
        name.removesuffix(".mp4") + ending if name.endswith(".mp4") else name
        for name in names
        for ending in (VIDEO_ENDINGS if name.endswith(".mp4") else ("",))
    ]


def read_batch(file: Path) -> list[BatchLine]:
    """Lines of a batch file; blank lines and lines that start with `#` are skipped, folders are relative to the file.

    Raises `InputError` with the line's number for a line without `@@` or without a folder, and for a file without
    cases. Whether a folder exists is not checked: one bad case must not stop the others.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"The batch file {file} cannot be read ({error.strerror}): give a text file.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"The batch file {file} is not UTF-8 text: save it as UTF-8.") from error
    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        prompt, separator, folder = (part.strip() for part in stripped.rpartition(SEPARATOR))
        if not separator or not folder:
            raise InputError(f"Line {number} of {file} is not `prompt@@case_dir`: {stripped[:80]!r}.")
        lines.append(BatchLine("" if prompt == "None" else prompt, file.parent / Path(folder).expanduser(), number))
    if not lines:
        raise InputError(f"The batch file {file} holds no case: write one `prompt@@case_dir` a line.")
    return lines
