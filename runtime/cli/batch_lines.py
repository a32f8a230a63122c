"""Conversion of the lines of a batch file to typed options of `generate`.

The JSON object of a line uses the names of the options (`mask-image` or `mask_image`). Its values are converted as
those of a configuration file. Paths are relative to the batch file, except `output`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from scail2_rt.kernels.errors import InputError
from scail2_rt.runtime.cli.config import dashed, parameters, value_of
from scail2_rt.runtime.core.case_folder import BatchLine, read_batch

_COMMAND_ONLY = (  # options that apply to all lines
    "engines", "batch", "config", "dry-run", "server", "ray", "json", "debug", "backend", "max-rows", "attention",
    "vram-limit", "no-graphs", "gpus",
)  # fmt: skip


def typed_lines(ctx: click.Context, file: Path) -> tuple[BatchLine, ...]:
    """Return the lines of a batch file. The `options` of a line have the names and types of the command's parameters;
    an invalid line has an `error`. Raises InputError if the file cannot be read."""
    known = parameters(ctx.command)

    def typed(line: BatchLine) -> BatchLine:
        try:
            return replace(line, options=_typed(ctx, known, line.options, file.parent))
        except InputError as error:
            return replace(line, options={}, error=error)
        except click.ClickException as error:
            return replace(line, options={}, error=InputError(error.message))

    return tuple(typed(line) for line in read_batch(file))


def _typed(
    ctx: click.Context, known: Mapping[str, click.Parameter], given: Mapping[str, Any], folder: Path
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in given.items():
        name = dashed(key)
        if name == "from-video":
            raise InputError(f"{key!r} repeats one run and cannot be used in a batch. Run it without --batch.")
        if name in _COMMAND_ONLY:
            raise InputError(f"{key!r} applies to all lines of a batch. Give it on the command line.")
        if name not in known:
            raise InputError(f"{key!r} is not an option of generate. {_hint(ctx, known, name)}")
        if "\0" in str(value):
            raise InputError(f"{key!r} holds a zero byte (\\u0000). Remove it.")
        if value is not None:
            parameter, start = known[name], Path() if name == "output" else folder
            found[str(parameter.name)] = parameter.type_cast_value(ctx, value_of(ctx, parameter, key, value, start))
    return found


def _hint(ctx: click.Context, known: Mapping[str, click.Parameter], name: str) -> str:
    for parameter in ctx.command.get_params(ctx):
        if f"--{name}" in parameter.secondary_opts:
            return f'Write "{parameter.name}": false.'
    close = difflib.get_close_matches(name, known, 1)
    return f"Use {close[0]!r}." if close else "See `scail2-rt generate --help` for the names."
