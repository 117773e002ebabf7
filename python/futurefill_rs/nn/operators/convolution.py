"""Long convolutions through the engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import futurefill_rs as ff
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
        plan = self._plan(slack, max_new, method, u.device)
        x = F.pad(at_least_float32(u), (0, max_new))
        y = ff.causal_conv(x, self.lags(length + max_new, u.device).detach())
        seed = y[..., length:].movedim(-1, 0).clone(memory_format=torch.contiguous_format)
        return y[..., :length].to(u.dtype), _Seeded(plan.new_cache(u.shape[:-1]), seed, max_new)

    def _plan(self, positions: int, max_new: int | None, method: Any, device: torch.device) -> Any:
        horizon = _horizon(positions, max_new)
        return self._plans.get(self._name, self._filters, self._signature, horizon, method, device)


class _Seeded:
    """A cache of the engine for what follows a prompt, and what the prompt adds to it, `(max_new, *C)`."""

    def __init__(self, cache: Any, seed: Tensor, max_new: int) -> None:
        self._cache, self._seed, self._max_new, self._position = cache, seed, max_new, 0

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
            y = y + seed.movedim(0, -1)
        self._position += u.shape[-1]
        return y.to(u.dtype)

    def fork(self) -> _Seeded:
        copy = _Seeded(self._cache.fork(), self._seed, self._max_new)
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


def forget(x: Tensor, rows: Tensor | None) -> Tensor:
    """A copy of x with zeros in the given rows, in all rows for None."""
    return torch.zeros_like(x) if rows is None else x.index_fill(0, rows.to(x.device), 0)
