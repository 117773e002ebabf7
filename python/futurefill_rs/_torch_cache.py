"""The torch engine's cache: one stream of positions through a `TorchPlan`."""

from __future__ import annotations

import functools
import math
import os
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from . import _state
from ._core import CapacityError
from ._torch_args import (
    broadcast,
    check_device,
    check_entries_apart,
    check_shape,
    checked,
    dtype_name,
    is_fake,
    padded,
    to_host,
    type_name,
)
from ._torch_fft import ifft
from ._torch_ops import causal_conv_fft
from ._torch_streams import Graph, Side, check_recordable, record

if TYPE_CHECKING:
    from ._torch_engine import TorchPlan

# Elements of temporary memory one operation may take, on CPU (cache) and elsewhere.
_CPU_TEMPORARY = 1 << 18
_DEVICE_TEMPORARY = 1 << 24


def _pairs(values: Tensor) -> Tensor:
    """A complex tensor as real pairs."""
    return torch.view_as_real(values)


def kernel_usable(device: torch.device) -> bool:
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
    from autograd, and so are inputs that require grad. Nothing in `step` makes the host wait for the
    device. After any error the cache is what it was before the call, but where memory ends in the middle
    of an `extend`: the positions taken until then, which `position` tells, stay taken. Calls from several
    threads take turns; on a device with streams, use one stream.
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
        self._closed = False
        self._device_clock: Tensor | None = None
        self._lock = threading.RLock()
        with torch.inference_mode(False), torch.no_grad():
            self._shape_to(shape)
            self._seed = self._zeros(self._out_shape, 0) if seed is None else seed
            self._history = self._zeros(self._in_shape, self._layout.ring)
            pending = 0 if self._layout.base is None else self._layout.ring
            self._pending = self._zeros(self._out_shape, pending)
            self._ahead = self._zeros(self._out_shape, self._layout.base or 0)
            self._kept = tuple(
                self._zeros(self._in_shape, level.kept, level.n, complex_=True)
                for level in self._layout.levels
            )
            self._early = tuple(self._zeros(self._out_shape, 2 * level.n) for level in self._layout.delayed)
            self._attach()
            if arrays is not None:
                self._load(arrays, clock)
            else:
                self._open_block()

    def _attach(self) -> None:
        """What belongs to the memory and the rows of this cache as they are now."""
        device = self._plan.device
        self._lags = self._aligned(self._plan._reversed)
        # For each level, where captured: what the graph reads the time from, and the graph.
        self._tile_graphs: tuple[tuple[Tensor, Graph], ...] = ()
        real = not is_fake(self._history)
        self._sides = tuple(Side(device, f"level {k + 1}", real) for k in range(len(self._early)))
        self._kernel_rows: tuple[Tensor, Tensor] | None = None
        if kernel_usable(device):
            self._kernel_rows = (self._row_numbers(self._in_shape), self._row_numbers(self._filter_rank))

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
        try:
            return torch.zeros(shape, dtype=dtype, device=self._plan.device)
        except RuntimeError as error:
            if self._plan.device.type != "cpu":
                raise
            raise MemoryError(f"cannot allocate a cache for positions of shape {self._shape}") from error

    def _aligned(self, values: Tensor, lead: int = 0) -> Tensor:
        """Filter data with its F axes padded to the output's rank; `lead` axes stand in front of F."""
        axes = len(self._plan.filter_shape)
        return values.reshape(*values.shape[:lead], *self._filter_rank, *values.shape[lead + axes :])

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
        tensors = [*self._row_tensors(), *(self._kernel_rows or ())]
        return sum(t.numel() * t.element_size() for t in tensors)

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
        check_entries_apart(out, "out")
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
            if self._due or self._closed:
                self._finish()
            y = self._kernel(x, target, self._clock)
            if y is None:
                y = self._sum(x, target)
            self._advance(1)
        return y if out is None else out

    def _kernel(self, x: Tensor, target: Tensor | None, clock: int | Tensor) -> Tensor | None:
        """One position in one launch, None where no kernel can take it."""
        if self._kernel_rows is None or is_fake(x):
            return None
        y = target
        if y is None or not y.is_contiguous() or y.is_neg() or _share_memory(x, y):
            y = torch.empty(self._output_shape, dtype=x.dtype, device=x.device)
        from . import _torch_triton

        base, x = self._layout.base, x.resolve_neg().contiguous()
        given = self._seed if base is None else self._ahead
        filters, rows = self._plan._filters, self._kernel_rows
        if not _torch_triton.step(x, self._history, filters, given, y, rows, clock, base):
            return None
        return y if target is None or y is target else target.copy_(y)

    def _sum(self, x: Tensor, target: Tensor | None) -> Tensor:
        """One position by torch's operators."""
        t, base, ring = self._clock, self._layout.base, self._layout.ring
        c, lags = t % ring, self._lags.shape[-1]
        self._history.select(-1, c).view(self._shape).copy_(x)
        # The newest input meets lag 0, the last of the reversed lags.
        if base is not None:
            j = t % base
            window = self._history.narrow(-1, c - j, j + 1)
            total = self._dot(window, self._lags.narrow(-1, lags - j - 1, j + 1))
            total += self._ahead.select(-1, j)
        else:
            total = self._dot(self._history[..., : c + 1], self._lags[..., lags - c - 1 :])
            if t >= ring and c + 1 < ring:
                total += self._dot(self._history[..., c + 1 :], self._lags[..., lags - ring : lags - c - 1])
            if t < self._seed.shape[-1]:
                total += self._seed[..., t]
        y = total.view(self._output_shape)
        return y.to(x.dtype) if target is None else target.copy_(y)

    def advance(self) -> None:
        """Make room for one `static_step`, eager or replayed: run a due tile and set the device's clock.

        `CapacityError` past the capacity.
        """
        with self._lock, torch.inference_mode(False), torch.no_grad():
            self._check_room(1)
            self._finish()
            if self._device_clock is None:
                self._device_clock = torch.zeros(1, dtype=torch.int64, device=self._plan.device)
            self._device_clock.fill_(self._clock)
            self._advance(1)

    def static_step(self, u: Tensor, out: Tensor | None = None) -> Tensor:
        """The step that `advance` made room for, for CUDA graphs: the same operators whatever the position.

        Arguments, result and errors as for `step`, within rounding. Call `advance` before every call and
        before every replay of a graph that has captured one call; a graph holds until the cache is given
        another number of rows.
        """
        x = checked(u, "u")
        check_device(x, "u", self._plan.device)
        check_shape(x, "u", self._shape)
        target = None if out is None else self._checked_out(out, x.dtype)
        with self._lock:
            if self._device_clock is None:
                raise ValueError("static_step: expected a call of advance() before it, got none")
            y = self._kernel(x, target, self._device_clock)
            if y is None:
                y = self._static_sum(x, target, self._device_clock)
        return y if out is None else out

    def _static_sum(self, x: Tensor, target: Tensor | None, clock: Tensor) -> Tensor:
        """The sum of `_sum` with a clock that only the device knows: over a whole block, masked."""
        base, ring = self._layout.base, self._layout.ring
        column, place = clock % ring, clock if base is None else clock % base
        inputs = x.to(self._plan.dtype).reshape(*self._in_shape, 1)
        self._history.index_copy_(-1, column, inputs)
        lag = torch.arange(base or ring, device=self._plan.device)
        window = self._history.index_select(-1, (column - lag) % ring)
        products = window * self._aligned(self._plan._filters[..., : len(lag)])
        total = torch.where(lag <= place, products, 0).sum(-1)
        given = self._seed if base is None else self._ahead
        if given.shape[-1]:
            last = given.shape[-1] - 1
            known = given.index_select(-1, place.clamp(max=last))
            total += torch.where(place <= last, known, 0).squeeze(-1)
        y = total.view(self._output_shape)
        return y.to(x.dtype) if target is None else target.copy_(y)

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

    def _finish(self, spectrum: Tensor | None = None) -> None:
        """Run what became due at the end of the last block; after an error it may be called again.

        `spectrum`: that of the newest inputs, as many as it has bins, where known.
        """
        if self._due:
            self._tiles(spectrum)
            self._due, self._closed = False, True
        if self._closed:
            self._open_block()
            self._closed = False

    def _settle(self) -> None:
        """Nothing is due, and nothing is under way that the current stream would not wait for."""
        self._finish()
        for side in self._sides:
            side.wait()

    def _given(self, length: int) -> Tensor:
        """What earlier inputs give the next outputs, `length` of a block: new memory."""
        t = self._clock
        column = t % self._layout.ring
        given = self._pending[..., column : column + length].clone()
        for early, level in zip(self._early, self._layout.delayed, strict=True):
            column = t % (2 * level.n)
            given += early[..., column : column + length]
        return self._seeded(given)

    def _open_block(self) -> None:
        """Begin a base block: its outputs start from what earlier inputs are known to add."""
        if self._layout.base is not None and self._clock != self._capacity:
            self._ahead.copy_(self._given(self._layout.base))

    def _tiles(self, spectrum: Tensor | None) -> None:
        """Run the levels due at the clock."""
        t, levels = self._clock, self._layout.levels
        due = [k for k, level in enumerate(levels) if t % level.n == 0]
        if not due or self._rows == 0:
            return
        for k in reversed(due) if self._early else due[-1:]:
            if levels[k].delay:
                # What began a block ago is due; what begins now has a block's time.
                side = self._sides[k - 1]
                side.wait()
                side.start(functools.partial(self._run, k, t, None), self._used(k))
            else:
                self._run(k, t, spectrum)

    def _used(self, k: int) -> list[Tensor]:
        """All memory that a tile of delayed level k works on."""
        n, plan = self._layout.levels[k].n, self._plan
        own = [self._history, self._kept[k], self._early[k - 1]]
        clocks = [clock for clock, _ in self._tile_graphs[k : k + 1]]
        return [*own, *clocks, plan._spectra[n], plan._twist(n), *plan._untwist(n)]

    def _run(self, k: int, t: int, spectrum: Tensor | None) -> None:
        """The tile of level k at time t, as a graph where one has been recorded."""
        if self._tile_graphs:
            clock, graph = self._tile_graphs[k]
            clock.fill_(t)
            graph.replay()
        else:
            self._tile(k, t, spectrum)

    def _tile(self, k: int, t: int, spectrum: Tensor | None) -> None:
        """The tile of level k at time t; a `spectrum` of as many inputs as its own spares the transform."""
        level, ring = self._layout.levels[k], self._layout.ring
        n, partitions, skip = level.n, level.partitions, level.delay
        slot, window = level.window(t)
        if spectrum is None or spectrum.shape[-1] != n:
            column = (t - n) % ring
            spectrum = self._plan._transform(self._history[..., column : column + n], n)
        kept = self._kept[k]
        if partitions == 1:
            kept = spectrum.unsqueeze(-2)
        else:
            kept[..., slot, :].copy_(spectrum)
        # Filter partitions stand last to first, so that they run alongside the slots.
        weights = self._aligned(self._plan._spectra[n])
        end, count = weights.shape[-2] - skip, min(window, partitions - skip)
        newer = min(slot + 1, count)
        acc = self._accumulate(
            kept[..., slot + 1 - newer : slot + 1, :], weights[..., end - newer : end, :], None
        )
        if newer < count:
            older = partitions - (count - newer)
            acc = self._accumulate(kept[..., older:, :], weights[..., end - count : end - newer, :], acc)
        target, column, add = self._target(k, t)
        self._join(acc, n, target[..., column : column + n], add)

    def _target(self, k: int, t: Any) -> tuple[Tensor, Any, bool]:
        """Where the tile of level k at time t (an integer or a tensor) puts its outputs, and if it adds."""
        level = self._layout.levels[k]
        if level.delay:
            return self._early[k - 1], (t + level.n) % (2 * level.n), False
        return self._pending, t % self._layout.ring, level.blocks is not None and not level.smooth

    def _join(self, acc: Tensor, n: int, out: Tensor, add: bool) -> None:
        """The outputs of a sum of products of spectra, written to `out` or added to it."""
        y = ifft(acc)
        cosine, minus_sine = self._plan._untwist(n)
        if add:
            out.addcmul_(y.imag, cosine)
        else:
            torch.mul(y.imag, cosine, out=out)
        out.addcmul_(y.real, minus_sine)

    def _static_tile(self, k: int, t: Tensor) -> None:
        """The tile of `_tile` at a time that only the device knows: the same operators at every time."""
        level, ring = self._layout.levels[k], self._layout.ring
        n, partitions, skip = level.n, level.partitions, level.delay
        positions = torch.arange(n, device=self._plan.device)
        x = self._history.index_select(-1, (t - n) % ring + positions)
        kept = self._plan._transform(x, n).unsqueeze(-2)
        weights = self._aligned(self._plan._spectra[n])
        if partitions == 1:
            acc = self._accumulate(kept, weights[..., -1:, :], None)
        else:
            slot, window = level.window(t)
            kept = self._kept[k].index_copy_(-2, slot, kept)
            acc = torch.zeros((*self._out_shape, n), dtype=kept.dtype, device=kept.device)
            for a in range(partitions):
                age = (slot - a) % partitions
                weight = weights.index_select(-2, (weights.shape[-2] - 1 - skip - age).clamp(min=0))
                takes_part = (age < window) & (age < partitions - skip)
                # No product with what is in a slot of before: it may not be finite.
                acc.addcmul_(torch.where(takes_part, kept[..., a, :], 0), weight.squeeze(-2))
        target, column, add = self._target(k, t)
        columns = column + positions
        out = target.index_select(-1, columns) if add else torch.empty_like(target[..., :n])
        self._join(acc, n, out, add)
        target.index_copy_(-1, columns, out)

    def capture_tiles(self) -> int:
        """Record the tile of every level as a CUDA graph and use it from now on; the number of graphs.

        A tile is then two launches instead of about ten. The graphs keep the memory of their temporaries,
        and hold until the cache is given another number of rows; `fork` does not copy them. Host and device
        wait for each other during this call, not later. `ValueError` on any device but CUDA.
        """
        check_recordable(self._plan.device, not is_fake(self._history))
        with self._lock, torch.inference_mode(False), torch.no_grad():
            self._settle()
            # Transforms make their plans when they first run, which a graph must not see.
            scratch = self.fork()
            recorded: list[tuple[Tensor, Graph]] = []
            pool: Graph | None = None
            for k, level in enumerate(self._layout.levels if self._rows else ()):
                clock = torch.zeros(1, dtype=torch.int64, device=self._plan.device)
                scratch._static_tile(k, clock)
                alone = level.delay > 0
                tile = functools.partial(self._static_tile, k, clock)
                graph = record(tile, self._plan.device, None if alone else pool)
                recorded.append((clock, graph))
                pool = pool if alone else graph
            self._tile_graphs = tuple(recorded)
        return len(recorded)

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
            # Tiles that begin early need every block's turn.
            lengths = [base] if self._early else [level.n for level in self._layout.levels] or [base]
            n = max((n for n in lengths if n <= left and t % n == 0), default=0)
            if n:
                return self._extend_block(x[..., :n].to(dtype), n)
        return self._extend_part(x[..., : min(left, base - t % base)].to(dtype))

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
        y = ifft(spectrum * self._aligned(plan._head(n)))
        cosine, minus_sine = plan._untwist(n)
        own = torch.addcmul(y.real * cosine, y.imag, minus_sine, value=-1)
        own += self._given(n)
        # The tile at the block's end runs now, while the spectrum is at hand.
        self._advance(n)
        self._finish(spectrum)
        return own

    def _extend_part(self, x: Tensor) -> Tensor:
        """Part of a base block."""
        base, width = self._layout.base, x.shape[-1]
        assert base is not None
        column, j = self._clock % self._layout.ring, self._clock % base
        self._history[..., column : column + width].copy_(x)
        block = self._history[..., column - j : column + width]
        y = causal_conv_fft(block, self._plan._filters[..., : j + width], j + width)[..., j:]
        y += self._ahead[..., j : j + width]
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

    def _row_tensors(self) -> list[Tensor]:
        """Every array of the state; all have the rows in front."""
        return [self._seed, self._history, self._pending, self._ahead, *self._kept, *self._early]

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
                named = isinstance(value, np.ndarray) or array.ndim > 0
                got = str(array.dtype) if named else type_name(value)
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
            self._settle()
            arrays = self._row_tensors()
            gathered = [values.index_select(0, rows) for values in arrays]
            if rows.shape[0] == self._shape[0]:
                # In the same memory, which a captured graph may hold.
                for values, new in zip(arrays, gathered, strict=True):
                    values.copy_(new)
                return
            self._replace(gathered)
            self._shape_to((rows.shape[0], *self._shape[1:]))
            self._attach()

    def _replace(self, arrays: list[Tensor]) -> None:
        self._seed, self._history, self._pending, self._ahead = arrays[:4]
        levels = len(self._kept)
        self._kept, self._early = tuple(arrays[4 : 4 + levels]), tuple(arrays[4 + levels :])

    def reset(self, rows: Any = None) -> None:
        """Start rows of axis 0 again while the others go on, or, without `rows`, everything at position 0.

        `rows`: integers as in numpy indexing, or a boolean mask. The clock and the remaining capacity are
        common to all rows and stay. Errors as for `reorder`.
        """
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if rows is None:
                self._due = self._closed = False
                self._settle()
                for values in self._row_tensors():
                    values.zero_()
                self._clock, self._prompt = 0, 0
                return
            self._check_batch("rows")
            chosen = self._indices(rows, "rows", mask=True)
            self._settle()
            for values in self._row_tensors():
                if chosen.dtype is torch.bool:
                    values.masked_fill_(chosen.reshape(-1, *(1,) * (values.dim() - 1)), 0)
                else:
                    values.index_fill_(0, chosen, 0)

    def fork(self) -> TorchCache:
        """An independent copy."""
        with self._lock, torch.inference_mode(False), torch.no_grad():
            self._settle()
            copy = object.__new__(TorchCache)
            copy.__dict__.update(self.__dict__)
            copy._lock = threading.RLock()
            copy._replace([values.clone() for values in self._row_tensors()])
            copy._attach()
            if self._device_clock is not None:
                copy._device_clock = self._device_clock.clone()
            return copy

    # State

    def state_dict(self) -> dict[str, Any]:
        """A picklable snapshot on the host, for `plan.load_cache` of either engine and any device."""
        with self._lock, torch.inference_mode(False), torch.no_grad():
            self._settle()
            plan, layout, clock = self._plan, self._layout, self._clock
            pending = self._pending
            if self._early:
                pending = torch.cat((pending, *self._early), -1)
            elif layout.base is not None:
                pending = pending.clone()
                pending[..., : clock % layout.ring] = 0
            arrays = {
                "history": self._flat(self._history),
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
        array = to_host(values)
        rank = len(self._output_shape)
        return np.ascontiguousarray(array.reshape(math.prod(array.shape[:rank]), *array.shape[rank:]))

    def _load(self, arrays: Mapping[str, np.ndarray[Any, Any]], clock: int) -> None:
        """Take over the arrays of a state and the position within the base block."""
        seeded = arrays["seed"].shape[-1] if "seed" in arrays else 0
        self._seed = self._zeros(self._out_shape, seeded)
        pending = self._zeros(self._out_shape, sum(p.shape[-1] for p in (self._pending, *self._early)))
        wanted = {"history": self._history, "pending": pending, "seed": self._seed}
        wanted |= {f"spectra_{k}": _pairs(kept) for k, kept in enumerate(self._kept)}
        if set(arrays) != set(wanted):
            raise ValueError(f"state: expected arrays {sorted(wanted)}, got {sorted(arrays)}")
        arrays = {**arrays}
        for k, level in enumerate(self._layout.levels):
            arrays[f"spectra_{k}"] = _state.rebin(arrays[f"spectra_{k}"], level.n)
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
        at = 0
        for part in (self._pending, *self._early):
            part.copy_(pending[..., at : at + part.shape[-1]])
            at += part.shape[-1]
        base = self._layout.base
        self._clock = clock if base is None else clock - clock % base
        self._open_block()
        self._clock = clock
        if self._rows and clock and clock != self._capacity:
            for k, level in enumerate(self._layout.levels):
                # The compiled engine begins a tile with the step that follows.
                if level.delay and clock % level.n == 0:
                    self._sides[k - 1].start(functools.partial(self._run, k, clock, None), self._used(k))
