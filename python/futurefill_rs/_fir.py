"""Filters of finite response, whole signals or chunk by chunk, as `scipy.signal.lfilter` has them."""

from __future__ import annotations

from typing import Any, SupportsIndex, overload

import numpy as np

from futurefill_rs import _api
from futurefill_rs._args import index, type_name
from futurefill_rs._arrays import is_tensor, library_of

_ALLOWED = ("float32", "float64", "complex64", "complex128")


@overload
def fir(b: Any, x: Any, zi: None = None, axis: int = -1, *, workers: SupportsIndex | None = None) -> Any: ...
@overload
def fir(
    b: Any, x: Any, zi: Any, axis: int = -1, *, workers: SupportsIndex | None = None
) -> tuple[Any, Any]: ...
def fir(b: Any, x: Any, zi: Any = None, axis: int = -1, *, workers: SupportsIndex | None = None) -> Any:
    """Filter along one axis, ``y[n] = sum_j b[j] x[n-j]``: ``scipy.signal.lfilter(b, 1, x, axis, zi)``.

    | argument | shape | |
    | --- | --- | --- |
    | b | ``(L,)`` | taps, L >= 1 |
    | x | any | the signal; numpy or torch, as b |
    | zi | x's, but L - 1 along `axis`; axes of 1 broadcast | what went before, in lfilter's form |
    | result | x's | `y`, or ``(y, zf)`` where `zi` was given: `zf` is the next chunk's `zi` |

    Chunks of any length, one after the other, give what the whole signal gives, within rounding. Computed in
    the common dtype of all arguments, at least float32; integers may be signals. workers: as `causal_conv`.
    Raises TypeError for other dtypes, ValueError for shapes that do not fit.

    >>> import numpy as np, futurefill_rs as ff
    >>> y, zf = ff.fir(np.array([1.0, 0.5]), np.array([1.0, 0.0, 2.0]), zi=np.array([10.0]))
    >>> y.round(12), zf
    (array([11. ,  0.5,  2. ]), array([1.]))
    """
    arrays = [b, x] if zi is None else [b, x, zi]
    tensors = [is_tensor(array) for array in arrays]
    if any(tensors) and not all(tensors):
        names = [type_name(array) for array in arrays]
        raise TypeError(f"fir: expected arrays of one library, got {', '.join(names)}")
    if not any(tensors):
        arrays = [np.asarray(array) for array in arrays]
    dtype = _common(arrays)
    b, x, *state = [_cast(array, dtype) for array in arrays]
    if b.ndim != 1 or b.shape[0] == 0:
        raise ValueError(f"b: expected shape (L,) with L at least 1, got {tuple(b.shape)}")
    if x.ndim == 0:
        raise ValueError("x: expected at least one axis, got shape ()")
    axis = _axis(axis, x.ndim)
    order, back = _moves(axis, x.ndim)
    x = _transposed(x, order)
    y = _api.causal_conv(x, b, workers=workers)
    if zi is None:
        return _transposed(y, back)
    taps, length = b.shape[0], x.shape[-1]
    before = _state(state[0], x, order, taps - 1, axis)
    reach = min(taps - 1, length)
    y[..., :reach] += before[..., :reach]
    after = _api.futurefill(x, b)
    after[..., : taps - 1 - reach] += before[..., reach:]
    return _transposed(y, back), _transposed(after, back)


def _axis(axis: Any, rank: int) -> int:
    expected = f"an axis of a signal with {rank} axes"
    number = index(axis, "axis", expected)
    if not -rank <= number < rank:
        raise ValueError(f"axis: expected {expected}, got {number}")
    return number % rank


def _moves(axis: int, rank: int) -> tuple[list[int], list[int]]:
    """The order of axes that puts `axis` last, and the one that puts it back."""
    order = [*(at for at in range(rank) if at != axis), axis]
    return order, sorted(range(rank), key=order.__getitem__)


def _state(zi: Any, x: Any, order: list[int], taps: int, axis: int) -> Any:
    """What went before as `(*x.shape[:-1], taps)`."""
    outer = tuple(x.shape[:-1])
    expected = [*outer]
    expected.insert(axis, taps)
    if zi.ndim == len(order):
        moved = _transposed(zi, order)
        fits = all(a in (1, b) for a, b in zip(moved.shape[:-1], outer, strict=True))
        if fits and moved.shape[-1] == taps:
            library = library_of(x)
            return library.broadcast_to(moved, (*outer, taps))
    raise ValueError(f"zi: expected shape {tuple(expected)}, got {tuple(zi.shape)}")


def _common(arrays: list[Any]) -> Any:
    """The common dtype of all arrays, at least float32."""
    library = library_of(arrays[0])
    if library is np:
        dtype = np.result_type(*arrays, np.float32)
    else:
        dtype = library.float32
        for array in arrays:
            dtype = library.promote_types(dtype, array.dtype)
    name = str(dtype).removeprefix("torch.")
    if name not in _ALLOWED:
        raise TypeError(f"fir: expected numbers that are {', '.join(_ALLOWED)} together, got {name}")
    return dtype


def _cast(array: Any, dtype: Any) -> Any:
    return array.to(dtype) if is_tensor(array) else array.astype(dtype, copy=False)


def _transposed(array: Any, order: list[int]) -> Any:
    return array.permute(order) if is_tensor(array) else array.transpose(order)
