"""The spectral transform unit: convolution with a fixed bank of spectral filters (Agarwal et al., 2023)."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from futurefill_rs.nn.conv import first_lags
from futurefill_rs.nn.layer import Layer
from futurefill_rs.nn.operators.convolution import Convolution, LongFilter
from futurefill_rs.nn.operators.parity import ParityConvolution
from futurefill_rs.nn.operators.precision import at_least_float32
from futurefill_rs.nn.protocol import Operator, Time


def spectral_filters(seq_len: int, num_eigh: int, use_hankel_L: bool = False) -> Tensor:
    """The `(seq_len, num_eigh)` float32 filters phi: leading eigenvectors of a Hankel matrix, scaled.

    The trailing eigenvalues lie below float64's precision and eigenvectors have no sign of their own, so the
    result depends on the LAPACK in use: a trained model must keep the phi it was trained with. The cost is
    cubic in seq_len.
    """
    if not 1 <= num_eigh <= seq_len:
        raise ValueError(f"num_eigh: expected 1 to seq_len = {seq_len}, got {num_eigh}")
    i = np.arange(1, seq_len + 1, dtype=np.float64)
    s = i[:, None] + i[None, :]
    if use_hankel_L:
        hankel = ((-1.0) ** (s - 2) + 1) * 8 / ((s + 3) * (s - 1) * (s + 1))
    else:
        hankel = 2 / (s**3 - s)
    sigma, phi = np.linalg.eigh(hankel)
    # Rounding may leave a tiny eigenvalue below zero, whose fourth root would be NaN.
    scale = np.maximum(sigma[-num_eigh:], 0.0) ** 0.25
    phi = np.ascontiguousarray(phi[:, -num_eigh:] * scale, dtype=np.float32)
    return torch.from_numpy(phi).to(torch.get_default_device())


def check_phi(phi: Tensor, seq_len: int, num_eigh: int) -> None:
    """Raise unless the filters are `(seq_len, num_eigh)`: given ones define what is computed."""
    if phi.shape != (seq_len, num_eigh):
        raise ValueError(f"phi: expected shape {(seq_len, num_eigh)}, got {tuple(phi.shape)}")


class STU(Layer):
    """Spectral transform unit of flash-stu and flash-stu-2.

    Args:
        n_embd: features D.
        num_eigh: spectral filters K.
        seq_len: lags L of the filters, and the longest sequence `forward` takes.
        use_hankel_L: one branch with the filters as they are; otherwise a plus and a minus branch, the
            latter with alternating signs along the lags.
        use_approx: tensor-dot form, one filter `phi @ M_filters` per channel after the projection `M_inputs`;
            otherwise the full form, every filter on every channel, contracted with `M_phi_plus` and
            `M_phi_minus`.
        phi: the filters `(seq_len, num_eigh)`, if known.
        shared: the layer has no phi, a model hands its own to every call: `stu(x, phi=phi)`.

    State: `phi` `(L, K)` (unless `shared`); `M_inputs` `(D, D)` and `M_filters` `(K, D)`, or
    `M_phi_plus` and `M_phi_minus` `(K, D, D)`. A new layer computes phi (`spectral_filters`); a trained one
    must load it.
    """

    phi: Tensor

    def __init__(
        self,
        n_embd: int,
        num_eigh: int,
        seq_len: int,
        use_hankel_L: bool = False,
        use_approx: bool = True,
        *,
        phi: Tensor | None = None,
        shared: bool = False,
    ) -> None:
        super().__init__()
        self.n_embd, self.num_eigh, self.max_length = n_embd, num_eigh, seq_len
        self.use_hankel_L, self.use_approx = use_hankel_L, use_approx
        if not shared:
            if phi is None:
                phi = spectral_filters(seq_len, num_eigh, use_hankel_L)
            check_phi(phi, seq_len, num_eigh)
            self.register_buffer("phi", phi.clone())
        if use_approx:
            self.M_inputs = nn.Parameter(torch.empty(n_embd, n_embd))
            self.M_filters = nn.Parameter(torch.empty(num_eigh, n_embd))
        else:
            self.M_phi_plus = nn.Parameter(torch.empty(num_eigh, n_embd, n_embd))
            if not use_hankel_L:
                self.M_phi_minus = nn.Parameter(torch.empty(num_eigh, n_embd, n_embd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.xavier_normal_(parameter)

    @property
    def width(self) -> int:
        return self.n_embd

    @property
    def input_dtype(self) -> torch.dtype | None:
        return (self.M_inputs if self.use_approx else self.M_phi_plus).dtype

    def _operator(self, phi: Tensor) -> Operator:
        filters = self._all_lags if self.use_hankel_L else self._even_lags
        decisive = (self.M_filters,) if self.use_approx else ()

        def signature(length: int | None) -> tuple[Tensor, ...]:
            return phi[: _lags(length, self.use_hankel_L)], *decisive

        long_filter = LongFilter(self._plans, "phi", partial(filters, phi), signature)
        if self.use_hankel_L:
            return Convolution(long_filter)
        return ParityConvolution(long_filter, bank=0 if self.use_approx else self.num_eigh)

    def _project(self, phi: Tensor) -> Tensor:
        weights = at_least_float32(self.M_filters)
        dtype = torch.promote_types(phi.dtype, weights.dtype)
        return (phi.to(dtype) @ weights.to(dtype)).T

    def _all_lags(self, phi: Tensor, length: int | None) -> Tensor:
        phi = at_least_float32(first_lags(phi.T, length).T)
        return self._project(phi) if self.use_approx else phi.T.unsqueeze(1)

    def _even_lags(self, phi: Tensor, half: int | None) -> Tensor:
        """`half` even lags of the sum of both branches; in the full form the even and the odd lags of phi."""
        phi = at_least_float32(first_lags(phi.T, _lags(half, False)).T)
        if self.use_approx:
            # h_j + (-1)^j h_j is 2 h_j on even lags and nothing on odd ones.
            return 2 * self._project(phi[0::2])
        even, odd = phi[0::2], phi[1::2]
        if odd.shape[0] < even.shape[0]:
            odd = torch.cat([odd, odd.new_zeros(1, odd.shape[1])])
        return torch.cat([even, odd], 1).T.unsqueeze(1)

    def mix(self, x: Tensor, time: Time, *, phi: Tensor | None = None) -> Tensor:
        if phi is None:
            if "phi" not in self._buffers:
                raise ValueError("phi: expected the filters in every call of a shared layer, got None")
            phi = self.phi
        # New filters are float32 whatever the default dtype is; nothing may be computed in less than x has.
        operator = self._operator(phi.to(torch.promote_types(phi.dtype, x.dtype)))
        if self.use_approx:
            y: Tensor = time(operator, x @ self.M_inputs)
            return y
        spread = x.unsqueeze(-2)
        if self.use_hankel_L:
            return _contract(time(operator, spread), self.M_phi_plus)
        even, odd = time(operator, spread)
        return _contract(even + odd, self.M_phi_plus) + _contract(even - odd, self.M_phi_minus)


def _lags(length: int | None, all_lags: bool) -> int | None:
    """Lags that `length` of them, or of the even ones, reach over."""
    return length if length is None or all_lags else 2 * length


def _contract(u: Tensor, weight: Tensor) -> Tensor:
    """`(..., K, D_in)` with `(K, D_in, D_out)` over filters and channels."""
    return u.flatten(-2) @ weight.flatten(0, 1)
