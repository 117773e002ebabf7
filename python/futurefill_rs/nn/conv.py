"""Layers whose parameters are the filter itself."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from futurefill_rs.nn._base import Layer, Time
from futurefill_rs.nn._operators import Convolution, at_least_float32
from torch import Tensor, nn


def with_skip(filters: Tensor, skip: Tensor | None) -> Tensor:
    """Filters `(..., L)` with `skip` `(...)` added to lag 0: `conv(u, h) + skip * u` is one convolution."""
    if skip is None:
        return filters
    return torch.cat([filters[..., :1] + skip.to(filters.dtype).unsqueeze(-1), filters[..., 1:]], -1)


class CausalConv(Layer):
    """Depthwise causal convolution: `y[t] = sum_j weight[:, j] x[t-j] + bias`.

    Args:
        channels: features D of input and output.
        filter_length: lags L.
        bias: whether to add a learned constant per channel.

    Parameters: `weight` `(D, L)`, lag 0 first; `bias` `(D,)`. Sequences may be longer than the filters.
    """

    def __init__(
        self,
        channels: int,
        filter_length: int,
        bias: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, filter_length, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype)) if bias else None
        nn.init.normal_(self.weight, std=filter_length**-0.5)
        self._convolution = Convolution(self._filters, self._sources)

    @classmethod
    def from_filters(cls, filters: Tensor) -> CausalConv:
        """A layer with the given `(D, L)` filters."""
        if not isinstance(filters, Tensor) or filters.ndim != 2:
            raise ValueError(
                f"filters: expected a tensor of shape (D, L), got {getattr(filters, 'shape', filters)}"
            )
        layer = cls(*filters.shape, device=filters.device, dtype=filters.dtype)
        with torch.no_grad():
            layer.weight.copy_(filters)
        return layer

    @property
    def width(self) -> int:
        return self.weight.shape[0]

    def _filters(self, length: int | None) -> Tensor:
        return at_least_float32(self.weight[:, :length])

    def _sources(self) -> Iterable[Tensor]:
        return (self.weight,)

    def mix(self, x: Tensor, time: Time) -> Tensor:
        y: Tensor = time(self._convolution, x)
        return y if self.bias is None else y + self.bias
