"""The torch engine's plan: filters made ready, caches made, saved ones continued."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, SupportsIndex

import torch
from torch import Tensor

from futurefill_rs import _interface, _state
from futurefill_rs._args import broadcast, choice, integer, shape_of, type_name
from futurefill_rs._core import CapacityError, Schedule
from futurefill_rs._interface import Progress
from futurefill_rs._torch_args import checked, checked_input, compute_dtype, dtype_name, is_fake
from futurefill_rs.torch_engine import state as states
from futurefill_rs.torch_engine.cache import TorchCache
from futurefill_rs.torch_engine.fft import causal_conv_fft, telling
from futurefill_rs.torch_engine.tables import Tables
from futurefill_rs.torch_engine.tile import Memory


def _again(*arguments: Any) -> TorchPlan:
    """A pickled plan."""
    filters, horizon, schedule, latency = arguments
    return TorchPlan(filters, horizon, schedule, latency=latency)


class TorchPlan(_interface.Plan):
    """Filters prepared for exact streaming convolution of torch tensors; see `futurefill_rs.plan`.

    | argument | |
    | --- | --- |
    | `filters` | `(*F, L)`, lag 0 first, any device and floating dtype (half types as float32); copied |
    | `horizon` | positions one cache serves, None: no bound |
    | `method` | `"auto"`, `"naive"`, `"epoched"`, `"continuous"` or a `Schedule` |
    | `max_memory` | bytes of cache per sequence that `"auto"` may use |
    | `latency` | `"smooth"`: tiles but those of the lowest level begin a block early, on other streams |

    Errors: `TypeError` for anything but strided floating tensors, `ValueError` for shapes and values.
    """

    def __init__(
        self,
        filters: Tensor,
        horizon: SupportsIndex | None = None,
        method: str | Schedule = "auto",
        *,
        max_memory: SupportsIndex | None = None,
        latency: Literal["throughput", "smooth"] = "throughput",
    ) -> None:
        taps = checked(filters, "filters")
        if taps.dim() == 0:
            raise ValueError("filters: expected shape (*F, L), got ()")
        if taps.shape[-1] == 0:
            raise ValueError(f"filters: expected at least 1 lag, got shape {tuple(taps.shape)}")
        choice(latency, "latency", "throughput", "smooth")
        self._horizon = None if horizon is None else integer(horizon, "horizon", 1)
        memory = None if max_memory is None else integer(max_memory, "max_memory", 1)
        with torch.inference_mode(False), torch.no_grad():
            dtype = compute_dtype(taps.dtype)
            taps = taps.to(dtype, copy=True, memory_format=torch.contiguous_format)
        if not is_fake(taps) and taps.device.type != "meta" and bool(torch.isnan(taps).any()):
            raise ValueError("filters: expected numbers, got NaN")
        smooth = latency == "smooth"
        schedule = _schedule(method, taps, self._horizon, memory, smooth)
        self._tables = Tables(taps, schedule, self._horizon, smooth)

    @property
    def schedule(self) -> Schedule:
        return self._tables.schedule

    @property
    def filters(self) -> Tensor:
        return self._tables.filters.clone()

    @property
    def filter_shape(self) -> tuple[int, ...]:
        return self._tables.filter_shape

    @property
    def filter_length(self) -> int:
        return self._tables.filter_length

    @property
    def horizon(self) -> int | None:
        return self._horizon

    @property
    def latency(self) -> Literal["throughput", "smooth"]:
        return self._tables.latency

    @property
    def dtype(self) -> torch.dtype:
        return self._tables.dtype

    @property
    def device(self) -> torch.device:
        """The device of the filters and of every cache."""
        return self._tables.device

    @property
    def workers(self) -> int:
        """Always 1: torch has its own threads."""
        return 1

    @property
    def nbytes(self) -> int:
        return self._tables.nbytes

    def _memory(self, shape: tuple[int, ...], capacity: int | None, seed: Tensor | None = None) -> Memory:
        with torch.inference_mode(False), torch.no_grad():
            return Memory(self._tables, shape, self._tables.execution(capacity), seed)

    def new_cache(self, shape: Sequence[SupportsIndex] | SupportsIndex | None = None) -> TorchCache:
        position = self.filter_shape if shape is None else shape_of(shape, "shape")
        broadcast(position, self.filter_shape, "shape")
        return TorchCache(self, self._memory(position, self._horizon), self._horizon)

    def prefill(  # type: ignore[override]
        self, prompt: Tensor, max_new: SupportsIndex | None = None, *, progress: Progress | None = None
    ) -> tuple[Tensor, TorchCache]:
        tables = self._tables
        x = checked_input(prompt, "prompt", tables.dtype, tables.device)
        if x.dim() == 0:
            raise ValueError("prompt: expected shape (*C, P), got ()")
        shape, length = tuple(x.shape[:-1]), x.shape[-1]
        broadcast(shape, self.filter_shape, "prompt")
        capacity = None if max_new is None else integer(max_new, "max_new", 0)
        if self._horizon is not None:
            if length + (capacity or 0) > self._horizon:
                raise CapacityError(
                    f"the plan has room for {self._horizon} positions, got {length} + {capacity or 0}"
                )
            if capacity is None:
                capacity = self._horizon - length
        with torch.inference_mode(False), torch.no_grad(), telling(progress):
            ahead = self.filter_length - 1 if length else 0
            if capacity is not None:
                ahead = min(ahead, capacity)
            inputs = x.to(tables.dtype)
            # Lags that no position of the prompt reaches have no part in the outputs, not even by rounding.
            y = causal_conv_fft(inputs, tables.filters, length)
            full = causal_conv_fft(inputs, tables.filters, length + ahead) if ahead else y
            seed = full[..., length:].clone(memory_format=torch.contiguous_format)
        return y.to(x.dtype), TorchCache(self, self._memory(shape, capacity, seed), capacity, prompt=length)

    def load_cache(self, state: Mapping[str, Any]) -> TorchCache:
        tables = self._tables
        fields = _state.unseal(
            state,
            dtype=dtype_name(tables.dtype),
            filter_shape=tables.filter_shape,
            filter_length=tables.filter_length,
            filter_digest=tables.digest(),
            base=tables.schedule.base,
            fans=tuple(tables.schedule.fans),
            smooth=tables.smooth,
            horizon=self._horizon,
        )
        if fields["same"]:
            return self._continued(fields)
        position, remaining = fields["position"], fields["remaining"]
        reach = self.filter_length - 1 if position else 0
        reach = reach if remaining is None else min(reach, remaining)
        seed = None
        if reach:
            try:
                schedule = Schedule(fields["base"], fields["fans"])
            except (ValueError, OverflowError) as error:
                raise ValueError(f"state: damaged: {error}") from None
            theirs = TorchPlan(
                tables.filters, None, schedule, latency="smooth" if fields["smooth"] else "throughput"
            )
            seed = theirs._continued(fields).pending(reach)
        memory = self._memory(fields["shape"], remaining, seed)
        return TorchCache(self, memory, remaining, prompt=position)

    def _continued(self, fields: Mapping[str, Any]) -> TorchCache:
        """The cache of a state of this plan's schedule, bit for bit."""
        capacity, clock = fields["capacity"], fields["clock"]
        memory = self._memory(fields["shape"], capacity)
        with torch.inference_mode(False), torch.no_grad():
            states.load(memory, fields)
        return TorchCache(self, memory, capacity, prompt=fields["position"] - clock, clock=clock)

    def __copy__(self) -> TorchPlan:
        return self

    def __deepcopy__(self, memo: Any) -> TorchPlan:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (self._tables.filters, self._horizon, self.schedule, self.latency)

    def __repr__(self) -> str:
        return (
            f"TorchPlan(filters={(*self.filter_shape, self.filter_length)}, horizon={self._horizon}, "
            f"schedule={self.schedule}, dtype={dtype_name(self.dtype)}, device={self.device})"
        )


def _schedule(
    method: Any, filters: Tensor, horizon: int | None, max_memory: int | None, smooth: bool
) -> Schedule:
    """The schedule meant by `method` for filters `(*F, L)`."""
    length = filters.shape[-1]
    reach = length if horizon is None else min(horizon, length)
    if isinstance(method, Schedule):
        return method
    if not isinstance(method, str):
        raise TypeError(f"method: expected a name or a Schedule, got {type_name(method)}")
    if method == "auto":
        return Schedule.auto(
            horizon,
            length,
            rows=max(filters.numel() // length, 1),
            itemsize=filters.dtype.itemsize,
            max_memory=max_memory,
            device="cpu" if filters.device.type == "cpu" else "gpu",
            latency="smooth" if smooth else "throughput",
        )
    named = {"epoched": Schedule.epoched, "continuous": Schedule.continuous}
    if method in named:
        return named[method](reach)
    if method != "naive":
        raise ValueError(
            f"method: expected 'auto', 'naive', 'epoched', 'continuous' or a Schedule, got {method!r}"
        )
    return Schedule.naive()
