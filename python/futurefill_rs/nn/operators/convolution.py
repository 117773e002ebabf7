"""Long convolutions through the engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import futurefill_rs as ff
from futurefill_rs.nn.operators.long import FEW_LAGS, FewLagsReader, ManyLagsReader
from futurefill_rs.nn.operators.plans import Filters, Plans, Signature, computed
from futurefill_rs.nn.operators.precision import at_least_float32
from futurefill_rs.nn.protocol import State

LONG_PROMPT = 4096
"""A prompt from which on a plan for all of it may not be worth its memory."""


def _horizon(positions: int, max_new: int | None) -> int | None:
    """Rounded up by at most a quarter, so that prompts of many lengths share a few plans."""
    if max_new is None:
        return None
    total = max(1, positions + max_new)
    unit = 1 << max(0, (total - 1).bit_length() - 3)
    return -(-total // unit) * unit


class LongFilter:
    """Filters of many lags as an operator has them: computed anew for a whole sequence, planned for a prompt.

    Args:
        plans: where the layer keeps its plans; name: the operator's there.
        filters: `filters(n)` gives `(*F, min(n, L))` lags, lag 0 first, all L for None; differentiable.
        signature: `signature(n)` gives tensors on which these lags depend alone, where they cost less to
            compute and to compare; None: the lags themselves.
    """

    def __init__(self, plans: Plans, name: str, filters: Filters, signature: Signature | None = None) -> None:
        self._plans, self._name, self._filters, self._signature = plans, name, filters, signature

    def lags(self, length: int | None, device: torch.device) -> Tensor:
        return computed(self._filters, length, device)

    def prefill(self, u: Tensor, max_new: int | None, method: Any, slack: int = 0) -> tuple[Tensor, Any]:
        """Outputs for a prompt u `(*C, P)`, time last, and a cache of the engine.

        A plan for P + max_new positions holds as many lags of spectra. For a long prompt with few positions
        to follow one transform of all P + max_new positions gives the outputs and what the prompt adds to
        the positions that follow, and the plan is one for `max_new` positions, whatever the prompt. `slack`
        is room for more positions.
        """
        u = u.detach()
        length = u.shape[-1]
        if max_new is None or length < max(LONG_PROMPT, 2 * max_new):
            y, cache = self._plan(length + slack, max_new, method, u.device).prefill(u, max_new)
            return y, cache
        x = F.pad(at_least_float32(u), (0, max_new))
        y = ff.causal_conv(x, self.lags(length + max_new, u.device).detach())
        seed = y[..., length:].movedim(-1, 0).clone(memory_format=torch.contiguous_format)
        cache = self.seeded(seed, tuple(u.shape[:-1]), max_new, method, slack)
        return y[..., :length].to(u.dtype), cache

    def seeded(
        self, seed: Tensor, rows: tuple[int, ...], max_new: int | None, method: Any, slack: int = 0
    ) -> Any:
        """A cache of the engine for `max_new` more positions of `rows`, to whose first outputs the past adds
        `seed` `(n, *O)`. `slack` is room for more positions.
        """
        plan = self._plan(slack, max_new, method, seed.device)
        return _Seeded(plan.new_cache(rows), seed)

    def reading(self, u: Tensor, length: int, max_new: int | None) -> LongReader:
        """A reader of `length` positions, u `(*C, n)` the first piece of them, time last.

        `max_new` as in `prefill`.
        """
        known = None if max_new is None else length + max_new
        lags = self.lags(known, u.device).detach()
        dtype = torch.promote_types(lags.dtype, at_least_float32(u[..., :0]).dtype)
        return LongReader(self, lags.to(dtype), u, length)

    def _plan(self, positions: int, max_new: int | None, method: Any, device: torch.device) -> Any:
        horizon = _horizon(positions, max_new)
        return self._plans.get(self._name, self._filters, self._signature, horizon, method, device)


class LongReader:
    """What a long filter keeps of a sequence that comes in pieces `(*C, m)`, time last."""

    def __init__(self, long_filter: LongFilter, lags: Tensor, u: Tensor, length: int) -> None:
        self._filter, self._reach, self._dtype = long_filter, lags.shape[-1] - 1, u.dtype
        few = lags.shape[-1] <= FEW_LAGS
        self._reader = FewLagsReader(lags, u) if few else ManyLagsReader(lags, u, length)
        self._rows = tuple(u.shape[:-1])

    def extend(self, u: Tensor) -> Tensor:
        return self._reader.extend(u)

    def finish(self, max_new: int | None, method: Any, slack: int = 0) -> Any:
        """A cache of the engine for `max_new` more positions, in a plan with room for `slack` beside them."""
        count = self._reach if max_new is None else max_new
        seed = self._reader.following(count).movedim(-1, 0).contiguous()
        del self._reader
        return self._filter.seeded(seed, self._rows, max_new, method, slack)


class _Seeded:
    """A cache of the engine for what follows a prompt, and what the prompt adds to it, `(n, *C)`."""

    def __init__(self, cache: Any, seed: Tensor) -> None:
        self._cache, self._seed, self._position = cache, seed, 0

    def step(self, u: Tensor) -> Tensor:
        y: Tensor = self._cache.step(at_least_float32(u))
        if self._position < self._seed.shape[0]:
            y = y + self._seed[self._position]
        self._position += 1
        return y.to(u.dtype)

    def extend(self, u: Tensor) -> Tensor:
        y: Tensor = self._cache.extend(at_least_float32(u))
        seed = self._seed[self._position : self._position + u.shape[-1]]
        if seed.shape[0]:
            y = y + F.pad(seed.movedim(0, -1), (0, u.shape[-1] - seed.shape[0]))
        self._position += u.shape[-1]
        return y.to(u.dtype)

    def fork(self) -> _Seeded:
        copy = _Seeded(self._cache.fork(), self._seed)
        copy._position = self._position
        return copy

    def reorder(self, index: Tensor) -> None:
        self._cache.reorder(index)
        self._seed = self._seed.index_select(1, index.to(self._seed.device))

    def reset(self, rows: Tensor | None = None) -> None:
        if rows is None:
            self._cache.reset()
            self._seed, self._position = self._seed[:0], 0
        else:
            self._cache.reset(rows)
            self._seed = self._seed.index_fill(1, rows.to(self._seed.device), 0)

    @property
    def nbytes(self) -> int:
        return int(self._cache.nbytes) + self._seed.nbytes


class ConvolutionState:
    """A cache of the engine, seen with features last."""

    __slots__ = ("_cache", "step")

    def __init__(self, cache: Any) -> None:
        self._cache = cache
        self.step = cache.step

    def __reduce__(self) -> tuple[Any, ...]:
        return ConvolutionState, (self._cache,)

    def extend(self, u: Tensor) -> Tensor:
        y: Tensor = self._cache.extend(u.movedim(1, -1))
        return y.movedim(-1, 1)

    def fork(self) -> ConvolutionState:
        return ConvolutionState(self._cache.fork())

    def reorder(self, index: Tensor) -> None:
        self._cache.reorder(index)

    def reset(self, rows: Tensor | None) -> None:
        if rows is None:
            self._cache.reset()
        else:
            self._cache.reset(rows)

    @property
    def nbytes(self) -> int:
        return int(self._cache.nbytes)


class Convolution:
    """Causal convolution with filters of many lags."""

    def __init__(self, long_filter: LongFilter) -> None:
        self._filter = long_filter

    def whole(self, u: Tensor) -> Tensor:
        lags = self._filter.lags(max(1, u.shape[1]), u.device)
        y: Tensor = ff.causal_conv(u.movedim(1, -1), lags)
        return y.movedim(-1, 1)

    def prefill(self, u: Tensor, max_new: int | None, method: Any) -> tuple[Tensor, State]:
        y, cache = self._filter.prefill(u.movedim(1, -1), max_new, method)
        return y.movedim(-1, 1), ConvolutionState(cache)

    def reading(self, u: Tensor, length: int, max_new: int | None) -> ConvolutionReader:
        return ConvolutionReader(self._filter.reading(u.movedim(1, -1), length, max_new))


class ConvolutionReader:
    """A `LongReader`, seen with features last."""

    def __init__(self, reader: LongReader) -> None:
        self._reader = reader

    def extend(self, u: Tensor) -> Tensor:
        return self._reader.extend(u.movedim(1, -1)).movedim(-1, 1)

    def finish(self, max_new: int | None, method: Any) -> State:
        return ConvolutionState(self._reader.finish(max_new, method))


def forget(x: Tensor, rows: Tensor | None) -> Tensor:
    """A copy of x with zeros in the given rows, in all rows for None."""
    return torch.zeros_like(x) if rows is None else x.index_fill(0, rows.to(x.device), 0)
