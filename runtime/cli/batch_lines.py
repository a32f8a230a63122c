"""The lines of a batch file as typed options of `generate`, by the command's own declarations.

A line's JSON object has the names of the options (`mask-image` or `mask_image`); its values are read as those of the
command line are, so that a wrong one gets the same sentence. Paths are relative to the batch file.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.cli.types import SeedList
from scail2_rt.runtime.core.case_folder import BatchLine, read_batch

_OF_ALL = (
    *("engines", "batch", "config_file", "dry_run", "server", "ray_address", "as_json", "debug"),
    *("backend", "max_rows", "attention", "vram_limit", "no_graphs", "gpus"),
)


def typed_lines(ctx: click.Context, file: Path) -> tuple[BatchLine, ...]:
    """The lines of a batch file; `options` of each have the names and types of the command's parameters."""
    known = {
        name.lstrip("-").replace("-", "_"): parameter
        for parameter in ctx.command.get_params(ctx)
        for name in (*parameter.opts, parameter.name or "")
    }

    def typed(line: BatchLine) -> BatchLine:
        try:
            return replace(line, options=_typed(ctx, known, line.options, file.parent))
        except InputError as error:
            return replace(line, options={}, error=error)
        except click.ClickException as error:
            return replace(line, options={}, error=InputError(error.format_message()))

    return tuple(typed(line) for line in read_batch(file))


def _typed(
    ctx: click.Context, known: Mapping[str, click.Parameter], given: Mapping[str, Any], folder: Path
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in given.items():
        parameter = known.get(key.replace("-", "_"))
        if parameter is None or parameter.name is None or key == "help":
            raise InputError(f"{key!r} is no option of generate: {_hint(ctx, known, key)}")
        name = parameter.name
        if name == "from_video":
            raise InputError(f"{key!r} repeats one run and cannot be a line of a batch: run it without --batch.")
        if name in _OF_ALL:
            raise InputError(f"{key!r} holds for all lines of a batch: give it on the command line.")
        if value is None:
            continue
        found[name] = parameter.type_cast_value(ctx, _text(key, value, parameter))
        if name != "output":
            found[name] = _beside(found[name], folder)
    return found


def _hint(ctx: click.Context, known: Mapping[str, click.Parameter], key: str) -> str:
    flag = f"--{key.replace('_', '-')}"
    for parameter in ctx.command.get_params(ctx):
        if flag in parameter.secondary_opts:
            return f'write "{parameter.name}": false.'
    near = difflib.get_close_matches(key.replace("-", "_"), known, 1)
    return f"did you mean {near[0]!r}?" if near else "see `scail2-rt generate --help`."


def _text(key: str, value: Any, parameter: click.Parameter) -> Any:
    """A JSON value as the command line would give it: text, or lists of text for an option that may be repeated."""
    if "\0" in str(value):
        raise InputError(f"{key!r} holds a zero byte (\\u0000): remove it.")
    if isinstance(value, bool | int | float | str):
        several = parameter.multiple
        text = str(value).lower() if isinstance(value, bool) else str(value)
        return [text] if several else text
    listed = parameter.multiple or isinstance(parameter.type, SeedList)
    if isinstance(value, list) and listed:
        pairs = [tuple(map(str, item)) if isinstance(item, list) else str(item) for item in value]
        return pairs if parameter.multiple else ",".join(map(str, value))
    raise InputError(f"{key!r} must be {'a list of values' if listed else 'one value'}, not {str(value)[:80]}.")


def _beside(value: Any, folder: Path) -> Any:
    """Paths relative to the folder of the batch file."""
    if isinstance(value, tuple):
        return tuple(_beside(item, folder) for item in value)
    return folder / value.expanduser() if isinstance(value, Path) else value
