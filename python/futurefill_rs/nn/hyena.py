"""Hyena (Poli et al., 2023) with implicit filters, and Monarch Mixer (Fu et al., 2023), which shares them."""

from __future__ import annotations

import math
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from futurefill_rs.nn.conv import with_skip
from futurefill_rs.nn.layer import Layer, dtype_of
from futurefill_rs.nn.operators.convolution import Convolution, LongFilter
from futurefill_rs.nn.operators.plans import sampled
from futurefill_rs.nn.operators.precision import HALVES, at_least_float32, widely
from futurefill_rs.nn.operators.short import ShortConvolution
from futurefill_rs.nn.protocol import Time, whole


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
        dtype = torch.get_default_dtype()
        z, t = (x.to(torch.get_default_device(), dtype) for x in positional_embedding(emb_dim, l_max))
        if learn:
            self.z = nn.Parameter(z)
        else:
            self.register_buffer("z", z)
        self.register_buffer("t", t)

    def forward(self, lags: Lags) -> tuple[Tensor, Tensor]:
        """z `(n, emb_dim)` and t `(n, 1)` of these lags.

        16 bits are too coarse for the plain grid: where a value is the grid's rounded, it stands for it.
        """
        z, t = self.z[0, lags], self.t[0, lags]
        if z.dtype in HALVES:
            at = lags if isinstance(lags, slice) else lags.cpu()
            grid, t = (x[0, at].to(z.device) for x in positional_embedding(z.shape[-1], self.z.shape[1]))
            z = torch.where(grid.to(z.dtype) == z, grid, z.float())
        return z, at_least_float32(t)


class _Modulation(nn.Module):
    deltas: Tensor

    def __init__(self, width: int, fast: float = 0.3, slow: float = 1.5, target: float = 1e-2) -> None:
        super().__init__()
        bounds = math.log(target) / slow, math.log(target) / fast
        self.register_buffer("deltas", torch.linspace(*bounds, width)[None, None])

    def forward(self, t: Tensor) -> Tensor:
        """The window `(n, width)` at times t `(n, 1)`."""
        return torch.exp(-t * at_least_float32(self.deltas[0]).abs())


SOME_LAGS = 1 << 14
"""Lags that are drawn at a time, where nothing has to be kept for a gradient."""

Lags = slice | Tensor
"""Lags as an index: a slice from 0, or some of them, ascending, 0 among them."""


def positional_embedding(emb_dim: int, l_max: int) -> tuple[Tensor, Tensor]:
    """z `(1, l_max, emb_dim)`: time and the real and imaginary parts of `exp(-i f w)`; t `(1, l_max, 1)`.

    In at least float32, on the CPU, whose rounding is that of the checkpoints.
    """
    dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
    grid = partial(torch.linspace, dtype=dtype, device="cpu")
    t = grid(0, 1, l_max)[None, :, None]
    bands = (emb_dim - 1) // 2
    w = 2 * math.pi * grid(0, l_max - 1, l_max)[None, :, None] / l_max
    f = grid(1e-4, bands - 1, bands)[None, None]
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
        parts: list[nn.Module] = [nn.Linear(emb_dim, order), _Sin(order, w, w_mod)]
        for _ in range(num_inner_mlps):
            parts += [nn.Linear(order, order), _Sin(order, w, w_mod)]
        # One parameter under all their names.
        for sine in parts[3::2]:
            sine.freq = parts[1].freq
        self.implicit_filter = nn.Sequential(*parts, nn.Linear(order, width, bias=False))
        self.modulation = _Modulation(width)

    def lags(self, lags: Lags) -> Tensor:
        """`(n, width)` in at least float32, without the skip."""
        z, t = self.pos_emb(lags)
        h = widely(self.implicit_filter, z)
        if self.normalized == "before":
            h = h / h.norm(p=1, dim=-1, keepdim=True)
        if self.modulate:
            h = h * (self.modulation(t) + self.shift)
        if self.normalized == "after":
            h = h / h.norm(p=1, dim=-1, keepdim=True)
        return h

    def forward(self, lags: Lags) -> Tensor:
        """The filters `(width, n)` at these lags, with `bias` at lag 0."""
        if isinstance(lags, Tensor) or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return with_skip(self.lags(lags).T, self.bias)
        # The network's inner features of a million lags would take more memory than the filters.
        length = self.l_max if lags.stop is None else min(lags.stop, self.l_max)
        filters: Tensor | None = None
        for start in range(0, length, SOME_LAGS):
            some = slice(start, min(start + SOME_LAGS, length))
            h = self.lags(some).T
            if filters is None:
                filters = h.new_empty(h.shape[0], length)
            filters[:, some] = h
        assert filters is not None
        filters[:, 0] += self.bias
        return filters

    def signature(self, length: int | None) -> tuple[Tensor, ...]:
        """What the first `length` lags depend on: the embedding at all of them, the rest at some."""
        z, t = self.pos_emb(slice(length))
        return z, t, self(sampled(len(z), z.device))


class _ShortFilter(nn.Module):
    """Upstream's depthwise `Conv1d` by its parameters: the LAST tap is the current position."""

    def __init__(self, width: int, order: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, 1, order))
        self.bias = nn.Parameter(torch.empty(width))
        bound = order**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def _taps(self) -> Tensor:
        return self.weight[:, 0].flip(-1).T

    def forward(self, u: Tensor, *, time: Time = whole) -> Tensor:
        y: Tensor = time(ShortConvolution(self._taps, self.bias), u)
        return y


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
        self.in_proj = nn.Linear(d_model, (order + 1) * d_model)
        self.out_proj = nn.Linear(d_model, d_model)
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

    @property
    def width(self) -> int:
        return self.d_model

    @property
    def input_dtype(self) -> torch.dtype | None:
        return dtype_of(self.in_proj)

    def _of_order(self, i: int, filters: Tensor) -> Tensor:
        """The part of `((N - 1) D, n)` that belongs to order i, `(D, n)`."""
        if self.layout == "v o":
            return filters[i :: self.order - 1]
        return filters[i * self.d_model : (i + 1) * self.d_model]

    def _filter(self, i: int) -> LongFilter:
        def filters(length: int | None) -> Tensor:
            return self._of_order(i, self.filter_fn(slice(length)))

        def signature(length: int | None) -> tuple[Tensor, ...]:
            *grid, some = self.filter_fn.signature(length)
            return *grid, self._of_order(i, some)

        return LongFilter(self._plans, f"order {i}", filters, signature)

    def mix(self, x: Tensor, time: Time) -> Tensor:
        z = self.short_filter(self.in_proj(x), time=time)
        first, *gates, v = z.chunk(self.order + 1, -1)
        for i, gate in enumerate(reversed(gates)):
            v = time(Convolution(self._filter(i)), v * gate)
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
        self.in_linear = nn.Linear(d_model, 3 * d_model)
        self.out_linear = nn.Linear(d_model, d_model)
        self.short_filter = _ShortFilter(3 * d_model, 3)

    @property
    def width(self) -> int:
        return self.d_model

    @property
    def input_dtype(self) -> torch.dtype | None:
        return dtype_of(self.in_linear)

    def mix(self, x: Tensor, time: Time) -> Tensor:
        x1, x2, v = self.short_filter(self.in_linear(x), time=time).chunk(3, -1)
        y = time(self._convolution("gated", self.filter_fn), v * x1) * x2
        if self.filter_fn2 is not None:
            y = y + time(self._convolution("around", self.filter_fn2), x)
        out: Tensor = self.out_linear(y)
        return out

    def _convolution(self, name: str, filter_fn: HyenaFilter) -> Convolution:
        return Convolution(LongFilter(self._plans, name, partial(_first, filter_fn), filter_fn.signature))


def _first(filter_fn: HyenaFilter, length: int | None) -> Tensor:
    filters: Tensor = filter_fn(slice(length))
    return filters
