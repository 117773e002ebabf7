"""Checks of tensor arguments shared by the torch engine and the torch operators."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FLOAT_NAMES = "float16, bfloat16, float32 or float64"


def type_name(value: object) -> str:
    """Name of a type as a user knows it: `numpy.ndarray`, `int`."""
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_tensor(value: Any, arg: str) -> None:
    """`TypeError` unless `value` is a strided real floating tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{arg}: expected a torch tensor of {FLOAT_NAMES}, got {type_name(value)}")
    if value.dtype not in FLOATS:
        raise TypeError(f"{arg}: expected {FLOAT_NAMES}, got {dtype_name(value.dtype)}")
    if value.layout is not torch.strided or value.is_nested:
        got = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{arg}: expected a strided tensor, got {got}")


def checked(value: Any, arg: str) -> Tensor:
    """The tensor, detached; errors as of `check_tensor`."""
    check_tensor(value, arg)
    result: Tensor = value.detach()
    return result


def check_device(value: Tensor, arg: str, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(f"{arg}: expected device {device}, got {value.device}")


def check_shape(value: Tensor, arg: str, shape: tuple[int, ...]) -> None:
    if value.shape != shape:
        raise ValueError(f"{arg}: expected shape {shape}, got {tuple(value.shape)}")


def check_entries_apart(value: Tensor, arg: str) -> None:
    """`ValueError` where entries share memory, or might by their strides."""
    if value.is_contiguous():
        return
    reach = 0
    for stride, axis in sorted(zip(value.stride(), value.shape, strict=True)):
        if axis > 1:
            if stride <= reach:
                got = f"shape {tuple(value.shape)} and strides {value.stride()}"
                raise ValueError(f"{arg}: expected memory of its own for every entry, got {got}")
            reach += stride * (axis - 1)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision a computation on this dtype runs in: half types in float32."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def size(value: Any, arg: str, least: int) -> int:
    """An integer of at least `least` and below 2**63."""
    expected = {0: "a non-negative integer", 1: "a positive integer"}.get(
        least, f"an integer of at least {least}"
    )
    if isinstance(value, bool):
        raise TypeError(f"{arg}: expected {expected}, got bool")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{arg}: expected {expected}, got {type_name(value)}") from None
    if not least <= number < 2**63:
        raise ValueError(f"{arg}: expected {expected} below 2**63, got {number}")
    return number


def shape_of(value: Any, arg: str) -> tuple[int, ...]:
    """A shape from a sequence of sizes or from one size."""
    if isinstance(value, int) and not isinstance(value, bool):
        return (size(value, arg, 0),)
    if not isinstance(value, Iterable):
        raise TypeError(f"{arg}: expected a shape (tuple of integers), got {type_name(value)}")
    return tuple(size(axis, arg, 0) for axis in value)


def broadcast(inputs: tuple[int, ...], filters: tuple[int, ...], arg: str) -> tuple[int, ...]:
    """numpy's broadcasting of an input shape with the filters' shape."""
    rank = max(len(inputs), len(filters))
    pairs = zip(padded(inputs, rank), padded(filters, rank), strict=True)
    out = []
    for a, b in pairs:
        if a != b and 1 not in (a, b):
            raise ValueError(f"{arg}: expected shape broadcastable to {filters}, got {inputs}")
        out.append(b if a == 1 else a)
    return tuple(out)


def padded(shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """The shape with axes of one in front, `rank` axes in all."""
    return (1,) * (rank - len(shape)) + tuple(shape)


def is_fake(value: Tensor) -> bool:
    return isinstance(value, FakeTensor)


def to_host(values: Tensor) -> np.ndarray[Any, Any]:
    """A numpy copy; a fake tensor has no values, zeros stand for them."""
    if is_fake(values):
        return np.zeros(tuple(values.shape), dtype_name(values.dtype))
    array: np.ndarray[Any, Any] = values.detach().to("cpu", copy=True).numpy()
    return array


def borrowed(values: Tensor) -> np.ndarray[Any, Any]:
    """A CPU tensor's memory as a numpy array to read from, for tensors that may be weights.

    `Tensor.numpy` would forbid for good to resize the memory, as sharding does between two uses.
    """
    array: np.ndarray[Any, Any] = np.from_dlpack(values.detach().resolve_conj().resolve_neg())
    return array
