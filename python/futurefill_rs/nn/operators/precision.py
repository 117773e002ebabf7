"""Filters are computed in at least float32, whatever the weights have and whatever is cast around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

HALVES = (torch.bfloat16, torch.float16)
T = TypeVar("T")
A = TypeVar("A")


def at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in HALVES else x


def autocasting(device: torch.device) -> bool:
    """Whether autocast is on for the device; torch knows none for tensors without values."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def precisely(function: Callable[[A], T], argument: A, device: torch.device) -> T:
    """`function(argument)` without autocast on the device."""
    if not autocasting(device):
        return function(argument)
    with torch.autocast(device.type, enabled=False):
        return function(argument)


def widely(network: nn.Module, x: Tensor) -> Tensor:
    """`network(x)` as if its weights were of 32 bits, through all its hooks and adapters."""
    if all(p.dtype not in HALVES for p in network.parameters()):
        y: Tensor = network(x)
        return y
    with _Widening():
        y = network(x)
    return y


class _Widening(TorchFunctionMode):
    """Every torch function finds float32 where tensors of 16 bits are."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        return function(
            *(_widened(value) for value in args), **{key: _widened(value) for key, value in kwargs.items()}
        )


def _widened(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(map(_widened, value)) if type(value) in (list, tuple) else value
    if not isinstance(value, Tensor):
        return value
    if type(value).__module__.partition(".")[0] == "torch":
        return at_least_float32(value)
    # A quantised weight, which a cast may not reach.
    dequantize = getattr(value, "dequantize", None)
    return at_least_float32(dequantize()) if dequantize and value.dtype in HALVES else value
