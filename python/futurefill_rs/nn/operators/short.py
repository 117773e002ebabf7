"""Filters of a few taps, run directly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from futurefill_rs.nn.operators.convolution import forget
from futurefill_rs.nn.operators.precision import at_least_float32
from futurefill_rs.nn.protocol import State


class ShortState:
    """The last inputs of a short filter, newest first; never written to, so forks share them."""

    __slots__ = ("_bias", "_past", "_taps")

    def __init__(self, taps: list[Tensor], bias: Tensor | None, past: list[Tensor]) -> None:
        self._taps, self._bias, self._past = taps, bias, past

    def step(self, u: Tensor) -> Tensor:
        x = at_least_float32(u)
        past, taps = self._past, self._taps
        y = x * taps[0] if self._bias is None else torch.addcmul(self._bias, x, taps[0])
        for earlier, tap in zip(past, taps[1:], strict=True):
            y.addcmul_(earlier, tap)
        if past:
            # The input's memory is the caller's, who may use it again.
            self._past = [x.clone() if x is u else x, *past[:-1]]
        return y.to(u.dtype)

    def extend(self, u: Tensor) -> Tensor:
        if not self._past:
            return fir(at_least_float32(u), self._taps, self._bias).to(u.dtype)
        x = torch.cat([*(earlier[:, None] for earlier in reversed(self._past)), at_least_float32(u)], 1)
        count = len(self._past)
        self._past = [x[:, -1 - j].clone() for j in range(count)]
        return fir(x, self._taps, self._bias)[:, count:].to(u.dtype)

    def fork(self) -> ShortState:
        return ShortState(self._taps, self._bias, self._past)

    def reorder(self, index: Tensor) -> None:
        self._past = [x.index_select(0, index.to(x.device)) for x in self._past]

    def reset(self, rows: Tensor | None) -> None:
        self._past = [forget(x, rows) for x in self._past]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self._past)


class ShortConvolution:
    """A causal filter of a few taps per feature, run directly: `y[t] = bias + sum_k taps[k] u[t-k]`.

    Args:
        taps: gives `(K, D)`, lag 0 first; bias: `(D,)` or None. Both differentiable.
    """

    def __init__(self, taps: Callable[[], Tensor], bias: Tensor | None) -> None:
        self._taps, self._bias = taps, bias

    def whole(self, u: Tensor) -> Tensor:
        taps, bias = self._taps(), self._bias
        return fir(at_least_float32(u), _rows(taps), None if bias is None else at_least_float32(bias)).to(
            u.dtype
        )

    def prefill(self, u: Tensor, max_new: int | None, method: Any) -> tuple[Tensor, State]:
        bias = None if self._bias is None else at_least_float32(self._bias.detach().clone())
        taps = _rows(self._taps().detach().clone())
        x = at_least_float32(u.detach())
        recent = F.pad(x[:, max(0, x.shape[1] - len(taps) + 1) :], (0, 0, len(taps), 0))
        past = [recent[:, -1 - j].clone() for j in range(len(taps) - 1)]
        return fir(x, taps, bias).to(u.dtype), ShortState(taps, bias, past)


def _rows(taps: Tensor) -> list[Tensor]:
    return list(at_least_float32(taps).contiguous().unbind(0))


def fir(x: Tensor, taps: list[Tensor], bias: Tensor | None) -> Tensor:
    """`y[:, t] = bias + sum_k taps[k] x[:, t-k]` for x `(B, T, D)`, the sum in the order a step has it."""
    y = x * taps[0] if bias is None else torch.addcmul(bias, x, taps[0])
    reach = len(taps) - 1
    late = F.pad(x, (0, 0, reach, 0))
    for lag, tap in enumerate(taps[1:], 1):
        y = torch.addcmul(y, late.narrow(1, reach - lag, x.shape[1]), tap)
    return y
