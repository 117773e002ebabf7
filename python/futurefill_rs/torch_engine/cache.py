"""The torch engine's cache: one stream of positions through a plan."""

from __future__ import annotations

import contextlib
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
    wrote,
)
from futurefill_rs.torch_engine import block, state, step
from futurefill_rs.torch_engine.tile import Memory


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
        rows = memory.row_numbers() if step.kernel_usable(memory.tables.device) else None
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
            y = step.by_kernel(self._memory, self._kernel_rows, x, target, self._clock)
            if y is None:
                y = step.by_operators(self._memory, x, target, self._clock)
            self._advance(1)
        return y if out is None else wrote(out, y)

    def pending(self, k: SupportsIndex) -> Tensor:
        count = integer(k, "k")
        with self._lock, _plain():
            self._check_room(count)
            if count == 1:
                self._finish()
                return step.pending(self._memory, self._clock).reshape(*self.output_shape, 1)
            tables = self._memory.tables
            zeros = torch.zeros((*self.shape, count), dtype=tables.dtype, device=tables.device)
            return self.fork().extend(zeros) if count else zeros.new_zeros((*self.output_shape, 0))

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
            y = step.by_kernel(self._memory, self._kernel_rows, x, target, self._device_clock)
            if y is None:
                y = step.by_static_operators(self._memory, x, target, self._device_clock)
        return y if out is None else wrote(out, y)

    # Time

    def _advance(self, count: int) -> None:
        clock, base = self._clock + count, self._memory.base
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
            base = memory.base
            if base is not None and self._clock != self._capacity:
                # Begin a base block: its outputs start from what earlier inputs are known to add.
                start = self._clock - self._clock % base
                memory.ahead.copy_(memory.given(start, base))
            self._closed = False

    def capture_tiles(self) -> int:
        """Record the tile of every level as a CUDA graph and use it from now on; the number of graphs.

        A tile is then a few launches instead of about ten. The graphs keep the memory of their temporaries,
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
            base = memory.base
            # Part of a base block is taken in one go, with nothing to undo before it.
            part = base is not None and count < base and self._clock % base + count <= base
            with contextlib.nullcontext() if part and progress is None else self._restored():
                at = 0
                while at < count:
                    self._finish()
                    n = block.width(memory, self._clock, count - at)
                    piece = x[..., at : at + n].to(memory.tables.dtype)
                    values, spectrum = block.outputs(memory, self._clock, piece)
                    y[..., at : at + n].copy_(values)
                    at += n
                    self._advance(n)
                    if spectrum is not None:
                        # The tile at the block's end runs now, while the spectrum is at hand.
                        self._finish(spectrum)
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
