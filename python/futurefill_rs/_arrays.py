"""Which library an array belongs to, without importing torch."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from typing_extensions import TypeIs

_is_tensor_type: dict[type, bool] = {}


def is_tensor(value: Any) -> TypeIs[torch.Tensor]:
    """Whether `value` is a torch tensor: only possible where the user has imported torch."""
    kind = type(value)
    known = _is_tensor_type.get(kind)
    if known is None:
        tensor = getattr(sys.modules.get("torch"), "Tensor", None)
        known = tensor is not None and issubclass(kind, tensor)
        _is_tensor_type[kind] = known
    return known


def library_of(array: Any) -> Any:
    """torch for a tensor, else numpy."""
    if is_tensor(array):
        import torch

        return torch
    return np
