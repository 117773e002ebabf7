"""Hyena (Poli et al., 2023) with implicit filters, and Monarch Mixer (Fu et al., 2023), which shares them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from futurefill_rs.nn._base import Layer, Time, dtype_of
from futurefill_rs.nn._linear import Linear
from futurefill_rs.nn._operators import Convolution, ShortConvolution, at_least_float32
from futurefill_rs.nn.conv import with_skip


class _Sin(nn.Module):
    def __init__(self, width: int, w: float, w_mod: float = 1) -> None:
        super().__init__()
        self.freq = nn.Parameter(torch.full((1, width), float(w)))
        self.w_mod = w_mod

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(at_least_float32(self.w_mod * self.freq) * x)


class _PositionalEmbedding(nn.Module):
    z: Tensor
    t: Tensor

    def __init__(self, emb_dim: int, l_max: int, learn: bool) -> None:
        super().__init__()
        z, t = positional_embedding(emb_dim, l_max)
        if learn:
            self.z = nn.Parameter(z)
        else:
            self.register_buffer("z", z)
        self.register_buffer("t", t)

    def exact(self) -> tuple[Tensor, Tensor]:
        """z and t; where 16 bits hold the plain grid, which they are too coarse for, the grid itself."""
        z, t = self.z, self.t
        if z.dtype in (torch.float16, torch.bfloat16):
            grid, time = (x.to(z.device) for x in positional_embedding(z.shape[-1], z.shape[1]))
            t = time
            z = torch.where((grid.to(z.dtype) == z).all(), grid, z.float())
        return z, t


class _Modulation(nn.Module):
    deltas: Tensor

    def __init__(self, width: int, fast: float = 0.3, slow: float = 1.5, target: float = 1e-2) -> None:
        super().__init__()
        bounds = math.log(target) / slow, math.log(target) / fast
        self.register_buffer("deltas", torch.linspace(*bounds, width)[None, None])


def positional_embedding(emb_dim: int, l_max: int) -> tuple[Tensor, Tensor]:
    """z `(1, l_max, emb_dim)`: time and the real and imaginary parts of `exp(-i f w)`; t `(1, l_max, 1)`."""
    t = torch.linspace(0, 1, l_max)[None, :, None]
    bands = (emb_dim - 1) // 2
    w = 2 * math.pi * torch.linspace(0, l_max - 1, l_max)[None, :, None] / l_max
    f = torch.linspace(1e-4, bands - 1, bands)[None, None]
    return torch.cat([t, torch.cos(f * w), -torch.sin(f * w)], -1), t


class HyenaFilter(nn.Module):
    """Filters that a small network of sines draws over time, times a decaying window, and their skips `bias`.

    Args:
        width: filters.
        emb_dim: features of the embedding of time, odd and at least 3.
        order: width of the network.
        l_max: lags.
        w, w_mod: initial and fixed factor of the sines' frequencies.
        modulate, shift: whether there is a window, and the constant added to it.
        normalized: "before" or "after" the window: divide by the sum of absolute values over the filters.
    """

    def __init__(
        self,
        width: int,
        l_max: int,
        *,
        emb_dim: int = 3,
        order: int = 16,
        num_inner_mlps: int = 2,
        w: float = 1,
        w_mod: float = 1,
        modulate: bool = True,
        shift: float = 0.0,
        normalized: Literal["before", "after"] | None = None,
        learn_embedding: bool = True,
    ) -> None:
        super().__init__()
        if emb_dim < 3 or emb_dim % 2 == 0:
            raise ValueError(f"emb_dim: expected an odd number, 3 or more, got {emb_dim}")
        self.l_max, self.modulate, self.shift, self.normalized = l_max, modulate, shift, normalized
        self.bias = nn.Parameter(torch.randn(width))
        self.pos_emb = _PositionalEmbedding(emb_dim, l_max, learn_embedding)
        parts: list[nn.Module] = [Linear(emb_dim, order), _Sin(order, w, w_mod)]
        for _ in range(num_inner_mlps):
            parts += [Linear(order, order), _Sin(order, w, w_mod)]
        # One parameter under all their names.
        for sine in parts[3::2]:
            sine.freq = parts[1].freq
        self.implicit_filter = nn.Sequential(*parts, Linear(order, width, bias=False))
        self.modulation = _Modulation(width)

    def lags(self, length: int | None) -> Tensor:
        """`(L, width)` in at least float32."""
        z, t = self.pos_emb.exact()
        h, t = at_least_float32(z[0, :length]), at_least_float32(t[0, :length])
        for part in self.implicit_filter:
            if isinstance(part, nn.Linear):
                bias = None if part.bias is None else at_least_float32(part.bias)
                h = F.linear(h, at_least_float32(part.weight), bias)
            else:
                h = part(h)
        if self.normalized == "before":
            h = h / h.norm(p=1, dim=-1, keepdim=True)
        if self.modulate:
            h = h * (torch.exp(-t * at_least_float32(self.modulation.deltas[0]).abs()) + self.shift)
        if self.normalized == "after":
            h = h / h.norm(p=1, dim=-1, keepdim=True)
        return h

    def sources(self) -> Iterable[Tensor]:
        return (*self.parameters(), *self.buffers())


class _ShortFilter(nn.Conv1d):
    """The parameters of upstream's depthwise filter: the LAST tap is the current position."""

    def __init__(self, width: int, order: int) -> None:
        super().__init__(width, width, order, groups=width, padding=order - 1)

    def taps(self) -> Tensor:
        return self.weight[:, 0].flip(-1).T

    def bias_(self) -> Tensor | None:
        return self.bias


class HyenaOperator(Layer):
    """Hyena operator of safari and HyenaDNA: `order - 1` long convolutions with gates between them.

    Args:
        d_model: features D.
        l_max: lags of the long filters, and the longest sequence `forward` takes.
        order: N; N - 1 long convolutions run one after another.
        emb_dim, filter_order, num_inner_mlps, w, modulate, modulation_shift, normalized: see `HyenaFilter`;
        the
            shift is 0 in safari and 0.05 in HyenaDNA.
        short_filter_order: taps of the short filter on all `(N + 1) D` projections.
        layout: how filters and skips of the orders share one axis: "v o" (safari: channel first) or "o d"
            (HyenaDNA: order first); alike for order 2.
    """

    def __init__(
        self,
        d_model: int,
        l_max: int,
        order: int = 2,
        *,
        emb_dim: int = 3,
        filter_order: int = 64,
        num_inner_mlps: int = 2,
        short_filter_order: int = 3,
        w: float = 1,
        modulate: bool = True,
        modulation_shift: float = 0.0,
        normalized: bool = False,
        layout: str = "v o",
        learn_embedding: bool = True,
    ) -> None:
        super().__init__()
        if order < 2:
            raise ValueError(f"order: expected 2 or more, got {order}")
        if layout not in ("v o", "o d"):
            raise ValueError(f"layout: expected 'v o' or 'o d', got {layout!r}")
        self.d_model, self.max_length, self.order, self.layout = d_model, l_max, order, layout
        self.in_proj = Linear(d_model, (order + 1) * d_model)
        self.out_proj = Linear(d_model, d_model)
        self.short_filter = _ShortFilter((order + 1) * d_model, short_filter_order)
        self.filter_fn = HyenaFilter(
            (order - 1) * d_model,
            l_max,
            emb_dim=emb_dim,
            order=filter_order,
            num_inner_mlps=num_inner_mlps,
            w=w,
            modulate=modulate,
            shift=modulation_shift,
            normalized="before" if normalized else None,
            learn_embedding=learn_embedding,
        )
        self._short = ShortConvolution(self.short_filter.taps, self.short_filter.bias_)
        self._long = [
            Convolution(partial(self._filters, i), self.filter_fn.sources) for i in range(order - 1)
        ]

    @property
    def width(self) -> int:
        return self.d_model

    @property
    def input_dtype(self) -> torch.dtype | None:
        return dtype_of(self.in_proj)

    def _of_order(self, x: Tensor, i: int) -> Tensor:
        """The part of x `(..., (N - 1) D)` that belongs to order i."""
        if self.layout == "v o":
            return x[..., i :: self.order - 1]
        return x[..., i * self.d_model : (i + 1) * self.d_model]

    def _filters(self, i: int, length: int | None) -> Tensor:
        lags = self._of_order(self.filter_fn.lags(length), i)
        return with_skip(lags.T, self._of_order(self.filter_fn.bias, i))

    def mix(self, x: Tensor, time: Time) -> Tensor:
        first, *gates, v = time(self._short, self.in_proj(x)).chunk(self.order + 1, -1)
        for convolution, gate in zip(self._long, reversed(gates), strict=True):
            v = time(convolution, v * gate)
        y: Tensor = self.out_proj(v * first)
        return y


class MonarchMixer(Layer):
    """Causal sequence mixer of Monarch Mixer: one gated long convolution, and one around it from input to
    output.

    Args:
        d_model: features D.
        l_max: lags, and the longest sequence `forward` takes.
        hyena_emb_dim, hyena_filter_order, hyena_w, hyena_w_mod: see `HyenaFilter`.
        residual_long_conv: whether the second convolution exists.
    """

    def __init__(
        self,
        d_model: int,
        l_max: int = 128,
        *,
        hyena_emb_dim: int = 3,
        hyena_filter_order: int = 16,
        hyena_w: float = 10,
        hyena_w_mod: float = 1,
        residual_long_conv: bool = False,
    ) -> None:
        super().__init__()
        self.d_model, self.max_length = d_model, l_max

        def make_filter() -> HyenaFilter:
            return HyenaFilter(
                d_model,
                l_max,
                emb_dim=hyena_emb_dim,
                order=hyena_filter_order,
                w=hyena_w,
                w_mod=hyena_w_mod,
            )

        self.filter_fn = make_filter()
        self.filter_fn2 = make_filter() if residual_long_conv else None
        self.in_linear = Linear(d_model, 3 * d_model)
        self.out_linear = Linear(d_model, d_model)
        self.short_filter = _ShortFilter(3 * d_model, 3)
        self._short = ShortConvolution(self.short_filter.taps, self.short_filter.bias_)
        self._gated = Convolution(partial(_skip_filters, self.filter_fn), self.filter_fn.sources)
        self._around = (
            None
            if self.filter_fn2 is None
            else Convolution(partial(_skip_filters, self.filter_fn2), self.filter_fn2.sources)
        )

    @property
    def width(self) -> int:
        return self.d_model

    @property
    def input_dtype(self) -> torch.dtype | None:
        return dtype_of(self.in_linear)

    def mix(self, x: Tensor, time: Time) -> Tensor:
        x1, x2, v = time(self._short, self.in_linear(x)).chunk(3, -1)
        y = time(self._gated, v * x1) * x2
        if self._around is not None:
            y = y + time(self._around, x)
        out: Tensor = self.out_linear(y)
        return out


def _skip_filters(filter_fn: HyenaFilter, length: int | None) -> Tensor:
    return with_skip(filter_fn.lags(length).T, filter_fn.bias)
