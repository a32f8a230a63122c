"""Results that depend only on a file, kept until the file changes: the next request with the same driving clip and mask
is checked without reading them again."""

import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")


class KeptResults(Generic[T]):
    """The most recent results of one function of a file. They are shared, so nobody may change them.

    count: maximum number of results. May be used by several threads."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._results: OrderedDict[Hashable, T] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, source: object, about: Hashable, make: Callable[[], T]) -> T:
        """Return the kept result for this file and `about` (the other arguments), or that of `make`, which is then
        kept. A source that is no regular file, or that changes meanwhile, is not kept."""
        state = _state(source)
        if state is None:
            return make()
        with self._lock:
            if (state, about) in self._results:
                self._results.move_to_end((state, about))
                return self._results[state, about]
        result = make()
        if _state(source) == state:
            with self._lock:
                self._results[state, about] = result
                while len(self._results) > self._count:
                    self._results.popitem(last=False)
        return result


def _state(source: object) -> Hashable:
    """What identifies the content of a file: path, device, inode, size, times. None if it is no regular file."""
    if not isinstance(source, (str, Path)):
        return None
    try:
        found = os.stat(source)
    except OSError:
        return None
    if not stat.S_ISREG(found.st_mode):
        return None
    return str(source), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
