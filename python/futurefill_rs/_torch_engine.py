"""The streaming engine in plain torch: the same schedules as the compiled engine, on any torch device.

Time is last in every array a user sees. Inside, the base block lies time first, so that one step reads and
writes contiguous memory, and everything the levels touch lies in rows (time last), as the transforms want it.

A level with blocks of n positions computes, from n inputs and 2n filter lags, the middle n outputs of their
product. It works modulo z^n - i, where the product of x and f_j + i f_{j+n} is (P0 - P2) + i P1: its
imaginary part is the wanted P1. The twist w^j, w = exp(i pi / (2n)), turns that product into a cyclic one,
so a block costs one complex transform of length n, and so does the sum over all partitions of a level.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import _state
from ._core import CapacityError, Schedule
from ._torch_args import (
    broadcast,
    check_device,
    check_shape,
    checked,
    compute_dtype,
    dtype_name,
    is_fake,
    padded,
    shape_of,
    size,
    type_name,
)
from ._torch_ops import causal_conv_fft

# Longest base block that is pushed position by position. A longer one is summed anew at each position:
# pushing would add that many terms one after the other, and their rounding errors with them.
_LONGEST_PUSH = 256

# Elements of temporary memory one operation may take, on CPU (cache) and elsewhere.
_CPU_TEMPORARY = 1 << 18
_DEVICE_TEMPORARY = 1 << 24


class _Level(NamedTuple):
    """One level as a cache runs it."""

    n: int
    """Positions of a block."""
    partitions: int
    """Kept blocks that take part at most."""
    blocks: int | None
    """Blocks of a super-block; None at the top, where blocks are counted without end."""


class _Layout(NamedTuple):
    """What a schedule comes to for one filter length and one capacity."""

    base: int | None
    fans: tuple[int, ...]
    levels: tuple[_Level, ...]
    ring: int
    """Positions the history holds."""


def _layout(base: int | None, fans: Sequence[int], filter_length: int, capacity: int | None) -> _Layout:
    """Drop what no position of such a cache reaches."""
    reach = filter_length if capacity is None else max(min(capacity, filter_length), 1)
    if base is None:
        return _Layout(None, (), (), reach)
    n = min(base, reach)
    lengths, kept = [n], []
    for fan in fans:
        n *= fan
        if n >= reach:
            break
        lengths.append(n)
        kept.append(fan)
    if capacity is not None and capacity <= lengths[0]:
        return _Layout(lengths[0], (), (), lengths[0])
    levels = []
    for k, n in enumerate(lengths):
        partitions = -(-filter_length // n)
        if k < len(kept):
            levels.append(_Level(n, min(partitions, kept[k] - 1), kept[k]))
        else:
            if capacity is not None:
                partitions = min(partitions, -(-capacity // n) - 1)
            levels.append(_Level(n, partitions, None))
    return _Layout(lengths[0], tuple(kept), tuple(levels), lengths[-1])


def _pairs(values: Tensor) -> Tensor:
    """A complex tensor as real pairs."""
    return torch.view_as_real(values)


class TorchPlan:
    """Filters prepared for exact streaming convolution of torch tensors; immutable and shareable.

    | argument | |
    | --- | --- |
    | `filters` | `(*F, L)`, lag 0 first, any device and floating dtype (half types as float32); copied |
    | `horizon` | positions one cache serves, None: no bound |
    | `method` | `"auto"`, `"naive"`, `"epoched"`, `"continuous"` or a `Schedule` |
    | `max_memory` | bytes of cache per sequence that `"auto"` may use |
    | `latency` | `"throughput"` or `"smooth"`: alike, as a device with a queue makes no step wait |

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
            self._prepare_base()

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

    def _layout_for(self, capacity: int | None) -> _Layout:
        return _layout(self._schedule.base, self._schedule.fans, self.filter_length, capacity)

    def _prepare_base(self) -> None:
        """Lags of the base block: time first where inputs are pushed, last lag first where pulled."""
        base = self._layout.base
        self._pushed: Tensor | None = None
        self._reversed: Tensor | None = None
        if base is not None and base <= _LONGEST_PUSH:
            self._pushed = self._filters[..., :base].movedim(-1, 0).contiguous()
        else:
            lags = self._layout.ring if base is None else base
            self._reversed = self._filters[..., :lags].flip(-1).contiguous()

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
        spectrum: Tensor = torch.fft.fft(torch.view_as_complex(x.unsqueeze(-1) * self._twist(n)))
        return spectrum

    def _partition_spectra(self, level: _Level) -> Tensor:
        """Spectra (*F, P, n) of the filter lags (p-1)n .. (p+1)n, the last partition first."""
        n, count = level.n, level.partitions
        lags = self._filters[..., : (count + 1) * n]
        lags = torch.nn.functional.pad(lags, (0, (count + 1) * n - lags.shape[-1]))
        blocks = lags.reshape(*lags.shape[:-1], count + 1, n).flip(-2)
        folded = torch.complex(blocks[..., 1:, :], blocks[..., :-1, :])
        spectra: Tensor = torch.fft.fft(folded * torch.view_as_complex(self._twist(n)))
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
            self._digest = _state.digest(_to_host(self._filters))
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
        tensors = [self._filters, self._pushed, self._reversed]
        tensors += [*self._spectra.values(), *self._heads.values(), *self._twists.values()]
        tensors += [part for pair in self._untwists.values() for part in pair]
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

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
            full = causal_conv_fft(x.to(self._dtype), self._filters, length + ahead)
            y = full[..., :length].to(x.dtype, copy=True, memory_format=torch.contiguous_format)
            seed = full[..., length:].clone(memory_format=torch.contiguous_format)
            return y, TorchCache(self, shape, capacity, prompt=length, seed=seed)

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
        theirs = _layout(fields["base"], fields["fans"], self.filter_length, capacity)
        if theirs != layout:
            raise ValueError(
                f"state: expected base {layout.base} and fans {layout.fans} of this plan, "
                f"got {theirs.base} and {theirs.fans}"
            )
        with torch.inference_mode(False), torch.no_grad():
            return TorchCache(self, shape, capacity, prompt=prompt, arrays=fields["arrays"], clock=clock)

    def __repr__(self) -> str:
        return (
            f"TorchPlan(filters={(*self.filter_shape, self.filter_length)}, horizon={self._horizon}, "
            f"schedule={self._schedule}, dtype={dtype_name(self._dtype)}, device={self.device})"
        )


def _to_host(values: Tensor) -> np.ndarray[Any, Any]:
    """A numpy copy; a fake tensor has no values, zeros stand for them."""
    if is_fake(values):
        return np.zeros(tuple(values.shape), dtype_name(values.dtype))
    array: np.ndarray[Any, Any] = values.detach().to("cpu", copy=True).numpy()
    return array


def _kernel_usable(device: torch.device) -> bool:
    """Whether the Triton kernel takes the steps; triton is imported only where it might."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return False
    try:
        from . import _torch_triton
    except ImportError:
        return False
    return _torch_triton.usable(device)


def _share_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


class TorchCache:
    """One stream of positions through a plan, on the plan's device.

    `step(u (*C,)) -> (*broadcast(C, F),)`, `extend(u (*C, m)) -> (*broadcast(C, F), m)`. Inputs of any
    floating dtype are taken at the plan's precision, results have the input's dtype. Results are detached
    from autograd, and so are inputs that require grad. Nothing in `step` waits for the device. After any
    error the cache is what it was before the call. Calls from several threads take turns; on a device with
    streams, use one stream.
    """

    def __init__(
        self,
        plan: TorchPlan,
        shape: tuple[int, ...],
        capacity: int | None,
        *,
        prompt: int = 0,
        seed: Tensor | None = None,
        arrays: Mapping[str, np.ndarray[Any, Any]] | None = None,
        clock: int = 0,
    ) -> None:
        self._plan = plan
        self._capacity = capacity
        self._layout = plan._layout_for(capacity)
        self._prompt = prompt
        self._clock = 0
        self._due = False
        self._lock = threading.RLock()
        with torch.inference_mode(False), torch.no_grad():
            self._shape_to(shape)
            self._seed = self._zeros(self._out_shape, 0) if seed is None else seed
            self._history = self._zeros(self._in_shape, self._layout.ring)
            pending = 0 if self._layout.base is None else self._layout.ring
            self._pending = self._zeros(self._out_shape, pending)
            self._kept = tuple(
                self._zeros(self._in_shape, level.partitions, level.n, complex_=True)
                for level in self._layout.levels
            )
            self._new_block()
            if arrays is not None:
                self._load(arrays, clock)
            else:
                self._open_block()

    def _shape_to(self, shape: tuple[int, ...]) -> None:
        filters = self._plan.filter_shape
        self._shape = shape
        self._output_shape = broadcast(shape, filters, "shape")
        rank = len(self._output_shape)
        # Axes of one in front let every array of the cache broadcast with every other.
        self._in_shape = padded(shape, rank)
        self._out_shape = padded(self._output_shape, rank)
        self._filter_rank = padded(filters, rank)
        self._rows = math.prod(self._output_shape)

    def _zeros(self, *sizes: tuple[int, ...] | int, complex_: bool = False) -> Tensor:
        shape: list[int] = []
        for part in sizes:
            shape.extend(part if isinstance(part, tuple) else (part,))
        dtype = self._plan.dtype
        if complex_:
            dtype = dtype.to_complex()
        return torch.zeros(shape, dtype=dtype, device=self._plan.device)

    def _aligned(self, values: Tensor, lead: int = 0) -> Tensor:
        """Filter data with its F axes padded to the output's rank; `lead` axes stand in front of F."""
        axes = len(self._plan.filter_shape)
        return values.reshape(*values.shape[:lead], *self._filter_rank, *values.shape[lead + axes :])

    def _new_block(self) -> None:
        """The base block: its inputs and outputs, time first, and the views one step of it needs."""
        base, pushed, reverse = self._layout.base, self._plan._pushed, self._plan._reversed
        self._block_in: Tensor | None = None
        self._block_out: Tensor | None = None
        self._lags: Tensor | None = None
        if base is not None and pushed is not None:
            self._block_in = self._zeros(base, self._in_shape)
            self._block_out = self._zeros(base, self._out_shape)
            self._lags = self._aligned(pushed, 1)
        elif reverse is not None:
            self._lags = self._aligned(reverse)
        self._slice_block()

    def _slice_block(self) -> None:
        self._inputs: tuple[Tensor, ...] = ()
        self._sources: tuple[Tensor, ...] = ()
        self._targets: tuple[Tensor, ...] = ()
        self._weights: tuple[Tensor, ...] = ()
        self._outputs: tuple[Tensor, ...] = ()
        self._kernel_rows: tuple[Tensor, Tensor] | None = None
        if self._block_in is not None and self._block_out is not None and self._lags is not None:
            base = self._block_in.shape[0]
            if _kernel_usable(self._plan.device):
                self._kernel_rows = (self._row_numbers(self._in_shape), self._row_numbers(self._filter_rank))
            self._inputs = tuple(self._block_in[j].view(self._shape) for j in range(base))
            self._sources = tuple(self._block_in[j] for j in range(base))
            self._targets = tuple(self._block_out[j:] for j in range(base))
            self._weights = tuple(self._lags[: base - j] for j in range(base))
            self._outputs = tuple(self._block_out[j].view(self._output_shape) for j in range(base))

    def _row_numbers(self, shape: tuple[int, ...]) -> Tensor:
        """For every output row the row of an array of this shape that it reads."""
        rows = torch.arange(math.prod(shape), device=self._plan.device).reshape(shape)
        return rows.expand(self._out_shape).reshape(-1)

    # Properties

    @property
    def plan(self) -> TorchPlan:
        """The plan this cache belongs to."""
        return self._plan

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input position."""
        return self._shape

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of one output position."""
        return self._output_shape

    @property
    def position(self) -> int:
        """Positions so far, the prompt included."""
        return self._prompt + self._clock

    @property
    def remaining(self) -> int | None:
        """Positions this cache still serves, None without bound."""
        return None if self._capacity is None else self._capacity - self._clock

    @property
    def nbytes(self) -> int:
        """Bytes of device memory this cache holds."""
        tensors = (self._seed, self._history, self._pending, *self._kept, self._block_in, self._block_out)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def __repr__(self) -> str:
        return (
            f"TorchCache(shape={self._shape}, position={self.position}, remaining={self.remaining}, "
            f"device={self._plan.device})"
        )

    # Positions

    def _check_room(self, count: int) -> None:
        if self._capacity is not None and self._clock + count > self._capacity:
            raise CapacityError(
                f"the cache has room for {self._capacity - self._clock} more positions, got {count}"
            )

    def _checked_out(self, out: Any, dtype: torch.dtype) -> Tensor:
        if not isinstance(out, Tensor):
            raise TypeError(f"out: expected a torch tensor, got {type_name(out)}")
        if out.dtype is not dtype:
            raise TypeError(f"out: expected {dtype_name(dtype)}, got {dtype_name(out.dtype)}")
        check_device(out, "out", self._plan.device)
        check_shape(out, "out", self._output_shape)
        if any(stride == 0 and axis > 1 for stride, axis in zip(out.stride(), out.shape, strict=True)):
            raise ValueError(f"out: expected memory of its own for every entry, got strides {out.stride()}")
        return out.detach()

    def step(self, u: Tensor, out: Tensor | None = None) -> Tensor:
        """One position: `u (*C,)` -> `y (*broadcast(C, F),)` in u's dtype, written to `out` where given.

        Errors: `TypeError` for other types, `ValueError` for another shape or device, `CapacityError` past
        the capacity.
        """
        x = checked(u, "u")
        plan = self._plan
        check_device(x, "u", plan.device)
        check_shape(x, "u", self._shape)
        target = None if out is None else self._checked_out(out, x.dtype)
        with self._lock:
            self._check_room(1)
            if self._due:
                self._finish()
            if self._inputs:
                result = self._push(self._clock % len(self._inputs), x, target)
            else:
                y = self._pull(x)
                result = y.to(x.dtype) if target is None else target.copy_(y)
            self._advance(1)
        return result if out is None else out

    def _push(self, j: int, x: Tensor, target: Tensor | None) -> Tensor:
        """Take input j of a base block and add its effect to the block's outputs from j on."""
        if self._kernel_rows is not None and self._block_in is not None and not is_fake(x):
            assert self._block_out is not None and self._lags is not None
            y = target
            if y is None or not y.is_contiguous() or _share_memory(x, y):
                y = torch.empty(self._output_shape, dtype=x.dtype, device=x.device)
            from . import _torch_triton

            if _torch_triton.push(
                x.contiguous(), self._block_in, self._block_out, self._lags, y, self._kernel_rows, j
            ):
                return y if target is None or y is target else target.copy_(y)
        self._inputs[j].copy_(x)
        self._targets[j].addcmul_(self._sources[j], self._weights[j])
        y = self._outputs[j]
        return y.to(x.dtype, copy=True) if target is None else target.copy_(y)

    def _push_again(self, start: int, stop: int) -> None:
        """Add the effects of inputs already in the base block, by the very operations of `step`."""
        for j in range(start, stop):
            if self._kernel_rows is None:
                self._targets[j].addcmul_(self._sources[j], self._weights[j])
            else:
                self._push(j, self._inputs[j], None)

    def _pull(self, x: Tensor) -> Tensor:
        """Write one input to the history and sum over the block (or, without tiles, over all lags) anew."""
        t, base, ring = self._clock, self._layout.base, self._layout.ring
        assert self._lags is not None
        c, lags = t % ring, self._lags.shape[-1]
        self._history[..., c].view(self._shape).copy_(x)
        # The newest input meets lag 0, the last of the reversed lags.
        if base is None:
            total = self._dot(self._history[..., : c + 1], self._lags[..., lags - c - 1 :])
            if t >= ring and c + 1 < ring:
                total += self._dot(self._history[..., c + 1 :], self._lags[..., lags - ring : lags - c - 1])
        else:
            j = t % base
            total = self._dot(self._history[..., c - j : c + 1], self._lags[..., lags - j - 1 :])
            total += self._pending[..., c]
        if t < self._seed.shape[-1]:
            total += self._seed[..., t]
        return total.view(self._output_shape)

    def _dot(self, x: Tensor, weights: Tensor) -> Tensor:
        """Sum over the last axis of x (*C, m) and weights (*F, m), in pieces of bounded memory."""
        piece = max(self._temporary() // max(self._rows, 1), 256)
        if x.shape[-1] <= piece:
            return (x * weights).sum(-1)
        sums = [
            (x[..., a : a + piece] * weights[..., a : a + piece]).sum(-1)
            for a in range(0, x.shape[-1], piece)
        ]
        return torch.stack(sums, -1).sum(-1)

    def _temporary(self) -> int:
        return _CPU_TEMPORARY if self._plan.device.type == "cpu" else _DEVICE_TEMPORARY

    def _advance(self, count: int) -> None:
        self._clock += count
        base = self._layout.base
        self._due = base is not None and self._clock % base == 0 and self._clock != self._capacity

    def _finish(self) -> None:
        """Run what became due at the end of the last block."""
        base = self._layout.base
        if self._due and base is not None:
            if self._block_in is not None:
                column = (self._clock - base) % self._layout.ring
                self._history[..., column : column + base].copy_(self._block_in.movedim(0, -1))
            self._tile(None, 0)
            self._open_block()
        self._due = False

    def _open_block(self) -> None:
        """Begin a base block: its outputs start from what earlier inputs are known to add."""
        base, block = self._layout.base, self._block_out
        if block is None or base is None or self._clock == self._capacity:
            return
        column = self._clock % self._layout.ring
        block.copy_(self._pending[..., column : column + base].movedim(-1, 0))
        seed = self._seed[..., self._clock : self._clock + base]
        if seed.shape[-1]:
            block[: seed.shape[-1]].add_(seed.movedim(-1, 0))

    def _tile(self, spectrum: Tensor | None, length: int) -> None:
        """Fire the level due at the clock; `spectrum`: that of the newest `length` inputs where known."""
        t, levels = self._clock, self._layout.levels
        k = max((k for k, level in enumerate(levels) if t % level.n == 0), default=None)
        if k is None or self._rows == 0:
            return
        n, partitions, blocks = levels[k]
        newest = t // n if blocks is None else t // n % blocks
        ring = self._layout.ring
        if spectrum is None or length != n:
            column = (t - n) % ring
            spectrum = self._plan._transform(self._history[..., column : column + n], n)
        kept, slot = self._kept[k], (newest - 1) % partitions
        kept[..., slot, :].copy_(spectrum)
        weights = self._aligned(self._plan._spectra[n])
        total = weights.shape[-2]
        acc = self._accumulate(kept[..., : slot + 1, :], weights[..., total - slot - 1 :, :], None)
        if newest > partitions and slot + 1 < partitions:
            older = weights[..., total - partitions : total - slot - 1, :]
            acc = self._accumulate(kept[..., slot + 1 :, :], older, acc)
        y = torch.fft.ifft(acc)
        cosine, minus_sine = self._plan._untwist(n)
        column = t % ring
        pending = self._pending[..., column : column + n]
        if blocks is None:
            torch.mul(y.imag, cosine, out=pending)
        else:
            pending.addcmul_(y.imag, cosine)
        pending.addcmul_(y.real, minus_sine)

    def _accumulate(self, kept: Tensor, weights: Tensor, acc: Tensor | None) -> Tensor:
        """Sum over partitions of kept (*C, i, n) times weights (*F, i, n)."""
        count, n = kept.shape[-2:]
        piece = max(self._temporary() // max(self._rows * n, 1), 1)
        for a in range(0, count, piece):
            if piece == 1 or count == 1:
                if acc is None:
                    acc = kept[..., a, :] * weights[..., a, :]
                else:
                    acc = acc.addcmul_(kept[..., a, :], weights[..., a, :])
            else:
                part = (kept[..., a : a + piece, :] * weights[..., a : a + piece, :]).sum(-2)
                acc = part if acc is None else acc.add_(part)
        assert acc is not None
        return acc

    def extend(self, u: Tensor) -> Tensor:
        """A known block: `u (*C, m)`, m >= 0 -> `y (*broadcast(C, F), m)`, as m steps would give."""
        x = checked(u, "u")
        check_device(x, "u", self._plan.device)
        if x.dim() != len(self._shape) + 1 or tuple(x.shape[:-1]) != self._shape:
            expected = "(" + ", ".join([*map(str, self._shape), "m"]) + ("," if not self._shape else "") + ")"
            raise ValueError(f"u: expected shape {expected}, got {tuple(x.shape)}")
        count = x.shape[-1]
        with self._lock, torch.inference_mode(False), torch.no_grad():
            self._check_room(count)
            y = torch.empty((*self._out_shape, count), dtype=x.dtype, device=x.device)
            x = x.reshape(*self._in_shape, count)
            at = 0
            while at < count:
                if self._due:
                    self._finish()
                values = self._extend_piece(x[..., at:])
                width = values.shape[-1]
                y[..., at : at + width].copy_(values)
                at += width
        return y.reshape(*self._output_shape, count)

    def _extend_piece(self, x: Tensor) -> Tensor:
        """Take the first positions of x, as many as one operation can, and return their outputs."""
        t, base, ring, left = self._clock, self._layout.base, self._layout.ring, x.shape[-1]
        dtype = self._plan.dtype
        if base is None:
            width = min(left, max(ring, 4096))
            return self._extend_naive(x[..., :width].to(dtype))
        if t % base == 0:
            lengths = [level.n for level in self._layout.levels] or [base]
            n = max((n for n in lengths if n <= left and t % n == 0), default=0)
            if n:
                return self._extend_block(x[..., :n].to(dtype), n)
        j = t % base
        width = min(left, base - j)
        if self._block_in is None or self._block_out is None:
            return self._extend_pull(x[..., :width].to(dtype))
        # One by one, so that the block is always the same function of its inputs: a saved state relies on it.
        self._block_in[j : j + width].copy_(x[..., :width].movedim(-1, 0))
        self._push_again(j, j + width)
        self._advance(width)
        return self._block_out[j : j + width].movedim(0, -1)

    def _seeded(self, y: Tensor) -> Tensor:
        """Add the prompt's effect on the outputs from the clock on."""
        seed = self._seed[..., self._clock : self._clock + y.shape[-1]]
        if seed.shape[-1]:
            y[..., : seed.shape[-1]].add_(seed)
        return y

    def _extend_block(self, x: Tensor, n: int) -> Tensor:
        """A whole aligned block: its own sum is the real part of its product with the first lags."""
        plan, column = self._plan, self._clock % self._layout.ring
        self._history[..., column : column + n].copy_(x)
        spectrum = plan._transform(x, n)
        y = torch.fft.ifft(spectrum * self._aligned(plan._head(n)))
        cosine, minus_sine = plan._untwist(n)
        own = torch.addcmul(y.real * cosine, y.imag, minus_sine, value=-1)
        own += self._pending[..., column : column + n]
        own = self._seeded(own)
        # The tile at the block's end runs now, while the spectrum is at hand.
        self._clock += n
        if self._clock != self._capacity:
            self._tile(spectrum, n)
            self._open_block()
        return own

    def _extend_pull(self, x: Tensor) -> Tensor:
        """Part of a base block that is summed anew at each position."""
        base, width = self._layout.base, x.shape[-1]
        assert base is not None
        column, j = self._clock % self._layout.ring, self._clock % base
        self._history[..., column : column + width].copy_(x)
        block = self._history[..., column - j : column + width]
        y = causal_conv_fft(block, self._plan._filters[..., : j + width], j + width)[..., j:]
        y = self._seeded(y + self._pending[..., column : column + width])
        self._advance(width)
        return y

    def _extend_naive(self, x: Tensor) -> Tensor:
        """A block without tiles: convolve it behind as much history as the filters reach."""
        ring, width, t = self._layout.ring, x.shape[-1], self._clock
        past = min(t, self._plan.filter_length - 1)
        columns = [(t - past + i) % ring for i in (0, past - 1)] if past else []
        if not past:
            window = x
        elif columns[0] <= columns[1]:
            window = torch.cat((self._history[..., columns[0] : columns[1] + 1], x), -1)
        else:
            pieces = (self._history[..., columns[0] :], self._history[..., : columns[1] + 1], x)
            window = torch.cat(pieces, -1)
        y = causal_conv_fft(window, self._plan._filters, past + width)[..., past:]
        newest = x[..., -ring:]
        start = (t + width - newest.shape[-1]) % ring
        first = min(newest.shape[-1], ring - start)
        self._history[..., start : start + first].copy_(newest[..., :first])
        if first < newest.shape[-1]:
            self._history[..., : newest.shape[-1] - first].copy_(newest[..., first:])
        y = self._seeded(y)
        self._advance(width)
        return y

    # Rows

    def _row_tensors(self) -> list[tuple[Tensor, int]]:
        """Every array with rows, and where its batch axis is."""
        arrays = [
            (self._seed, 0),
            (self._history, 0),
            (self._pending, 0),
            *((kept, 0) for kept in self._kept),
        ]
        if self._block_in is not None and self._block_out is not None:
            arrays += [(self._block_in, 1), (self._block_out, 1)]
        return arrays

    def _check_batch(self, name: str) -> int:
        filters = self._plan.filter_shape
        if len(self._shape) <= len(filters):
            raise ValueError(
                f"{name}: expected a batch axis in front of the filters' shape {filters}, got {self._shape}"
            )
        return self._shape[0]

    def _indices(self, value: Any, arg: str, mask: bool) -> Tensor:
        """Entries of axis 0 as an int64 tensor of one axis (or a boolean mask), on the cache's device.

        A tensor that is not on the CPU is not read: its entries are checked by the device, if at all.
        """
        count, device = self._shape[0], self._plan.device
        expected = "integers or a boolean mask" if mask else "integers"
        if isinstance(value, Tensor):
            found = value.detach()
        else:
            try:
                array = np.asarray(value)
            except (ValueError, TypeError):
                raise TypeError(f"{arg}: expected {expected}, got {type_name(value)}") from None
            if array.size == 0 and not isinstance(value, np.ndarray):
                array = array.astype(np.int64)
            # Integers beyond 64 bits make an object array: out of range, not of the wrong type.
            huge = array.dtype.kind == "O" and all(type(entry) is int for entry in array.flat)
            if array.dtype.kind not in "iub" and not huge:
                got = array.dtype.name if isinstance(value, np.ndarray) else type_name(value)
                raise TypeError(f"{arg}: expected {expected}, got {got}")
            if array.dtype.kind != "b":
                outside = array[(array < -count) | (array >= count)]
                if outside.size:
                    raise IndexError(f"{arg}: {outside.flat[0]} is out of range for axis 0 of size {count}")
                array = array.astype(np.int64)
            kind = torch.bool if array.dtype.kind == "b" else torch.int64
            found = torch.tensor(array.tolist(), dtype=kind, device="cpu").reshape(array.shape)
        if found.is_floating_point() or found.is_complex() or (found.dtype is torch.bool and not mask):
            raise TypeError(f"{arg}: expected {expected}, got {dtype_name(found.dtype)}")
        if found.dim() == 0 and mask and found.dtype is not torch.bool:
            found = found.reshape(1)
        if found.dim() != 1:
            raise ValueError(f"{arg}: expected one axis, got {found.dim()} axes")
        if found.dtype is torch.bool:
            if found.shape[0] != count:
                raise ValueError(f"{arg}: expected a mask of shape ({count},), got {tuple(found.shape)}")
            return found.to(device)
        found = found.to(torch.int64)
        if found.device.type == "cpu" and not is_fake(found):
            for entry in found.tolist():
                if not -count <= entry < count:
                    raise IndexError(f"{arg}: {entry} is out of range for axis 0 of size {count}")
        found = found.to(device)
        return torch.where(found < 0, found + count, found)

    def reorder(self, index: Any) -> None:
        """Gather axis 0 in place, beams may multiply: `index` holds integers as in numpy indexing.

        An index on the cache's own device is not copied to the host. `ValueError` without a batch axis,
        `IndexError` out of range.
        """
        with self._lock, torch.inference_mode(False), torch.no_grad():
            self._check_batch("index")
            rows = self._indices(index, "index", mask=False)
            self._finish()
            gathered = [values.index_select(axis, rows) for values, axis in self._row_tensors()]
            self._replace(gathered)
            self._shape_to((rows.shape[0], *self._shape[1:]))
            self._slice_block()

    def _replace(self, arrays: list[Tensor]) -> None:
        self._seed, self._history, self._pending = arrays[:3]
        levels = len(self._kept)
        self._kept = tuple(arrays[3 : 3 + levels])
        if self._block_in is not None:
            self._block_in, self._block_out = arrays[3 + levels :]

    def reset(self, rows: Any = None) -> None:
        """Start rows of axis 0 again while the others go on, or, without `rows`, everything at position 0.

        `rows`: integers as in numpy indexing, or a boolean mask. The clock and the remaining capacity are
        common to all rows and stay. Errors as for `reorder`.
        """
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if rows is None:
                for values, _ in self._row_tensors():
                    values.zero_()
                self._seed = self._seed[..., :0].clone()
                self._clock, self._prompt, self._due = 0, 0, False
                return
            self._check_batch("rows")
            chosen = self._indices(rows, "rows", mask=True)
            self._finish()
            for values, axis in self._row_tensors():
                if chosen.dtype is torch.bool:
                    lead = values.movedim(axis, 0)
                    lead.masked_fill_(chosen.reshape(-1, *(1,) * (lead.dim() - 1)), 0)
                else:
                    values.index_fill_(axis, chosen, 0)

    def fork(self) -> TorchCache:
        """An independent copy."""
        with self._lock, torch.inference_mode(False), torch.no_grad():
            self._finish()
            copy = object.__new__(TorchCache)
            copy.__dict__.update(self.__dict__)
            copy._lock = threading.RLock()
            copy._replace([values.clone() for values, _ in self._row_tensors()])
            copy._slice_block()
            return copy

    # State

    def state_dict(self) -> dict[str, Any]:
        """A picklable snapshot on the host, for `plan.load_cache` of either engine and any device."""
        with self._lock, torch.inference_mode(False), torch.no_grad():
            self._finish()
            plan, layout, clock = self._plan, self._layout, self._clock
            history, pending = self._history.clone(), self._pending.clone()
            base = layout.base
            if self._block_in is not None and base is not None:
                j = clock % base
                # At the capacity the last block is whole and was never moved to the history.
                start = (clock - j) % layout.ring if j else (clock - base) % layout.ring
                width = j or (base if clock and clock == self._capacity else 0)
                history[..., start : start + width].copy_(self._block_in[:width].movedim(0, -1))
            if base is not None:
                done = clock % layout.ring
                pending[..., :done] = 0
            arrays = {
                "history": self._flat(history),
                "pending": self._flat(pending),
                "seed": self._flat(self._seed),
            }
            for k, kept in enumerate(self._kept):
                arrays[f"spectra_{k}"] = self._flat(_pairs(kept))
            return _state.seal(
                {
                    "dtype": dtype_name(plan.dtype),
                    "shape": self._shape,
                    "filter_shape": plan.filter_shape,
                    "filter_length": plan.filter_length,
                    "filter_digest": plan._filter_digest(),
                    "base": plan.schedule.base,
                    "fans": tuple(plan.schedule.fans),
                    "capacity": self._capacity,
                    "clock": clock,
                    "position": self.position,
                    "arrays": arrays,
                }
            )

    def _flat(self, values: Tensor) -> np.ndarray[Any, Any]:
        """The array with its row axes as one."""
        array = _to_host(values)
        rank = len(self._output_shape)
        return np.ascontiguousarray(array.reshape(math.prod(array.shape[:rank]), *array.shape[rank:]))

    def _load(self, arrays: Mapping[str, np.ndarray[Any, Any]], clock: int) -> None:
        """Take over the arrays of a state and the position within the base block."""
        seeded = arrays["seed"].shape[-1] if "seed" in arrays else 0
        self._seed = self._zeros(self._out_shape, seeded)
        wanted = {"history": self._history, "pending": self._pending, "seed": self._seed}
        wanted |= {f"spectra_{k}": _pairs(kept) for k, kept in enumerate(self._kept)}
        if set(arrays) != set(wanted):
            raise ValueError(f"state: expected arrays {sorted(wanted)}, got {sorted(arrays)}")
        rank = len(self._output_shape)
        for name, buffer in wanted.items():
            array = arrays[name]
            shape = (math.prod(buffer.shape[:rank]), *buffer.shape[rank:])
            if array.shape != shape or array.dtype.name != dtype_name(self._plan.dtype):
                raise ValueError(
                    f"state: expected {name} of shape {shape} and {dtype_name(self._plan.dtype)}, "
                    f"got {array.shape} and {array.dtype.name}"
                )
        for name, buffer in wanted.items():
            values = torch.tensor(arrays[name], device="cpu").reshape(buffer.shape)
            buffer.copy_(values)
        base = self._layout.base
        j = 0 if base is None else clock % base
        self._clock = clock - j
        self._open_block()
        if j and self._block_in is not None:
            column = self._clock % self._layout.ring
            self._block_in[:j].copy_(self._history[..., column : column + j].movedim(-1, 0))
            self._push_again(0, j)
        self._clock = clock
