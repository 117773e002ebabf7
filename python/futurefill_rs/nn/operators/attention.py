"""Causal attention; what it keeps are keys and values."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from futurefill_rs._torch_args import is_fake
from futurefill_rs.nn.operators.precision import at_least_float32
from futurefill_rs.nn.protocol import State


def alibi_slopes(n_heads: int, interpolation: float = 0.25) -> Tensor:
    """The `(n_heads,)` slopes of ALiBi (Press et al., 2022), scaled as flash-stu does."""

    def geometric(n: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]

    power = 1 << (n_heads.bit_length() - 1)
    slopes = geometric(power)
    if power < n_heads:
        slopes += geometric(2 * power)[0::2][: n_heads - power]
    return torch.tensor(slopes, dtype=torch.float32, device="cpu") * interpolation


class Attention:
    """Causal attention over queries, keys and values side by side; what it keeps are keys and values.

    Heads come as `(B, T, (H + 2 G) d)`: H of queries, G of keys, G of values. Every H / G neighbouring heads
    of queries share one of keys and values. Positions further back than `window` are not seen; None: all are.
    """

    block = 256
    """Queries at a time, so that memory grows with the length and not with its square."""

    def __init__(self, n_heads: int, n_kv_heads: int, window: int | None) -> None:
        self.n_heads, self.n_kv_heads, self.window = n_heads, n_kv_heads, window
        self._born: Tensor | None = None

    def since(self, starts: Tensor) -> Attention:
        """The same, blind to what stands before `starts` `(B,)`."""
        attention = copy.copy(self)
        attention._born = starts
        return attention

    def first(self, position: int) -> int:
        """The first position that the one at `position` sees."""
        return 0 if self.window is None else max(0, position - self.window)

    def heads(self, qkv: Tensor, position: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `(B, H, T, d)`, keys and values `(B, G, T, d)`; the first of them stand at `position`."""
        every = self.n_heads + 2 * self.n_kv_heads
        x = qkv.view(*qkv.shape[:2], every, qkv.shape[2] // every).transpose(1, 2)
        q, k, v = torch.split(x, [self.n_heads, self.n_kv_heads, self.n_kv_heads], 1)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, born: Tensor | None) -> Tensor:
        """Outputs `(B, T, H d)` for queries at the last T of the key positions; rows see nothing before
        `born`."""
        raise NotImplementedError

    def banded(self, q: Tensor, k: Tensor, v: Tensor, born: Tensor | None = None) -> Tensor:
        """`attend` in blocks of queries."""
        length, offset = q.shape[2], k.shape[2] - q.shape[2]
        if length <= 2 * self.block:
            return self.attend(q, k, v, born)
        pieces = []
        for start in range(0, length, self.block):
            stop = min(length, start + self.block)
            first = self.first(offset + start)
            seen = slice(first, offset + stop)
            age = None if born is None else born - first
            pieces.append(self.attend(q[:, :, start:stop], k[:, :, seen], v[:, :, seen], age))
        return torch.cat(pieces, 1)

    def whole(self, u: Tensor) -> Tensor:
        return self.banded(*self.heads(u), self._born)

    def prefill(self, u: Tensor, max_new: int | None, method: Any) -> tuple[Tensor, State]:
        q, k, v = self.heads(u)
        state = KeyValueState(self, k, v, max_new, self._born)
        return self.banded(q, k, v, self._born), state


class Windowed(Attention):
    """Scores capped, then falling with distance, over a window."""

    def __init__(self, n_heads: int, window: int, alibi: bool, softcap: float) -> None:
        super().__init__(n_heads, n_heads, window)
        self.reach, self.alibi, self.softcap = window, alibi, softcap
        self.block = max(window, 128)
        self._slopes: Tensor | None = None

    def slopes(self, device: torch.device) -> Tensor:
        """`(H, 1, 1)` on the device; a state takes them from step to step."""
        if self._slopes is None or self._slopes.device != device:
            self._slopes = alibi_slopes(self.n_heads).to(device).view(-1, 1, 1)
        return self._slopes

    def attend(self, q: Tensor, k: Tensor, v: Tensor, born: Tensor | None) -> Tensor:
        dtype, length, keys = q.dtype, q.shape[2], k.shape[2]
        if dtype in (torch.bfloat16, torch.float16):
            q, k, v = q.float(), k.float(), v.float()
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if self.softcap > 0:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        age = _ages(length, keys, q.device)
        if self.alibi:
            scores = scores - self.slopes(q.device) * age
        if length > 1 or keys > self.reach + 1:
            scores = scores.masked_fill((age < 0) | (age > self.reach), -math.inf)
        if born is not None:
            scores = scores.masked_fill(~_seen_since(born, age), -math.inf)
        y: Tensor = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return y.to(dtype)


class Rotary(Attention):
    """All positions seen, queries and keys turned by angles that grow with their position.

    The angles are float32 products of float32 positions and frequencies, as flash-attn has them: at large
    positions their rounding is part of what a model was trained with.
    """

    def __init__(self, n_heads: int, n_kv_heads: int, base: float, scaling_factor: float) -> None:
        super().__init__(n_heads, n_kv_heads, None)
        self.base, self.scaling_factor = base, scaling_factor

    def heads(self, qkv: Tensor, position: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().heads(qkv, position)
        width, device = q.shape[-1], q.device
        steps = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
        time = torch.arange(position, position + q.shape[2], dtype=torch.float32, device=device)
        angles = torch.outer(time / self.scaling_factor, 1.0 / self.base**steps)
        cos, sin = angles.cos(), angles.sin()
        return _turn(q, cos, sin), _turn(k, cos, sin), v

    def banded(self, q: Tensor, k: Tensor, v: Tensor, born: Tensor | None = None) -> Tensor:
        if born is None and q.shape[2] == k.shape[2]:
            # Torch's own blocks, without a mask in memory.
            shared = self.n_heads // self.n_kv_heads
            k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return y.transpose(1, 2).flatten(2)
        return super().banded(q, k, v, born)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, born: Tensor | None) -> Tensor:
        length, groups = q.shape[2], self.n_kv_heads
        shared = self.n_heads // groups
        mask = None
        if length > 1 or born is not None:
            keys = k.shape[2]
            mask = torch.ones(length, keys, dtype=torch.bool, device=q.device).tril_(keys - length)
            if born is not None:
                mask = mask & _seen_since(born, _ages(length, keys, q.device))
            mask = mask.repeat(*(1,) * (mask.ndim - 2), shared, 1) if shared > 1 else mask
        # Heads that share keys and values are more queries to them: nothing is copied.
        rows, width = q.shape[0], q.shape[3]
        q = q.reshape(rows, groups, shared * length, width)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return y.reshape(rows, self.n_heads, length, width).transpose(1, 2).flatten(2)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (Su et al., 2021) of `(B, H, T, d)` by `(T, d / 2)`: i and i + d / 2 make a pair."""
    first, second = at_least_float32(x).chunk(2, -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1).to(x.dtype)


def _ages(length: int, keys: int, device: torch.device) -> Tensor:
    """How long before each of the last `length` positions each of `keys` stands: `(length, keys)`."""
    query = torch.arange(keys - length, keys, device=device)
    return query.unsqueeze(-1) - torch.arange(keys, device=device)


def _seen_since(born: Tensor, age: Tensor) -> Tensor:
    """Whether rows born at `born` `(B,)` see keys, `(B, 1, T, keys)`.

    Every query sees itself, padding too: a softmax of nothing is NaN.
    """
    key = torch.arange(age.shape[-1], device=age.device)
    return (key >= born.to(age.device).view(-1, 1, 1, 1)) | (age == 0)


class KeyValueState:
    """Keys and values of the positions that the next one sees, in order, in buffers with room to append.

    Args:
        k, v: those of a prompt, `(B, G, T, d)`.
        born: the first position of each row, None where it is that of the prompt.
    """

    def __init__(
        self, attention: Attention, k: Tensor, v: Tensor, max_new: int | None, born: Tensor | None
    ) -> None:
        self._attention = attention
        self._position = k.shape[2]
        window = attention.window
        start = attention.first(self._position)
        room = [count for count in (max_new, None if window is None else window + 1) if count is not None]
        self._k, self._v = (_with_room(x[:, :, start:], min(room, default=0)) for x in (k, v))
        self._end = self._position - start
        self._born = None if born is None else (born - start).clamp_min(0)

    def _unseen(self) -> int:
        """Positions at the front of the buffers that no row sees any more."""
        unseen = self._attention.first(self._end)
        born = self._born
        # Elsewhere it would be a synchronisation.
        if born is not None and born.numel() and born.device.type == "cpu" and not is_fake(born):
            unseen = max(unseen, int(born.min()))
        return unseen

    def _drop(self, start: int) -> None:
        """Move what stands from `start` on to the front of the buffers, making room at their end."""
        kept = self._end - start
        for buffer in (self._k, self._v):
            buffer[:, :, :kept] = buffer[:, :, start : self._end].clone()
        if self._born is not None:
            self._born = (self._born - start).clamp_min(0)
        self._end = kept

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Outputs `(B, m, H d)` at the next m positions, whose keys and values are kept."""
        count, size = k.shape[2], self._k.shape[2]
        if self._k.is_inference() and not torch.is_inference_mode_enabled():
            # Such buffers may only be written to in the mode they were made in.
            self._k, self._v = self._k.clone(), self._v.clone()
        if self._end + count > size and (unseen := self._unseen()):
            self._drop(unseen)
        if self._end + count > size:
            # Twice the room when it runs out: appending costs a constant on average.
            room = max(self._end + count - size, size if self._attention.window is None else 0)
            self._k, self._v = _with_room(self._k, room), _with_room(self._v, room)
        start, self._end = self._end, self._end + count
        self._position += count
        self._k[:, :, start : self._end], self._v[:, :, start : self._end] = k, v
        first = self._attention.first(start)
        seen = slice(first, self._end)
        born = None if self._born is None else self._born - first
        return self._attention.banded(q, self._k[:, :, seen], self._v[:, :, seen], born)

    def step(self, u: Tensor) -> Tensor:
        return self._attend(*self._attention.heads(u.unsqueeze(1), self._position)).squeeze(1)

    def extend(self, u: Tensor) -> Tensor:
        if not u.shape[1]:
            heads = self._attention.n_heads
            return u[..., : u.shape[-1] * heads // (heads + 2 * self._attention.n_kv_heads)].clone()
        return self._attend(*self._attention.heads(u, self._position))

    def fork(self) -> KeyValueState:
        state = copy.copy(self)
        state._k, state._v = self._k.clone(), self._v.clone()
        return state

    def reorder(self, index: Tensor) -> None:
        index = index.to(self._k.device)
        self._k, self._v = self._k.index_select(0, index), self._v.index_select(0, index)
        if self._born is not None:
            self._born = self._born.index_select(0, index)

    def reset(self, rows: Tensor | None) -> None:
        if rows is None:
            self._end = self._position = 0
            self._born = None
            return
        rows = rows.to(self._k.device)
        # Not only out of sight: a weight of zero does not hide a value that is not finite.
        self._k, self._v = self._k.index_fill(0, rows, 0), self._v.index_fill(0, rows, 0)
        born = self._born
        if born is None:
            born = torch.zeros(self._k.shape[0], dtype=torch.int64, device=self._k.device)
        self._born = born.index_fill(0, rows.to(born.device), self._end)

    @property
    def nbytes(self) -> int:
        return self._k.nbytes + self._v.nbytes


def _with_room(x: Tensor, room: int) -> Tensor:
    """A copy of x `(B, G, T, d)` with `room` positions more."""
    rows, heads, length, width = x.shape
    copy = x.new_zeros(rows, heads, length + room, width)
    copy[:, :, :length] = x
    return copy
