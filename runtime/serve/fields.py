"""Parse the fields of a request into typed options.

OpenAI's client sends all fields except one file as strings and flattens nested ones: `video_reference[file_id]`,
`"true"`, `"3"`. Field names are those of `Request` and of the command line's options. Fields that only the operator
sets are refused by name. `size` is WxH, as in OpenAI's interface (the command line uses HxW).
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.core.request import Request
from scail2_rt.runtime.jobs.options import PRESETS, GenerateOptions
from scail2_rt.runtime.serve.errors import wrong

# Field of the interface → field of `Request`.
REFERENCES = {
    "input_reference": "image",
    "mask_reference": "mask_image",
    "video_reference": "driving",
    "video_mask_reference": "mask_video",
}
WHOLE = ("start", "frames", "steps", "seed", "segment_length", "segment_overlap", "overlap_blend", "crf")
NUMBERS = ("shift", "guidance")
RATES = ("fps",)
FLAGS = ("fit_reference", "allow_mask_problems", "metadata")
TEXTS = (*("prompt", "negative_prompt", "mode", "fit", "preset", "scheduler", "anchor_color", "noise_device", "codec"),)
OPTIONS = (*WHOLE, *NUMBERS, *RATES, *FLAGS, *TEXTS)
MASKING = ("mask_prompt", "max_characters", "sort", "points", "boxes", "pairs", "one_to_many")
OPERATORS = (
    *("output", "overwrite", "resume", "case", "batch", "prompt_file", "engines", "backend", "attention", "max_rows"),
    *("vram_limit", "no_graphs", "gpus", "device", "execution", "image", "mask_image", "driving", "mask_video"),
    *("segmenter", "segmenter_weights", "segmenter_device", "image_from", "driving_from"),
)
OTHER = ("model", "size", "seconds", "extra_refs", "masks_id", "user", "extra_body")
PROMPT_CHARACTERS = 20_000


@dataclasses.dataclass(frozen=True, slots=True)
class Asked:
    """One parsed request for a video.

    options      typed values for `GenerateOptions`; size as (height, width)
    references   field of `Request` → the client's reference: {"file_id": …} or {"url": …}
    extra_refs   pairs (image, mask) of such references
    seconds      length of the result, if the client gave it in seconds
    model        name of the model, if given
    masking      options for making masks
    masks_id     id of an earlier masks job whose masks are used"""

    options: dict[str, Any]
    references: dict[str, Any]
    extra_refs: tuple[tuple[Any, Any], ...]
    seconds: Fraction | None
    model: str | None
    masking: dict[str, Any] = dataclasses.field(default_factory=dict)
    masks_id: str | None = None


def nested(fields: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """`a[b][c]` = v → {"a": {"b": {"c": v}}}; each `a[]` gets the next index from 0. Raises Refusal (400) for a
    malformed name and for a name that is given twice."""
    tree: dict[str, Any] = {}
    for name, value in fields:
        head, keys = name.partition("[")[0], re.findall(r"\[([^\[\]]*)\]", name)
        if name != head + "".join(f"[{key}]" for key in keys) or not head or len(keys) > 4:
            said = f"The field name {name[:80]!r} is malformed. Write names as in video_reference[file_id]."
            raise wrong(said, name[:80], "unknown_field")
        here, path = tree, [head, *keys]
        for key in path[:-1]:
            here = here.setdefault(key, {})
            if not isinstance(here, dict):
                raise wrong(f"The field {name[:80]} is given twice. Send it once.", head)
        last = path[-1] or str(len(here))
        if last in here:
            raise wrong(f"The field {name[:80]} is given twice. Send it once.", head)
        here[last] = value
    return tree


def _listed(pairs: Iterable[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Turn repeated `points` and `boxes` fields into lists, as the command line does for a repeated --point."""
    given = list(pairs)
    repeated = [name for name in ("points", "boxes") if sum(field == name for field, _ in given) > 1]
    return [(f"{name}[]" if name in repeated else name, value) for name, value in given]


def read_fields(pairs: Iterable[tuple[str, Any]]) -> Asked:
    """Parse the fields of a request. Raises Refusal (400) for a field that is unknown, reserved for the operator or of
    the wrong type. Sentences about values are those of the command line."""
    tree = {name: value for name, value in nested(_listed(pairs)).items() if value is not None}
    extra = tree.pop("extra_body", None)
    if extra is not None:
        tree |= extra if isinstance(extra, dict) else _json(extra, "extra_body", dict)
    for name in tree:
        if name in OPERATORS:
            raise wrong(f"The field {name} is set by the operator of the service. Leave it out.", name)
        if name not in (*OPTIONS, *REFERENCES, *MASKING, *OTHER):
            known = ", ".join((*REFERENCES, *OPTIONS, *MASKING, *OTHER[:5]))
            raise wrong(f"The field {name[:80]!r} is not known. Use one of {known}.", name[:80], "unknown_field")
    options = {name: _typed(name, tree[name]) for name in OPTIONS if name in tree}
    if options.get("preset", "quality") not in PRESETS:
        raise wrong(f"--preset must be one of {', '.join(PRESETS)}, not {options['preset'][:80]}.", "preset")
    if "size" in tree:
        options["size"] = _size(tree["size"])
    model = tree.get("model")
    return Asked(
        options=options,
        references={field: _reference(name, tree[name]) for name, field in REFERENCES.items() if name in tree},
        extra_refs=_pairs(tree.get("extra_refs", ())),
        seconds=_seconds(tree["seconds"]) if "seconds" in tree else None,
        model=None if model is None else str(model),
        masking={name: _masking(name, tree[name]) for name in MASKING if name in tree},
        masks_id=None if "masks_id" not in tree else str(tree["masks_id"]),
    )


def request_of(options: Mapping[str, Any], folder: Path, extra_refs: int) -> Request:
    """The `Request` for a job's folder, whose input files have the interface's field names. extra_refs: number of
    extra reference pairs. Raises InputError as on the command line."""
    places = {field: folder / name for name, field in REFERENCES.items()}
    pairs = tuple((folder / f"extra_ref_{i}", folder / f"extra_ref_{i}_mask") for i in range(1, extra_refs + 1))
    return options_of(options, folder).request(**places, extra_refs=pairs)


def options_of(options: Mapping[str, Any], folder: Path) -> GenerateOptions:
    """`GenerateOptions` from a job's options; inputs are not among them."""
    given = dict(options)
    if given.get("size") is not None:
        given["size"] = tuple(given["size"])
    return GenerateOptions(engines=folder, output=folder / "video.mp4", **given)


def _typed(name: str, value: Any) -> Any:
    if name in WHOLE:
        return _whole(name, value)
    if name in NUMBERS:
        return _number(name, value)
    if name in RATES:
        return _rate(name, value)
    if name in FLAGS:
        return _flag(name, value)
    if not isinstance(value, str):
        raise wrong(f"The field {name} must be text, not {json.dumps(value)[:80]}.", name)
    if len(value) > PROMPT_CHARACTERS:
        raise wrong(f"The field {name} is longer than {PROMPT_CHARACTERS} characters. Shorten it.", name)
    return value


def _masking(name: str, value: Any) -> Any:
    if name == "max_characters":
        return _whole(name, value)
    if name == "one_to_many":
        return _flag(name, value)
    if name not in ("points", "boxes"):
        return _typed(name, value)
    if isinstance(value, str):
        value = _json(value, name, list) if value.lstrip().startswith("[") else value.split(";")
    items = list(value.values()) if isinstance(value, dict) else value
    if not isinstance(items, list) or not all(isinstance(item, str) and len(item) < 100 for item in items):
        raise wrong(f"The field {name} must be a list of strings.", name)
    return items[:200]


def _whole(name: str, value: Any) -> int:
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d{1,20}\s*", value):
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise wrong(f"--{name.replace('_', '-')} must be a whole number, not {str(value)[:80]!r}.", name)


def _number(name: str, value: Any) -> float:
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise wrong(f"--{name.replace('_', '-')} must be a number, not {str(value)[:80]!r}.", name) from None


def _rate(name: str, value: Any) -> str:
    """Frames per second as text that a fraction can be made of."""
    if isinstance(value, bool) or not re.fullmatch(r"\d{1,4}(\.\d{1,6}|/\d{1,6})?|\d{5,6}/\d{1,6}", str(value).strip()):
        raise wrong(f"--{name} must be a number such as 16, 23.976 or 30000/1001, not {str(value)[:80]!r}.", name)
    return str(value).strip()


def _flag(name: str, value: Any) -> bool:
    known = {"true": True, "1": True, "on": True, "yes": True, "false": False, "0": False, "off": False, "no": False}
    found = value if isinstance(value, bool) else known.get(str(value).strip().lower())
    if found is None:
        raise wrong(f"The field {name} must be true or false, not {str(value)[:80]!r}.", name)
    return found


def _size(value: Any) -> tuple[int, int]:
    """WxH → (height, width)."""
    match = re.fullmatch(r"(\d{1,5})[xX×*](\d{1,5})", value.strip()) if isinstance(value, str) else None
    if not match:
        raise wrong(f"{str(value)[:80]!r} is not a size. Write width and height as in 896x512.", "size")
    return int(match[2]), int(match[1])


def _seconds(value: Any) -> Fraction:
    try:
        seconds = Fraction(str(value)).limit_denominator(1000)
    except (ValueError, ZeroDivisionError):
        seconds = Fraction(0)
    if not 0 < seconds <= 86_400:
        raise wrong(f"seconds must be a number above 0, not {str(value)[:80]!r}.", "seconds")
    return seconds


def _json(text: Any, name: str, kind: type) -> Any:
    try:
        found = json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, kind):
        raise wrong(f"The field {name} must be JSON: {'an object' if kind is dict else 'a list'}.", name)
    return found


def _reference(name: str, value: Any) -> Any:
    """Parse a reference into {"file_id": …} or {"url": …}. `image_url`, `video_url` and a plain string mean `url`."""
    if isinstance(value, str):
        value = _json(value, name, dict) if value.lstrip().startswith("{") else {"url": value}
    given = {key: text for key, text in value.items() if text is not None} if isinstance(value, dict) else {}
    if len(given) == 1:
        key, text = next(iter(given.items()))
        if isinstance(text, dict):
            text = text.get("url")
        if key in ("file_id", "url", "image_url", "video_url") and isinstance(text, str) and text:
            return {"file_id" if key == "file_id" else "url": text}
    raise wrong(f'The field {name} must be a file, {{"file_id": …}} or {{"url": …}}.', name)


def _pairs(value: Any) -> tuple[tuple[Any, Any], ...]:
    """Parse [[image, mask], …], given as JSON or as fields such as `extra_refs[0][1][file_id]`."""
    items = _json(value, "extra_refs", list) if isinstance(value, str) else value
    items = list(items.values()) if isinstance(items, dict) else items
    pairs = []
    for item in items if isinstance(items, list | tuple) else [None]:
        pair = list(item.values()) if isinstance(item, dict) else item
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise wrong("Extra references must be pairs: extra_refs=[[image, mask], …].", "extra_refs")
        pairs.append((_reference("extra_refs", pair[0]), _reference("extra_refs", pair[1])))
    if len(pairs) > 8:
        raise wrong("A request has at most 8 extra references. Leave some out.", "extra_refs")
    return tuple(pairs)


def check_numbers(asked: Asked, folder: Path) -> None:
    """Check the option values as `Request` does, before inputs are placed or decoded. Raises Refusal (400) with the
    first error."""
    try:
        request_of(asked.options, folder, 0)
    except InputError as error:
        raise wrong(str(error)) from None
