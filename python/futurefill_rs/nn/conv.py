"""Layers whose parameters are the filter itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from futurefill_rs.nn.layer import Layer, dtype_of
from futurefill_rs.nn.operators.convolution import Convolution, LongFilter
from futurefill_rs.nn.operators.precision import at_least_float32
from futurefill_rs.nn.protocol import Time


def with_skip(filters: Tensor, skip: Tensor | None) -> Tensor:
    """Filters `(..., L)` with `skip` `(...)` added to lag 0: `conv(u, h) + skip * u` is one convolution."""
    if skip is None:
        return filters
    filters = at_least_float32(filters)
    first = filters[..., :1] + skip.to(filters.dtype).unsqueeze(-1)
    return torch.cat([first, filters[..., 1:]], -1)


def first_lags(filters: Tensor, length: int | None) -> Tensor:
    """The first `length` lags, or more: a graph for every length cannot ask whether there are as many."""
    return filters if torch.compiler.is_compiling() else filters[..., :length]


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
        return first_lags(self.weight, length)

    def mix(self, x: Tensor, time: Time) -> Tensor:
        y: Tensor = time(Convolution(LongFilter(self._plans, "weight", self._filters)), x)
        return y if self.bias is None else y + self.bias


class _LongKernel(nn.Module):
    def __init__(self, channels: int, width: int, l_max: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(channels, width, l_max) * 0.002)

    def forward(self, length: int | None) -> Tensor:
        return first_lags(self.kernel, length)


ACTIVATIONS: dict[str | None, type[nn.Module]] = {
    None: nn.Identity,
    "id": nn.Identity,
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}


class LongConv(Layer):
    """Long convolution of safari with an explicit, soft-thresholded kernel (Fu et al., 2023).

    `h = relu(|k| - lam) sign(k)`; `y = output_linear(activation(conv(x, h) + D x))`.

    Args:
        d_model: features H.
        l_max: lags, and the longest sequence `forward` takes.
        lam: the threshold.
        activation: "gelu", "relu", "silu", "tanh", "sigmoid" or "id".
        postact: what follows the output projection: "glu" or one of the activations; None: no projection at
            all.
        channels: kernels C per feature, whose outputs are projected together.
    """

    def __init__(
        self,
        d_model: int,
        l_max: int = 1024,
        *,
        lam: float = 0.1,
        activation: str | None = "gelu",
        postact: str | None = "glu",
        channels: int = 1,
    ) -> None:
        super().__init__()
        self.d_model, self.max_length, self.lam, self.channels = d_model, l_max, lam, channels
        self.D = nn.Parameter(torch.randn(channels, d_model))
        self.kernel = _LongKernel(channels, d_model, l_max)
        self.activation = _activation("activation", activation)
        self.output_linear = nn.Sequential()
        if postact == "glu":
            self.output_linear.extend([nn.Linear(channels * d_model, 2 * d_model), nn.GLU(-1)])
        elif postact is not None:
            last = _activation("postact", postact)
            self.output_linear.extend([nn.Linear(channels * d_model, d_model), last])

    @property
    def width(self) -> int:
        return self.d_model

    @property
    def input_dtype(self) -> torch.dtype | None:
        return dtype_of(self.output_linear[0]) if len(self.output_linear) else None

    def _filters(self, length: int | None) -> Tensor:
        k = at_least_float32(self.kernel(length))
        return with_skip(torch.relu(k.abs() - self.lam) * k.sign(), self.D)

    def mix(self, x: Tensor, time: Time) -> Tensor:
        convolution = Convolution(LongFilter(self._plans, "kernel", self._filters))
        y = time(convolution, x.unsqueeze(-2)).flatten(-2)
        out: Tensor = self.output_linear(self.activation(y))
        return out


def _activation(name: str, value: str | None) -> nn.Module:
    if value not in ACTIVATIONS:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, ACTIVATIONS))}, got {value!r}")
    return ACTIVATIONS[value]()
