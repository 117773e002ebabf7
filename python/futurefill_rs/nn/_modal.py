"""Filters that are sums of exponentials: as lags for the engine, or as an exact recurrence of fixed state."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from futurefill_rs.nn._base import State
from futurefill_rs.nn._operators import Convolution, forget

Modes = Callable[[], tuple[Tensor, Tensor]]


class ModalState:
    """One number per mode, in double precision: `s <- s * pole + u`, and the output is `Re sum residue *
    s`."""

    __slots__ = ("_log_poles", "_poles", "_residues", "_skip", "_state")

    def __init__(self, log_poles: Tensor, residues: Tensor, skip: Tensor | None, state: Tensor) -> None:
        self._log_poles, self._residues, self._skip, self._state = log_poles, residues, skip, state
        self._poles = log_poles.exp()

    def step(self, u: Tensor) -> Tensor:
        self._state = torch.addcmul(u.unsqueeze(-1).to(self._poles.dtype), self._state, self._poles)
        y = _real(self._state * self._residues).sum(-1)
        return (y if self._skip is None else y + u * self._skip).to(u.dtype)

    def extend(self, u: Tensor) -> Tensor:
        if not u.shape[1]:
            return u
        lags = modal_filters(self._log_poles, self._residues, u.shape[1])
        y = _convolve64(u, lags)
        # What the state before the block adds: residue * pole^(t+1) * state at its position t.
        arrivals = (self._log_poles.unsqueeze(-1) * (1 + _count(u.shape[1], u.device))).exp()
        owed = torch.einsum("b...n,...nt->bt...", self._state * self._residues, arrivals)
        self._state = self._state * (self._log_poles * u.shape[1]).exp() + absorb(u, self._log_poles)
        y = y + _real(owed)
        return (y if self._skip is None else y + u * self._skip).to(u.dtype)

    def fork(self) -> ModalState:
        return ModalState(self._log_poles, self._residues, self._skip, self._state)

    def reorder(self, index: Tensor) -> None:
        self._state = self._state.index_select(0, index.to(self._state.device))

    def reset(self, rows: Tensor | None) -> None:
        self._state = forget(self._state, rows)

    @property
    def nbytes(self) -> int:
        return self._state.nbytes


class ModalConvolution:
    """Convolution with `h[t] = Re sum_n residues[n] exp(log_poles[n] t)`, plus `skip` at lag 0.

    With a bound on what follows a prompt the lags go through the engine. Without one the filter never ends,
    and the recurrence runs instead, whose state does not grow.

    Args:
        modes: gives log_poles and residues `(*F, N)`, both complex128 or both float64; differentiable.
        skip: gives `(*F,)` or None.
        sources: the tensors that both are computed from.
    """

    def __init__(
        self, modes: Modes, skip: Callable[[], Tensor | None], sources: Callable[[], Iterable[Tensor]]
    ) -> None:
        self._modes, self._skip, self._sources = modes, skip, sources
        self._engine = Convolution(self._lags, sources)

    def _lags(self, length: int | None) -> Tensor:
        if length is None:
            raise ValueError("length: expected a number of lags, got None for a filter without an end")
        log_poles, residues = self._modes()
        lags, skip = modal_filters(log_poles, residues, length), self._skip()
        if skip is not None:
            lags = torch.cat([lags[..., :1] + skip.double().unsqueeze(-1), lags[..., 1:]], -1)
        double = any(source.dtype == torch.float64 for source in self._sources())
        return lags if double else lags.float()

    def whole(self, u: Tensor) -> Tensor:
        return self._engine.whole(u)

    def prefill(self, u: Tensor, max_new: int | None, method: Any) -> tuple[Tensor, State]:
        if max_new is not None:
            return self._engine.prefill(u, max_new, method)
        log_poles, residues = self._modes()
        skip = self._skip()
        skip = None if skip is None else skip.double()
        state = ModalState(log_poles, residues, skip, absorb(u, log_poles))
        return self.whole(u), state


def modal_filters(log_poles: Tensor, residues: Tensor, length: int) -> Tensor:
    """Lags 0..length-1 of the sum of exponentials, `(*F, length)` float64, with the square root of the
    work."""
    block = max(1, math.isqrt(length))
    blocks = -(-length // block)
    device = log_poles.device
    starts = (log_poles.unsqueeze(-2) * (block * _count(blocks, device)).unsqueeze(-1)).exp()
    within = (log_poles.unsqueeze(-1) * _count(block, device)).exp()
    lags: Tensor = _real((residues.unsqueeze(-2) * starts) @ within)
    return lags.flatten(-2)[..., :length]


def absorb(u: Tensor, log_poles: Tensor) -> Tensor:
    """The state `(B, *F, N)` after the inputs u `(B, T, *F)` from rest: `sum_j pole^(T-1-j) u_j`."""
    length = u.shape[1]
    block = max(1, math.isqrt(length))
    blocks = -(-length // block)
    x = u.flip(1).to(log_poles.dtype)
    x = torch.nn.functional.pad(x, [0, 0] * (u.ndim - 2) + [0, blocks * block - length])
    x = x.movedim(1, -1).reshape(u.shape[0], *u.shape[2:], blocks, block)
    device = log_poles.device
    within = (log_poles.unsqueeze(-2) * _count(block, device).unsqueeze(-1)).exp()
    starts = (log_poles.unsqueeze(-2) * (block * _count(blocks, device)).unsqueeze(-1)).exp()
    return ((x @ within) * starts).sum(-2)


def _convolve64(u: Tensor, lags: Tensor) -> Tensor:
    import futurefill_rs as ff

    y: Tensor = ff.causal_conv(u.double().movedim(1, -1), lags)
    return y.movedim(-1, 1)


def _count(length: int, device: torch.device) -> Tensor:
    return torch.arange(length, dtype=torch.float64, device=device)


def _real(x: Tensor) -> Tensor:
    return x.real if x.is_complex() else x
