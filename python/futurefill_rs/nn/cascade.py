"""The gated convolution of StripedHyena 1 and 2 (Poli et al., 2023; Ku et al., 2025)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from futurefill_rs.nn.conv import first_lags, with_skip
from futurefill_rs.nn.layer import Layer
from futurefill_rs.nn.operators.convolution import Convolution, LongFilter
from futurefill_rs.nn.operators.modal import ModalConvolution
from futurefill_rs.nn.operators.precision import at_least_float32
from futurefill_rs.nn.operators.short import ShortConvolution
from futurefill_rs.nn.protocol import Operator, Time

Variant = Literal["hcs", "hcm", "hcl", "modal"]

EXACT: dict[Variant, tuple[str, ...]] = {
    "hcs": (),
    "hcm": ("h",),
    "hcl": ("log_poles", "residues"),
    "modal": ("poles", "residues"),
}
"""Parameters that upstream keeps in float32 in a 16-bit model: small errors in them grow with the length."""


class HyenaCascade(Layer):
    """`x2 * conv(x1 * v)` after a short filter, where x2, x1, v come from 3D projected channels.

    Args:
        hidden_size: features D; the input has 3D.
        variant: the inner filter: "hcs": `h` `(groups, 1, K)` whose LAST tap is the current position; "hcm":
            `h` whose FIRST tap is, with the skip `D`; "hcl": real exponentials `log_poles` `(groups, N, 1)`
            and `residues` `(groups, N)`, with `D`; "modal" (StripedHyena 1): complex `poles` and `residues`
            `(groups, N, 1, 2)`, with `D`.
        filter_groups: each filter serves `D / groups` neighbouring channels; by default every channel has
            its own.
        filter_length: taps K of hcs and hcm.
        state_size: exponentials N.
        num_heads: needed with column_split: channels come per head as (x2, x1, v).
        interleave: channels come as x2, x1, v of one feature after another; otherwise as three blocks.
        flip: x1 and x2 change places.
    """

    def __init__(
        self,
        hidden_size: int,
        variant: Variant,
        *,
        filter_groups: int | None = None,
        filter_length: int = 7,
        state_size: int = 16,
        short_filter_length: int = 3,
        short_filter_bias: bool = False,
        num_heads: int = 1,
        column_split: bool = False,
        interleave: bool = False,
        flip: bool = False,
    ) -> None:
        super().__init__()
        groups = hidden_size if filter_groups is None else filter_groups
        if groups < 1 or hidden_size % groups:
            raise ValueError(f"filter_groups: expected a divisor of {hidden_size}, got {groups}")
        if num_heads < 1 or (column_split and hidden_size % num_heads):
            raise ValueError(f"num_heads: expected a divisor of {hidden_size}, got {num_heads}")
        self.hidden_size, self.variant, self.groups = hidden_size, variant, groups
        self.num_heads, self.column_split = num_heads, column_split
        self.interleave, self.flip = interleave, flip
        self.short_filter_weight = nn.Parameter(torch.randn(3 * hidden_size, 1, short_filter_length))
        self.short_filter_bias = nn.Parameter(torch.randn(3 * hidden_size)) if short_filter_bias else None
        self.D = None if variant == "hcs" else nn.Parameter(torch.zeros(hidden_size))
        if variant in ("hcs", "hcm"):
            self.h = nn.Parameter(torch.randn(groups, 1, filter_length) * filter_length**-0.5)
        elif variant == "hcl":
            decays = -(10 ** torch.linspace(-3, 0, state_size))
            self.log_poles = nn.Parameter(decays.repeat(groups, 1).unsqueeze(-1))
            self.residues = nn.Parameter(torch.randn(groups, state_size) / state_size)
        elif variant == "modal":
            radius = 1 - 10 ** torch.linspace(-3, -0.5, state_size)
            angle = torch.linspace(0, 2, state_size)
            poles = torch.stack([radius * angle.cos(), radius * angle.sin()], -1)
            self.poles = nn.Parameter(poles.repeat(groups, 1, 1).unsqueeze(2))
            self.residues = nn.Parameter(torch.randn(groups, state_size, 1, 2) / state_size)
        else:
            raise ValueError(f"variant: expected 'hcs', 'hcm', 'hcl' or 'modal', got {variant!r}")
        self.exact = EXACT[variant]

    @property
    def width(self) -> int:
        return 3 * self.hidden_size

    def _short_taps(self) -> Tensor:
        return self.short_filter_weight[:, 0].flip(-1).T

    def _spread(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.hidden_size // self.groups, 0)

    def _taps(self, length: int | None) -> Tensor:
        taps = at_least_float32(self.h[:, 0])
        if self.variant == "hcs":
            taps = taps.flip(-1)
        return with_skip(self._spread(first_lags(taps, length)), self.D)

    def _modes(self) -> tuple[Tensor, Tensor]:
        if self.variant == "hcl":
            return self._spread(self.log_poles[..., 0].double()), self._spread(self.residues.double())
        poles, residues = (
            torch.view_as_complex(x[:, :, 0].double().contiguous()) for x in (self.poles, self.residues)
        )
        # A pole at zero answers at lag 0 only; the logarithm of a tiny one says so without an infinity.
        poles = torch.where(poles == 0, torch.full_like(poles, 1e-300), poles)
        return self._spread(poles.log()), self._spread(residues)

    def _inner(self) -> Operator:
        if self.variant in ("hcs", "hcm"):
            return Convolution(LongFilter(self._plans, "inner", self._taps))
        double = any(getattr(self, name).dtype == torch.float64 for name in ("D", *EXACT[self.variant]))
        return ModalConvolution(self._plans, "inner", self._modes, self.D, double)

    def _split(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.interleave:
            x2, x1, v = z.view(*z.shape[:-1], self.hidden_size, 3).unbind(-1)
        elif self.column_split:
            parts = z.view(*z.shape[:-1], self.num_heads, 3, self.hidden_size // self.num_heads).unbind(-2)
            x2, x1, v = (part.flatten(-2) for part in parts)
        else:
            x2, x1, v = z.chunk(3, -1)
        return (x1, x2, v) if self.flip else (x2, x1, v)

    def mix(self, x: Tensor, time: Time) -> Tensor:
        short = ShortConvolution(self._short_taps, self.short_filter_bias)
        x2, x1, v = self._split(time(short, x))
        y: Tensor = time(self._inner(), x1 * v) * x2
        return y
