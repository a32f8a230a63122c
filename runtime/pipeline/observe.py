"""Intermediate tensors for whoever wants to see them: the parity tests compare them with recorded ones.

    with observing(look):          # look(name, tensor)
        for frames in animate(…): …

Without an observer `observe` does nothing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

Observer = Callable[[str, Tensor], None]
_observer: ContextVar[Observer | None] = ContextVar("observer", default=None)


def observe(name: str, value: Tensor) -> None:
    """Tell the observer, if there is one."""
    if (look := _observer.get()) is not None:
        look(name, value)


@contextmanager
def observing(look: Observer) -> Iterator[None]:
    """Everything that this context computes meanwhile is shown to `look`."""
    token = _observer.set(look)
    try:
        yield
    finally:
        _observer.reset(token)
