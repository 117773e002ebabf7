"""Outputs of known blocks of positions: aligned ones in one transform, parts of a base block, direct sums.

Inputs x are `(*C, m)` with the memory's axes, in the plan's dtype; every function writes them to the history
and returns outputs `(*O, m)` in new memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from futurefill_rs.torch_engine.fft import causal_conv_fft
from futurefill_rs.torch_engine.tile import Memory
from futurefill_rs.torch_engine.transform import ifft

# Positions of a direct sum that one operation takes, where the history holds fewer.
_DIRECT = 4096


def width(memory: Memory, t: int, left: int) -> int:
    """How many of the next `left` positions from time t on one operation takes."""
    base = memory.base
    if base is None:
        return min(left, max(memory.ring, _DIRECT))
    if t % base == 0:
        # Tiles that begin early need every block's turn.
        blocks = [base] if memory.delayed else [level.block for level in memory.levels] or [base]
        aligned = [n for n in blocks if n <= left and t % n == 0]
        if aligned:
            return max(aligned)
    return min(left, base - t % base)


def outputs(memory: Memory, t: int, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Outputs of the positions from time t on, as many as `width` says, and the spectrum of a whole block."""
    n, base = x.shape[-1], memory.base
    if base is None:
        return _direct(memory, t, x), None
    if t % base == 0 and n >= base:
        return _whole(memory, t, x)
    return _part(memory, t, x, base), None


def _whole(memory: Memory, t: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """A whole aligned block: its own sum is the real part of its product with the first lags."""
    tables, n, column = memory.tables, x.shape[-1], t % memory.ring
    memory.history[..., column : column + n].copy_(x)
    spectrum = tables.transform(x, n)
    y = ifft(spectrum * memory.aligned(tables.head(n)))
    cosine, minus_sine = tables.untwist(n)
    own = torch.addcmul(y.real * cosine, y.imag, minus_sine, value=-1)
    own += memory.given(t, n)
    return own, spectrum


def _part(memory: Memory, t: int, x: Tensor, base: int) -> Tensor:
    """Part of a base block."""
    n, column, j = x.shape[-1], t % memory.ring, t % base
    memory.history[..., column : column + n].copy_(x)
    block = memory.history[..., column - j : column + n]
    y = causal_conv_fft(block, memory.tables.filters[..., : j + n], j + n)[..., j:]
    y += memory.ahead[..., j : j + n]
    return y


def _direct(memory: Memory, t: int, x: Tensor) -> Tensor:
    """A block without tiles: convolve it behind as much history as the filters reach."""
    history, ring, n, filters = memory.history, memory.ring, x.shape[-1], memory.tables.filters
    past = min(t, filters.shape[-1] - 1)
    first, last = (t - past) % ring, (t - 1) % ring
    if not past:
        window = x
    elif first <= last:
        window = torch.cat((history[..., first : last + 1], x), -1)
    else:
        window = torch.cat((history[..., first:], history[..., : last + 1], x), -1)
    y = causal_conv_fft(window, filters, past + n)[..., past:]
    newest = x[..., -ring:]
    start = (t + n - newest.shape[-1]) % ring
    room = min(newest.shape[-1], ring - start)
    history[..., start : start + room].copy_(newest[..., :room])
    if room < newest.shape[-1]:
        history[..., : newest.shape[-1] - room].copy_(newest[..., room:])
    return memory.seeded(y, t)
