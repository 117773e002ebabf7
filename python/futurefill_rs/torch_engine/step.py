"""The sums of one position: over the present base block, or over all that counts where there are no tiles."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from futurefill_rs._torch_args import is_fake
from futurefill_rs.torch_engine.tile import Memory


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


def by_kernel(
    memory: Memory, rows: tuple[Tensor, Tensor] | None, x: Tensor, target: Tensor | None, clock: int | Tensor
) -> Tensor | None:
    """One position in one launch, None where no kernel can take it; `rows` as of `Memory.row_numbers`."""
    if rows is None or is_fake(x):
        return None
    y = target
    if y is None or not y.is_contiguous() or y.is_neg() or _share_memory(x, y):
        y = torch.empty(memory.output_shape, dtype=x.dtype, device=x.device)
    from futurefill_rs.torch_engine import triton

    x, filters = x.resolve_neg().contiguous(), memory.tables.filters
    given = memory.seed if memory.base is None else memory.ahead
    if not triton.step(x, memory.history, filters, given, y, rows, clock, memory.base):
        return None
    return y if target is None or y is target else target.copy_(y)


def by_operators(memory: Memory, x: Tensor, target: Tensor | None, t: int) -> Tensor:
    """One position at time t by torch's operators."""
    base, lags = memory.base, memory.lags.shape[-1]
    c = t % memory.ring
    memory.history.select(-1, c).view(memory.shape).copy_(x)
    # The newest input meets lag 0, the last of the reversed lags.
    if base is not None:
        j = t % base
        window = memory.history.narrow(-1, c - j, j + 1)
        total = _dot(memory, window, memory.lags.narrow(-1, lags - j - 1, j + 1))
        total += memory.ahead.select(-1, j)
    else:
        total = _dot(memory, memory.history[..., : c + 1], memory.lags[..., lags - c - 1 :])
        _add_beyond(memory, total, t)
    return _placed(memory, total, x, target)


def by_static_operators(memory: Memory, x: Tensor, target: Tensor | None, clock: Tensor) -> Tensor:
    """`by_operators` with a clock that only the device knows: over a whole block, masked."""
    base, ring, tables = memory.base, memory.ring, memory.tables
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
    return _placed(memory, total, x, target)


def pending(memory: Memory, t: int) -> Tensor:
    """The sum of `by_operators` without its newest term, in the shape of the memory's rows."""
    base, lags = memory.base, memory.lags.shape[-1]
    c = t % memory.ring
    j = c if base is None else t % base
    window = memory.history.narrow(-1, c - j, j)
    total = _dot(memory, window, memory.lags.narrow(-1, lags - j - 1, j)).expand(memory.out_shape).clone()
    if base is None:
        _add_beyond(memory, total, t)
    else:
        total += memory.ahead.select(-1, j)
    return total


def _add_beyond(memory: Memory, total: Tensor, t: int) -> None:
    """Add to a direct sum at time t what the ring's last turn and the prompt give."""
    ring, lags = memory.ring, memory.lags.shape[-1]
    c = t % ring
    if t >= ring and c + 1 < ring:
        older = memory.lags[..., lags - ring : lags - c - 1]
        total += _dot(memory, memory.history[..., c + 1 :], older)
    if t < memory.seed.shape[-1]:
        total += memory.seed[..., t]


def _placed(memory: Memory, total: Tensor, x: Tensor, target: Tensor | None) -> Tensor:
    """The output in x's dtype, in `target` where there is one."""
    y = total.view(memory.output_shape)
    return y.to(x.dtype) if target is None else target.copy_(y)


def _dot(memory: Memory, x: Tensor, weights: Tensor) -> Tensor:
    """Sum over the last axis of x (*C, m) and weights (*F, m), in pieces of bounded memory."""
    piece = max(memory.temporary // max(memory.rows, 1), 256)
    if x.shape[-1] <= piece:
        return (x * weights).sum(-1)
    pieces = range(0, x.shape[-1], piece)
    sums = [(x[..., a : a + piece] * weights[..., a : a + piece]).sum(-1) for a in pieces]
    return torch.stack(sums, -1).sum(-1)
