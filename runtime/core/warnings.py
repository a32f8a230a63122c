"""Warnings for the user that arise during work, such as a cache that cannot be written or damaged audio.

A caller collects them with `collecting`; without a collector they go to the module `logging`."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_collected: ContextVar[list[str] | None] = ContextVar("warnings", default=None)


def warn(sentence: str) -> None:
    """Give a sentence to the collector of the current context, or to `logging` if there is none."""
    collected = _collected.get()
    if collected is None:
        logging.getLogger("scail2_rt").warning("%s", sentence)
    else:
        collected.append(sentence)


@contextmanager
def collecting(sentences: list[str]) -> Iterator[None]:
    """Append the warnings of this context to `sentences` while the `with` statement runs."""
    token = _collected.set(sentences)
    try:
        yield
    finally:
        _collected.reset(token)
