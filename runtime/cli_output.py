"""What commands print: the result on stdout, as text or as one JSON object, and nothing else there."""

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any

import click


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
    from scail2_rt.runtime.report import plain

    click.echo(json.dumps(plain(result), ensure_ascii=False))
