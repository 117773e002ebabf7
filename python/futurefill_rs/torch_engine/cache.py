"""The torch engine's cache: one stream of positions through a plan."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any, SupportsIndex

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from futurefill_rs import _interface, _state
from futurefill_rs._args import integer
from futurefill_rs._core import CapacityError
from futurefill_rs._interface import Progress
from futurefill_rs._torch_args import (
    check_out,
    check_sequence,
    check_shape,
    checked_input,
    entries,
    is_fake,
    wrote,
)
from futurefill_rs.torch_engine import state
from futurefill_rs.torch_engine.fft import causal_conv_fft
from futurefill_rs.torch_engine.tile import Memory
from futurefill_rs.torch_engine.transform import ifft


def kernel_usable(device: torch.device) -> bool:
    """Whether the Triton kernel takes the steps; triton is imported only where it might."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return False
    try:
        from futurefill_rs.torch_engine import triton
    except ImportError:
        return False
    return triton.usable(device)


def _share_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


@contextlib.contextmanager
def _plain() -> Iterator[None]:
    """Neither autograd nor inference mode: what is made here serves in every mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class TorchCache(_interface.Cache):
    """One stream of positions through a `TorchPlan`, on the plan's device; see `futurefill_rs.Cache`.

    Inputs that require grad are taken as values. Nothing in `step` makes the host wait for the device. On a
    device with streams, use one stream.
    """

    def __init__(
        self,
        plan: _interface.Plan,
        memory: Memory,
        capacity: int | None,
        *,
        prompt: int = 0,
        clock: int = 0,
        opened: bool = False,
    ) -> None:
        """`opened`: the present base block's outputs have been begun in `memory.ahead`."""
        self._plan = plan
        self._capacity = capacity
        self._prompt = prompt
        self._clock = clock
        self._due = False
        self._closed = not opened
        self._device_clock: Tensor | None = None
        self._lock = threading.RLock()
        self._hold(memory)
        with _plain():
            self._finish()

    def _hold(self, memory: Memory) -> None:
        """Go on with this memory."""
        rows = memory.row_numbers() if kernel_usable(memory.tables.device) else None
        self._memory, self._kernel_rows = memory, rows

    # Properties

    @property
    def plan(self) -> _interface.Plan:
        return self._plan

    @property
    def shape(self) -> tuple[int, ...]:
        return self._memory.shape

    @property
    def output_shape(self) -> tuple[int, ...]:
        return self._memory.output_shape

    @property
    def position(self) -> int:
        return self._prompt + self._clock

    @property
    def remaining(self) -> int | None:
        return None if self._capacity is None else self._capacity - self._clock

    @property
    def nbytes(self) -> int:
        tensors = [*self._memory.arrays(), *(self._kernel_rows or ())]
        return sum(t.numel() * t.element_size() for t in tensors)

    def __repr__(self) -> str:
        return (
            f"TorchCache(shape={self.shape}, position={self.position}, remaining={self.remaining}, "
            f"device={self._memory.tables.device})"
        )

    # One position

    def _check_room(self, count: int) -> None:
        if self._capacity is not None and self._clock + count > self._capacity:
            raise CapacityError(
                f"the cache has room for {self._capacity - self._clock} more positions, got {count}"
            )

    def _checked_step(self, u: Any, out: Any) -> tuple[Tensor, Tensor | None]:
        """The input of one position and where its output goes, detached."""
        tables = self._memory.tables
        u = torch.tensor(u, dtype=tables.dtype, device=tables.device) if type(u) is float else u
        x = checked_input(u, "u", tables.dtype, tables.device)
        check_shape(x, "u", self.shape)
        return x, None if out is None else check_out(out, x, self.output_shape)

    def step(self, u: Tensor | float, *, out: Tensor | None = None) -> Tensor:  # type: ignore[override]
        x, target = self._checked_step(u, out)
        with self._lock:
            self._check_room(1)
            if self._due or self._closed:
                self._finish()
            y = self._kernel(x, target, self._clock)
            if y is None:
                y = self._sum(x, target)
            self._advance(1)
        return y if out is None else wrote(out, y)

    def _kernel(self, x: Tensor, target: Tensor | None, clock: int | Tensor) -> Tensor | None:
        """One position in one launch, None where no kernel can take it."""
        if self._kernel_rows is None or is_fake(x):
            return None
        y = target
        if y is None or not y.is_contiguous() or y.is_neg() or _share_memory(x, y):
            y = torch.empty(self.output_shape, dtype=x.dtype, device=x.device)
        from futurefill_rs.torch_engine import triton

        memory, x = self._memory, x.resolve_neg().contiguous()
        base, filters, rows = memory.layout.base, memory.tables.filters, self._kernel_rows
        given = memory.seed if base is None else memory.ahead
        if not triton.step(x, memory.history, filters, given, y, rows, clock, base):
            return None
        return y if target is None or y is target else target.copy_(y)

    def _sum(self, x: Tensor, target: Tensor | None) -> Tensor:
        """One position by torch's operators."""
        memory = self._memory
        t, base, ring = self._clock, memory.layout.base, memory.layout.ring
        c, lags = t % ring, memory.lags.shape[-1]
        memory.history.select(-1, c).view(self.shape).copy_(x)
        # The newest input meets lag 0, the last of the reversed lags.
        if base is not None:
            j = t % base
            window = memory.history.narrow(-1, c - j, j + 1)
            total = self._dot(window, memory.lags.narrow(-1, lags - j - 1, j + 1))
            total += memory.ahead.select(-1, j)
        else:
            total = self._dot(memory.history[..., : c + 1], memory.lags[..., lags - c - 1 :])
            total = self._beyond(total, t, c)
        y = total.view(self.output_shape)
        return y.to(x.dtype) if target is None else target.copy_(y)

    def _beyond(self, total: Tensor, t: int, c: int) -> Tensor:
        """Add to a direct sum at time t what the ring's last turn and the prompt give."""
        memory, ring, lags = self._memory, self._memory.layout.ring, self._memory.lags.shape[-1]
        if t >= ring and c + 1 < ring:
            older = memory.lags[..., lags - ring : lags - c - 1]
            total += self._dot(memory.history[..., c + 1 :], older)
        if t < memory.seed.shape[-1]:
            total += memory.seed[..., t]
        return total

    def pending(self, k: SupportsIndex) -> Tensor:
        count = integer(k, "k")
        with self._lock, _plain():
            self._check_room(count)
            if count == 1:
                self._finish()
                return self._pending_step().reshape(*self.output_shape, 1)
            tables = self._memory.tables
            zeros = torch.zeros((*self.shape, count), dtype=tables.dtype, device=tables.device)
            return self.fork().extend(zeros) if count else zeros.new_zeros((*self.output_shape, 0))

    def _pending_step(self) -> Tensor:
        """The sum of `_sum` without its newest term."""
        memory = self._memory
        t, base, ring = self._clock, memory.layout.base, memory.layout.ring
        c, lags = t % ring, memory.lags.shape[-1]
        j = c if base is None else t % base
        window = memory.history.narrow(-1, c - j, j)
        total = self._dot(window, memory.lags.narrow(-1, lags - j - 1, j)).expand(memory.out_shape)
        if base is None:
            return self._beyond(total.clone(), t, c)
        return total + memory.ahead.select(-1, j)

    def advance(self) -> None:
        """Make room for one `static_step`, eager or replayed: run a due tile and set the device's clock.

        `CapacityError` past the capacity.
        """
        with self._lock, _plain():
            self._check_room(1)
            self._finish()
            if self._device_clock is None:
                self._device_clock = torch.zeros(1, dtype=torch.int64, device=self._memory.tables.device)
            self._device_clock.fill_(self._clock)
            self._advance(1)

    def static_step(self, u: Tensor, out: Tensor | None = None) -> Tensor:
        """The step that `advance` made room for, for CUDA graphs: the same operators whatever the position.

        Arguments, result and errors as for `step`, within rounding. Call `advance` before every call and
        before every replay of a graph that has captured one call; a graph holds until the cache is given
        another number of rows.
        """
        x, target = self._checked_step(u, out)
        with self._lock:
            if self._device_clock is None:
                raise ValueError("static_step: expected a call of advance() before it, got none")
            y = self._kernel(x, target, self._device_clock)
            if y is None:
                y = self._static_sum(x, target, self._device_clock)
        return y if out is None else wrote(out, y)

    def _static_sum(self, x: Tensor, target: Tensor | None, clock: Tensor) -> Tensor:
        """The sum of `_sum` with a clock that only the device knows: over a whole block, masked."""
        memory = self._memory
        base, ring, tables = memory.layout.base, memory.layout.ring, memory.tables
        column, place = clock % ring, clock if base is None else clock % base
        inputs = x.to(tables.dtype).reshape(*memory.in_shape, 1)
        memory.history.index_copy_(-1, column, inputs)
        lag = torch.arange(base or ring, device=tables.device)
        window = memory.history.index_select(-1, (column - lag) % ring)
        products = window * memory.aligned(tables.filters[..., : len(lag)])
        total = torch.where(lag <= place, products, 0).sum(-1)
        given = memory.seed if base is None else memory.ahead
        if given.shape[-1]:
            last = given.shape[-1] - 1
            known = given.index_select(-1, place.clamp(max=last))
            total += torch.where(place <= last, known, 0).squeeze(-1)
        y = total.view(self.output_shape)
        return y.to(x.dtype) if target is None else target.copy_(y)

    def _dot(self, x: Tensor, weights: Tensor) -> Tensor:
        """Sum over the last axis of x (*C, m) and weights (*F, m), in pieces of bounded memory."""
        piece = max(self._memory.temporary // max(self._memory.rows, 1), 256)
        if x.shape[-1] <= piece:
            return (x * weights).sum(-1)
        sums = [
            (x[..., a : a + piece] * weights[..., a : a + piece]).sum(-1)
            for a in range(0, x.shape[-1], piece)
        ]
        return torch.stack(sums, -1).sum(-1)

    # Time

    def _advance(self, count: int) -> None:
        clock, base = self._clock + count, self._memory.layout.base
        due = base is not None and clock % base == 0 and clock != self._capacity
        # Side by side: an interrupt comes before both or after both.
        self._clock, self._due = clock, due

    def _finish(self, spectrum: Tensor | None = None) -> None:
        """Run what became due at the end of the last block; after an error it may be called again.

        `spectrum`: that of the newest inputs, as many as it has bins, where known.
        """
        memory = self._memory
        if self._due:
            memory.run(self._clock, spectrum)
            self._due, self._closed, memory.result = False, True, None
        if self._closed:
            base = memory.layout.base
            if base is not None and self._clock != self._capacity:
                # Begin a base block: its outputs start from what earlier inputs are known to add.
                start = self._clock - self._clock % base
                memory.ahead.copy_(memory.given(start, base))
            self._closed = False

    def capture_tiles(self) -> int:
        """Record the tile of every level as a CUDA graph and use it from now on; the number of graphs.

        A tile is then two launches instead of about ten. The graphs keep the memory of their temporaries,
        and hold until the cache is given another number of rows; `fork` does not copy them. Host and device
        wait for each other during this call, not later. `ValueError` on any device but CUDA.
        """
        with self._lock, _plain():
            self._settle()
            return self._memory.capture()

    def _settle(self) -> None:
        """Nothing is due, and nothing is under way that the current stream would not wait for."""
        self._finish()
        self._memory.settle()

    # Blocks

    def extend(  # type: ignore[override]
        self, u: Tensor, *, out: Tensor | None = None, progress: Progress | None = None
    ) -> Tensor:
        memory = self._memory
        x = checked_input(u, "u", memory.tables.dtype, memory.tables.device)
        check_sequence(x, "u", self.shape)
        count = x.shape[-1]
        shape = (*self.output_shape, count)
        target = None if out is None else check_out(out, x, shape)
        with self._lock, _plain():
            self._check_room(count)
            y = torch.empty((*memory.out_shape, count), dtype=x.dtype, device=x.device)
            x = x.reshape(*memory.in_shape, count)
            base = memory.layout.base
            # Part of a base block is taken in one go, with nothing to undo before it.
            part = base is not None and count < base and self._clock % base + count <= base
            with contextlib.nullcontext() if part and progress is None else self._restored():
                at = 0
                while at < count:
                    self._finish()
                    values = self._extend_piece(x[..., at:])
                    width = values.shape[-1]
                    y[..., at : at + width].copy_(values)
                    at += width
                    if progress is not None:
                        progress(at, count)
            y = y.reshape(shape)
            return y if target is None or out is None else wrote(out, target.copy_(y))

    @contextlib.contextmanager
    def _restored(self) -> Iterator[None]:
        """After an error or an interrupt within the block the cache is what it was before."""
        self._settle()
        memory, clock, before = (
            self._memory,
            self._clock,
            [values.clone() for values in self._memory.arrays()],
        )
        try:
            yield
        except BaseException:
            self._due = self._closed = False
            memory.settle()
            for values, old in zip(memory.arrays(), before, strict=True):
                values.copy_(old)
            self._clock, memory.result = clock, None
            raise

    def _extend_piece(self, x: Tensor) -> Tensor:
        """Take the first positions of x, as many as one operation can, and return their outputs."""
        layout, t, left = self._memory.layout, self._clock, x.shape[-1]
        base, dtype = layout.base, self._memory.tables.dtype
        if base is None:
            width = min(left, max(layout.ring, 4096))
            return self._extend_naive(x[..., :width].to(dtype))
        if t % base == 0:
            # Tiles that begin early need every block's turn.
            lengths = [base] if layout.delayed else [level.n for level in layout.levels] or [base]
            n = max((n for n in lengths if n <= left and t % n == 0), default=0)
            if n:
                return self._extend_block(x[..., :n].to(dtype), n)
        return self._extend_part(x[..., : min(left, base - t % base)].to(dtype))

    def _extend_block(self, x: Tensor, n: int) -> Tensor:
        """A whole aligned block: its own sum is the real part of its product with the first lags."""
        memory, tables = self._memory, self._memory.tables
        column = self._clock % memory.layout.ring
        memory.history[..., column : column + n].copy_(x)
        spectrum = tables.transform(x, n)
        y = ifft(spectrum * memory.aligned(tables.head(n)))
        cosine, minus_sine = tables.untwist(n)
        own = torch.addcmul(y.real * cosine, y.imag, minus_sine, value=-1)
        own += memory.given(self._clock, n)
        # The tile at the block's end runs now, while the spectrum is at hand.
        self._advance(n)
        self._finish(spectrum)
        return own

    def _extend_part(self, x: Tensor) -> Tensor:
        """Part of a base block."""
        memory, width = self._memory, x.shape[-1]
        base = memory.layout.base
        assert base is not None
        column, j = self._clock % memory.layout.ring, self._clock % base
        memory.history[..., column : column + width].copy_(x)
        block = memory.history[..., column - j : column + width]
        y = causal_conv_fft(block, memory.tables.filters[..., : j + width], j + width)[..., j:]
        y += memory.ahead[..., j : j + width]
        self._advance(width)
        return y

    def _extend_naive(self, x: Tensor) -> Tensor:
        """A block without tiles: convolve it behind as much history as the filters reach."""
        memory, filters = self._memory, self._memory.tables.filters
        history, ring, width, t = memory.history, memory.layout.ring, x.shape[-1], self._clock
        past = min(t, filters.shape[-1] - 1)
        columns = [(t - past + i) % ring for i in (0, past - 1)] if past else []
        if not past:
            window = x
        elif columns[0] <= columns[1]:
            window = torch.cat((history[..., columns[0] : columns[1] + 1], x), -1)
        else:
            pieces = (history[..., columns[0] :], history[..., : columns[1] + 1], x)
            window = torch.cat(pieces, -1)
        y = causal_conv_fft(window, filters, past + width)[..., past:]
        newest = x[..., -ring:]
        start = (t + width - newest.shape[-1]) % ring
        first = min(newest.shape[-1], ring - start)
        history[..., start : start + first].copy_(newest[..., :first])
        if first < newest.shape[-1]:
            history[..., : newest.shape[-1] - first].copy_(newest[..., first:])
        y = memory.seeded(y, t)
        self._advance(width)
        return y

    # Rows

    def _batch(self, name: str) -> int:
        filters = self._memory.tables.filter_shape
        if len(self.shape) <= len(filters):
            raise ValueError(
                f"{name}: expected a cache with a batch axis in front of the filters' {filters}, such as "
                f"new_cache({(3, *filters)}), got shape {self.shape}"
            )
        return self.shape[0]

    def reorder(self, index: Any) -> None:
        """As `Cache.reorder`; an index on the cache's own device is not copied to the host."""
        with self._lock, _plain():
            memory = self._memory
            rows = entries(index, "index", self._batch("index"), memory.tables.device, mask=False)
            self._settle()
            gathered = [values.index_select(0, rows) for values in memory.arrays()]
            if rows.shape[0] != self.shape[0]:
                self._hold(memory.with_arrays(gathered))
                return
            # In the same memory, which a captured graph may hold.
            for values, new in zip(memory.arrays(), gathered, strict=True):
                values.copy_(new)

    def reset(self, rows: Any = None) -> None:
        with self._lock, _plain():
            memory = self._memory
            if rows is None:
                self._due = self._closed = False
                memory.settle()
                for values in memory.arrays():
                    values.zero_()
                self._clock, self._prompt, memory.result = 0, 0, None
                return
            chosen = entries(rows, "rows", self._batch("rows"), memory.tables.device, mask=True)
            self._settle()
            for values in memory.arrays():
                if chosen.dtype is torch.bool:
                    values.masked_fill_(chosen.reshape(-1, *(1,) * (values.dim() - 1)), 0)
                else:
                    values.index_fill_(0, chosen, 0)

    # Copies

    def fork(self) -> TorchCache:
        with self._lock, _plain():
            self._settle()
            memory = self._memory.with_arrays([values.clone() for values in self._memory.arrays()])
            copy = TorchCache(
                self._plan, memory, self._capacity, prompt=self._prompt, clock=self._clock, opened=True
            )
            if self._device_clock is not None:
                copy._device_clock = self._device_clock.clone()
            return copy

    def __copy__(self) -> TorchCache:
        return self.fork()

    def __deepcopy__(self, memo: Any) -> TorchCache:
        return self.fork()

    def __reduce__(self) -> tuple[Any, ...]:
        return _state.load, (self._plan, self.state_dict())

    def state_dict(self) -> dict[str, NDArray[np.generic]]:
        with self._lock, _plain():
            self._settle()
            return state.save(self._memory, self._plan.horizon, self._capacity, self._clock, self._prompt)
