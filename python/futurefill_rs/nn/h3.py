"""H3 (Fu et al., 2023): a shift state-space model and a diagonal one around a product of keys and values."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from futurefill_rs.nn.conv import first_lags, with_skip
from futurefill_rs.nn.layer import Layer, dtype_of
from futurefill_rs.nn.operators.convolution import Convolution, LongFilter
from futurefill_rs.nn.operators.modal import ModalConvolution
from futurefill_rs.nn.operators.precision import at_least_float32
from futurefill_rs.nn.protocol import Time


class _Nested(nn.Module):
    """Upstream keeps kernel parameters two modules deep, as `kernel.kernel.C`."""

    def __init__(self, kernel: nn.Module) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self) -> Any:
        return self.kernel()


class ShiftKernel(nn.Module):
    """Filters of d_state lags: `h[j] = sum_n B[n] C[n + j]`."""

    def __init__(self, width: int, d_state: int) -> None:
        super().__init__()
        self.B = nn.Parameter(
            F.one_hot(torch.zeros(width, dtype=torch.long), d_state).to(torch.get_default_dtype())
        )
        self.C = nn.Parameter(torch.randn(1, width, d_state))

    def forward(self) -> Tensor:
        """The lags `(width, d_state)`."""
        size = self.B.shape[-1]
        ahead = F.pad(at_least_float32(self.C[0]), (0, size)).unfold(-1, size, 1)[..., :size, :]
        return (ahead @ at_least_float32(self.B).unsqueeze(-1)).squeeze(-1)


class DiagonalKernel(nn.Module):
    """Sums of d_state / 2 conjugate pairs of exponentials (S4D), discretised with the bilinear rule or
    "zoh"."""

    def __init__(self, width: int, d_state: int, disc: str = "bilinear") -> None:
        super().__init__()
        if disc not in ("bilinear", "zoh"):
            raise ValueError(f"disc: expected 'bilinear' or 'zoh', got {disc!r}")
        modes = d_state // 2
        self.disc = disc
        self.C = nn.Parameter(torch.randn(1, width, modes, 2))
        self.B = nn.Parameter(torch.cat([torch.ones(width, modes, 1), torch.zeros(width, modes, 1)], -1))
        self.log_dt = nn.Parameter(torch.empty(width).uniform_(math.log(1e-3), math.log(1e-1)))
        self.inv_A_real = nn.Parameter(torch.full((width, modes), math.log(0.5)))
        self.A_imag = nn.Parameter(math.pi * torch.arange(modes).repeat(width, 1))

    def forward(self) -> tuple[Tensor, Tensor]:
        """log_poles and residues, `(width, modes)` complex128."""
        dt = self.log_dt.double().exp().unsqueeze(-1)
        a = torch.complex(-self.inv_A_real.double().exp(), self.A_imag.double())
        b, c = _complex(self.B), _complex(self.C)[0]
        # Fewer systems than features are repeated over the features.
        a, b = a.repeat(len(dt) // len(a), 1), b.repeat(len(dt) // len(b), 1)
        half = dt * a / 2
        if self.disc == "zoh":
            return dt * a, 2 * b * c * torch.expm1(dt * a) / a
        return torch.log((1 + half) / (1 - half)), 2 * b * c * dt / (1 - half)


def _complex(pairs: Tensor) -> Tensor:
    return torch.view_as_complex(pairs.double().contiguous())


class H3(Layer):
    """H3 of safari.

    Args:
        d_model: features D.
        d_state: lags of the shift kernel; the diagonal kernel has half as many conjugate pairs.
        l_max: the longest sequence `forward` takes, None for any.
        head_dim: keys and values meet as outer products of this many features each.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        l_max: int | None = None,
        head_dim: int = 1,
        *,
        disc: str = "bilinear",
    ) -> None:
        super().__init__()
        if d_model % head_dim:
            raise ValueError(f"head_dim: expected a divisor of d_model = {d_model}, got {head_dim}")
        heads = d_model // head_dim
        self.d_model, self.max_length, self.head_dim = d_model, l_max, head_dim
        self.q_proj = nn.Linear(d_model, d_model)
        self.k_proj = nn.Linear(d_model, d_model)
        self.v_proj = nn.Linear(d_model, d_model)
        shift, diagonal = ShiftKernel(d_model, d_state), DiagonalKernel(heads, d_state, disc)
        self.ssm_k_kernel, self.kernel = _Nested(shift), _Nested(diagonal)
        self.ssm_k_D = nn.Parameter(torch.randn(d_model))
        self.D = nn.Parameter(torch.randn(heads))
        self.output_linear = nn.Linear(d_model, d_model)

    @property
    def width(self) -> int:
        return self.d_model

    @property
    def input_dtype(self) -> torch.dtype | None:
        return dtype_of(self.q_proj)

    def _shift_lags(self, length: int | None) -> Tensor:
        return with_skip(first_lags(self.ssm_k_kernel(), length), self.ssm_k_D)

    def mix(self, x: Tensor, time: Time) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        k = time(Convolution(LongFilter(self._plans, "shift", self._shift_lags)), k)
        double = self.D.dtype == torch.float64
        diagonal = ModalConvolution(self._plans, "diagonal", self.kernel, self.D, double)
        size = self.head_dim
        if size == 1:
            y = time(diagonal, k * v) * q
        else:
            # Features are (head, d); the products are (d1, d2, head) and the output is (d2, head).
            q, k, v = (p.unflatten(-1, (-1, size)).transpose(-1, -2) for p in (q, k, v))
            products = k.unsqueeze(-2) * v.unsqueeze(-3)
            y = (time(diagonal, products) * q.unsqueeze(-2)).sum(-3).flatten(-2)
        out: Tensor = self.output_linear(y)
        return out
