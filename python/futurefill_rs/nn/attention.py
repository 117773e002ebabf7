"""Causal attention: over a sliding window, as flash-stu has it between its spectral layers, and over all
positions, as StripedHyena 1 has it between its convolutions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from futurefill_rs.nn.layer import Layer, dtype_of
from futurefill_rs.nn.operators.attention import Rotary, Windowed
from futurefill_rs.nn.protocol import Time


class SlidingWindowAttention(Layer):
    """Multi-head causal attention over the current position and the `window_size` before it.

    Args:
        n_embd: features D.
        n_heads: heads, a divisor of D.
        window_size: earlier positions seen.
        softcap: scores s become `softcap * tanh(s / softcap)`; 0 leaves them alone.
        alibi: whether scores fall linearly with distance (`alibi_slopes`), after the cap.
        bias: whether projections have biases.

    Parameters: `c_attn` (D to 3 D: queries, keys, values) and `c_proj` (D to D), flash-stu's names.
    """

    def __init__(
        self,
        n_embd: int,
        n_heads: int,
        window_size: int,
        *,
        softcap: float = 50.0,
        alibi: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if n_heads < 1 or n_embd % n_heads:
            raise ValueError(f"n_heads: expected a divisor of n_embd = {n_embd}, got {n_heads}")
        if window_size < 0:
            raise ValueError(f"window_size: expected 0 or more, got {window_size}")
        self.n_embd, self.n_heads, self.window_size = n_embd, n_heads, window_size
        self.softcap, self.alibi = softcap, alibi
        self.c_attn = nn.Linear(n_embd, 3 * n_embd, bias=bias)
        self.c_proj = nn.Linear(n_embd, n_embd, bias=bias)

    @property
    def width(self) -> int:
        return self.n_embd

    @property
    def input_dtype(self) -> torch.dtype | None:
        return dtype_of(self.c_attn)

    def _attention(self) -> Windowed:
        return Windowed(self.n_heads, self.window_size, self.alibi, self.softcap)

    def mix(self, x: Tensor, time: Time) -> Tensor:
        y: Tensor = self.c_proj(time(self._attention(), self.c_attn(x)))
        return y


class CausalSelfAttention(Layer):
    """Multi-head causal attention over all positions, with rotary embeddings and grouped queries.

    A cache holds the keys and values of every position, so unlike that of the other layers it grows with the
    prompt too, and a step takes time in proportion to the position.

    Args:
        n_embd: features D.
        n_heads: heads H of queries, a divisor of D; D / H is even.
        n_kv_heads: heads G of keys and values, a divisor of H; by default H.
        rotary_base: the slowest angle per position is nearly its inverse, the fastest 1.
        rotary_scaling_factor: positions are divided by it (linear interpolation).
        qkv_bias, out_bias: whether the projections have biases.

    Parameters: `Wqkv` (D to (H + 2 G) D / H: queries, keys, values) and `out_proj` (D to D), the names of
    flash-attn's `MHA`.
    """

    def __init__(
        self,
        n_embd: int,
        n_heads: int,
        *,
        n_kv_heads: int | None = None,
        rotary_base: float = 10000.0,
        rotary_scaling_factor: float = 1.0,
        qkv_bias: bool = True,
        out_bias: bool = True,
    ) -> None:
        super().__init__()
        if n_heads < 1 or n_embd % n_heads:
            raise ValueError(f"n_heads: expected a divisor of n_embd = {n_embd}, got {n_heads}")
        if n_embd // n_heads % 2:
            raise ValueError(f"n_heads: expected heads of an even width, got {n_embd} / {n_heads}")
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        if n_kv_heads < 1 or n_heads % n_kv_heads:
            raise ValueError(f"n_kv_heads: expected a divisor of n_heads = {n_heads}, got {n_kv_heads}")
        self.n_embd, self.n_heads, self.n_kv_heads = n_embd, n_heads, n_kv_heads
        self.rotary_base, self.rotary_scaling_factor = rotary_base, rotary_scaling_factor
        features = (n_heads + 2 * n_kv_heads) * (n_embd // n_heads)
        self.Wqkv = nn.Linear(n_embd, features, bias=qkv_bias)
        self.out_proj = nn.Linear(n_embd, n_embd, bias=out_bias)

    @property
    def width(self) -> int:
        return self.n_embd

    @property
    def input_dtype(self) -> torch.dtype | None:
        return dtype_of(self.Wqkv)

    def _attention(self) -> Rotary:
        return Rotary(self.n_heads, self.n_kv_heads, self.rotary_base, self.rotary_scaling_factor)

    def mix(self, x: Tensor, time: Time) -> Tensor:
        y: Tensor = self.out_proj(time(self._attention(), self.Wqkv(x)))
        return y
