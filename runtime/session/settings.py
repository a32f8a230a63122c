"""The settings of a run, stored in its output so that the run can be repeated.

They are one JSON object in the tag `comment` of a video, in the comment extension of a GIF, and in each PNG file:

    {"scail2_rt": {"format": 1, "options": …, "inputs": …, "engines": …, "made_with": …}}

options are those of `generate` that change the pixels, resolved (a preset is stored as its numbers). inputs are names
and SHA-256 hashes, never paths. engines is the digest of the folder's weights. Equal runs store equal settings. The run
report holds the same facts and can be read instead.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.core.case_folder import FILES, refuse_url
from scail2_rt.runtime.core.request import Request

KEY = "scail2_rt"
FORMAT = 1
COMPUTING = ("scail2-rt", "torch", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx-cu13", "triton", "av")
_LEFT_OUT = ("output", "overwrite", "resume", "metadata", "config", *FILES, "extra_refs")
OPTIONS = frozenset(  # options that a run stores
    {*(field.name for field in fields(Request)), "codec", "crf", "backend", "gpus", "max_rows", "attention"}
).difference(_LEFT_OUT)


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings stored in an output.

    options    option of `generate` → value
    inputs     label → {"name", "sha256"}; the name is None for an input in memory
    engines    digest and precision of the engine folder
    made_with  the device and the versions of the packages that compute"""

    options: Mapping[str, Any]
    inputs: Mapping[str, Mapping[str, str | None]]
    engines: Mapping[str, str]
    made_with: Mapping[str, str]


def settings_text(about: Mapping[str, Any]) -> str:
    """Return the settings of the run that a report describes, as ASCII JSON."""
    return json.dumps({KEY: _of_report(about)}, separators=(",", ":"))


def _of_report(about: Mapping[str, Any]) -> dict[str, Any]:
    from scail2_rt.engines.registry import backend as registered

    options = {name: value for name, value in about["options"].items() if name not in _LEFT_OUT and value is not None}
    options |= {"mode": about["mode"], "size": f"{about['height']}x{about['width']}"}
    options |= {"backend": about["device"]["backend"], "gpus": about["device"]["gpus"]}
    options |= {"max_rows": about["engines"]["max_rows"]}
    if registered(about["device"]["backend"]).compiles_kernels:
        options |= {"attention": about["engines"]["attention"]}
    return {
        "format": FORMAT,
        "options": options,
        "inputs": {
            label: {"name": file["path"] and Path(file["path"]).name, "sha256": file["sha256"]}
            for label, file in about["inputs"].items()
        },
        "engines": {name: about["engines"].get(name, "") for name in ("digest", "precision")},
        "made_with": made_with(about["device"], about["versions"]),
    }


def made_with(device: Mapping[str, Any], versions: Mapping[str, str]) -> dict[str, str]:
    """Return the facts that must be equal for a bit-identical repetition, besides engines, options and inputs: the
    device's name and the versions of the packages that its backend uses. device: as in the report."""
    others = tuple(name for name in ("onnxruntime", "tensorrt") if not device["backend"].startswith(name))
    used = [name for name in COMPUTING if name in versions and not name.startswith(others)]
    return {"device": device["name"], **{name: versions[name] for name in used}}


def read_settings(path: Path) -> Settings:
    """Return the settings in an output of `generate`, or in its report. Raises InputError if they cannot be read."""
    refuse_url("video of --from-video", path)
    if not path.exists():
        raise InputError(f"The video {path} of --from-video does not exist. Give a video that `generate` made.")
    try:
        document = json.loads(_comment(path))
        found = _of_report(document) if "report_version" in document else document[KEY]
        version = found["format"]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise InputError(
            f"{path} holds no settings of scail2-rt: it was made by another tool, by a service or with --no-metadata, "
            "or the settings were removed. Give the run report with --from-video, or give the options."
        ) from None
    if version != FORMAT:
        raise InputError(
            f"The settings in {path} have format {version}, and this version of scail2-rt reads format {FORMAT}. Use "
            "the version that made the video, or give the options."
        )
    parts = [found.get(name) for name in ("options", "inputs", "engines", "made_with")]
    files = list(parts[1].values()) if isinstance(parts[1], dict) else [None]
    if not all(isinstance(part, dict) for part in (*parts, *files)):
        raise InputError(f"The settings in {path} are damaged. Give the run report, or give the options.")
    return Settings(*parts)  # type: ignore[arg-type]


def _comment(path: Path) -> str:
    """Return the comment of a video, a GIF, a PNG file or the first PNG file of a folder; or the text of a .json
    file."""
    import av
    from PIL import Image, UnidentifiedImageError

    if path.is_dir():
        path = min(path.glob("*.png"), default=path / "000000.png")
    try:
        if path.suffix.lower() == ".json":
            return path.read_text(encoding="utf-8")
        if path.suffix.lower() in (".gif", ".png"):
            with Image.open(path) as image:
                comment = image.info.get("comment", "")
                return comment.decode("ascii", "replace") if isinstance(comment, bytes) else str(comment)
        with av.open(str(path.absolute()), metadata_errors="replace") as container:
            return next((value for name, value in container.metadata.items() if name.lower() == "comment"), "")
    except (OSError, SyntaxError, av.FFmpegError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be read ({reason}). Give a video that `generate` made.") from error
