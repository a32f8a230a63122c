"""Sentences for the user that come up while work goes on: a cache that cannot be written, sound that is damaged.

Whoever works for somebody collects them (`collecting`); without a collector they go to the module `logging`."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_collected: ContextVar[list[str] | None] = ContextVar("warnings", default=None)


def warn(sentence: str) -> None:
    """Tell the collector of this context."""
    collected = _collected.get()
    if collected is None:
        logging.getLogger("scail2_rt").warning("%s", sentence)
    else:
        collected.append(sentence)


@contextmanager
def collecting(sentences: list[str]) -> Iterator[None]:
    """What this context warns of meanwhile is added to `sentences`."""
    token = _collected.set(sentences)
    try:
        yield
    finally:
        _collected.reset(token)
