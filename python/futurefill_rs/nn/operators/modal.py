"""Filters that are sums of exponentials: as lags for the engine, or as an exact recurrence of fixed state."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import futurefill_rs as ff
from futurefill_rs.nn.operators.convolution import Convolution, ConvolutionState, LongFilter, forget
from futurefill_rs.nn.operators.plans import Plans
from futurefill_rs.nn.operators.precision import at_least_float32, precisely
from futurefill_rs.nn.protocol import State

Modes = Callable[[], tuple[Tensor, Tensor]]


class ModalState:
    """One number per mode, in double precision: `s <- s * pole + u`, the output is `Re sum residue * s`.

    The state is `(N, B, *U)`: with the features last and side by side a step is several times quicker.
    """

    __slots__ = ("_log_poles", "_poles", "_residues", "_skip", "_state", "_weights")

    def __init__(self, log_poles: Tensor, residues: Tensor, skip: Tensor | None, state: Tensor) -> None:
        self._log_poles, self._residues, self._skip, self._state = log_poles, residues, skip, state
        self._poles = _modes_first(log_poles.exp(), state.ndim)
        self._weights = _modes_first(residues, state.ndim)

    def step(self, u: Tensor) -> Tensor:
        self._state = torch.addcmul(u.to(self._state.dtype), self._state, self._poles)
        y = _real((self._state * self._weights).sum(0))
        return (y if self._skip is None else y + u * self._skip).to(u.dtype)

    def extend(self, u: Tensor) -> Tensor:
        if not u.shape[1]:
            return u.clone()
        lags = modal_filters(self._log_poles, self._residues, u.shape[1])
        y = _convolve64(u, lags) + self.owed(u.shape[1])
        self.absorb(u)
        return (y if self._skip is None else y + u * self._skip).to(u.dtype)

    def owed(self, count: int) -> Tensor:
        """What the past adds to the next `count` outputs, `(B, count, *U)` float64."""
        # residue * pole^(t+1) * state at position t.
        arriving = (self._state * self._weights * self._poles).movedim(0, -1)
        return modal_filters(self._log_poles, arriving, count).movedim(-1, 1)

    def absorb(self, u: Tensor) -> None:
        """Go on to after the inputs u `(B, m, *U)`."""
        fade = _modes_first((self._log_poles * u.shape[1]).exp(), self._state.ndim)
        self._state = self._state * fade + absorb(u, self._log_poles)

    def fork(self) -> ModalState:
        return ModalState(self._log_poles, self._residues, self._skip, self._state)

    def reorder(self, index: Tensor) -> None:
        self._state = self._state.index_select(1, index.to(self._state.device))

    def reset(self, rows: Tensor | None) -> None:
        self._state = forget(self._state.movedim(1, 0), rows).movedim(0, 1).contiguous()

    @property
    def nbytes(self) -> int:
        return self._state.nbytes


class ModalConvolution:
    """Convolution with `h[t] = Re sum_n residues[n] exp(log_poles[n] t)`, plus `skip` at lag 0.

    Without a bound on what follows a prompt the filter never ends, and the recurrence runs, whose state does
    not grow. With one the lags go through the engine, or the recurrence runs where it is cheaper
    (`recurrence_pays`). Both are exact.

    Args:
        plans, name: as in `LongFilter`.
        modes: gives log_poles and residues `(*F, N)`, both complex128 or both float64; differentiable.
        skip: `(*F,)` or None.
        double: whether the lags are wanted in float64.
    """

    def __init__(
        self, plans: Plans, name: str, modes: Modes, skip: Tensor | None, double: bool = False
    ) -> None:
        self._modes, self._skip, self._double = modes, skip, double
        self._filter = LongFilter(plans, name, self._lags, self._signature)
        self._engine = Convolution(self._filter)

    def _signature(self, length: int | None) -> list[Tensor]:
        # The lags of two precisions are no longer the same filters.
        double = torch.tensor(self._double, device="cpu")
        return [*self._modes(), double, *([] if self._skip is None else [self._skip])]

    def _lags(self, length: int | None) -> Tensor:
        if length is None:
            raise ValueError("length: expected a number of lags, got None for a filter without an end")
        log_poles, residues = self._modes()
        lags, skip = modal_filters(log_poles, residues, length), self._skip
        if skip is not None:
            lags = lags + F.pad(skip.double().unsqueeze(-1), (0, lags.shape[-1] - 1))
        return lags if self._double else lags.float()

    def whole(self, u: Tensor) -> Tensor:
        return self._engine.whole(u)

    def prefill(self, u: Tensor, max_new: int | None, method: Any) -> tuple[Tensor, State]:
        u = u.detach()
        log_poles, residues = (modes.detach() for modes in precisely(_call, self._modes, u.device))
        if max_new is not None and not (method == "auto" and recurrence_pays(u, residues)):
            return self._engine.prefill(u, max_new, method)
        skip = None if self._skip is None else self._skip.detach().double().clone()
        state = ModalState(log_poles.clone(), residues.clone(), skip, absorb(u, log_poles))
        return self.whole(u), state

    def reading(self, u: Tensor, length: int, max_new: int | None) -> ModalReader:
        return ModalReader(self, u)


class ModalReader:
    """The filter's first lags within a piece, and the recurrence from piece to piece.

    Args:
        u: the first piece `(B, n, *U)`; none is longer.
    """

    def __init__(self, convolution: ModalConvolution, u: Tensor) -> None:
        self._convolution = convolution
        log_poles, residues = (x.detach().clone() for x in precisely(_call, convolution._modes, u.device))
        skip = convolution._skip
        skip = None if skip is None else skip.detach().double().clone()
        self._lags = convolution._filter.lags(max(1, u.shape[1]), u.device).detach()
        at_rest = u.new_zeros(log_poles.shape[-1], u.shape[0], *u.shape[2:], dtype=log_poles.dtype)
        self._state = ModalState(log_poles, residues, skip, at_rest)
        self._recurrent = recurrence_pays(u, residues)
        self._rows, self._begun = (u.shape[0], *u.shape[2:]), False

    def extend(self, u: Tensor) -> Tensor:
        y: Tensor = ff.causal_conv(at_least_float32(u).movedim(1, -1), self._lags).movedim(-1, 1)
        if self._begun:
            y = y + self._state.owed(u.shape[1]).to(y.dtype)
        self._state.absorb(u)
        self._begun = True
        return y.to(u.dtype)

    def finish(self, max_new: int | None, method: Any) -> State:
        if max_new is None or (method == "auto" and self._recurrent):
            return self._state
        seed = self._state.owed(max_new).movedim(1, 0).to(self._lags.dtype)
        return ConvolutionState(self._convolution._filter.seeded(seed, self._rows, max_new, method))


def _call(function: Modes) -> tuple[Tensor, Tensor]:
    return function()


def recurrence_pays(u: Tensor, residues: Tensor) -> bool:
    """Whether the recurrence is cheaper than the engine for a bounded number of positions after u.

    Nanoseconds for each of them, measured on a CPU (AVX2, 256 to 4096 features, 2 to 16 modes, 200 to 2000
    positions): a step of either, and the engine's lags and spectra. These are not saved where a plan is kept
    from an earlier prompt, so that the answer, and with it the rounding, is the same for every prompt; the
    recurrence then costs at most the plan's time more, and none of its memory.
    """
    if u.device.type != "cpu":
        return False
    modes, filters = residues.shape[-1], residues[..., 0].numel()
    lanes = u.numel() // max(1, u.shape[1])
    recurrence = 13000 + (2.0 if residues.is_complex() else 0.75) * modes * lanes
    return recurrence < 3000 + 5 * lanes + 15 * filters


def modal_filters(log_poles: Tensor, residues: Tensor, length: int) -> Tensor:
    """Lags 0..length-1 of the sum of exponentials, `(*F, length)` float64, with the square root of the
    work."""
    # A compiler has no number to take the root of.
    block = 128 if torch.compiler.is_compiling() else max(1, math.isqrt(length))
    blocks = -(-length // block)
    device = log_poles.device
    starts = (log_poles.unsqueeze(-2) * (block * _count(blocks, device)).unsqueeze(-1)).exp()
    within = (log_poles.unsqueeze(-1) * _count(block, device)).exp()
    lags: Tensor = _real((residues.unsqueeze(-2) * starts) @ within)
    return lags.flatten(-2)[..., :length]


def absorb(u: Tensor, log_poles: Tensor) -> Tensor:
    """The state `(N, B, *U)` after the inputs u `(B, T, *U)` from rest: `sum_j pole^(T-1-j) u_j`."""
    length = u.shape[1]
    block = max(1, math.isqrt(length))
    blocks = -(-length // block)
    x = u.flip(1).to(log_poles.dtype)
    x = F.pad(x, [0, 0] * (u.ndim - 2) + [0, blocks * block - length])
    x = x.movedim(1, -1).reshape(u.shape[0], *u.shape[2:], blocks, block)
    device = log_poles.device
    within = (log_poles.unsqueeze(-2) * _count(block, device).unsqueeze(-1)).exp()
    starts = (log_poles.unsqueeze(-2) * (block * _count(blocks, device)).unsqueeze(-1)).exp()
    return ((x @ within) * starts).sum(-2).movedim(-1, 0).contiguous()


def _modes_first(x: Tensor, ndim: int) -> Tensor:
    """`(*F, N)` as `(N, 1, .., *F)` of `ndim` axes, to go with `(N, B, *U)`."""
    x = x.movedim(-1, 0)
    return x.reshape(x.shape[0], *(1,) * (ndim - x.ndim), *x.shape[1:]).contiguous()


def _convolve64(u: Tensor, lags: Tensor) -> Tensor:
    y: Tensor = ff.causal_conv(u.double().movedim(1, -1), lags)
    return y.movedim(-1, 1)


def _count(length: int, device: torch.device) -> Tensor:
    return torch.arange(length, dtype=torch.float64, device=device)


def _real(x: Tensor) -> Tensor:
    return x.real if x.is_complex() else x
