"""What a layer or a model remembers between two positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import futurefill_rs as ff
from futurefill_rs._args import integer
from futurefill_rs._torch_args import entries
from futurefill_rs.nn.journal import Journal
from futurefill_rs.nn.protocol import Extending, State, Stepping, SteppingTogether

Rows = Sequence[int] | Sequence[bool] | np.ndarray[Any, Any] | Tensor | int


class Cache:
    """What a layer or a model remembers of each row of a batch between two positions.

    It owns all of it, filters included: writing to an input, an output or a weight does not change it.
    `copy.copy` and `copy.deepcopy` are `fork`; it can be pickled.

    Attributes:
        position: positions consumed so far, the prompt included.
        remaining: positions that still fit, None without bound.
        batch_size: rows.
        nbytes: bytes held.
    """

    __slots__ = ("_capacity", "_journal", "_states", "_torn", "_used", "batch_size", "position")

    def __init__(self, states: list[State], batch_size: int, position: int, capacity: int | None) -> None:
        self._states = states
        self._capacity = capacity
        self._journal: Journal | None = None
        self._torn = False
        self._used = 0
        self.batch_size = batch_size
        self.position = position

    @property
    def remaining(self) -> int | None:
        return None if self._capacity is None else self._capacity - self._used

    @property
    def nbytes(self) -> int:
        journal = 0 if self._journal is None else self._journal.nbytes
        return sum(state.nbytes for state in self._states) + journal

    def __len__(self) -> int:
        return self.position

    def __repr__(self) -> str:
        return (
            f"Cache(batch_size={self.batch_size}, position={self.position}, "
            f"remaining={self.remaining}, nbytes={self.nbytes})"
        )

    def _run(self, module: Callable[..., Tensor], x: Tensor, stepping: bool, **options: Any) -> Tensor:
        """`module` at the next position `x` `(B, ..)`, or at the next ones `(B, m, ..)`."""
        time = (Stepping if stepping else Extending)(self._states)
        self._claim(1 if stepping else x.shape[1])
        return _run([self], time, module, x, stepping, options)

    def _claim(self, count: int) -> None:
        if self._torn:
            raise RuntimeError(
                "cache: expected one whose last call came to its end, got one that an error stopped between "
                "two operators: go on from a fork made before, or reset it"
            )
        if self._capacity is not None and self._used + count > self._capacity:
            raise ff.CapacityError(
                f"cache: expected at most {self._capacity - self._used} more positions, got {count}"
            )

    def _absorbed(self, x: Tensor) -> None:
        """Note that the states have taken in `x` `(B, m, ..)`."""
        self._used += x.shape[1]
        self.position += x.shape[1]
        if self._journal is not None and x.shape[1]:
            self._journal.record(x, self._used, self._states)

    def keep(self, count: int) -> None:
        """From now on remember enough for `rewind` to go back `count` positions behind the last one reached.

        It takes one or two copies of the cache, a new one every `count` positions. A reset begins anew.
        """
        count = integer(count, "count", 1)
        self._journal = Journal(count, self._used, self._states)

    def _undo(self, module: Callable[..., Tensor], count: int) -> None:
        """Go back `count` positions; `module` reads again what came after the copy that this begins from."""
        self._claim(0)
        journal = self._journal
        reach = 0 if journal is None else journal.reach(self._used)
        if count > reach:
            raise ValueError(f"count: expected at most {reach} positions to undo, got {count}")
        if journal is None or not count:
            return
        target = self._used - count
        self._torn = True
        _, self._states, inputs = journal.back_to(target)
        if inputs is not None and inputs.shape[1]:
            module(inputs, time=Extending(self._states))
        self._used = target
        self.position -= count
        self._torn = False

    def fork(self) -> Cache:
        """An independent copy: stepping one does not change the other."""
        copy = Cache([state.fork() for state in self._states], self.batch_size, self.position, self._capacity)
        copy._used, copy._torn = self._used, self._torn
        copy._journal = None if self._journal is None else self._journal.fork()
        return copy

    __copy__ = fork

    def __deepcopy__(self, memo: dict[int, Any]) -> Cache:
        return self.fork()

    def reorder(self, index: Rows) -> None:
        """Gather rows in place: afterwards row i is what row `index[i]` was; any length, rows may repeat."""
        index = row_index(index, self.batch_size, "index", mask=False)
        for state in self._states:
            state.reorder(index)
        if self._journal is not None:
            self._journal.reorder(index)
        self.batch_size = len(index)

    def reset(self, rows: Rows | None = None) -> None:
        """Forget the history of `rows` (integers or a boolean mask) while the other rows and the clock go on.

        Without `rows` everything starts again at position 0 with the cache's whole capacity.
        """
        if rows is None:
            for state in self._states:
                state.reset(None)
            self._used = self.position = 0
            self._torn = False
        else:
            rows = row_index(rows, self.batch_size, "rows", mask=True)
            if not len(rows):
                return
            for state in self._states:
                state.reset(rows)
        if self._journal is not None:
            self.keep(self._journal.limit)


def run_together(module: Callable[..., Tensor], x: Tensor, caches: Sequence[Cache]) -> Tensor:
    """`module` at the next position of several caches: `x` `(B, ..)` holds the rows of one after another."""
    for cache in caches:
        cache._claim(1)
    time = SteppingTogether([cache._states for cache in caches], [cache.batch_size for cache in caches])
    return _run(caches, time, module, x, True, {})


def _run(
    caches: Sequence[Cache],
    time: Stepping | Extending | SteppingTogether,
    module: Callable[..., Tensor],
    x: Tensor,
    stepping: bool,
    options: dict[str, Any],
) -> Tensor:
    """`module` goes on from the caches' states.

    An error before the operators changes nothing. One among them leaves some ahead of the others: the caches
    then refuse to go on.
    """
    try:
        y = module(x, time=time, **options)
        if time.used < len(time.states):
            raise RuntimeError(
                f"cache: expected one of this layer, got one with {len(time.states)} states where the layer "
                f"went on from {time.used}"
            )
        parts = (x,) if len(caches) == 1 else torch.split(x, [cache.batch_size for cache in caches])
        for cache, rows in zip(caches, parts, strict=True):
            cache._absorbed(rows.unsqueeze(1) if stepping else rows)
    except BaseException as error:
        # An operator that refuses what it is given has not moved.
        refused = len(caches) == 1 and time.used == 1 and isinstance(error, TypeError | ValueError)
        torn = time.used > 0 and not refused
        for cache in caches:
            cache._torn = torn
        raise
    return y


def row_index(rows: Rows, batch_size: int, name: str, mask: bool) -> Tensor:
    """Rows as indices from 0, those of a `mask` too, checked; those on another device stay there, unseen."""
    device = rows.device if isinstance(rows, Tensor) else torch.device("cpu")
    found = entries(rows, name, batch_size, device, mask)
    return found.nonzero().flatten() if found.dtype is torch.bool else found
