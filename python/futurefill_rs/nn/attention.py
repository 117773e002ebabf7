"""Causal attention over a sliding window, as flash-stu has it between its spectral layers."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from futurefill_rs.nn._base import Layer, State, Time
from futurefill_rs.nn._linear import Linear


def alibi_slopes(n_heads: int, interpolation: float = 0.25) -> Tensor:
    """The `(n_heads,)` slopes of ALiBi (Press et al., 2022), scaled as flash-stu does."""

    def geometric(n: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]

    power = 1 << (n_heads.bit_length() - 1)
    slopes = geometric(power)
    if power < n_heads:
        slopes += geometric(2 * power)[0::2][: n_heads - power]
    return torch.tensor(slopes) * interpolation


class _Window:
    """Windowed attention over `(B, T, 3 D)` queries, keys and values; what it keeps are keys and values."""

    def __init__(self, n_heads: int, window: int, alibi: bool, softcap: float) -> None:
        self.n_heads, self.window, self.alibi, self.softcap = n_heads, window, alibi, softcap
        self._slopes: dict[torch.device, Tensor] = {}
        self._born: Tensor | None = None

    def since(self, starts: Tensor) -> _Window:
        """The same, blind to what stands before `starts` `(B,)`."""
        window = copy.copy(self)
        window._born = starts
        return window

    def slopes(self, device: torch.device) -> Tensor:
        """`(H, 1, 1)` on the device, made there once."""
        if device not in self._slopes:
            self._slopes[device] = alibi_slopes(self.n_heads).to(device).view(-1, 1, 1)
        return self._slopes[device]

    def heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as `(B, H, T, d)`."""
        q, k, v = (
            qkv.view(*qkv.shape[:2], 3, self.n_heads, qkv.shape[2] // (3 * self.n_heads))
            .transpose(1, 3)
            .unbind(2)
        )
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, born: Tensor | None) -> Tensor:
        """Outputs `(B, T, D)` for queries at the last T of the key positions; rows see nothing before
        `born`."""
        dtype, length, keys = q.dtype, q.shape[2], k.shape[2]
        if dtype in (torch.bfloat16, torch.float16):
            q, k, v = q.float(), k.float(), v.float()
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if self.softcap > 0:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        key = torch.arange(keys, device=q.device)
        age = torch.arange(keys - length, keys, device=q.device).unsqueeze(-1) - key
        if self.alibi:
            scores = scores - self.slopes(q.device) * age
        if length > 1 or keys > self.window + 1:
            scores = scores.masked_fill((age < 0) | (age > self.window), -math.inf)
        if born is not None:
            hidden = key < born.to(q.device).view(-1, 1, 1, 1)
            # Every query sees itself, padding too: a softmax of nothing is NaN.
            scores = scores.masked_fill(hidden & (age != 0), -math.inf)
        y: Tensor = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return y.to(dtype)

    def banded(self, q: Tensor, k: Tensor, v: Tensor, born: Tensor | None = None) -> Tensor:
        """`attend` in blocks of queries, so that memory grows with the length times the window."""
        length, offset = q.shape[2], k.shape[2] - q.shape[2]
        block = max(self.window, 128)
        if length <= 2 * block:
            return self.attend(q, k, v, born)
        pieces = []
        for start in range(0, length, block):
            stop = min(length, start + block)
            first = max(0, offset + start - self.window)
            seen = slice(first, offset + stop)
            age = None if born is None else born - first
            pieces.append(self.attend(q[:, :, start:stop], k[:, :, seen], v[:, :, seen], age))
        return torch.cat(pieces, 1)

    def whole(self, u: Tensor) -> Tensor:
        return self.banded(*self.heads(u), self._born)

    def prefill(self, u: Tensor, max_new: int | None, method: Any) -> tuple[Tensor, State]:
        q, k, v = self.heads(u)
        kept = slice(max(0, k.shape[2] - self.window), None)
        state = WindowState(self, k[:, :, kept], v[:, :, kept], max_new)
        if self._born is not None:
            state._born = (self._born - kept.start).clamp_min(0)
        return self.banded(q, k, v, self._born), state


class WindowState:
    """Keys and values of the last `window` positions, in order, in buffers with room to append."""

    def __init__(self, window: _Window, k: Tensor, v: Tensor, max_new: int | None) -> None:
        self._window = window
        have = k.shape[2]
        room = window.window + 1 if max_new is None else min(max_new, window.window + 1)
        self._k = F.pad(k, (0, 0, 0, room)).contiguous()
        self._v = F.pad(v, (0, 0, 0, room)).contiguous()
        self._end = have
        self._born: Tensor | None = None

    def _drop(self) -> None:
        """Move the window to the front of the buffers, making room at their end."""
        start = max(0, self._end - self._window.window)
        kept = self._end - start
        for buffer in (self._k, self._v):
            buffer[:, :, :kept] = buffer[:, :, start : self._end].clone()
        if self._born is not None:
            self._born = (self._born - start).clamp_min_(0)
        self._end = kept

    def step(self, u: Tensor) -> Tensor:
        q, k, v = self._window.heads(u.unsqueeze(1))
        if self._end == self._k.shape[2]:
            self._drop()
        end = self._end
        self._k[:, :, end : end + 1], self._v[:, :, end : end + 1] = k, v
        self._end = end + 1
        first = max(0, end - self._window.window)
        seen = slice(first, end + 1)
        born = None if self._born is None else self._born - first
        return self._window.attend(q, self._k[:, :, seen], self._v[:, :, seen], born).squeeze(1)

    def extend(self, u: Tensor) -> Tensor:
        if not u.shape[1]:
            return u[..., : u.shape[-1] // 3]
        q, k, v = self._window.heads(u)
        k = torch.cat([self._k[:, :, : self._end], k], 2)
        v = torch.cat([self._v[:, :, : self._end], v], 2)
        y = self._window.banded(q, k, v, self._born)
        start = max(0, k.shape[2] - self._window.window)
        kept = k.shape[2] - start
        if kept > self._k.shape[2]:
            self._k = F.pad(self._k, (0, 0, 0, kept - self._k.shape[2]))
            self._v = F.pad(self._v, (0, 0, 0, kept - self._v.shape[2]))
        self._k[:, :, :kept], self._v[:, :, :kept] = k[:, :, start:], v[:, :, start:]
        if self._born is not None:
            self._born = (self._born - start).clamp_min_(0)
        self._end = kept
        return y

    def fork(self) -> WindowState:
        copy = object.__new__(WindowState)
        copy._window, copy._end, copy._born = self._window, self._end, self._born
        copy._k, copy._v = self._k.clone(), self._v.clone()
        return copy

    def reorder(self, index: Tensor) -> None:
        index = index.to(self._k.device)
        self._k, self._v = self._k.index_select(0, index), self._v.index_select(0, index)
        if self._born is not None:
            self._born = self._born.index_select(0, index)

    def reset(self, rows: Tensor | None) -> None:
        if rows is None:
            self._end, self._born = 0, None
            return
        born = self._born
        if born is None:
            born = torch.zeros(self._k.shape[0], dtype=torch.int64, device=self._k.device)
        self._born = born.index_fill(0, rows.to(born.device), self._end)

    @property
    def nbytes(self) -> int:
        return self._k.nbytes + self._v.nbytes


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
        self.n_embd = n_embd
        self.c_attn = Linear(n_embd, 3 * n_embd, bias=bias)
        self.c_proj = Linear(n_embd, n_embd, bias=bias)
        self._attention = _Window(n_heads, window_size, alibi, softcap)

    @property
    def width(self) -> int:
        return self.n_embd

    def mix(self, x: Tensor, time: Time) -> Tensor:
        y: Tensor = self.c_proj(time(self._attention, self.c_attn(x)))
        return y
