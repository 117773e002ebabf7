"""One kernel for one step of a pushed base block; without it the torch engine takes three operators."""

from __future__ import annotations

import contextlib
import os
import warnings

import torch
import triton  # type: ignore[import,unused-ignore]
import triton.language as tl  # type: ignore[import,unused-ignore]
from torch import Tensor

ENVIRONMENT = "FUTUREFILL_TRITON"
_ROWS, _TIMES = 64, 32
_broken = False


@triton.jit(do_not_specialize=["j"])  # type: ignore[untyped-decorator]
def _push(  # type: ignore[no-untyped-def]
    u,
    block_in,
    block_out,
    lags,
    y,
    input_row,
    filter_row,
    j,
    base,
    rows,
    rows_in,
    rows_filter,
    ROWS: tl.constexpr,
    TIMES: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lag = tl.program_id(1) * TIMES + tl.arange(0, TIMES)
    live = row < rows
    source = tl.load(input_row + row, mask=live, other=0)
    taps = tl.load(filter_row + row, mask=live, other=0)
    x = tl.load(u + source, mask=live, other=0).to(block_out.dtype.element_ty)
    inside = (lag < base - j)[:, None] & live[None, :]
    weight = tl.load(lags + lag[:, None].to(tl.int64) * rows_filter + taps[None, :], mask=inside, other=0)
    place = block_out + (j + lag)[:, None].to(tl.int64) * rows + row[None, :]
    total = tl.load(place, mask=inside, other=0) + x[None, :] * weight
    tl.store(place, total, mask=inside)
    if tl.program_id(1) == 0:
        # Rows that share an input write the same value.
        tl.store(block_in + tl.cast(j, tl.int64) * rows_in + source, x, mask=live)
        now = tl.sum(tl.where((lag == 0)[:, None], total, 0), 0)
        tl.store(y + row, now.to(y.dtype.element_ty), mask=live)


def usable(device: torch.device) -> bool:
    """Whether steps on this device go through the kernel: CUDA, unless FUTUREFILL_TRITON=0.

    On other devices only Triton's interpreter can run it, which the tests do.
    """
    if _broken or os.environ.get(ENVIRONMENT) == "0":
        return False
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def push(
    x: Tensor,
    block_in: Tensor,
    block_out: Tensor,
    lags: Tensor,
    y: Tensor,
    rows: tuple[Tensor, Tensor],
    j: int,
) -> bool:
    """`block_in[j] = x`, `block_out[j:] += x * lags`, `y = block_out[j]`, one launch; False if not launched.

    `block_in (b, *C)`, `block_out (b, *O)`, `lags (>= b, *F)`, `x (*C)` and `y (*O)`, all contiguous;
    `rows`: for every output row its input row and its filter row. Nothing has been written when the result
    is False.
    """
    global _broken
    base, count = block_out.shape[0], y.numel()
    if count == 0:
        return True
    grid = (-(-count // _ROWS), -(-(base - j) // _TIMES))
    try:
        # Triton launches on the current device, whatever its arguments are on.
        with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
            _push[grid](
                x,
                block_in,
                block_out,
                lags,
                y,
                *rows,
                j,
                base,
                count,
                x.numel(),
                lags[0].numel(),
                ROWS=_ROWS,
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
