"""`generate --from-video`: the settings of a run that is repeated, from the video that it made.

Options that are given on the command line win. Inputs that are not given are found by their hashes: where the run
report beside the video says, beside the video, or among the masks that were made for it.
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
OF_ENGINES = ("backend", "gpus", "max_rows", "attention")  # which the operator of a service sets
DESCRIBED = frozenset(  # options that say what a run makes, which is what a video tells
    {*OPTIONS, *_OPTIONS.values(), "extra_refs", "case", "batch", "prompt_file", "preset", "seeds"}
).difference(OF_ENGINES)
_REPLACED_BY = {  # on the command line → stored options that it replaces
    "preset": tuple(field.name for field in fields(Preset)),
    "prompt_file": ("prompt",),
    "case": ("mode",),
}


def repeated_options(video: Path, output: Path, given: Mapping[str, Any], remote: bool = False) -> dict[str, Any]:
    """Options and inputs of the run that made a video, to be written to `output`, without those that are `given`, and
    for a `remote` service without those of engines. Says on stderr which inputs are others than those of the run.
    Raises InputError when the video holds no settings, an input is not found, or an option is not known."""
    if "batch" in given:
        raise InputError("--from-video repeats one run, and --batch names many: leave one of them out.")
    settings = read_settings(video)
    replaced = {name for option in given for name in _REPLACED_BY.get(option, ())}
    replaced.update(OF_ENGINES if remote else ())
    if settings.options.get("codec") not in container_of(output).codecs:
        replaced |= {"codec", "crf"}
    stored = {name: value for name, value in settings.options.items() if name not in {*given, *replaced}}
    if unknown := [name for name in stored if name not in OPTIONS]:
        raise InputError(
            f"{video} was made with {', '.join(unknown)}, which this version of scail2-rt does not know: use the "
            f"version that made it ({settings.made_with.get('scail2-rt', 'unknown')})."
        )
    return stored | _inputs(video, settings, given)


def _inputs(video: Path, settings: Settings, given: Mapping[str, Any]) -> dict[str, Any]:
    """The files of the run that are not given, by option."""
    files = _given_files(given)
    differing = [label for label, path in files.items() if _differs(settings, label, path)]
    for label in differing:
        name = settings.inputs[label].get("name")
        print(
            f"warning: {files[label]} is not the {_told(label)} of {video} ({name}): its hash differs", file=sys.stderr
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
    """Label → the input that is given, by itself or in a case folder."""
    if "case" in given:
        mode = given.get("mode", "auto")
        case = read_case(given["case"], None if mode == "auto" else mode)
        return {label: getattr(case, option) for label, option in _OPTIONS.items()}
    return {label: given[option] for label, option in _OPTIONS.items() if option in given}


def _differs(settings: Settings, label: str, path: Path) -> bool:
    file = settings.inputs.get(label, {})
    return file.get("name") is not None and path.exists() and path_hash(path) != file.get("sha256")


def _found(video: Path, settings: Settings, label: str) -> Path:
    """The file of the run, by its hash. Raises InputError when it is not there."""
    file = settings.inputs.get(label, {})
    option = f"--{_OPTIONS.get(label, 'extra_ref').replace('_', '-')}"
    name, digest = file.get("name"), file.get("sha256")
    if not isinstance(name, str):
        raise InputError(f"The {_told(label)} of {video} was in memory: give it with {option}.")
    for path in dict.fromkeys(_candidates(video, label, Path(name).name)):
        if path.exists() and path_hash(path) == digest:
            return path
    raise InputError(
        f"The {_told(label)} {name} of {video} is not beside it, nor unchanged where the run report says: give it with "
        f"{option}."
    )


def _candidates(video: Path, label: str, name: str) -> Iterator[Path]:
    """Where an input may be, the likely places first."""
    beside = report_path(video)
    if is_report(beside):
        told = json.loads(beside.read_text(encoding="utf-8")).get("inputs", {}).get(label, {}).get("path")
        if told:
            yield Path(told)
            yield beside.parent / told
    yield video.parent / name
    yield masks_folder(video) / name
    yield from sorted(
        path for path in video.parent.iterdir() if path.is_file() and Path(name).suffix in ("", path.suffix)
    )


def _told(label: str) -> str:
    names = {"image": "reference image", "image_mask": "reference mask", "driving": "driving video"}
    return {**names, "mask_video": "driving mask video"}.get(label, label.replace("_", " "))
