"""Case folders, batch files and prompt files (MODEL §1).

A case folder holds a reference image, its mask, a driving clip and its mask video under the official names. If several
possible names exist, the first in the list is used. `replace_mask.mp4` selects replace mode. A video may also end in
.mov, .mkv and so on. `prompt.txt` is the prompt if none is given. A batch file has one case per line, as
`prompt@@case_dir` or as a JSON object of options. This module finds images and videos by name only: it does not check
whether they can be decoded.
"""

import codecs
import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from scail2_rt.kernels.errors import InputError

Mode = Literal["animate", "replace"]

_IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".heic", ".heif", ".avif")
IMAGES = tuple(stem + ending for stem in ("ref", "ref_image") for ending in _IMAGE_ENDINGS)
MASK_IMAGES = tuple(
    stem + ending for stem in ("ref_mask", "ref_image_mask") for ending in (".png", ".jpg", ".jpeg", ".webp")
)
VIDEO_ENDINGS = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".ts", ".gif", ".webp")  # official: .mp4
DRIVING = ("rendered_v2.mp4", "rendered_aligned.mp4", "rendered.mp4", "driving.mp4")
ANIMATE_MASKS = ("rendered_mask_v2.mp4", "rendered_mask.mp4")
REPLACE_MASKS = ("replace_mask.mp4",)
PROMPT = "prompt.txt"
SEPARATOR = "@@"
FILES = ("image", "mask_image", "driving", "mask_video")  # fields of `CaseFiles`, and names of options


@dataclass(frozen=True, slots=True)
class CaseFiles:
    """The files of one case, and the mode that they select.

    prompt_file   `prompt.txt`, if the folder has one
    choices       the files used if several were possible, as "ref.png (not ref.jpg)"; else empty"""

    image: Path
    mask_image: Path
    driving: Path
    mask_video: Path
    mode: Mode
    prompt_file: Path | None = None
    choices: str = ""


class UnmaskedCase(NamedTuple):
    """The files of a case folder without masks, with the fields of `CaseFiles`."""

    image: Path
    driving: Path
    prompt_file: Path | None
    choices: str


@dataclass(frozen=True, slots=True)
class BatchLine:
    """One line of a batch file: its number (from 1) and its options by name, or an error if it is malformed.

    A line `prompt@@case_dir` sets `case`, and `prompt` unless nothing precedes the `@@`. The text `None` there means an
    empty prompt."""

    number: int
    options: Mapping[str, Any] = field(default_factory=dict)
    error: InputError | None = None


@dataclass(frozen=True, slots=True)
class CaseInputs:
    """A case as the user named it: a folder, or its four files."""

    case: Path | None
    image: Path | None
    mask_image: Path | None
    driving: Path | None
    mask_video: Path | None

    def files(self, instead: str) -> "NamedFiles | None":
        """Return the four files if they were named, or None if none was. `instead` is the part of the error message
        that says what to give. Raises InputError if only some of the four were named, or a folder as well."""
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
    """The flags of options, as "--image, --extra-ref". names: of the options' values, such as `extra_refs`."""
    return ", ".join("--" + name.rstrip("s").replace("_", "-") for name in names)


def read_case(directory: Path, mode: Mode | None = None) -> CaseFiles:
    """Find the files of a case folder. `mode` overrides the mode that the name of the mask video selects.

    If `mode` is given, the mask video of that mode is preferred, and the other mode's is used if it is the only one.
    Raises InputError, which lists every missing file with its possible names."""
    masks = {"replace": REPLACE_MASKS + ANIMATE_MASKS, "animate": ANIMATE_MASKS + REPLACE_MASKS}[mode or "replace"]
    wanted: dict[str, Sequence[str]] = {
        "the reference image (ref.png, ref.jpg, ref_image.png or ref_image.jpg)": IMAGES,
        "the reference mask (ref_mask.png or ref_mask.jpg)": MASK_IMAGES,
        f"the driving clip ({' or '.join(DRIVING)})": DRIVING,
        f"the mask video ({' or '.join(masks)})": masks,
    }
    files = _files_of(directory)
    found = {what: _candidates(files, names) for what, names in wanted.items()}
    if missing := [what for what, paths in found.items() if not paths]:
        holds = ", ".join(path.name for path in list(files.values())[:20]) or "no file"
        remedy = "Add the missing files."
        if any("mask" in what for what in missing):
            picture, _, clip, _ = (shlex.quote(str(paths[0])) if paths else "" for paths in found.values())
            words = f"scail2-rt masks make --image {picture or 'IMAGE'} --driving {clip or 'VIDEO'} -o DIR"
            remedy = f"Make both masks with `{words}`."
        raise InputError(f"The case folder {directory} lacks {'; '.join(missing)}. It holds {holds}. {remedy}")
    image, mask_image, driving, mask_video = (paths[0] for paths in found.values())
    named: Mode = "replace" if _is_replace_mask(mask_video) else "animate"
    # The mask videos of the two modes are not alternatives: the mode selects one.
    alike = [
        [path for path in paths if _is_replace_mask(path) == _is_replace_mask(paths[0])] for paths in found.values()
    ]
    return CaseFiles(image, mask_image, driving, mask_video, mode or named, files.get(PROMPT), _choices(alike))


def _is_replace_mask(path: Path) -> bool:
    return path.name.lower() in _with_other_endings(REPLACE_MASKS)


def read_unmasked_case(directory: Path) -> UnmaskedCase | None:
    """Return the files of a case folder with a reference image, a driving clip and no mask; None for other folders."""
    files = _files_of(directory)
    if any(_candidates(files, names) for names in (MASK_IMAGES, ANIMATE_MASKS + REPLACE_MASKS)):
        return None
    images, clips = found = _candidates(files, IMAGES), _candidates(files, DRIVING)
    return UnmaskedCase(images[0], clips[0], files.get(PROMPT), _choices(found)) if images and clips else None


def _files_of(directory: Path) -> dict[str, Path]:
    """Map lower-case names to the files of a case folder. Raises InputError if it is not an existing folder."""
    refuse_url("case folder", directory)
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "does not exist"
        raise InputError(
            f"The case folder {directory} {what}: give a folder that holds a reference image and a driving clip."
        )
    return {path.name.lower(): path for path in sorted(directory.iterdir()) if path.is_file()}


def _candidates(files: Mapping[str, Path], names: Sequence[str]) -> list[Path]:
    """The files that have one of these names, in the order of `names`."""
    return [files[name] for name in _with_other_endings(names) if name in files]


def _choices(found: Iterable[Sequence[Path]]) -> str:
    """Describe choices as `ref.png (not ref.jpg), rendered.mp4 (not driving.mp4)`. found: candidates, the used one
    first."""
    several = (paths for paths in found if paths[1:])
    return ", ".join(f"{paths[0].name} (not {', '.join(path.name for path in paths[1:])})" for paths in several)


def official_files(directory: Path) -> list[Path]:
    """The files of a folder that have one of the official names, sorted."""
    names = set(_with_other_endings((*IMAGES, *MASK_IMAGES, *DRIVING, *ANIMATE_MASKS, *REPLACE_MASKS)))
    return sorted(path for path in directory.glob("*") if path.name.lower() in names)


def _with_other_endings(names: Sequence[str]) -> list[str]:
    """The names, each video name (`.mp4`) expanded to all of `VIDEO_ENDINGS`."""
    return [
        name.removesuffix(".mp4") + ending if name.endswith(".mp4") else name
        for name in names
        for ending in (VIDEO_ENDINGS if name.endswith(".mp4") else ("",))
    ]


def read_batch(file: Path) -> list[BatchLine]:
    """Read a batch file; blank lines and lines that start with `#` are skipped, and a malformed line carries its error.

    Raises InputError if the file cannot be read or holds no case. Case folders are not looked up."""
    lines = [
        _batch_line(number, stripped)
        for number, line in enumerate(re.split(r"\r\n?|\n", read_text("batch file", file)), 1)
        if (stripped := line.strip()) and not stripped.startswith("#")
    ]
    if not lines:
        raise InputError(f"The batch file {file} holds no case: write one `prompt@@case_dir` or JSON object per line.")
    return lines


def _batch_line(number: int, line: str) -> BatchLine:
    if line.startswith("{"):
        try:
            return BatchLine(number, json.loads(line))
        except (ValueError, RecursionError) as error:
            wrong = f'it is not valid JSON ({error}): write one object per line, such as {{"case": "walk"}}.'
            return BatchLine(number, error=InputError(wrong))
    prompt, separator, folder = (part.strip() for part in line.rpartition(SEPARATOR))
    if not separator or not folder:
        wrong = f"{line[:80]!r} is neither `prompt@@case_dir` nor a JSON object of options: write one of the two."
        return BatchLine(number, error=InputError(wrong))
    given = {"case": folder}
    if prompt:
        given["prompt"] = "" if prompt == "None" else prompt
    return BatchLine(number, given)


_BYTE_ORDER_MARKS = (  # UTF-32's begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_text(what: str, file: Path) -> str:
    """Read a text file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark. Other encodings cannot be told apart.

    `what` describes the file in messages. Raises InputError if it cannot be read or is in another encoding."""
    refuse_url(what, file)
    try:
        data = file.read_bytes()
    except OSError as error:
        raise InputError(f"The {what} {file} cannot be read ({error.strerror}): give a text file.") from error
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS if data.startswith(mark)), "utf-8-sig")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"The {what} {file} is not {encoding.removesuffix('-sig').upper()} text (byte 0x{data[error.start]:02x} in "
            f"line {line}): save it as UTF-8. If it is Latin-1, "
            f"`iconv -f LATIN1 -t UTF-8 {shlex.quote(str(file))} > NEW` converts it."
        ) from error
    if "\0" in text:
        raise InputError(
            f"The {what} {file} contains NUL bytes, so it is UTF-16 without a byte order mark, or not text: "
            "save it as UTF-8."
        )
    return text


def refuse_url(what: str, source: Path | str) -> None:
    """Raise InputError if `source` is a URL. `what` describes the input in the message."""
    if url := url_of(source):
        raise InputError(f"The {what} {url} is a URL: download it first, then give its path.")


def url_of(source: Path | str) -> str | None:
    """Return `source` if it is a URL, else None. A slash that `Path` removed from it is restored."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.+)", str(source))
    return f"{match[1]}://{match[2]}" if match and not Path(source).exists() else None
