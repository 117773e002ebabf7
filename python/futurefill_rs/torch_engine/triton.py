"""One kernel for one step, whatever the schedule; without it the torch engine takes a few operators."""

from __future__ import annotations

import contextlib
import os
import warnings

import torch
import triton  # type: ignore[import,unused-ignore]
import triton.language as tl  # type: ignore[import,unused-ignore]
from torch import Tensor

ENVIRONMENT = "FUTUREFILL_TRITON"
_TIMES = 256
_broken = False


@triton.jit(do_not_specialize=["clock", "given_length"])  # type: ignore[untyped-decorator]
def _step(  # type: ignore[no-untyped-def]
    u,
    history,
    filters,
    given,
    y,
    input_row,
    filter_row,
    clock,
    block,
    ring,
    filter_length,
    given_length,
    TILES: tl.constexpr,
    STATIC: tl.constexpr,
    TIMES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(input_row + row)
    taps = filters + tl.load(filter_row + row) * filter_length
    inputs = history + source * ring
    t = tl.load(clock) if STATIC else tl.cast(clock, tl.int64)
    column = t % ring
    place = t % block if TILES else t
    # Without tiles what the ring holds of its last turn counts too.
    lags = place + 1 if TILES else tl.minimum(t + 1, ring)
    newest = tl.load(u + source).to(history.dtype.element_ty)
    lag = tl.arange(0, TIMES)
    total = tl.zeros((TIMES,), dtype=history.dtype.element_ty)
    for start in range(0, lags, TIMES):
        inside = start + lag < lags
        older = column - start - lag
        older = tl.where(older < 0, older + ring, older)
        x = tl.load(inputs + older, mask=inside & (start + lag > 0), other=0)
        x = tl.where(start + lag == 0, newest, x)
        total += x * tl.load(taps + start + lag, mask=inside, other=0)
    result = tl.sum(total, 0)
    result += tl.load(given + row * given_length + place, mask=place < given_length, other=0)
    # Rows that share an input write the same value, where no row reads.
    tl.store(inputs + column, newest)
    tl.store(y + row, result.to(y.dtype.element_ty))


def usable(device: torch.device) -> bool:
    """Whether steps on this device go through the kernel: CUDA, unless FUTUREFILL_TRITON=0.

    On other devices only Triton's interpreter can run it, which the tests do.
    """
    if _broken or os.environ.get(ENVIRONMENT) == "0":
        return False
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def step(
    x: Tensor,
    history: Tensor,
    filters: Tensor,
    given: Tensor,
    y: Tensor,
    rows: tuple[Tensor, Tensor],
    clock: int | Tensor,
    block: int | None,
) -> bool:
    """Take x as the input of time `clock` and write its output to y, one launch; False if not launched.

    `x (*C)`, `history (*C, ring)`, `filters (*F, L)`, `given (*O, g)` and `y (*O)`, all contiguous. The
    output is the sum over the inputs of the present block of `block` positions plus `given[t % block]`, or,
    where `block` is None, over all of the ring plus `given[t]` where there is one. `clock` may stand on the
    device; `rows`: for every output row its input row and its filter row. Nothing has been written when the
    result is False.
    """
    global _broken
    if y.numel() == 0:
        return True
    if _broken:
        return False
    try:
        # Triton launches on the current device, whatever its arguments are on.
        with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
            _step[(y.numel(),)](
                x,
                history,
                filters,
                given,
                y,
                *rows,
                clock,
                block or 0,
                history.shape[-1],
                filters.shape[-1],
                given.shape[-1],
                TILES=block is not None,
                STATIC=isinstance(clock, Tensor),
                TIMES=_TIMES,
                enable_fp_fusion=True,
            )
    except Exception as error:
        # Triton compiles on the user's machine, where a compiler may be missing; torch's own operators do
        # the same.
        _broken = True
        warnings.warn(f"the Triton kernel cannot be used: {error}", RuntimeWarning, stacklevel=3)
        return False
    return True
