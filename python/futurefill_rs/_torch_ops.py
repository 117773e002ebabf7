"""Whole sequences at once: causal convolution of torch tensors as a registered, differentiable operator."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _core, _threads
from ._torch_args import (
    borrowed,
    broadcast,
    check_device,
    check_tensor,
    compute_dtype,
    is_fake,
    padded,
)

# Real elements of one chunk of rows: small enough to stay in a core's cache, or to bound a device's memory.
_CPU_CHUNK = 1 << 19
_DEVICE_CHUNK = 1 << 26


def fast_length(n: int) -> int:
    """The least length of at least n whose only prime factors are 2, 3 and 5."""
    best = 1 << max(n - 1, 0).bit_length()
    five = 1
    while five < best:
        three = five
        while three < best:
            two = three << max(-(-n // three) - 1, 0).bit_length()
            best = min(best, two)
            three *= 3
        five *= 5
    return max(best, 1)


class _Groups:
    """The axes of a result by who has them: input and filters (A), input alone (B), filters alone (K)."""

    def __init__(self, outer: tuple[int, ...], inputs: tuple[int, ...], filters: tuple[int, ...]) -> None:
        rank = len(outer)
        left, right = padded(inputs, rank), padded(filters, rank)
        both = [a for a in range(rank) if right[a] != 1 and left[a] != 1]
        own = [a for a in range(rank) if right[a] == 1]
        bank = [a for a in range(rank) if right[a] != 1 and left[a] == 1]
        self.rank = rank
        self.order = [*both, *own, *bank]
        self.counts = (len(both), len(own), len(bank))
        self.sizes = tuple(math.prod(outer[a] for a in axes) for axes in (both, own, bank))

    def rows(self, values: Tensor, *, batch: bool = True, kinds: bool = True) -> Tensor:
        """Values (.., n) as (A, B, K, n), with B or K of one where the values lack those axes."""
        n = values.shape[-1]
        sizes = (self.sizes[0], self.sizes[1] if batch else 1, self.sizes[2] if kinds else 1)
        full = values.reshape(*padded(tuple(values.shape[:-1]), self.rank), n)
        return full.permute(*self.order, self.rank).reshape(*sizes, n)


def causal_conv_fft(u: Tensor, filters: Tensor, length: int) -> Tensor:
    """The first `length` positions of `u (*C, T)` (zero after its end) convolved with `filters (*F, L)`.

    Both of one floating dtype (float32 or float64) and device -> `(*broadcast(C, F), length)`, contiguous.
    Every distinct input row and every distinct filter row is transformed once, in chunks of rows that bound
    the memory.
    """
    u, filters = u[..., :length], filters[..., :length]
    taken, lags = u.shape[-1], filters.shape[-1]
    outer = broadcast(tuple(u.shape[:-1]), tuple(filters.shape[:-1]), "u")
    if math.prod(outer) * length == 0 or taken == 0:
        return u.new_zeros((*outer, length))
    group = _Groups(outer, tuple(u.shape[:-1]), tuple(filters.shape[:-1]))
    rank, order = len(outer), group.order
    pairs, batch, kinds = group.sizes
    rows_u = group.rows(u, kinds=False)
    rows_f = group.rows(filters, batch=False)
    out = u.new_empty((*outer, length))
    arranged = out.permute(*order, rank)
    # Rows go straight to their place where the axes of one kind are neighbours, else by a copy at the end.
    direct = _merged(arranged, group.counts)
    rows_y = out.new_empty((pairs, batch, kinds, length)) if direct is None else direct
    # Beyond it the circular product overlaps positions that are asked for.
    n = fast_length(max(length, min(taken + lags - 1, length + lags - 1, length + taken - 1)))
    chunk = (_CPU_CHUNK if u.device.type == "cpu" else _DEVICE_CHUNK) // n
    step_pairs = max(min(chunk // max(kinds, 1), pairs), 1)
    step_batch = max(min(chunk // (step_pairs * max(kinds, 1)), batch), 1)
    for a in range(0, pairs, step_pairs):
        spectrum = torch.fft.rfft(rows_f[a : a + step_pairs], n)
        for b in range(0, batch, step_batch):
            block = torch.fft.rfft(rows_u[a : a + step_pairs, b : b + step_batch], n)
            product = torch.fft.irfft(block * spectrum, n)
            rows_y[a : a + step_pairs, b : b + step_batch].copy_(product[..., :length])
    if direct is None:
        arranged.copy_(rows_y.reshape(arranged.shape))
    return out


def _merged(values: Tensor, groups: tuple[int, int, int]) -> Tensor | None:
    """A view of shape (A, B, K, T), each group of axes as one; None where memory does not allow it."""
    shape: list[int] = []
    at = 0
    for count in groups:
        axes = range(at, at + count)
        at += count
        sizes = [(values.shape[a], values.stride(a)) for a in axes if values.shape[a] != 1]
        for (_, outer), (size, inner) in itertools.pairwise(sizes):
            if outer != size * inner:
                return None
        shape.append(math.prod(values.shape[a] for a in axes))
    return values.view(*shape, values.shape[-1])


def filter_grad_fft(grad: Tensor, u: Tensor, shape: Sequence[int]) -> Tensor:
    """`sum_t grad[.., t] u[.., t - j]` for every lag j, summed over the axes that `shape (*F, L)` lacks.

    `grad (*O, T)`, `u (*C, S)` of one dtype -> `(*F, L)`; u is zero after its end. The sum over a batch
    happens before the one inverse transform.
    """
    u = u[..., : grad.shape[-1]]
    outer, lags, length = tuple(grad.shape[:-1]), shape[-1], grad.shape[-1]
    result = u.new_zeros(tuple(shape))
    reach = min(lags, length)
    if math.prod(outer) * length * reach == 0:
        return result
    group = _Groups(outer, tuple(u.shape[:-1]), tuple(shape[:-1]))
    pairs, batch, kinds = group.sizes
    rows_g, rows_u = group.rows(grad), group.rows(u, kinds=False)
    n = fast_length(length + reach - 1)
    chunk = (_CPU_CHUNK if u.device.type == "cpu" else _DEVICE_CHUNK) // n
    step_pairs = max(min(chunk // max(kinds, 1), pairs), 1)
    step_batch = max(min(chunk // (step_pairs * max(kinds, 1)), batch), 1)
    rows_f = u.new_empty((pairs, 1, kinds, reach))
    for a in range(0, pairs, step_pairs):
        total = None
        for b in range(0, batch, step_batch):
            left = torch.fft.rfft(rows_g[a : a + step_pairs, b : b + step_batch], n)
            right = torch.fft.rfft(rows_u[a : a + step_pairs, b : b + step_batch], n)
            # A lazy conjugate would be lost where an operator runs below the dispatcher key that resolves it.
            part = (left * torch.conj_physical(right)).sum(1, keepdim=True)
            total = part if total is None else total.add_(part)
        assert total is not None
        rows_f[a : a + step_pairs].copy_(torch.fft.irfft(total, n)[..., :reach])
    # B stands second in the order and has no size here: A and K are the filters' own axes.
    inner = padded(tuple(shape[:-1]), group.rank)
    arranged = rows_f.reshape(*(inner[a] for a in group.order), reach)
    back = [group.order.index(a) for a in range(group.rank)]
    result[..., :reach].copy_(arranged.permute(*back, group.rank).reshape(*shape[:-1], reach))
    return result


def _on_host(*tensors: Tensor) -> bool:
    """Whether the compiled engine can read these tensors."""
    return all(t.device.type == "cpu" and not is_fake(t) for t in tensors)


def _convolve(u: Tensor, filters: Tensor, workers: int) -> Tensor:
    dtype = torch.promote_types(compute_dtype(u.dtype), compute_dtype(filters.dtype))
    x, taps = u.detach().to(dtype), filters.detach().to(dtype)
    if _on_host(x, taps):
        y = torch.from_numpy(_core.causal_conv(borrowed(x), borrowed(taps), workers=workers))
    else:
        y = causal_conv_fft(x, taps, x.shape[-1])
    return y.to(u.dtype)


@torch.library.custom_op("futurefill_rs::causal_conv", mutates_args=())
def _causal_conv(u: Tensor, filters: Tensor, workers: int) -> Tensor:
    return _convolve(u, filters, workers)


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
        for_upper = _conv(full, grad, ctx.workers).expand(upper.shape).to(upper.dtype)
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
    return _conv(_front(u, in_dims[0], rank), _front(filters, in_dims[1], rank), workers), 0


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
        return _product_rule(lambda a, b: _conv(a, b, ctx.workers), ctx, u, filters)


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


def _conv(u: Tensor, filters: Tensor, workers: int) -> Tensor:
    apply = _Conv.apply if _eager_autograd(u, filters) else _causal_conv
    result: Tensor = apply(u, filters, workers)
    return result


def _correlate(grad: Tensor, u: Tensor, shape: Sequence[int], workers: int) -> Tensor:
    apply = _Correlation.apply if _eager_autograd(grad, u) else _filter_grad
    result: Tensor = apply(grad, u, shape, workers)
    return result


def _check(value: Any, arg: str) -> None:
    check_tensor(value, arg)
    if value.dim() == 0:
        raise ValueError(f"{arg}: expected at least one axis, got shape ()")


def causal_conv(u: Tensor, filters: Tensor, workers: int | None = None) -> Tensor:
    """Causal convolution of whole sequences, differentiable in both arguments (twice, too) on every device.

    | argument | shape | |
    | --- | --- | --- |
    | `u` | `(*C, T)` | float16, bfloat16, float32 or float64; half types are computed in float32 |
    | `filters` | `(*F, L)` | lag 0 first, L at least 1, on u's device |
    | result | `(*broadcast(C, F), T)` | in u's dtype |

    `y[..., t] = sum_{j <= min(t, L-1)} filters[..., j] u[..., t-j]`. `workers`: threads on CPU, default
    `get_workers()`. The backward pass keeps `u` and `filters`, nothing else. Errors: `TypeError` for other
    types, `ValueError` for shapes that do not broadcast and for two devices. DTensors that are sharded along
    any axis but time convolve where they are.
    """
    _check(u, "u")
    _check(filters, "filters")
    if filters.shape[-1] == 0:
        raise ValueError(f"filters: expected at least 1 lag, got shape {tuple(filters.shape)}")
    check_device(filters, "filters", u.device)
    broadcast(tuple(u.shape[:-1]), tuple(filters.shape[:-1]), "u")
    threads = _threads.resolve(workers)
    if _is_dtensor(u) or _is_dtensor(filters):
        from . import _torch_dtensor

        return _torch_dtensor.causal_conv(u, filters, lambda a, b: _conv(a, b, threads))
    return _conv(u, filters, threads)


def _is_dtensor(values: Tensor) -> bool:
    """Whether this is a DTensor, without importing what makes one."""
    return type(values) is not Tensor and type(values).__module__.startswith("torch.distributed.tensor")


def futurefill(v: Tensor, w: Tensor) -> Tensor:
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
    result = _conv(padded_past, w, _threads.resolve(None))
    return result[..., past.shape[-1] :].to(v.dtype).contiguous()
