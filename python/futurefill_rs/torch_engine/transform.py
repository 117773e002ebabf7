"""Complex transforms of every length to the precision of their dtype."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from futurefill_rs._torch_args import is_fake

# MKL rounds composite float64 lengths with a larger prime factor up to a hundred times worse than others.
_LARGEST_EXACT_FACTOR = 13


def fft(x: Tensor) -> Tensor:
    """The transform of x `(..., n)` over its last axis."""
    prime = _inexact_factor(x)
    if prime is None:
        y: Tensor = torch.fft.fft(x)
        return y
    # One step of Cooley and Tukey takes the prime out: as a length of its own it is exact.
    rest = x.shape[-1] // prime
    y = torch.fft.fft(x.reshape(*x.shape[:-1], prime, rest), dim=-2) * _twiddles(prime, rest)
    return fft(y).transpose(-1, -2).flatten(-2)


def ifft(x: Tensor) -> Tensor:
    """The inverse of `fft`."""
    if _inexact_factor(x) is None:
        y: Tensor = torch.fft.ifft(x)
        return y
    return fft(x.conj()).conj() / x.shape[-1]


def _inexact_factor(x: Tensor) -> int | None:
    """The prime that makes torch's own transform inexact."""
    if x.dtype != torch.complex128 or x.device.type != "cpu" or is_fake(x):
        return None
    prime = _largest_factor(x.shape[-1])
    return None if prime <= _LARGEST_EXACT_FACTOR or prime == x.shape[-1] else prime


@functools.cache
def _largest_factor(n: int) -> int:
    largest, factor = 1, 2
    while factor * factor <= n:
        if n % factor:
            factor += 1
        else:
            largest, n = factor, n // factor
    return max(largest, n)


@functools.cache
def _twiddles(rows: int, columns: int) -> Tensor:
    """`exp(-2 pi i r c / (rows * columns))` at row r and column c."""
    n = rows * columns
    with torch.inference_mode(False):
        turns = torch.outer(torch.arange(rows), torch.arange(columns)) % n
        angles = turns.double() * (-2 * math.pi / n)
        return torch.polar(torch.ones_like(angles), angles)
