"""The stateless functions on tensors: arguments are checked here, the operator is in `autograd`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from futurefill_rs import _threads
from futurefill_rs._args import broadcast
from futurefill_rs._interface import Progress
from futurefill_rs._torch_args import check_device, check_out, check_tensor, wrote
from futurefill_rs.torch_engine.autograd import convolve
from futurefill_rs.torch_engine.fft import telling


def _check(value: Any, arg: str) -> None:
    check_tensor(value, arg)
    if value.dim() == 0:
        raise ValueError(f"{arg}: expected at least one axis, got shape ()")


def causal_conv(
    u: Tensor,
    filters: Tensor,
    workers: int | None = None,
    *,
    out: Tensor | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Causal convolution of whole sequences, differentiable in both arguments (twice, too) on every device.

    | argument | shape | |
    | --- | --- | --- |
    | `u` | `(*C, T)` | float16, bfloat16, float32 or float64; half types are computed in float32 |
    | `filters` | `(*F, L)` | lag 0 first, L at least 1, on u's device |
    | result | `(*broadcast(C, F), T)` | in u's dtype |

    Computed in the higher of both precisions.
    `y[..., t] = sum_{j <= min(t, L-1)} filters[..., j] u[..., t-j]`. `workers`: threads on CPU, default
    `get_workers()`. The backward pass keeps `u` and `filters`, nothing else. Errors: `TypeError` for other
    types, `ValueError` for shapes that do not broadcast and for two devices. DTensors that are sharded along
    any axis but time convolve where they are. `out` takes the result, which is then not differentiable;
    `progress` is called with done and total.
    """
    _check(u, "u")
    _check(filters, "filters")
    if filters.shape[-1] == 0:
        raise ValueError(f"filters: expected at least 1 lag, got shape {tuple(filters.shape)}")
    check_device(filters, "filters", u.device)
    outer = broadcast(tuple(u.shape[:-1]), tuple(filters.shape[:-1]), "u")
    threads = _threads.resolve(workers)
    target = None if out is None else check_out(out, u, (*outer, u.shape[-1]))
    if target is not None and torch.is_grad_enabled() and (u.requires_grad or filters.requires_grad):
        raise ValueError(
            "out: expected none where u or filters require grad: the result is not differentiable"
        )
    with telling(progress):
        if _is_dtensor(u) or _is_dtensor(filters):
            from futurefill_rs.torch_engine import dtensor

            y: Tensor = dtensor.causal_conv(u, filters, lambda a, b: convolve(a, b, threads))
        else:
            y = convolve(u, filters, threads)
    return y if target is None or out is None else wrote(out, target.copy_(y))


def _is_dtensor(values: Tensor) -> bool:
    """Whether this is a DTensor, without importing what makes one."""
    return type(values) is not Tensor and type(values).__module__.startswith("torch.distributed.tensor")


def futurefill(v: Tensor, w: Tensor, *, progress: Progress | None = None) -> Tensor:
    """The effect of past inputs on future outputs: the paper's FutureFill, differentiable in both arguments.

    `v (*B, t1)`, `w (*B, t2)` -> `(*B, t2 - 1)` in v's dtype: entry s (from 1) is
    `sum_{i=1}^{t2-s} v[t1-i+1] w[s+i]`, `numpy.convolve(v, w)[t1 : t1 + t2 - 1]`. Leading axes broadcast.
    Errors as for `causal_conv`.
    """
    _check(v, "v")
    _check(w, "w")
    if w.shape[-1] == 0:
        raise ValueError(f"w: expected at least 1 lag, got shape {tuple(w.shape)}")
    check_device(w, "w", v.device)
    outer = broadcast(tuple(v.shape[:-1]), tuple(w.shape[:-1]), "v")
    ahead = w.shape[-1] - 1
    if ahead == 0 or v.shape[-1] == 0:
        return v.new_zeros((*outer, ahead))
    # Inputs that lie further back than the filter reaches have no effect.
    past = v[..., -ahead:]
    padded_past = torch.nn.functional.pad(past, (0, ahead))
    if v.device.type != "mps":
        # Of filters that die out the future has little, and the transform's rounding is that of the whole.
        padded_past = padded_past.double()
    with telling(progress):
        result = convolve(padded_past, w, _threads.resolve(None))
    return result[..., past.shape[-1] :].to(v.dtype).contiguous()
