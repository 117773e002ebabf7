"""Convolutions whose even and odd lags run apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import futurefill_rs as ff
from futurefill_rs.nn.operators.convolution import LongFilter, forget
from futurefill_rs.nn.protocol import State


class ParityState:
    """Two caches of the engine that take turns, and what the last position owes to the next one."""

    def __init__(self, caches: list[Any], turn: int, bank: int, carry: Tensor | None) -> None:
        self._caches, self._bank, self._carry = caches, bank, carry
        self._turn = self._first_turn = turn

    def step(self, u: Tensor) -> Any:
        y: Tensor = self._caches[self._turn].step(u)
        self._turn ^= 1
        odd = self._carry
        if odd is None:
            return y
        self._carry = y[:, self._bank :].clone()
        return y[:, : self._bank], odd

    def extend(self, u: Tensor) -> Any:
        if not u.shape[1]:
            y = self._caches[0].extend(u.movedim(1, -1)).movedim(-1, 1)
            return y if self._carry is None else (y[:, :, : self._bank], y[:, :, self._bank :])
        first, second = self._turn, 1 - self._turn
        y = _interleave(
            self._caches[first].extend(u[:, 0::2].movedim(1, -1)),
            self._caches[second].extend(u[:, 1::2].movedim(1, -1)),
        )
        self._turn ^= u.shape[1] & 1
        if self._carry is None:
            return y
        even, odd = y[:, :, : self._bank], y[:, :, self._bank :]
        delayed = torch.cat([self._carry[:, None], odd[:, :-1]], 1)
        self._carry = odd[:, -1].clone()
        return even, delayed

    def fork(self) -> ParityState:
        carry = None if self._carry is None else self._carry.clone()
        copy = ParityState([cache.fork() for cache in self._caches], self._turn, self._bank, carry)
        copy._first_turn = self._first_turn
        return copy

    def reorder(self, index: Tensor) -> None:
        for cache in self._caches:
            cache.reorder(index)
        if self._carry is not None:
            self._carry = self._carry.index_select(0, index.to(self._carry.device))

    def reset(self, rows: Tensor | None) -> None:
        for cache in self._caches:
            cache.reset() if rows is None else cache.reset(rows)
        if rows is None:
            self._turn = self._first_turn
        if self._carry is not None:
            self._carry = forget(self._carry, rows)

    @property
    def nbytes(self) -> int:
        carry = 0 if self._carry is None else self._carry.nbytes
        return sum(int(cache.nbytes) for cache in self._caches) + carry


class ParityConvolution:
    """A causal convolution whose even and odd positions run apart, at half the length and half the rate.

    An even lag joins positions of the same parity, an odd lag those of different parity. Filters that vanish
    on odd lags are two independent convolutions with the even lags alone; others need the odd lags as a
    second bank, whose output at one position is due at the next.

    Args:
        half: the even lags; half as many as the filter has.
        bank: 0: `half` is all there is, and the output is one tensor. K: `half` has `(2 K, ...)` filters,
            the K even-lag filters and the K odd-lag ones, the output is the pair of their convolutions, `(B,
            T, K, ...)`.
    """

    def __init__(self, half: LongFilter, bank: int = 0) -> None:
        self._half, self._bank = half, bank

    def whole(self, u: Tensor) -> Any:
        length = u.shape[1]
        half = (length + 1) // 2
        u = F.pad(u, [0, 0] * (u.ndim - 2) + [0, 2 * half - length])
        pairs = u.reshape(u.shape[0], half, 2, *u.shape[2:]).movedim(1, -1)
        y = ff.causal_conv(pairs, self._half.lags(max(1, pairs.shape[-1]), u.device))
        y = _front(y.movedim(-1, 1).flatten(1, 2), length)
        if not self._bank:
            return y
        even, odd = y[:, :, : self._bank], y[:, :, self._bank :]
        return even, _front(F.pad(odd, [0, 0] * (odd.ndim - 2) + [1, 0]), length)

    def prefill(self, u: Tensor, max_new: int | None, method: Any) -> tuple[Any, State]:
        length = u.shape[1]
        turn = length % 2
        outputs, caches = [], []
        for parity in (0, 1):
            new = None if max_new is None else (max_new + (parity == turn)) // 2
            x = u[:, parity::2].movedim(1, -1)
            # Both halves share a plan: room for the longer one.
            slack = 0 if max_new is None or new is None else (length + max_new + 1) // 2 - x.shape[-1] - new
            y, cache = self._half.prefill(x, new, method, slack)
            outputs.append(y)
            caches.append(cache)
        y = _interleave(*outputs)
        if not self._bank:
            return y, ParityState(caches, turn, 0, None)
        even, odd = y[:, :, : self._bank], y[:, :, self._bank :]
        delayed = F.pad(odd, [0, 0] * (odd.ndim - 2) + [1, 0])
        return (even, delayed[:, :length]), ParityState(caches, turn, self._bank, delayed[:, length].clone())

    def reading(self, u: Tensor, length: int, max_new: int | None) -> ParityReader:
        return ParityReader(self._half, self._bank, u, length, max_new)


class ParityReader:
    """Readers of the even and of the odd positions that take turns."""

    def __init__(self, half: LongFilter, bank: int, u: Tensor, length: int, max_new: int | None) -> None:
        # The longer half has one position more; so may what follows.
        new = None if max_new is None else (max_new + 1) // 2
        first = u[:, 0::2].movedim(1, -1)
        self._readers = [half.reading(first, (length + 1 - parity) // 2, new) for parity in (0, 1)]
        carry = u.new_zeros(u.shape[0], bank, *u.shape[3:]) if bank else None
        self._state = ParityState(self._readers, 0, bank, carry)
        self._bank, self._turn = bank, length % 2

    def extend(self, u: Tensor) -> Any:
        return self._state.extend(u)

    def finish(self, max_new: int | None, method: Any) -> State:
        caches = []
        for parity, reader in enumerate(self._readers):
            new = None if max_new is None else (max_new + (parity == self._turn)) // 2
            # Both halves share a plan: room for the longer one.
            slack = 0 if max_new is None or new is None else (max_new + 1) // 2 - new
            caches.append(reader.finish(new, method, slack))
        return ParityState(caches, self._turn, self._bank, self._state._carry)


def _front(y: Tensor, length: int) -> Tensor:
    """`y[:, :length]`, in a graph for every length without asking whether there are as many."""
    if torch.compiler.is_compiling():
        return y.index_select(1, torch.arange(length, device=y.device))
    return y[:, :length]


def _interleave(first: Tensor, second: Tensor) -> Tensor:
    """Merge positions 0, 2, .. and 1, 3, .. (time last) into one sequence `(B, T, ...)`."""
    y = first.new_empty(first.shape[0], first.shape[-1] + second.shape[-1], *first.shape[1:-1])
    y[:, 0::2] = first.movedim(-1, 1)
    y[:, 1::2] = second.movedim(-1, 1)
    return y
