"""Conversion of the lines of a batch file to typed options of `generate`.

The JSON object of a line uses the names of the options (`mask-image` or `mask_image`). Its values are converted by the
option declarations of the command, so that a wrong value gives the same error as on the command line. Paths are
relative to the batch file.
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

_COMMAND_ONLY = (  # parameters that apply to all lines
    "engines", "batch", "dry_run", "server", "ray_address", "as_json", "debug", "backend", "max_rows", "attention",
    "vram_limit", "no_graphs", "gpus",
)  # fmt: skip


def typed_lines(ctx: click.Context, file: Path) -> tuple[BatchLine, ...]:
    """Return the lines of a batch file. The `options` of a line have the names and types of the command's parameters;
    an invalid line has an `error`. Raises InputError if the file cannot be read."""
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
            near = difflib.get_close_matches(key.replace("-", "_"), known, 1)
            hint = f"Use {near[0]!r}." if near else "See `scail2-rt generate --help`."
            raise InputError(f"{key!r} is not an option of generate. {hint}")
        name = parameter.name
        if name in _COMMAND_ONLY:
            raise InputError(f"{key!r} applies to all lines of a batch. Give it on the command line.")
        if value is None:
            continue
        found[name] = parameter.type_cast_value(ctx, _text(key, value, parameter))
        if name != "output":
            found[name] = _beside(found[name], folder)
    return found


def _text(key: str, value: Any, parameter: click.Parameter) -> Any:
    """Return a JSON value in the form of the command line: text, or a list of texts for a repeatable option."""
    if isinstance(value, bool | int | float | str):
        text = str(value).lower() if isinstance(value, bool) else str(value)
        return [text] if parameter.multiple else text
    listed = parameter.multiple or isinstance(parameter.type, SeedList)
    if isinstance(value, list) and listed:
        pairs = [tuple(map(str, item)) if isinstance(item, list) else str(item) for item in value]
        return pairs if parameter.multiple else ",".join(map(str, value))
    raise InputError(f"{key!r} is {str(value)[:80]}. Give {'a list of values' if listed else 'one value'}.")


def _beside(value: Any, folder: Path) -> Any:
    """Return the value with its paths joined to the folder of the batch file."""
    if isinstance(value, tuple):
        return tuple(_beside(item, folder) for item in value)
    return folder / value.expanduser() if isinstance(value, Path) else value
