"""Checks of tensor arguments: the one place for each, for CPU tensors and for the torch engine."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import increment_version

from futurefill_rs._args import shape_text, type_name

Function = TypeVar("Function", bound=Callable[..., Any])

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FLOAT_NAMES = "float16, bfloat16, float32 or float64"


def outside_graphs(function: Function) -> Function:
    """`function`, which `torch.compile` breaks its graph for and calls as it is, with all that it calls.

    For what reads memory or keeps states. Unlike `torch.compiler.disable` it loads no compiler where there is
    none.
    """
    outside = _disable_dynamo(function)

    @wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        return (outside if torch.compiler.is_compiling() else function)(*args, **options)

    return cast(Function, call)


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


def checked_input(value: Any, arg: str, precision: torch.dtype, device: torch.device) -> Tensor:
    """An input of a plan that computes in `precision` on `device`, detached.

    Nothing is computed in less precision than it came in: `TypeError` for more than the plan's.
    """
    if isinstance(value, Tensor) and value.is_complex():
        name = dtype_name(value.dtype)
        raise TypeError(
            f"{arg}: expected {FLOAT_NAMES}, got {name}: a complex input needs a plan with dtype={name}"
        )
    tensor = checked(value, arg)
    if tensor.dtype is torch.float64 and precision is not torch.float64:
        raise TypeError(
            f"{arg}: expected float32, the precision of this plan, or less, got float64: "
            f"plan with dtype=float64, or convert {arg} to float32"
        )
    check_device(tensor, arg, device)
    return tensor


def check_sequence(value: Tensor, arg: str, channels: tuple[int, ...]) -> None:
    """`ValueError` unless the shape is `(*channels, m)`."""
    if value.dim() != len(channels) + 1 or tuple(value.shape[:-1]) != channels:
        hint = _batch_hint(arg, tuple(value.shape[:-1]), channels)
        raise ValueError(f"{arg}: expected shape {shape_text(channels, 'm')}, got {tuple(value.shape)}{hint}")


def check_out(out: Any, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`out`, detached, where it can take a result of this shape and of the dtype and device of `like`."""
    if not isinstance(out, Tensor):
        raise TypeError(f"out: expected a torch tensor of {dtype_name(like.dtype)}, got {type_name(out)}")
    if out.dtype is not like.dtype:
        raise TypeError(f"out: expected {dtype_name(like.dtype)}, got {dtype_name(out.dtype)}")
    target = checked(out, "out")
    check_target(out, like.device, shape)
    return target


def check_target(out: Tensor, device: torch.device, shape: tuple[int, ...]) -> None:
    """`ValueError` unless a result of this shape on this device can be written there."""
    check_device(out, "out", device)
    check_shape(out, "out", shape)
    check_entries_apart(out, "out")
    if out.requires_grad:
        raise ValueError("out: expected a tensor that does not require grad: results are detached")


def wrote(out: Tensor, result: Tensor) -> Tensor:
    """`out`, whose memory now holds the result, after autograd has been told so."""
    increment_version(out)
    return out


def check_device(value: Tensor, arg: str, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(f"{arg}: expected device {device}, got {value.device}")


def check_shape(value: Tensor, arg: str, shape: tuple[int, ...]) -> None:
    got = tuple(value.shape)
    if got != shape:
        raise ValueError(f"{arg}: expected shape {shape}, got {got}{_batch_hint(arg, got, shape)}")


def _batch_hint(arg: str, got: tuple[int, ...], shape: tuple[int, ...]) -> str:
    """How to make a cache for inputs that are a batch of what this one takes."""
    batch = arg == "u" and len(got) > len(shape) and got[len(got) - len(shape) :] == shape
    return f": make the cache for a batch by new_cache({got})" if batch else ""


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


def is_fake(value: Tensor) -> bool:
    return isinstance(value, FakeTensor)


def to_host(values: Tensor) -> np.ndarray[Any, Any]:
    """A numpy copy; a fake tensor has no values, zeros stand for them."""
    if is_fake(values):
        return np.zeros(tuple(values.shape), dtype_name(values.dtype))
    array: np.ndarray[Any, Any] = values.detach().to("cpu", copy=True).numpy()
    return array


@outside_graphs
def borrowed(values: Tensor) -> np.ndarray[Any, Any]:
    """A CPU tensor's memory as a numpy array to read from, for tensors that may be weights.

    `Tensor.numpy` would forbid for good to resize the memory, as sharding does between two uses.
    """
    array: np.ndarray[Any, Any] = np.from_dlpack(values.detach().resolve_conj().resolve_neg())
    return array


def entries(value: Any, arg: str, count: int, device: torch.device, mask: bool) -> Tensor:
    """Entries of an axis of `count` as an int64 tensor of one axis (or a boolean mask), on `device`.

    A tensor that is not on the CPU is not read: its entries are checked by the device, if at all.
    """
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
            named = isinstance(value, np.ndarray) or array.ndim > 0
            got = str(array.dtype) if named else type_name(value)
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
