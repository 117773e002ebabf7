"""What a plan of the torch engine holds: filters, twists and spectra, for one schedule.

A level with blocks of n positions computes, from n inputs and 2n filter lags, the middle n outputs of their
product. It works modulo z^n - i, where the product of x and f_j + i f_{j+n} is (P0 - P2) + i P1: its
imaginary part is the wanted P1. The twist w^j, w = exp(i pi / (2n)), turns that product into a cyclic one,
so a block costs one complex transform of length n, and so does the sum over all partitions of a level.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from futurefill_rs import _state
from futurefill_rs._core import Execution, Level, Schedule
from futurefill_rs._torch_args import to_host
from futurefill_rs.torch_engine.transform import fft


class Tables:
    """Filters `(*F, L)` of float32 or float64 and all that is computed from them once; immutable."""

    def __init__(self, filters: Tensor, schedule: Schedule, horizon: int | None, smooth: bool) -> None:
        self.filters = filters
        self.dtype, self.device = filters.dtype, filters.device
        self.filter_shape, self.filter_length = tuple(filters.shape[:-1]), filters.shape[-1]
        self.schedule, self.smooth = schedule, smooth
        execution = self.execution(horizon)
        self._digest: int | None = None
        self._twists: dict[int, Tensor] = {}
        self._untwists: dict[int, tuple[Tensor, Tensor]] = {}
        self._heads: dict[int, Tensor] = {}
        self.spectra: dict[int, Tensor] = {}
        with torch.inference_mode(False), torch.no_grad():
            for level in execution.levels:
                self.spectra[level.block] = self._partition_spectra(level)
                self.untwist(level.block)
            lags = execution.base or execution.ring
            # The lags of a direct sum, the last first.
            self.reversed = filters[..., :lags].flip(-1).contiguous()

    def execution(self, capacity: int | None) -> Execution:
        """What a cache of this capacity executes."""
        return Execution(self.schedule, capacity, self.filter_length, self.latency)

    @property
    def latency(self) -> Literal["throughput", "smooth"]:
        return "smooth" if self.smooth else "throughput"

    def twist(self, n: int) -> Tensor:
        """w^j as real pairs, (n, 2)."""
        twist = self._twists.get(n)
        if twist is None:
            with torch.inference_mode(False):
                angle = torch.arange(n, dtype=torch.float64, device="cpu") * (math.pi / (2 * n))
                pairs = torch.stack((angle.cos(), angle.sin()), -1)
                twist = self._twists.setdefault(n, pairs.to(device=self.device, dtype=self.dtype))
        return twist

    def untwist(self, n: int) -> tuple[Tensor, Tensor]:
        """Cosine and minus sine of the twist's angles, each (n,)."""
        pair = self._untwists.get(n)
        if pair is None:
            twist = self.twist(n)
            with torch.inference_mode(False):
                pair = self._untwists.setdefault(n, (twist[:, 0].clone(), -twist[:, 1]))
        return pair

    def transform(self, x: Tensor, n: int) -> Tensor:
        """Spectrum of real blocks x (..., n) modulo z^n - i."""
        return fft(torch.view_as_complex(x.unsqueeze(-1) * self.twist(n)))

    def _partition_spectra(self, level: Level) -> Tensor:
        """Spectra (*F, P, n) of the filter lags (p-1)n .. (p+1)n, the last partition first."""
        n, count = level.block, level.parts
        lags = self.filters[..., : (count + 1) * n]
        lags = torch.nn.functional.pad(lags, (0, (count + 1) * n - lags.shape[-1]))
        blocks = lags.reshape(*lags.shape[:-1], count + 1, n).flip(-2)
        folded = torch.complex(blocks[..., 1:, :], blocks[..., :-1, :])
        return fft(folded * torch.view_as_complex(self.twist(n)))

    def head(self, n: int) -> Tensor:
        """Spectrum (*F, n) of the first n lags: the product's real part is the block's own causal sum."""
        head = self._heads.get(n)
        if head is None:
            with torch.inference_mode(False), torch.no_grad():
                lags = self.filters[..., :n]
                lags = torch.nn.functional.pad(lags, (0, n - lags.shape[-1]))
                head = self._heads.setdefault(n, self.transform(lags, n))
        return head

    def digest(self) -> int:
        """Fingerprint of the filters."""
        if self._digest is None:
            self._digest = _state.digest(to_host(self.filters))
        return self._digest

    @property
    def nbytes(self) -> int:
        """Bytes of the filters and of everything prepared from them."""
        tensors = [self.filters, self.reversed]
        tensors += [*self.spectra.values(), *self._heads.values(), *self._twists.values()]
        tensors += [part for pair in self._untwists.values() for part in pair]
        return sum(t.numel() * t.element_size() for t in tensors)
