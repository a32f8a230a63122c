"""What every command does with its result: text for people, or one JSON object; and what several commands share."""

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import click


def parts_apart(options: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of the checkpoint that were named apart, as keyword arguments of `open_checkpoint`: name → path."""
    return {name: options[name] for name in ("vae", "umt5", "clip", "tokenizer") if options[name] is not None}


@contextlib.contextmanager
def stdout_for(as_json: bool) -> Iterator[None]:
    """While a command works, what libraries print goes to stderr if stdout must hold JSON alone."""
    if not as_json:
        yield
        return
    with contextlib.redirect_stdout(sys.stderr):
        yield


def show(result: Any, text: str, as_json: bool) -> None:
    """The result of a command on stdout: one JSON object, or text for people."""
    if not as_json:
        click.echo(text)
        return
    from scail2_rt.runtime.core.as_json import plain

    click.echo(json.dumps(plain(result), ensure_ascii=False))
