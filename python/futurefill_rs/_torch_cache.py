"""The torch engine's cache: one stream of positions through a `TorchPlan`."""

from __future__ import annotations

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
    check_shape,
    checked,
    dtype_name,
    is_fake,
    padded,
    to_host,
    type_name,
)
from ._torch_layout import LONGEST_PUSH
from ._torch_ops import causal_conv_fft

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
                self._zeros(self._in_shape, level.kept, level.n, complex_=True)
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
        self._counter: Tensor | None = None
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
            if kernel_usable(self._plan.device):
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
                x.resolve_neg().contiguous(),
                self._block_in,
                self._block_out,
                self._lags,
                y,
                self._kernel_rows,
                j,
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

    def advance(self) -> None:
        """Make room for one `static_step`, eager or replayed: run a due tile and set the device's clock.

        `CapacityError` past the capacity, `ValueError` for a schedule without a short base block.
        """
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if self._block_in is None or self._lags is None:
                raise ValueError(
                    f"schedule: expected a base block of at most {LONGEST_PUSH} positions for static steps, "
                    f"got {self._plan.schedule}"
                )
            self._check_room(1)
            self._finish()
            base = self._block_in.shape[0]
            if self._counter is None:
                nothing = torch.zeros_like(self._lags[:base])
                self._static_lags = torch.cat((nothing, self._lags[:base]))
                self._places = torch.arange(base, 2 * base, device=self._plan.device)
                self._counter = torch.zeros(1, dtype=torch.int64, device=self._plan.device)
            self._counter.fill_(self._clock % base)
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
        counter, block_in, block_out = self._counter, self._block_in, self._block_out
        if counter is None or block_in is None or block_out is None:
            raise ValueError("static_step: expected a call of advance() before it, got none")
        with self._lock:
            x = x.to(self._plan.dtype).reshape(1, *self._in_shape)
            block_in.index_copy_(0, counter, x)
            # Lags before the position are zero here; what they touch has been given out already.
            weights = self._static_lags.index_select(0, self._places - counter)
            block_out.addcmul_(x, weights)
            y = block_out.index_select(0, counter).view(self._output_shape)
            if target is None:
                return y.to(u.dtype)
            target.copy_(y)
        assert out is not None
        return out

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
        if partitions == 1:
            kept = spectrum.unsqueeze(-2)
        else:
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
            arrays = self._row_tensors()
            gathered = [values.index_select(axis, rows) for values, axis in arrays]
            if rows.shape[0] == self._shape[0]:
                # In the same memory, which a captured graph may hold.
                for (values, _), new in zip(arrays, gathered, strict=True):
                    values.copy_(new)
                return
            self._replace(gathered)
            self._shape_to((rows.shape[0], *self._shape[1:]))
            self._counter = None
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
            copy._counter = None
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
        array = to_host(values)
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
