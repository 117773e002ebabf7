"""How many threads work on large tiles: one by default, more on request, never a different result."""

from __future__ import annotations

import os
import threading
import warnings
from types import TracebackType
from typing import SupportsIndex

from futurefill_rs import _core
from futurefill_rs._args import index

ENVIRONMENT = "FUTUREFILL_NUM_THREADS"
MOST = 4096
EXPECTED = f"a positive integer up to {MOST}, or -1 for all cores"
_lock = threading.Lock()


def _count(workers: SupportsIndex) -> int:
    count = index(workers, "workers", EXPECTED)
    if count == -1:
        return _core.available_workers()
    if not 1 <= count <= MOST:
        raise ValueError(f"workers: expected {EXPECTED}, got {count}")
    return count


def _from_environment() -> int:
    text = os.environ.get(ENVIRONMENT)
    if text is None or not text.strip():
        return 1
    try:
        return _count(int(text))
    except ValueError:
        warnings.warn(
            f"{ENVIRONMENT}: expected {EXPECTED}, got {text!r}; ignored",
            RuntimeWarning,
            stacklevel=2,
        )
        return 1


_default = _from_environment()


def get_workers() -> int:
    """Number of threads that plans and bulk calls use where no ``workers=`` is given."""
    return _default


def resolve(workers: SupportsIndex | None) -> int:
    """The number of threads meant by a ``workers=`` argument: None is the default, -1 all cores."""
    return _default if workers is None else _count(workers)


class set_workers:
    """Set how many threads plans and bulk calls use where no ``workers=`` is given.

    ``set_workers(n)`` takes effect at once, for the whole process; as a context manager it puts the former
    number back at the end of the block. Plans keep the number they were made with. Results are bit-identical
    for every number of workers.

    workers: a positive int, or -1 for all cores. Raises ValueError for 0 and other negative numbers,
    TypeError for anything that is no integer.

    >>> import futurefill_rs as ff
    >>> with ff.set_workers(2):
    ...     ff.get_workers()
    2
    """

    def __init__(self, workers: SupportsIndex) -> None:
        global _default
        count = _count(workers)
        with _lock:
            self._previous, _default = _default, count

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        global _default
        with _lock:
            _default = self._previous
