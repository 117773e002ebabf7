"""The protocol all layers and models share: one description of the mathematics, four ways through time.

A layer writes its mathematics once, as `mix(x, time)`, with features on the last axis so that the same code
serves a sequence `(B, T, D)` and one position `(B, D)`. Whatever reaches across time is an operator (see
`_operators`) and is called as `time(operator, u)`. `time` decides what that means: the whole sequence, a
prompt whose effect is kept, one step, or a block of steps. The kept states form one flat list in order of
execution, however deep the modules nest, so a cache is this list and nothing in it depends on the model.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

import futurefill_rs as ff
from futurefill_rs._torch_args import FLOATS, is_fake
from futurefill_rs.nn._files import save
from futurefill_rs.nn._journal import Journal

Rows = Sequence[int] | Sequence[bool] | np.ndarray[Any, Any] | Tensor | int


class State(Protocol):
    """What one operator keeps of the past, for every row of the batch."""

    def step(self, u: Tensor, /) -> Any: ...
    def extend(self, u: Tensor, /) -> Any: ...
    def fork(self) -> State: ...
    def reorder(self, index: Tensor, /) -> None: ...
    def reset(self, rows: Tensor | None, /) -> None: ...
    @property
    def nbytes(self) -> int: ...


class Operator(Protocol):
    """A causal, time-invariant map of sequences `(B, T, ...)`; zero history before the first position."""

    def whole(self, u: Tensor, /) -> Any: ...
    def prefill(self, u: Tensor, max_new: int | None, method: Any, /) -> tuple[Any, State]: ...


Time = Callable[[Operator, Tensor], Any]


def whole(operator: Operator, u: Tensor) -> Any:
    """Time for `forward`: every operator sees its whole input and keeps nothing."""
    return operator.whole(u)


class _Prefilling:
    def __init__(self, max_new: int | None, method: Any) -> None:
        self.max_new, self.method = max_new, method
        self.states: list[State] = []

    def __call__(self, operator: Operator, u: Tensor) -> Any:
        y, state = operator.prefill(u, self.max_new, self.method)
        self.states.append(state)
        return y


class _Padded:
    """Time for rows that begin late: what stands before a row's start reaches no operator."""

    def __init__(self, time: Time, starts: Tensor, length: int) -> None:
        self.time, self.starts = time, starts
        self.heard = torch.arange(length, device=starts.device) >= starts.unsqueeze(-1)

    def __call__(self, operator: Operator, u: Tensor) -> Any:
        heard = self.heard.view(*self.heard.shape, *(1,) * (u.ndim - 2))
        # Zeros are no history to a convolution. Not a product with the mask: padding may hold anything.
        u = torch.where(heard, u, 0.0)
        since = getattr(operator, "since", None)
        return self.time(operator if since is None else since(self.starts), u)


def padded(time: Time, x: Tensor, starts: Tensor | None) -> Time:
    """`time` with row i of x `(B, T, ..)` starting at position `starts[i]`."""
    if starts is None:
        return time
    starts = torch.as_tensor(starts, device=x.device)
    if starts.shape != x.shape[:1] or starts.is_floating_point():
        raise ValueError(f"starts: expected integers of shape ({x.shape[0]},), got {tuple(starts.shape)}")
    return _Padded(time, starts, x.shape[1])


def _stepping(states: Iterable[State]) -> Time:
    upcoming = iter(states)
    return lambda operator, u: next(upcoming).step(u)


def _stepping_all(caches: Sequence[Cache], upcoming: Iterator[tuple[State, ...]]) -> Time:
    """One step of the rows of several caches, each operator's states one after the other."""
    sizes = [cache.batch_size for cache in caches]

    def time(operator: Operator, u: Tensor) -> Any:
        outputs = [
            state.step(rows) for state, rows in zip(next(upcoming), torch.split(u, sizes), strict=True)
        ]
        if isinstance(outputs[0], tuple):
            return tuple(torch.cat(parts) for parts in zip(*outputs, strict=True))
        return torch.cat(outputs)

    return time


def _extending(states: Iterable[State]) -> Time:
    upcoming = iter(states)
    return lambda operator, u: next(upcoming).extend(u)


class Cache:
    """What a layer or a model remembers of each row of a batch between two positions.

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

    def _run(self, mix: Callable[[Tensor, Time], Tensor], x: Tensor, stepping: bool) -> Tensor:
        """`mix` at the next position `x` `(B, ..)`, or at the next ones `(B, m, ..)`.

        An error before the operators changes nothing. One among them leaves some ahead of the others: the
        cache then refuses to go on.
        """
        self._claim(1 if stepping else x.shape[1])
        upcoming = iter(self._states)
        time = _stepping(upcoming) if stepping else _extending(upcoming)
        try:
            y = mix(x, time)
            self._absorbed(x.unsqueeze(1) if stepping else x)
        except BaseException as error:
            begun = len(self._states) - operator.length_hint(upcoming)
            # An operator that refuses what it is given has not moved.
            refused = begun == 1 and isinstance(error, TypeError | ValueError)
            self._torn = begun > 0 and not refused
            raise
        return y

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

    def _advance(self, count: int) -> None:
        self._used += count
        self.position += count

    def _absorbed(self, x: Tensor) -> None:
        """Note that the states have taken in `x` `(B, m, ..)`."""
        self._advance(x.shape[1])
        if self._journal is not None and x.shape[1]:
            self._journal.record(x, self._used, self._states)

    def keep(self, count: int) -> None:
        """From now on remember enough for `rewind` to go back `count` positions behind the last one reached.

        It takes one or two copies of the cache, a new one every `count` positions. A reset begins anew.
        """
        count = integer(count, "count", 1)
        self._journal = Journal(count, self._used, self._states)

    def fork(self) -> Cache:
        """An independent copy: stepping one does not change the other."""
        copy = Cache([state.fork() for state in self._states], self.batch_size, self.position, self._capacity)
        copy._used, copy._torn = self._used, self._torn
        copy._journal = None if self._journal is None else self._journal.fork()
        return copy

    def reorder(self, index: Rows) -> None:
        """Gather rows in place: afterwards row i is what row `index[i]` was; any length, rows may repeat."""
        index = _row_index(index, self.batch_size, "index")
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
            rows = _row_index(rows, self.batch_size, "rows")
            if not len(rows):
                return
            for state in self._states:
                state.reset(rows)
        if self._journal is not None:
            self.keep(self._journal.limit)


def _row_index(rows: Rows, batch_size: int, name: str) -> Tensor:
    """Rows as a tensor of indices from 0, checked; those on another device stay there, unseen."""
    if not isinstance(rows, Tensor):
        values = np.asarray(rows)
        if values.dtype == bool:
            if values.shape != (batch_size,):
                raise ValueError(f"{name}: expected a mask of shape ({batch_size},), got {values.shape}")
            values = values.nonzero()[0]
        elif values.size and values.dtype.kind not in "iu":
            raise TypeError(f"{name}: expected integers or a boolean mask, got {values.dtype}")
        found = [int(value) for value in values.reshape(-1)]
        if any(not -batch_size <= value < batch_size for value in found):
            raise IndexError(f"{name}: expected rows of a batch of {batch_size}, got {found}")
        return torch.tensor([value % batch_size for value in found], dtype=torch.int64)
    if rows.device.type == "cpu" and not is_fake(rows):
        return _row_index(rows.numpy(), batch_size, name)
    if rows.dtype == torch.bool:
        if rows.shape != (batch_size,):
            raise ValueError(f"{name}: expected a mask of shape ({batch_size},), got {tuple(rows.shape)}")
        return rows.nonzero().flatten()
    if rows.is_floating_point() or rows.is_complex():
        raise TypeError(f"{name}: expected integers or a boolean mask, got {rows.dtype}")
    return rows.reshape(-1) % batch_size


class Layer(nn.Module):
    """Base of every layer and model: `mix` is the mathematics, the entries below run it through time."""

    max_length: int | None = None
    """Positions `forward` accepts; None where the layer has no longest sequence."""

    config: dict[str, Any] | None = None
    """The mapping that `models.build` made the layer from; None for a layer made in any other way."""

    def mix(self, x: Tensor, time: Time) -> Tensor:
        """The layer's mathematics, which every subclass writes once for all entries."""
        raise NotImplementedError

    def _check(self, x: Tensor, ndim: int, batch_size: int | None = None) -> None:
        """Raise unless x is `(B, T, D)` (ndim 3) or `(B, D)` (ndim 2) for this layer."""
        width = self.width
        if not isinstance(x, Tensor) or x.dtype not in FLOATS:
            raise TypeError(f"x: expected a floating-point tensor, got {_kind(x)}")
        wanted = self.input_dtype
        if wanted is not None and x.dtype != wanted and not _autocast(x, wanted):
            raise TypeError(f"x: expected {wanted} as the weights have, got {x.dtype}")
        if x.ndim != ndim or x.shape[-1] != width or (batch_size is not None and x.shape[0] != batch_size):
            batch = "B" if batch_size is None else str(batch_size)
            expected = f"({batch}, T, {width})" if ndim == 3 else f"({batch}, {width})"
            raise ValueError(f"x: expected shape {expected}, got {tuple(x.shape)}")

    @property
    def width(self) -> int:
        """Features of one input position."""
        raise NotImplementedError

    @property
    def input_dtype(self) -> torch.dtype | None:
        """The dtype that inputs must have; None where every floating-point dtype will do."""
        return None

    _sequence_ndim = 3

    def forward(self, x: Tensor, *, starts: Tensor | None = None) -> Tensor:
        """Outputs at every position of `x` `(B, T, D)`, T at most `max_length`; differentiable.

        With `starts` `(B,)` row i begins at position `starts[i]`: what stands before it is padding, has no
        effect on the row, and its outputs mean nothing.
        """
        self._check(x, self._sequence_ndim)
        if self.max_length is not None and x.shape[1] > self.max_length:
            raise ValueError(f"x: expected at most {self.max_length} positions, got {x.shape[1]}")
        return self.mix(x, padded(whole, x, starts))

    @torch.no_grad()
    def prefill(
        self, x: Tensor, max_new: int | None = None, *, method: Any = "auto", starts: Tensor | None = None
    ) -> tuple[Tensor, Cache]:
        """Outputs at every position of the prompt `x` `(B, P, D)` and a cache for `max_new` more positions.

        `max_new=None` puts no bound on what follows: what lies further back than the filters reach drops out.
        `method` is that of `futurefill_rs.plan`: "auto", "naive", "epoched", "continuous" or a `Schedule`;
        `starts` is that of `forward`.
        """
        self._check(x, self._sequence_ndim)
        time = _Prefilling(None if max_new is None else integer(max_new, "max_new"), method)
        y = self.mix(x, padded(time, x, starts))
        return y, Cache(time.states, x.shape[0], x.shape[1], time.max_new)

    @torch.no_grad()
    def step(self, x: Tensor, cache: Cache) -> Tensor:
        """Outputs at the next position: `x` `(B, D)` gives `(B, D_out)`."""
        self._check(x, self._sequence_ndim - 1, cache.batch_size)
        return cache._run(self.mix, x, stepping=True)

    @torch.no_grad()
    def step_all(self, x: Tensor, caches: Sequence[Cache]) -> Tensor:
        """`step` for the rows of several caches, which may be at different positions: `x` `(B, D)` holds
        those of the first cache, then those of the second, and so on.

        What does not reach across time is computed for all rows together.
        """
        if len(caches) == 1:
            return self.step(x, caches[0])
        sizes = [cache.batch_size for cache in caches]
        self._check(x, self._sequence_ndim - 1, sum(sizes))
        if not caches:
            raise ValueError("caches: expected one or more, got none")
        for cache in caches:
            cache._claim(1)
        states = list(zip(*(cache._states for cache in caches), strict=True))
        upcoming = iter(states)
        try:
            y = self.mix(x, _stepping_all(caches, upcoming))
            for cache, rows in zip(caches, torch.split(x, sizes), strict=True):
                cache._absorbed(rows.unsqueeze(1))
        except BaseException:
            for cache in caches:
                cache._torn = operator.length_hint(upcoming) < len(states)
            raise
        return y

    @torch.no_grad()
    def extend(self, x: Tensor, cache: Cache) -> Tensor:
        """Outputs at the next m positions, all known: `x` `(B, m, D)` gives what m steps would."""
        self._check(x, self._sequence_ndim, cache.batch_size)
        return cache._run(self.mix, x, stepping=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `config.json` and `model.safetensors`, for `models.load`, into the folder `path`, made if
        need be.
        """
        if self.config is None:
            raise ValueError("config: expected a model, or a layer that models.build made, got None")
        save(self.config, self.state_dict(), path)

    @torch.no_grad()
    def rewind(self, cache: Cache, count: int) -> None:
        """Undo the last `count` positions of a cache that was told to `keep` as many.

        For speculative decoding: extend by a draft, look at the outputs, rewind what was not accepted.
        """
        count = integer(count, "count")
        cache._claim(0)
        journal = cache._journal
        reach = 0 if journal is None else journal.reach(cache._used)
        if count > reach:
            raise ValueError(f"count: expected at most {reach} positions to undo, got {count}")
        if journal is None or not count:
            return
        target = cache._used - count
        cache._torn = True
        _, cache._states, inputs = journal.back_to(target)
        if inputs is not None and inputs.shape[1]:
            self.mix(inputs, _extending(cache._states))
        cache._used = target
        cache.position -= count
        cache._torn = False


def integer(value: object, name: str, least: int = 0) -> int:
    """`value`, of any library, as an integer of at least `least`."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name}: expected an integer of at least {least}, got {value!r}") from None
    if number < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {number}")
    return number


def dtype_of(projection: nn.Module) -> torch.dtype | None:
    """The dtype a linear layer takes; None where it is not that of its weights, as in quantised ones."""
    weight = getattr(projection, "weight", None)
    return weight.dtype if isinstance(weight, Tensor) and weight.dtype in FLOATS else None


def _autocast(x: Tensor, wanted: torch.dtype) -> bool:
    """Whether torch itself will bring inputs and weights together, which it does not for float64."""
    return torch.float64 not in (x.dtype, wanted) and torch.is_autocast_enabled(x.device.type)


def _kind(x: object) -> str:
    return f"a tensor of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
