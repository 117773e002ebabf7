"""The streaming engine in plain torch: the same schedules as the compiled engine, on any torch device.

Time is last in every array, inside as well as outside.

A level with blocks of n positions computes, from n inputs and 2n filter lags, the middle n outputs of their
product. It works modulo z^n - i, where the product of x and f_j + i f_{j+n} is (P0 - P2) + i P1: its
imaginary part is the wanted P1. The twist w^j, w = exp(i pi / (2n)), turns that product into a cyclic one,
so a block costs one complex transform of length n, and so does the sum over all partitions of a level.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _state
from ._core import CapacityError, Schedule
from ._torch_args import (
    broadcast,
    check_device,
    checked,
    compute_dtype,
    dtype_name,
    shape_of,
    size,
    to_host,
    type_name,
)
from ._torch_cache import TorchCache
from ._torch_fft import fft
from ._torch_layout import Layout, Level, layout_of
from ._torch_ops import causal_conv_fft

__all__ = ["TorchCache", "TorchPlan"]


class TorchPlan:
    """Filters prepared for exact streaming convolution of torch tensors; immutable and shareable.

    | argument | |
    | --- | --- |
    | `filters` | `(*F, L)`, lag 0 first, any device and floating dtype (half types as float32); copied |
    | `horizon` | positions one cache serves, None: no bound |
    | `method` | `"auto"`, `"naive"`, `"epoched"`, `"continuous"` or a `Schedule` |
    | `max_memory` | bytes of cache per sequence that `"auto"` may use |
    | `latency` | `"smooth"`: tiles but those of the lowest level begin a block early, on other streams |

    Results are detached from autograd. Errors: `TypeError` for anything but strided floating tensors,
    `ValueError` for shapes and values.
    """

    def __init__(
        self,
        filters: Tensor,
        horizon: int | None = None,
        method: str | Schedule = "auto",
        *,
        max_memory: int | None = None,
        latency: str = "throughput",
    ) -> None:
        taps = checked(filters, "filters")
        if taps.dim() == 0:
            raise ValueError("filters: expected shape (*F, L), got ()")
        if taps.shape[-1] == 0:
            raise ValueError(f"filters: expected at least 1 lag, got shape {tuple(taps.shape)}")
        if latency not in ("throughput", "smooth"):
            raise ValueError(f"latency: expected 'throughput' or 'smooth', got {latency!r}")
        self._horizon = None if horizon is None else size(horizon, "horizon", 1)
        memory = None if max_memory is None else size(max_memory, "max_memory", 1)
        self._dtype = compute_dtype(taps.dtype)
        with torch.inference_mode(False), torch.no_grad():
            self._filters = taps.to(self._dtype, copy=True, memory_format=torch.contiguous_format)
        self._smooth = latency == "smooth"
        self._schedule = self._resolve(method, memory)
        self._layout = self._layout_for(self._horizon)
        self._digest: int | None = None
        self._twists: dict[int, Tensor] = {}
        self._untwists: dict[int, tuple[Tensor, Tensor]] = {}
        self._heads: dict[int, Tensor] = {}
        self._spectra: dict[int, Tensor] = {}
        with torch.inference_mode(False), torch.no_grad():
            for level in self._layout.levels:
                self._spectra[level.n] = self._partition_spectra(level)
                self._untwist(level.n)
            lags = self._layout.base or self._layout.ring
            self._reversed = self._filters[..., :lags].flip(-1).contiguous()

    def _resolve(self, method: Any, max_memory: int | None) -> Schedule:
        length = self.filter_length
        reach = length if self._horizon is None else min(self._horizon, length)
        if method == "auto":
            rows = self._filters.numel() // length
            return Schedule.auto(
                self._horizon,
                length,
                rows=max(rows, 1),
                itemsize=self._dtype.itemsize,
                max_memory=max_memory,
                device="cpu" if self.device.type == "cpu" else "gpu",
                latency="smooth" if self._smooth else "throughput",
            )
        if method == "naive":
            return Schedule.naive()
        if method == "epoched":
            return Schedule.epoched(reach)
        if method == "continuous":
            return Schedule.continuous(reach)
        if isinstance(method, str):
            raise ValueError(
                f"method: expected 'auto', 'naive', 'epoched', 'continuous' or a Schedule, got {method!r}"
            )
        if not hasattr(method, "base") or not hasattr(method, "fans"):
            raise TypeError(f"method: expected a name or a Schedule, got {type_name(method)}")
        schedule: Schedule = method
        return schedule

    def _layout_for(self, capacity: int | None) -> Layout:
        schedule = self._schedule
        return layout_of(schedule.base, schedule.fans, self.filter_length, capacity, self._smooth)

    def _twist(self, n: int) -> Tensor:
        """w^j as real pairs, (n, 2)."""
        twist = self._twists.get(n)
        if twist is None:
            with torch.inference_mode(False):
                angle = torch.arange(n, dtype=torch.float64, device="cpu") * (math.pi / (2 * n))
                pairs = torch.stack((angle.cos(), angle.sin()), -1)
                twist = self._twists.setdefault(n, pairs.to(device=self.device, dtype=self._dtype))
        return twist

    def _untwist(self, n: int) -> tuple[Tensor, Tensor]:
        """Cosine and minus sine of the twist's angles, each (n,)."""
        pair = self._untwists.get(n)
        if pair is None:
            twist = self._twist(n)
            with torch.inference_mode(False):
                pair = self._untwists.setdefault(n, (twist[:, 0].clone(), -twist[:, 1]))
        return pair

    def _transform(self, x: Tensor, n: int) -> Tensor:
        """Spectrum of real blocks x (..., n) modulo z^n - i."""
        spectrum: Tensor = fft(torch.view_as_complex(x.unsqueeze(-1) * self._twist(n)))
        return spectrum

    def _partition_spectra(self, level: Level) -> Tensor:
        """Spectra (*F, P, n) of the filter lags (p-1)n .. (p+1)n, the last partition first."""
        n, count = level.n, level.partitions
        lags = self._filters[..., : (count + 1) * n]
        lags = torch.nn.functional.pad(lags, (0, (count + 1) * n - lags.shape[-1]))
        blocks = lags.reshape(*lags.shape[:-1], count + 1, n).flip(-2)
        folded = torch.complex(blocks[..., 1:, :], blocks[..., :-1, :])
        spectra: Tensor = fft(folded * torch.view_as_complex(self._twist(n)))
        return spectra

    def _head(self, n: int) -> Tensor:
        """Spectrum (*F, n) of the first n lags: the product's real part is the block's own causal sum."""
        head = self._heads.get(n)
        if head is None:
            with torch.inference_mode(False), torch.no_grad():
                lags = self._filters[..., :n]
                lags = torch.nn.functional.pad(lags, (0, n - lags.shape[-1]))
                head = self._heads.setdefault(n, self._transform(lags, n))
        return head

    def _filter_digest(self) -> int:
        if self._digest is None:
            self._digest = _state.digest(to_host(self._filters))
        return self._digest

    @property
    def schedule(self) -> Schedule:
        """The schedule chosen."""
        return self._schedule

    @property
    def filter_shape(self) -> tuple[int, ...]:
        """Shape of the filters without their lags."""
        return tuple(self._filters.shape[:-1])

    @property
    def filter_length(self) -> int:
        """Lags of every filter."""
        return self._filters.shape[-1]

    @property
    def horizon(self) -> int | None:
        """Positions one cache serves, None without bound."""
        return self._horizon

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the computation and of the caches: float32 or float64."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """The device of the filters and of every cache."""
        return self._filters.device

    @property
    def workers(self) -> int:
        """Always 1: torch has its own threads."""
        return 1

    @property
    def nbytes(self) -> int:
        """Bytes of the filters and of everything prepared from them."""
        tensors = [self._filters, self._reversed]
        tensors += [*self._spectra.values(), *self._heads.values(), *self._twists.values()]
        tensors += [part for pair in self._untwists.values() for part in pair]
        return sum(t.numel() * t.element_size() for t in tensors)

    def new_cache(self, shape: Sequence[int] | int | None = None) -> TorchCache:
        """An empty cache for positions of this shape, default the filters' own; numpy's broadcasting."""
        position = self.filter_shape if shape is None else shape_of(shape, "shape")
        broadcast(position, self.filter_shape, "shape")
        return TorchCache(self, position, self._horizon)

    def prefill(self, prompt: Tensor, max_new: int | None = None) -> tuple[Tensor, TorchCache]:
        """Outputs at every position of a prompt, and a cache for what follows.

        `prompt (*C, P)`, P >= 0 -> `y (*broadcast(C, F), P)` in the prompt's dtype and a cache that serves
        `max_new` more positions (None: the rest of the horizon). The cache's size depends on `max_new`, not
        on P. `CapacityError` where P + max_new exceeds the horizon.
        """
        x = checked(prompt, "prompt")
        check_device(x, "prompt", self.device)
        if x.dim() == 0:
            raise ValueError("prompt: expected shape (*C, P), got ()")
        shape, length = tuple(x.shape[:-1]), x.shape[-1]
        broadcast(shape, self.filter_shape, "prompt")
        capacity = None if max_new is None else size(max_new, "max_new", 0)
        if self._horizon is not None:
            if length + (capacity or 0) > self._horizon:
                raise CapacityError(
                    f"the plan has room for {self._horizon} positions, got {length} + {capacity or 0}"
                )
            if capacity is None:
                capacity = self._horizon - length
        with torch.inference_mode(False), torch.no_grad():
            ahead = self.filter_length - 1 if length else 0
            if capacity is not None:
                ahead = min(ahead, capacity)
            inputs = x.to(self._dtype)
            # Lags that no position of the prompt reaches have no part in the outputs, not even by rounding.
            y = causal_conv_fft(inputs, self._filters, length)
            full = causal_conv_fft(inputs, self._filters, length + ahead) if ahead else y
            seed = full[..., length:].clone(memory_format=torch.contiguous_format)
            return y.to(x.dtype), TorchCache(self, shape, capacity, prompt=length, seed=seed)

    def load_cache(self, state: Mapping[str, Any]) -> TorchCache:
        """A cache that goes on, on this plan's device, where `state_dict()` was taken.

        `ValueError` for a state that is damaged or does not fit this plan.
        """
        fields = _state.unseal(
            state,
            dtype=dtype_name(self._dtype),
            filter_shape=self.filter_shape,
            filter_length=self.filter_length,
            filter_digest=self._filter_digest(),
        )
        capacity, clock, position = fields["capacity"], fields["clock"], fields["position"]
        shape, prompt = fields["shape"], position - clock
        broadcast(shape, self.filter_shape, "state")
        if self._horizon is not None and (capacity is None or prompt + capacity > self._horizon):
            raise ValueError(f"state: expected a capacity within the horizon {self._horizon}, got {capacity}")
        layout = self._layout_for(capacity)
        theirs = layout_of(fields["base"], fields["fans"], self.filter_length, capacity, self._smooth)
        if theirs != layout:
            got = f"Schedule(base={fields['base']}, fans={fields['fans']})"
            raise ValueError(
                f"state: expected {self._schedule} of this plan, got {got}: plan with method={got}"
            )
        with torch.inference_mode(False), torch.no_grad():
            return TorchCache(self, shape, capacity, prompt=prompt, arrays=fields["arrays"], clock=clock)

    def __repr__(self) -> str:
        return (
            f"TorchPlan(filters={(*self.filter_shape, self.filter_length)}, horizon={self._horizon}, "
            f"schedule={self._schedule}, dtype={dtype_name(self._dtype)}, device={self.device})"
        )
