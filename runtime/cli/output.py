"""The output of a command: text for people, or one JSON object."""

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import click


def separate_parts(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts of the checkpoint that were named separately: keyword of `open_checkpoint` → path."""
    return {name: options[name] for name in ("vae", "umt5", "clip", "tokenizer") if options[name] is not None}


@contextlib.contextmanager
def stdout_for(as_json: bool) -> Iterator[None]:
    """Redirect stdout to stderr while a command works if stdout must hold only JSON."""
    if not as_json:
        yield
        return
    with contextlib.redirect_stdout(sys.stderr):
        yield


def show(result: Any, text: str, as_json: bool) -> None:
    """Print the result of a command on stdout: one JSON object, or the text."""
    if not as_json:
        click.echo(text)
        return
    from scail2_rt.runtime.core.as_json import plain

    click.echo(json.dumps(plain(result), ensure_ascii=False))
