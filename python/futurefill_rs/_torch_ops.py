"""Whole sequences at once: causal convolution of torch tensors as a registered, differentiable operator."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._torch_args import broadcast, padded

# Real elements of one chunk of rows: small enough to stay in a core's cache, or to bound a device's memory.
_CPU_CHUNK = 1 << 19
_DEVICE_CHUNK = 1 << 26


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


def causal_conv_fft(u: Tensor, filters: Tensor, length: int) -> Tensor:
    """The first `length` positions of `u (*C, T)` (zero after its end) convolved with `filters (*F, L)`.

    Both of one floating dtype (float32 or float64) and device -> `(*broadcast(C, F), length)`, contiguous. Every distinct
    input row and every distinct filter row is transformed once, rows in chunks that bound the memory.
    """
    u, filters = u[..., :length], filters[..., :length]
    taken, lags = u.shape[-1], filters.shape[-1]
    outer = broadcast(tuple(u.shape[:-1]), tuple(filters.shape[:-1]), "u")
    if math.prod(outer) * length == 0 or taken == 0:
        return u.new_zeros((*outer, length))
    rank = len(outer)
    left, right = padded(tuple(u.shape[:-1]), rank), padded(tuple(filters.shape[:-1]), rank)
    own = [a for a in range(rank) if right[a] == 1]
    bank = [a for a in range(rank) if right[a] != 1 and left[a] == 1]
    both = [a for a in range(rank) if right[a] != 1 and left[a] != 1]
    order = [*both, *own, *bank]
    pairs, batch, kinds = (math.prod(outer[a] for a in axes) for axes in (both, own, bank))
    rows_u = u.reshape(*left, taken).permute(*order, rank).reshape(pairs, batch, 1, taken)
    rows_f = filters.reshape(*right, lags).permute(*order, rank).reshape(pairs, 1, kinds, lags)
    out = u.new_empty((*outer, length))
    arranged = out.permute(*order, rank)
    # Rows go straight to their place where the axes of one kind are neighbours, else by a copy at the end.
    direct = _merged(arranged, (len(both), len(own), len(bank)))
    rows_y = out.new_empty((pairs, batch, kinds, length)) if direct is None else direct
    # Beyond it the circular product overlaps positions that are asked for.
    n = fast_length(max(length, min(taken + lags - 1, length + lags - 1, length + taken - 1)))
    chunk = (_CPU_CHUNK if u.device.type == "cpu" else _DEVICE_CHUNK) // n
    step_pairs = max(min(chunk // max(kinds, 1), pairs), 1)
    step_batch = max(min(chunk // (step_pairs * max(kinds, 1)), batch), 1)
    for a in range(0, pairs, step_pairs):
        spectrum = torch.fft.rfft(rows_f[a : a + step_pairs], n)
        for b in range(0, batch, step_batch):
            block = torch.fft.rfft(rows_u[a : a + step_pairs, b : b + step_batch], n)
            product = torch.fft.irfft(block * spectrum, n)
            rows_y[a : a + step_pairs, b : b + step_batch].copy_(product[..., :length])
    if direct is None:
        arranged.copy_(rows_y.reshape(arranged.shape))
    return out


def _merged(values: Tensor, groups: tuple[int, int, int]) -> Tensor | None:
    """A view of shape (A, B, K, T) with each group of axes as one; None where the memory does not allow it."""
    shape: list[int] = []
    at = 0
    for count in groups:
        axes = range(at, at + count)
        at += count
        sizes = [(values.shape[a], values.stride(a)) for a in axes if values.shape[a] != 1]
        for (_, outer), (size, inner) in zip(sizes, sizes[1:], strict=False):
            if outer != size * inner:
                return None
        shape.append(math.prod(values.shape[a] for a in axes))
    return values.view(*shape, values.shape[-1])
