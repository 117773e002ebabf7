"""Whole sequences by torch's transforms, in chunks of rows that bound the memory."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar

import torch
from torch import Tensor

from futurefill_rs._args import broadcast, padded
from futurefill_rs._interface import Progress

# Real elements of one chunk of rows: small enough to stay in a core's cache, or to bound a device's memory.
_CPU_CHUNK = 1 << 19
_DEVICE_CHUNK = 1 << 26

# Who is told how far the sequences of this thread's present call are.
_listener: ContextVar[Progress | None] = ContextVar("_listener", default=None)


def telling(progress: Progress | None) -> AbstractContextManager[None]:
    """Within the block, whole sequences tell `progress` how much of the work is done, and all of it."""
    # Compilers know no context variables.
    return contextlib.nullcontext() if progress is None else _telling(progress)


@contextlib.contextmanager
def _telling(progress: Progress) -> Iterator[None]:
    token = _listener.set(progress)
    try:
        yield
    finally:
        _listener.reset(token)


def told() -> Progress | None:
    """Who is to be told, in this thread and call."""
    return _listener.get()


def fast_length(n: int) -> int:
    """The least length of at least n whose only prime factors are 2, 3 and 5."""
    best = 1 << max(n - 1, 0).bit_length()
    five = 1
    while five < best:
        three = five
        while three < best:
            two = three << max(-(-n // three) - 1, 0).bit_length()
            best = min(best, two)
            three *= 3
        five *= 5
    return max(best, 1)


class _Groups:
    """The axes of a result by who has them: input and filters (A), input alone (B), filters alone (K)."""

    def __init__(self, outer: tuple[int, ...], inputs: tuple[int, ...], filters: tuple[int, ...]) -> None:
        rank = len(outer)
        left, right = padded(inputs, rank), padded(filters, rank)
        both = [a for a in range(rank) if right[a] != 1 and left[a] != 1]
        own = [a for a in range(rank) if right[a] == 1]
        bank = [a for a in range(rank) if right[a] != 1 and left[a] == 1]
        self.rank = rank
        self.order = [*both, *own, *bank]
        self.counts = (len(both), len(own), len(bank))
        self.sizes = tuple(math.prod(outer[a] for a in axes) for axes in (both, own, bank))

    def rows(self, values: Tensor, *, batch: bool = True, kinds: bool = True) -> Tensor:
        """Values (.., n) as (A, B, K, n), with B or K of one where the values lack those axes."""
        n = values.shape[-1]
        sizes = (self.sizes[0], self.sizes[1] if batch else 1, self.sizes[2] if kinds else 1)
        full = values.reshape(*padded(tuple(values.shape[:-1]), self.rank), n)
        return full.permute(*self.order, self.rank).reshape(*sizes, n)


def causal_conv_fft(u: Tensor, filters: Tensor, length: int) -> Tensor:
    """The first `length` positions of `u (*C, T)` (zero after its end) convolved with `filters (*F, L)`.

    Both of one floating dtype (float32 or float64) and device -> `(*broadcast(C, F), length)`, contiguous.
    Every distinct input row and every distinct filter row is transformed once, in chunks of rows that bound
    the memory.
    """
    u, filters = u[..., :length], filters[..., :length]
    taken, lags = u.shape[-1], filters.shape[-1]
    outer = broadcast(tuple(u.shape[:-1]), tuple(filters.shape[:-1]), "u")
    if math.prod(outer) * length == 0 or taken == 0:
        return u.new_zeros((*outer, length))
    group = _Groups(outer, tuple(u.shape[:-1]), tuple(filters.shape[:-1]))
    rank, order = len(outer), group.order
    pairs, batch, kinds = group.sizes
    rows_u = group.rows(u, kinds=False)
    rows_f = group.rows(filters, batch=False)
    out = u.new_empty((*outer, length))
    arranged = out.permute(*order, rank)
    # Rows go straight to their place where the axes of one kind are neighbours, else by a copy at the end.
    direct = _merged(arranged, group.counts)
    rows_y = out.new_empty((pairs, batch, kinds, length)) if direct is None else direct
    # Beyond it the circular product overlaps positions that are asked for.
    n = fast_length(max(length, min(taken + lags - 1, length + lags - 1, length + taken - 1)))
    chunk = (_CPU_CHUNK if u.device.type == "cpu" else _DEVICE_CHUNK) // n
    step_pairs = max(min(chunk // max(kinds, 1), pairs), 1)
    step_batch = max(min(chunk // (step_pairs * max(kinds, 1)), batch), 1)
    progress = told()
    for a in range(0, pairs, step_pairs):
        spectrum = torch.fft.rfft(rows_f[a : a + step_pairs], n)
        for b in range(0, batch, step_batch):
            block = torch.fft.rfft(rows_u[a : a + step_pairs, b : b + step_batch], n)
            product = torch.fft.irfft(block * spectrum, n)
            rows_y[a : a + step_pairs, b : b + step_batch].copy_(product[..., :length])
            if progress is not None:
                done = a * batch + min(step_pairs, pairs - a) * min(b + step_batch, batch)
                progress(done, pairs * batch)
    if direct is None:
        arranged.copy_(rows_y.reshape(arranged.shape))
    return out


def _merged(values: Tensor, groups: tuple[int, int, int]) -> Tensor | None:
    """A view of shape (A, B, K, T), each group of axes as one; None where memory does not allow it."""
    shape: list[int] = []
    at = 0
    for count in groups:
        axes = range(at, at + count)
        at += count
        sizes = [(values.shape[a], values.stride(a)) for a in axes if values.shape[a] != 1]
        for (_, outer), (size, inner) in itertools.pairwise(sizes):
            if outer != size * inner:
                return None
        shape.append(math.prod(values.shape[a] for a in axes))
    return values.view(*shape, values.shape[-1])


def filter_grad_fft(grad: Tensor, u: Tensor, shape: Sequence[int]) -> Tensor:
    """`sum_t grad[.., t] u[.., t - j]` for every lag j, summed over the axes that `shape (*F, L)` lacks.

    `grad (*O, T)`, `u (*C, S)` of one dtype -> `(*F, L)`; u is zero after its end. The sum over a batch
    happens before the one inverse transform.
    """
    u = u[..., : grad.shape[-1]]
    outer, lags, length = tuple(grad.shape[:-1]), shape[-1], grad.shape[-1]
    result = u.new_zeros(tuple(shape))
    reach = min(lags, length)
    if math.prod(outer) * length * reach == 0:
        return result
    group = _Groups(outer, tuple(u.shape[:-1]), tuple(shape[:-1]))
    pairs, batch, kinds = group.sizes
    rows_g, rows_u = group.rows(grad), group.rows(u, kinds=False)
    n = fast_length(length + reach - 1)
    chunk = (_CPU_CHUNK if u.device.type == "cpu" else _DEVICE_CHUNK) // n
    step_pairs = max(min(chunk // max(kinds, 1), pairs), 1)
    step_batch = max(min(chunk // (step_pairs * max(kinds, 1)), batch), 1)
    rows_f = u.new_empty((pairs, 1, kinds, reach))
    for a in range(0, pairs, step_pairs):
        total = None
        for b in range(0, batch, step_batch):
            left = torch.fft.rfft(rows_g[a : a + step_pairs, b : b + step_batch], n)
            right = torch.fft.rfft(rows_u[a : a + step_pairs, b : b + step_batch], n)
            # A lazy conjugate would be lost where an operator runs below the dispatcher key that resolves it.
            part = (left * torch.conj_physical(right)).sum(1, keepdim=True)
            total = part if total is None else total.add_(part)
        assert total is not None
        rows_f[a : a + step_pairs].copy_(torch.fft.irfft(total, n)[..., :reach])
    # B stands second in the order and has no size here: A and K are the filters' own axes.
    inner = padded(tuple(shape[:-1]), group.rank)
    arranged = rows_f.reshape(*(inner[a] for a in group.order), reach)
    back = [group.order.index(a) for a in range(group.rank)]
    result[..., :reach].copy_(arranged.permute(*back, group.rank).reshape(*shape[:-1], reach))
    return result
