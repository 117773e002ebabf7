"""Causal convolution as a registered operator: differentiable twice, in both modes, vmapped, compiled."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from futurefill_rs import _core
from futurefill_rs._args import broadcast, padded
from futurefill_rs._torch_args import borrowed, compute_dtype, is_fake
from futurefill_rs.torch_engine.fft import causal_conv_fft, filter_grad_fft, told


def _on_host(*tensors: Tensor) -> bool:
    """Whether the compiled engine can read these tensors."""
    return all(t.device.type == "cpu" and not is_fake(t) for t in tensors)


def _compute(u: Tensor, filters: Tensor, workers: int) -> Tensor:
    dtype = torch.promote_types(compute_dtype(u.dtype), compute_dtype(filters.dtype))
    x, taps = u.detach().to(dtype), filters.detach().to(dtype)
    if _on_host(x, taps):
        y = torch.from_numpy(_core.causal_conv(borrowed(x), borrowed(taps), workers=workers, progress=told()))
    else:
        y = causal_conv_fft(x, taps, x.shape[-1])
    return y.to(u.dtype)


@torch.library.custom_op("futurefill_rs::causal_conv", mutates_args=())
def _causal_conv(u: Tensor, filters: Tensor, workers: int) -> Tensor:
    return _compute(u, filters, workers)


@_causal_conv.register_fake
def _(u: Tensor, filters: Tensor, workers: int) -> Tensor:
    outer = broadcast(tuple(u.shape[:-1]), tuple(filters.shape[:-1]), "u")
    return u.new_empty((*outer, u.shape[-1]))


@torch.library.custom_op("futurefill_rs::filter_grad", mutates_args=())
def _filter_grad(grad: Tensor, u: Tensor, shape: Sequence[int], workers: int) -> Tensor:
    dtype = torch.promote_types(compute_dtype(grad.dtype), compute_dtype(u.dtype))
    upper, x = grad.detach().to(dtype), u.detach().to(dtype)
    reach = min(shape[-1], grad.shape[-1])
    nothing_to_sum = math.prod(grad.shape[:-1]) == math.prod(shape[:-1])
    if _on_host(upper, x) and (nothing_to_sum or 4 * x.numel() < upper.numel()):
        # The compiled engine is faster than three transforms, or than two where one has few rows.
        result = upper.new_zeros(tuple(shape))
        whole = (upper, x, result)
        # Entry by entry where there is a sum, so that it needs little memory.
        entries = [] if nothing_to_sum or upper.dim() == 1 else range(upper.shape[0])
        for piece, taps, target in [_entries(whole, i) for i in entries] or [whole]:
            back = _core.causal_conv(borrowed(piece.flip(-1)), borrowed(taps), workers=workers)
            part = torch.from_numpy(back).flip(-1)[..., :reach]
            target[..., :reach].add_(part.sum_to_size(target[..., :reach].shape))
        return result
    return filter_grad_fft(upper, x, shape)


def _entries(tensors: tuple[Tensor, ...], i: int) -> tuple[Tensor, ...]:
    """Entry i of the first tensor's first axis, and that of the others where they have such an axis."""
    rank = tensors[0].dim()
    return tuple(t[i : i + 1] if t.dim() == rank and t.shape[0] > 1 else t for t in tensors)


@_filter_grad.register_fake
def _(grad: Tensor, u: Tensor, shape: Sequence[int], workers: int) -> Tensor:
    dtype = torch.promote_types(compute_dtype(grad.dtype), compute_dtype(u.dtype))
    return u.new_empty(shape, dtype=dtype)


def _keep_conv(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    u, filters, ctx.workers = inputs
    _keep(ctx, u, filters, output.dtype)


def _keep_grad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, u, ctx.shape, ctx.workers = inputs
    _keep(ctx, grad, u, output.dtype)


def _keep(ctx: Any, a: Tensor, b: Tensor, dtype: torch.dtype) -> None:
    """The tensors for both modes of differentiation, and the result's dtype."""
    ctx.save_for_backward(a, b)
    ctx.save_for_forward(a, b)
    ctx.dtype = dtype


def _input_grad(grad: Tensor, filters: Tensor, like: Tensor, workers: int) -> Tensor:
    """Gradient for the input: inputs and filters change places in a convolution, so as for the filters."""
    return _correlate(grad, filters, tuple(like.shape), workers).to(like.dtype)


def _conv_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    u, filters = ctx.saved_tensors
    for_u = for_filters = None
    grad = grad.to(torch.promote_types(compute_dtype(u.dtype), compute_dtype(filters.dtype)))
    if ctx.needs_input_grad[0]:
        for_u = _input_grad(grad, filters, u, ctx.workers)
    if ctx.needs_input_grad[1]:
        for_filters = _correlate(grad, u, tuple(filters.shape), ctx.workers).to(filters.dtype)
    return for_u, for_filters, None


def _grad_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    # The filters' gradient is linear in both arguments, and its own gradient (*F, L) acts on each as a
    # filter.
    upper, u = ctx.saved_tensors
    for_upper = for_u = None
    grad = grad.to(torch.promote_types(compute_dtype(upper.dtype), compute_dtype(u.dtype)))
    if ctx.needs_input_grad[0]:
        missing = upper.shape[-1] - u.shape[-1]
        full = torch.nn.functional.pad(u.to(grad.dtype), (0, missing)) if missing else u.to(grad.dtype)
        for_upper = convolve(full, grad, ctx.workers).expand(upper.shape).to(upper.dtype)
    if ctx.needs_input_grad[1]:
        for_u = _input_grad(upper.to(grad.dtype), grad, u, ctx.workers)
    return for_upper, for_u, None, None


def _front(values: Tensor, axis: int | None, rank: int) -> Tensor:
    """The mapped axis in front (of one where there is none), the others padded to `rank` axes and time."""
    values = values.unsqueeze(0) if axis is None else values.movedim(axis, 0)
    shape = values.shape
    return values.reshape(shape[0], *padded(tuple(shape[1:-1]), rank), shape[-1])


def _conv_vmap(
    info: Any, in_dims: tuple[Any, ...], u: Tensor, filters: Tensor, workers: int
) -> tuple[Tensor, int]:
    rank = max(u.dim() - (in_dims[0] is not None), filters.dim() - (in_dims[1] is not None)) - 1
    return convolve(_front(u, in_dims[0], rank), _front(filters, in_dims[1], rank), workers), 0


def _grad_vmap(
    info: Any, in_dims: tuple[Any, ...], grad: Tensor, u: Tensor, shape: Sequence[int], workers: int
) -> tuple[Tensor, int]:
    rank = grad.dim() - (in_dims[0] is not None) - 1
    upper = _front(grad, in_dims[0], rank).expand(info.batch_size, *(-1,) * (rank + 1))
    full = (info.batch_size, *padded(tuple(shape[:-1]), rank), shape[-1])
    result = _correlate(upper, _front(u, in_dims[1], rank), full, workers)
    return result.reshape(info.batch_size, *shape), 0


_causal_conv.register_autograd(_conv_backward, setup_context=_keep_conv)
_causal_conv.register_vmap(_conv_vmap)
_filter_grad.register_autograd(_grad_backward, setup_context=_keep_grad)
_filter_grad.register_vmap(_grad_vmap)


def _product_rule(
    operator: Callable[[Tensor, Tensor], Tensor], ctx: Any, left: Tensor | None, right: Tensor | None
) -> Tensor:
    """The tangent of an operator that is linear in both saved tensors, from theirs; None stands for zero."""
    a, b = ctx.saved_tensors
    parts = [operator(left, b)] if left is not None else []
    parts += [operator(a, right)] if right is not None else []
    return sum(parts[1:], parts[0]).to(ctx.dtype)


class _Conv(torch.autograd.Function):
    """The operator for eager code: a custom operator's own autograd does not take part in torch.func."""

    forward = staticmethod(_causal_conv)
    setup_context = staticmethod(_keep_conv)
    backward = staticmethod(_conv_backward)
    vmap = staticmethod(_conv_vmap)

    @staticmethod
    def jvp(ctx: Any, u: Tensor | None, filters: Tensor | None, _: None) -> Tensor:
        return _product_rule(lambda a, b: convolve(a, b, ctx.workers), ctx, u, filters)


class _Correlation(torch.autograd.Function):
    forward = staticmethod(_filter_grad)
    setup_context = staticmethod(_keep_grad)
    backward = staticmethod(_grad_backward)
    vmap = staticmethod(_grad_vmap)

    @staticmethod
    def jvp(ctx: Any, grad: Tensor | None, u: Tensor | None, _: None, __: None) -> Tensor:
        return _product_rule(lambda a, b: _correlate(a, b, ctx.shape, ctx.workers), ctx, grad, u)


def _eager_autograd(a: Tensor, b: Tensor) -> bool:
    """Whether the slower autograd functions are needed: for gradients outside a compiler, in torch.func."""
    if torch.compiler.is_compiling():
        return False
    wanted = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    dual = forward_ad._current_level >= 0
    return wanted or dual or torch._C._functorch.peek_interpreter_stack() is not None


def convolve(u: Tensor, filters: Tensor, workers: int) -> Tensor:
    """`u (*C, T)` with `filters (*F, L)`, checked -> `(*broadcast(C, F), T)` in u's dtype."""
    apply = _Conv.apply if _eager_autograd(u, filters) else _causal_conv
    result: Tensor = apply(u, filters, workers)
    return result


def _correlate(grad: Tensor, u: Tensor, shape: Sequence[int], workers: int) -> Tensor:
    apply = _Correlation.apply if _eager_autograd(grad, u) else _filter_grad
    result: Tensor = apply(grad, u, shape, workers)
    return result
