"""Access to intermediate tensors: the parity tests compare them with recorded ones.

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
    """Pass a tensor to the observer, if there is one."""
    if (look := _observer.get()) is not None:
        look(name, value)


@contextmanager
def observing(look: Observer) -> Iterator[None]:
    """Pass every tensor that this context observes inside the `with` block to `look`."""
    token = _observer.set(look)
    try:
        yield
    finally:
        _observer.reset(token)
