"""Long sequences layer by layer, in pieces of positions: a few arrays of all positions are all the memory.

A model that reads a long sequence at once has the transient arrays of its widest layer at every position, and
one that goes on from piece to piece has what every layer's convolution keeps for all positions to come. Here
each block of layers is called with one piece after the other before the next block begins, so that only one
block keeps anything, and what it keeps is dropped, or brought down to the positions that are wanted, when it
has read the last piece.

It is a way through time like the others: modules are called with `time=time`, their hooks fire once for every
piece, in order. Modules around the blocks (a backbone, the model) are called once, with all positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from futurefill_rs.nn.protocol import Operator, Padding, State, Time

ELEMENTS = 1 << 19
"""Features of the positions in one piece: few enough to stay near a CPU."""

LEAST = 512
"""Positions in a piece at least."""


def piece_for(rows: int, width: int, device: torch.device) -> int:
    """Positions in a piece of `rows` sequences with `width` features."""
    # Elsewhere it is the number of calls that costs.
    elements = ELEMENTS if device.type == "cpu" else 16 * ELEMENTS
    return max(LEAST, elements // max(1, rows * width))


class Reader(Protocol):
    """What one operator keeps while it reads a sequence of a known length in pieces."""

    def extend(self, u: Tensor, /) -> Any: ...
    def finish(self, max_new: int | None, method: Any, /) -> State:
        """What it keeps for `max_new` more positions; the reader is of no use afterwards."""


class StateReader:
    """A reader that is a state from the first piece on, where that takes little memory."""

    def __init__(self, operator: Operator, room: int | None) -> None:
        self._operator, self._room = operator, room
        self._state: State | None = None

    def extend(self, u: Tensor) -> Any:
        if self._state is not None:
            return self._state.extend(u)
        y, self._state = self._operator.prefill(u, self._room, "auto")
        return y

    def finish(self, max_new: int | None, method: Any) -> State:
        assert self._state is not None
        return self._state


class Reading:
    """Time for a long sequence.

    Args:
        length: its positions; piece: how many of them go through a block at a time.
        max_new: positions to come for which states are left; None: without bound.
        kept: whether states are left at all.
        starts: `(B,)` where each row begins, see `Layer.forward`.

    Attributes:
        states: those of all operators, after the last block.
    """

    def __init__(
        self,
        length: int,
        piece: int,
        max_new: int | None = 0,
        method: Any = "auto",
        *,
        kept: bool = True,
        starts: Tensor | None = None,
    ) -> None:
        self.length, self.piece, self.max_new, self.method, self.kept = length, piece, max_new, method, kept
        self.states: list[State] = []
        self._starts = starts
        self._readers: list[Reader] = []
        self._start = self._used = 0
        self._own: Tensor | None = None

    def across(self, module: nn.Module, x: Tensor, **options: Any) -> Tensor:
        """`module(x, time=..)` of a module that reaches across time."""
        y = self.apart(lambda part: module(part, time=self, **options), x)
        while self._readers:
            reader = self._readers.pop(0)
            if self.kept:
                self.states.append(reader.finish(self.max_new, self.method))
        return y

    def apart(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`function(x)`, which does not reach across time, piece by piece.

        The result takes the place of x where x is a result of such a call itself.
        """
        out: Tensor | None = None
        for start in range(0, self.length, self.piece):
            self._start, self._used = start, 0
            part = slice(start, min(start + self.piece, self.length))
            # A copy: hooks may keep what they saw.
            y = function(x[:, part].clone())
            if out is None:
                shape = x.shape[:2] + y.shape[2:]
                mine = x is self._own and (x.shape, x.dtype) == (shape, y.dtype)
                out = x if mine else y.new_empty(shape)
            out[:, part] = y
        assert out is not None
        self._own = out
        return out

    def __call__(self, operator: Operator, u: Tensor) -> Any:
        if self._starts is not None:
            operator, u = Padding(self._starts, self._start, u.shape[1]).applied(operator, u)
        if self._used == len(self._readers):
            self._readers.append(self._reader(operator, u))
        self._used += 1
        return self._readers[self._used - 1].extend(u)

    def _reader(self, operator: Operator, u: Tensor) -> Reader:
        max_new = self.max_new if self.kept else 0
        reading = getattr(operator, "reading", None)
        if reading is not None:
            reader: Reader = reading(u, self.length, max_new)
            return reader
        rest = self.length - u.shape[1]
        return StateReader(operator, None if max_new is None else rest + max_new)


def across(module: nn.Module, x: Tensor, time: Time, **options: Any) -> Tensor:
    """`module(x, time=time, **options)`, in pieces where `time` is a `Reading`."""
    if isinstance(time, Reading):
        return time.across(module, x, **options)
    y: Tensor = module(x, time=time, **options)
    return y


def apart(function: Callable[[Tensor], Tensor], x: Tensor, time: Time) -> Tensor:
    """`function(x)`, which does not reach across time, in pieces where `time` is a `Reading`."""
    return time.apart(function, x) if isinstance(time, Reading) else function(x)
