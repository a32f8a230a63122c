"""`generate --from-video`: repeat a run with the settings stored in its video.

Options on the command line override stored ones. Inputs that are not given are searched by hash: at the paths in the
run report beside the video, beside the video, and among the masks that were made for it.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.core.case_folder import read_case
from scail2_rt.runtime.core.containers import container_of
from scail2_rt.runtime.jobs.masks import masks_folder
from scail2_rt.runtime.jobs.options import Preset
from scail2_rt.runtime.session.report import is_report, path_hash, report_path
from scail2_rt.runtime.session.settings import OPTIONS, Settings, read_settings

_OPTIONS = {"image": "image", "image_mask": "mask_image", "driving": "driving", "mask_video": "mask_video"}
_MASK_OF = {"image_mask": "image", "mask_video": "driving"}
OF_ENGINES = ("backend", "gpus", "max_rows", "attention")  # set by the operator of a service
DESCRIBED = frozenset(  # options that describe what a run makes; a video stores them
    {*OPTIONS, *_OPTIONS.values(), "extra_refs", "case", "batch", "prompt_file", "preset", "seeds"}
).difference(OF_ENGINES)
_REPLACED_BY = {  # option on the command line → stored options that it replaces
    "preset": tuple(field.name for field in fields(Preset)),
    "prompt_file": ("prompt",),
    "seeds": ("seed",),
    "case": ("mode",),
}


def repeated_options(video: Path, output: Path, given: Mapping[str, Any], remote: bool = False) -> dict[str, Any]:
    """Return the options and inputs of the run that made a video, to be written to `output`, without those that are
    `given`. Given inputs that differ from those of the run are named on stderr. remote: without options of engines.

    Raises InputError if the video holds no settings, an input is not found, or an option is unknown."""
    if "batch" in given:
        raise InputError("--from-video and --batch were both given. Use one of them.")
    settings = read_settings(video)
    replaced = {name for option in given for name in _REPLACED_BY.get(option, ())}
    replaced.update(OF_ENGINES if remote else ())
    if settings.options.get("codec") not in container_of(output).codecs:
        replaced |= {"codec", "crf"}
    stored = {name: value for name, value in settings.options.items() if name not in {*given, *replaced}}
    if unknown := [name for name in stored if name not in OPTIONS]:
        raise InputError(
            f"{video} was made with {', '.join(unknown)}, which this version of scail2-rt does not know. Use the "
            f"version that made it ({settings.made_with.get('scail2-rt', 'unknown')})."
        )
    return stored | _inputs(video, settings, given)


def _inputs(video: Path, settings: Settings, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return option → file of the run, for the files that are not given."""
    files = _given_files(given)
    differing = [label for label, path in files.items() if _differs(settings, label, path)]
    for label in differing:
        name = settings.inputs[label].get("name")
        print(
            f"warning: {files[label]} is not the {_name(label)} of {video} ({name}): its hash differs", file=sys.stderr
        )
    found: dict[str, Any] = {}
    for label, option in _OPTIONS.items():
        if label in files or label not in settings.inputs or _MASK_OF.get(label) in differing:
            continue
        found[option] = _found(video, settings, label)
    if "extra_refs" not in given:
        extra = sorted(label for label in settings.inputs if label.startswith("extra_ref") and label[-1].isdecimal())
        found["extra_refs"] = tuple(
            (_found(video, settings, label), _found(video, settings, f"{label}_mask")) for label in extra
        )
    return found


def _given_files(given: Mapping[str, Any]) -> dict[str, Path]:
    """Return label → given input, named separately or in a case folder."""
    if "case" in given:
        mode = given.get("mode", "auto")
        case = read_case(given["case"], None if mode == "auto" else mode)
        return {label: getattr(case, option) for label, option in _OPTIONS.items()}
    return {label: given[option] for label, option in _OPTIONS.items() if option in given}


def _differs(settings: Settings, label: str, path: Path) -> bool:
    file = settings.inputs.get(label, {})
    return file.get("name") is not None and path.exists() and path_hash(path) != file.get("sha256")


def _found(video: Path, settings: Settings, label: str) -> Path:
    """Return the file of the run with the stored hash. Raises InputError if it is not found."""
    file = settings.inputs.get(label, {})
    option = f"--{_OPTIONS.get(label, 'extra_ref').replace('_', '-')}"
    name, digest = file.get("name"), file.get("sha256")
    if not isinstance(name, str):
        raise InputError(f"The {_name(label)} of {video} was not a file. Give it with {option}.")
    for path in dict.fromkeys(_candidates(video, label, Path(name).name)):
        if path.exists() and path_hash(path) == digest:
            return path
    raise InputError(
        f"The {_name(label)} {name} of {video} is neither beside it nor at the path in the run report, or it has "
        f"changed. Give it with {option}."
    )


def _candidates(video: Path, label: str, name: str) -> Iterator[Path]:
    """Yield the paths at which an input may be, the likely ones first."""
    report_file = report_path(video)
    if is_report(report_file):
        reported = json.loads(report_file.read_text(encoding="utf-8")).get("inputs", {}).get(label, {}).get("path")
        if reported:
            yield Path(reported)
            yield report_file.parent / reported
    yield video.parent / name
    yield masks_folder(video) / name
    yield from sorted(
        path for path in video.parent.iterdir() if path.is_file() and Path(name).suffix in ("", path.suffix)
    )


def _name(label: str) -> str:
    """Return the name of an input for messages."""
    names = {"image": "reference image", "image_mask": "reference mask", "driving": "driving clip"}
    return {**names, "mask_video": "driving mask video"}.get(label, label.replace("_", " "))
