"""The protocol all layers and models share: one description of the mathematics, many ways through time.

A layer writes its mathematics once, with features on the last axis, so that the same code serves a sequence
`(B, T, D)` and one position `(B, D)`. Whatever reaches across time is an operator (see `operators`) and is
called as `time(operator, u)`. `time` decides what that means: the whole sequence, a prompt whose effect is
kept, one step, or a block of steps.

Time goes through `forward` itself: a module hands it on to the modules inside, `self.mixer(x, time=time)`,
and reads no weights but its own. So whatever is hung on a module (hooks, adapters, sharding, offloading,
compilers) acts in every way through time. The kept states form one flat list in order of execution, however
deep the modules nest: a cache is this list, and nothing in it depends on the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from futurefill_rs._torch_args import outside_graphs


class State(Protocol):
    """What one operator keeps of the past, for every row of the batch.

    Every tensor in it is its own: callers may write to what they passed in and to what they got. A state
    keeps its filters too, and goes on with them when the layer's weights change.
    """

    def step(self, u: Tensor, /) -> Any: ...
    def extend(self, u: Tensor, /) -> Any: ...
    def fork(self) -> State: ...
    def reorder(self, index: Tensor, /) -> None: ...
    def reset(self, rows: Tensor | None, /) -> None: ...
    @property
    def nbytes(self) -> int: ...


class Operator(Protocol):
    """A causal, time-invariant map of sequences `(B, T, ...)`; zero history before the first position.

    Operators are made where they are used and hold nothing of a layer but what they compute with. One whose
    states are large while a long sequence is read may have `reading(u, length, max_new)` beside these two,
    which gives a `reading.Reader`.
    """

    def whole(self, u: Tensor, /) -> Any: ...
    def prefill(self, u: Tensor, max_new: int | None, method: Any, /) -> tuple[Any, State]: ...


class Time(Protocol):
    def __call__(self, operator: Operator, u: Tensor, /) -> Any: ...


def whole(operator: Operator, u: Tensor) -> Any:
    """Time for `forward`: every operator sees its whole input and keeps nothing."""
    return operator.whole(u)


class _Keeping:
    """Time that keeps states. `torch.compile` has no graphs for them: it calls the operators as they are."""

    @outside_graphs
    def __call__(self, operator: Operator, u: Tensor) -> Any:
        return self._run(operator, u)

    def _run(self, operator: Operator, u: Tensor) -> Any:
        raise NotImplementedError


class Prefilling(_Keeping):
    """Time for a prompt: every operator sees all of it and leaves a state for `max_new` more positions."""

    def __init__(self, max_new: int | None, method: Any) -> None:
        self.max_new, self.method = max_new, method
        self.states: list[State] = []

    def _run(self, operator: Operator, u: Tensor) -> Any:
        y, state = operator.prefill(u, self.max_new, self.method)
        self.states.append(state)
        return y


class _Resuming(_Keeping):
    """Time that goes on from kept states, one after another.

    Attributes:
        used: states that were asked so far.
    """

    def __init__(self, states: Sequence[Any]) -> None:
        self.states, self.used = states, 0

    def following(self) -> Any:
        if self.used == len(self.states):
            raise ValueError(
                f"cache: expected the states of this layer, got a cache with {len(self.states)} of them only"
            )
        self.used += 1
        return self.states[self.used - 1]


class Stepping(_Resuming):
    """Time for one position."""

    def _run(self, operator: Operator, u: Tensor) -> Any:
        return self.following().step(u)


class Extending(_Resuming):
    """Time for a block of positions."""

    def _run(self, operator: Operator, u: Tensor) -> Any:
        return self.following().extend(u)


class SteppingTogether(_Resuming):
    """Time for one position of the rows of several caches, each operator's states one after the other."""

    def __init__(self, states: Sequence[Sequence[State]], sizes: Sequence[int]) -> None:
        super().__init__(list(zip(*states, strict=True)))
        self.sizes = list(sizes)

    def _run(self, operator: Operator, u: Tensor) -> Any:
        rows = torch.split(u, self.sizes)
        outputs = [state.step(part) for state, part in zip(self.following(), rows, strict=True)]
        if isinstance(outputs[0], tuple):
            return tuple(torch.cat(parts) for parts in zip(*outputs, strict=True))
        return torch.cat(outputs)


class Padding:
    """What stands before the starts `(B,)` of rows, of `length` positions from `first` on."""

    def __init__(self, starts: Tensor, first: int, length: int) -> None:
        self.starts = starts
        self.heard = torch.arange(first, first + length, device=starts.device) >= starts.unsqueeze(-1)

    def applied(self, operator: Operator, u: Tensor) -> tuple[Operator, Tensor]:
        """The operator and its input `(B, length, ..)` such that nothing before a start reaches it."""
        heard = self.heard.view(*self.heard.shape, *(1,) * (u.ndim - 2))
        since = getattr(operator, "since", None)
        # Zeros are no history to a convolution. Not a product with the mask: padding may hold anything.
        return operator if since is None else since(self.starts), torch.where(heard, u, 0.0)


class _Padded:
    """Time for rows that begin late: what stands before a row's start reaches no operator."""

    def __init__(self, time: Time, starts: Tensor, length: int) -> None:
        self.time, self.padding = time, Padding(starts, 0, length)

    def __call__(self, operator: Operator, u: Tensor) -> Any:
        return self.time(*self.padding.applied(operator, u))


def padded(time: Time, x: Tensor, starts: Tensor | None) -> Time:
    """`time` with row i of x `(B, T, ..)` starting at position `starts[i]`."""
    return time if starts is None else _Padded(time, checked_starts(starts, x), x.shape[1])


def checked_starts(starts: Tensor, x: Tensor) -> Tensor:
    """Where the rows of x `(B, ..)` begin, on its device."""
    starts = torch.as_tensor(starts, device=x.device)
    if starts.shape != x.shape[:1] or starts.is_floating_point():
        raise ValueError(f"starts: expected integers of shape ({x.shape[0]},), got {tuple(starts.shape)}")
    return starts


class Packed:
    """Time for rows of different lengths that stand back to back in one, `(1, N, ..)`, without padding.

    What does not reach across time costs nothing for padding. Operators see the rows apart, `(B, T, ..)`,
    each preceded by zeros.

    Args:
        x: the rows with padding `(B, T, ..)`; row i begins at position `starts[i]`.

    Attributes:
        last: where each row ends, `(B,)`.
    """

    def __init__(self, time: Time, x: Tensor, starts: Tensor) -> None:
        starts, length = checked_starts(starts, x), x.shape[1]
        self.time, self.starts = time, starts
        heard = Padding(starts, 0, length).heard
        self.shape = heard.shape
        self.places = heard.flatten().nonzero().flatten()
        self.last = (length - starts).cumsum(0) - 1

    def pack(self, x: Tensor) -> Tensor:
        """`(1, N, ..)` from `(B, T, ..)`."""
        return x.flatten(0, 1).index_select(0, self.places).unsqueeze(0)

    def __call__(self, operator: Operator, u: Tensor) -> Any:
        rows = u.new_zeros(self.shape.numel(), *u.shape[2:]).index_copy(0, self.places, u[0])
        since = getattr(operator, "since", None)
        rows = rows.reshape(*self.shape, *rows.shape[1:])
        y = self.time(operator if since is None else since(self.starts), rows)
        return tuple(map(self.pack, y)) if isinstance(y, tuple) else self.pack(y)
