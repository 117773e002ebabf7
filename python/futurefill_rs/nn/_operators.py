"""What reaches across time: long convolutions through the engine, short filters directly.

Sequences are `(B, T, ...)` and positions `(B, ...)`, features last, as the layers have them; the engine
wants time last, and takes any strides.
"""

from __future__ import annotations

import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import futurefill_rs as ff
from futurefill_rs.nn._base import State

PLAN_BYTES = 64 << 20
"""Plans other than the last one used are dropped while an operator's plans take more than this."""


HASHED_BYTES = 1 << 20
"""Of a larger tensor only a sample is hashed."""

LONG_PROMPT = 4096
"""A prompt from which on a plan for all of it may not be worth its memory."""


def at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _fingerprint(tensor: Tensor) -> tuple[Any, ...]:
    """Changes when the tensor's values do.

    Version counters miss writes through `.data` and do not exist for tensors made in inference mode, so the
    bytes of a CPU tensor are hashed as well (a sample of them and their sum, if there are many); on other
    devices that would be a synchronisation.
    """
    version = None if tensor.is_inference() else tensor._version
    key: tuple[Any, ...] = (id(tensor), version, tensor.dtype, tensor.device, tuple(tensor.shape))
    plain = type(tensor) in (Tensor, torch.nn.Parameter)
    if not plain or tensor.device.type != "cpu":
        return key
    values = tensor.detach().flatten()
    if values.nbytes > HASHED_BYTES:
        # All of a large tensor would take longer than a step: its sum, and one stretch in so many.
        stretch = values[: values.numel() // 4096 * 4096].view(-1, 4096)
        total = float(values.sum())
        values = stretch[:: 1 + stretch.shape[0] * 4096 * values.element_size() // HASHED_BYTES].flatten()
        key = (*key, total)
    data: Any = values.contiguous().view(torch.uint8).numpy()
    return (*key, tensor.data_ptr(), zlib.crc32(data))


class Plans:
    """The plans of one operator, kept while the tensors that its filters come from stay as they are."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._plans: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
        self._made_from: tuple[Any, ...] = ()
        self._sources: list[Tensor] = []

    def get(
        self,
        filters: Callable[[int | None], Tensor],
        sources: Iterable[Tensor],
        horizon: int | None,
        method: Any,
    ) -> Any:
        # The tensors themselves are kept as well: an id stays unique only as long as its object lives.
        tensors = list(sources)
        made_from = tuple(_fingerprint(tensor) for tensor in tensors)
        with self._lock:
            if made_from != self._made_from:
                self._plans.clear()
                self._made_from, self._sources = made_from, tensors
            key = (horizon, method)
            plan = self._plans.get(key)
            if plan is None:
                # Not inference tensors: the plan outlives the inference mode it may have been made in.
                with torch.inference_mode(False), torch.no_grad():
                    plan = ff.plan(filters(horizon).detach(), horizon, method)
                self._plans[key] = plan
            self._plans.move_to_end(key)
            while len(self._plans) > 1 and sum(p.nbytes for p in self._plans.values()) > PLAN_BYTES:
                self._plans.popitem(last=False)
            return plan

    def __deepcopy__(self, memo: dict[int, Any]) -> Plans:
        return Plans()

    def __reduce__(self) -> tuple[Any, ...]:
        return Plans, ()


def _horizon(positions: int, max_new: int | None) -> int | None:
    """Rounded up by at most a quarter, so that prompts of many lengths share a few plans."""
    if max_new is None:
        return None
    total = max(1, positions + max_new)
    unit = 1 << max(0, (total - 1).bit_length() - 3)
    return -(-total // unit) * unit


def prefill(
    plans: Plans,
    filters: Callable[[int | None], Tensor],
    sources: Iterable[Tensor],
    u: Tensor,
    max_new: int | None,
    method: Any,
    slack: int = 0,
) -> tuple[Tensor, Any]:
    """`plan.prefill` for a prompt u `(*C, P)`, time last, with a plan kept for later prompts.

    A plan for P + max_new positions holds as many lags of spectra. For a long prompt with few positions to
    follow one transform of all P + max_new positions gives the outputs and what the prompt adds to the
    positions that follow, and the plan is one for `max_new` positions, whatever the prompt. `slack` is room
    for more positions.
    """
    length = u.shape[-1]
    if max_new is None or length < max(LONG_PROMPT, 2 * max_new):
        plan = plans.get(filters, sources, _horizon(length + slack, max_new), method)
        y, cache = plan.prefill(u, max_new)
        return y, cache
    plan = plans.get(filters, sources, _horizon(slack, max_new), method)
    x = F.pad(at_least_float32(u), (0, max_new))
    y = ff.causal_conv(x, filters(length + max_new).detach())
    cache = _Seeded(plan.new_cache(u.shape[:-1]), y[..., length:].movedim(-1, 0).contiguous(), max_new)
    return y[..., :length].to(u.dtype), cache


class _Seeded:
    """A cache of the engine for what follows a prompt, and what the prompt adds to it, `(max_new, *C)`."""

    def __init__(self, cache: Any, seed: Tensor, max_new: int) -> None:
        self._cache, self._seed, self._max_new, self._position = cache, seed, max_new, 0

    def step(self, u: Tensor) -> Tensor:
        y: Tensor = self._cache.step(at_least_float32(u))
        if self._position < self._seed.shape[0]:
            y = y + self._seed[self._position]
        self._position += 1
        return y.to(u.dtype)

    def extend(self, u: Tensor) -> Tensor:
        y: Tensor = self._cache.extend(at_least_float32(u))
        seed = self._seed[self._position : self._position + u.shape[-1]]
        if seed.shape[0]:
            y = y + seed.movedim(0, -1)
        self._position += u.shape[-1]
        return y.to(u.dtype)

    def fork(self) -> _Seeded:
        copy = _Seeded(self._cache.fork(), self._seed, self._max_new)
        copy._position = self._position
        return copy

    def reorder(self, index: Tensor) -> None:
        self._cache.reorder(index)
        self._seed = self._seed.index_select(1, index.to(self._seed.device))

    def reset(self, rows: Tensor | None = None) -> None:
        if rows is None:
            self._cache.reset()
            self._seed, self._position = self._seed[:0], 0
        else:
            self._cache.reset(rows)
            self._seed = self._seed.index_fill(1, rows.to(self._seed.device), 0)

    @property
    def nbytes(self) -> int:
        return int(self._cache.nbytes) + self._seed.nbytes


class ConvolutionState:
    """A cache of the engine, seen with features last."""

    __slots__ = ("_cache", "step")

    def __init__(self, cache: Any) -> None:
        self._cache = cache
        self.step = cache.step

    def extend(self, u: Tensor) -> Tensor:
        y: Tensor = self._cache.extend(u.movedim(1, -1))
        return y.movedim(-1, 1)

    def fork(self) -> ConvolutionState:
        return ConvolutionState(self._cache.fork())

    def reorder(self, index: Tensor) -> None:
        self._cache.reorder(index)

    def reset(self, rows: Tensor | None) -> None:
        if rows is None:
            self._cache.reset()
        else:
            self._cache.reset(rows)

    @property
    def nbytes(self) -> int:
        return int(self._cache.nbytes)


class Convolution:
    """Causal convolution with filters computed from a layer's tensors.

    Args:
        filters: `filters(n)` gives `(*F, min(n, L))` lags, lag 0 first, all L for None; differentiable.
        sources: the tensors the filters are computed from; when one changes, plans are made anew.
    """

    def __init__(
        self, filters: Callable[[int | None], Tensor], sources: Callable[[], Iterable[Tensor]]
    ) -> None:
        self._filters, self._sources = filters, sources
        self._plans = Plans()

    def whole(self, u: Tensor) -> Tensor:
        y: Tensor = ff.causal_conv(u.movedim(1, -1), self._filters(max(1, u.shape[1])))
        return y.movedim(-1, 1)

    def prefill(self, u: Tensor, max_new: int | None, method: Any) -> tuple[Tensor, State]:
        x = u.detach().movedim(1, -1)
        y, cache = prefill(self._plans, self._filters, self._sources(), x, max_new, method)
        return y.movedim(-1, 1), ConvolutionState(cache)


class ParityState:
    """Two caches of the engine that take turns, and what the last position owes to the next one."""

    def __init__(self, caches: list[Any], turn: int, bank: int, carry: Tensor | None) -> None:
        self._caches, self._bank, self._carry = caches, bank, carry
        self._turn = self._first_turn = turn
        self.step: Callable[[Tensor], Any] = self._step_one if carry is None else self._step_both

    def _step_one(self, u: Tensor) -> Tensor:
        y: Tensor = self._caches[self._turn].step(u)
        self._turn ^= 1
        return y

    def _step_both(self, u: Tensor) -> tuple[Tensor, Tensor]:
        y = self._step_one(u)
        odd = self._carry
        assert odd is not None
        self._carry = y[:, self._bank :]
        return y[:, : self._bank], odd

    def extend(self, u: Tensor) -> Any:
        if not u.shape[1]:
            y = self._caches[0].extend(u.movedim(1, -1)).movedim(-1, 1)
            return y if self._carry is None else (y[:, :, : self._bank], y[:, :, self._bank :])
        first, second = self._turn, 1 - self._turn
        y = _interleave(
            self._caches[first].extend(u[:, 0::2].movedim(1, -1)),
            self._caches[second].extend(u[:, 1::2].movedim(1, -1)),
        )
        self._turn ^= u.shape[1] & 1
        if self._carry is None:
            return y
        even, odd = y[:, :, : self._bank], y[:, :, self._bank :]
        delayed = torch.cat([self._carry[:, None], odd[:, :-1]], 1)
        self._carry = odd[:, -1].clone()
        return even, delayed

    def fork(self) -> ParityState:
        copy = ParityState([cache.fork() for cache in self._caches], self._turn, self._bank, self._carry)
        copy._first_turn = self._first_turn
        return copy

    def reorder(self, index: Tensor) -> None:
        for cache in self._caches:
            cache.reorder(index)
        if self._carry is not None:
            self._carry = self._carry.index_select(0, index.to(self._carry.device))

    def reset(self, rows: Tensor | None) -> None:
        for cache in self._caches:
            cache.reset() if rows is None else cache.reset(rows)
        if rows is None:
            self._turn = self._first_turn
        if self._carry is not None:
            self._carry = forget(self._carry, rows)

    @property
    def nbytes(self) -> int:
        carry = 0 if self._carry is None else self._carry.nbytes
        return sum(int(cache.nbytes) for cache in self._caches) + carry


class ParityConvolution:
    """A causal convolution whose even and odd positions run apart, at half the length and half the rate.

    An even lag joins positions of the same parity, an odd lag those of different parity. Filters that vanish
    on odd lags are two independent convolutions with the even lags alone; others need the odd lags as a
    second bank, whose output at one position is due at the next.

    Args:
        even: `even(n)` gives the even lags among the first n, `(*F, ceil(min(n, L) / 2))`.
        sources: as in `Convolution`.
        bank: 0: `even` is all there is, and the output is one tensor. K: `even` gives `(2 K, ...)` filters,
            the K even-lag filters and the K odd-lag ones, the output is the pair of their convolutions, `(B,
            T, K, ...)`.
    """

    def __init__(
        self,
        even: Callable[[int | None], Tensor],
        sources: Callable[[], Iterable[Tensor]],
        bank: int = 0,
    ) -> None:
        self._even, self._sources, self._bank = even, sources, bank
        self._plans = Plans()

    def _half(self, half_length: int | None) -> Tensor:
        return self._even(None if half_length is None else 2 * half_length)

    def whole(self, u: Tensor) -> Any:
        length = u.shape[1]
        if length % 2:
            u = F.pad(u, [0, 0] * (u.ndim - 2) + [0, 1])
        pairs = u.reshape(u.shape[0], u.shape[1] // 2, 2, *u.shape[2:]).movedim(1, -1)
        y = ff.causal_conv(pairs, self._half(max(1, pairs.shape[-1])))
        y = y.movedim(-1, 1).flatten(1, 2)[:, :length]
        if not self._bank:
            return y
        even, odd = y[:, :, : self._bank], y[:, :, self._bank :]
        return even, F.pad(odd, [0, 0] * (odd.ndim - 2) + [1, 0])[:, :length]

    def prefill(self, u: Tensor, max_new: int | None, method: Any) -> tuple[Any, State]:
        length = u.shape[1]
        turn = length % 2
        outputs, caches = [], []
        for parity in (0, 1):
            new = None if max_new is None else (max_new + (parity == turn)) // 2
            x = u[:, parity::2].detach().movedim(1, -1)
            # Both halves share a plan: room for the longer one.
            slack = 0 if max_new is None or new is None else (length + max_new + 1) // 2 - x.shape[-1] - new
            y, cache = prefill(self._plans, self._half, self._sources(), x, new, method, slack)
            outputs.append(y)
            caches.append(cache)
        y = _interleave(*outputs)
        if not self._bank:
            return y, ParityState(caches, turn, 0, None)
        even, odd = y[:, :, : self._bank], y[:, :, self._bank :]
        delayed = F.pad(odd, [0, 0] * (odd.ndim - 2) + [1, 0])
        return (even, delayed[:, :length]), ParityState(caches, turn, self._bank, delayed[:, length].clone())


def _interleave(first: Tensor, second: Tensor) -> Tensor:
    """Merge positions 0, 2, .. and 1, 3, .. (time last) into one sequence `(B, T, ...)`."""
    y = first.new_empty(first.shape[0], first.shape[-1] + second.shape[-1], *first.shape[1:-1])
    y[:, 0::2] = first.movedim(-1, 1)
    y[:, 1::2] = second.movedim(-1, 1)
    return y


def forget(x: Tensor, rows: Tensor | None) -> Tensor:
    """A copy of x with zeros in the given rows, in all rows for None."""
    return torch.zeros_like(x) if rows is None else x.index_fill(0, rows.to(x.device), 0)


class ShortState:
    """The last inputs of a short filter, newest first; the tensors are never written to, so forks share
    them."""

    __slots__ = ("_bias", "_past", "_taps")

    def __init__(self, taps: list[Tensor], bias: Tensor | None, past: list[Tensor]) -> None:
        self._taps, self._bias, self._past = taps, bias, past

    def step(self, u: Tensor) -> Tensor:
        x = at_least_float32(u)
        past, taps = self._past, self._taps
        y = x * taps[0] if self._bias is None else torch.addcmul(self._bias, x, taps[0])
        for earlier, tap in zip(past, taps[1:], strict=True):
            y.addcmul_(earlier, tap)
        if past:
            self._past = [x, *past[:-1]]
        return y.to(u.dtype)

    def extend(self, u: Tensor) -> Tensor:
        if not self._past:
            return fir(at_least_float32(u), self._taps, self._bias).to(u.dtype)
        x = torch.cat([*(earlier[:, None] for earlier in reversed(self._past)), at_least_float32(u)], 1)
        count = len(self._past)
        self._past = [x[:, -1 - j].clone() for j in range(count)]
        return fir(x, self._taps, self._bias)[:, count:].to(u.dtype)

    def fork(self) -> ShortState:
        return ShortState(self._taps, self._bias, self._past)

    def reorder(self, index: Tensor) -> None:
        self._past = [x.index_select(0, index.to(x.device)) for x in self._past]

    def reset(self, rows: Tensor | None) -> None:
        self._past = [forget(x, rows) for x in self._past]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self._past)


class ShortConvolution:
    """A causal filter of a few taps per feature, run directly: `y[t] = bias + sum_k taps[k] u[t-k]`.

    Args:
        taps: gives `(K, D)`, lag 0 first; bias: gives `(D,)` or None. Both differentiable.
    """

    def __init__(self, taps: Callable[[], Tensor], bias: Callable[[], Tensor | None]) -> None:
        self._taps, self._bias = taps, bias

    def _read(self) -> tuple[list[Tensor], Tensor | None]:
        taps, bias = self._taps(), self._bias()
        return (
            list(at_least_float32(taps).contiguous().unbind(0)),
            None if bias is None else at_least_float32(bias),
        )

    def whole(self, u: Tensor) -> Tensor:
        return fir(at_least_float32(u), *self._read()).to(u.dtype)

    def prefill(self, u: Tensor, max_new: int | None, method: Any) -> tuple[Tensor, State]:
        taps, bias = self._read()
        x = at_least_float32(u)
        recent = F.pad(x[:, max(0, x.shape[1] - len(taps) + 1) :], (0, 0, len(taps), 0))
        past = [recent[:, -1 - j].clone() for j in range(len(taps) - 1)]
        return fir(x, taps, bias).to(u.dtype), ShortState(taps, bias, past)


def fir(x: Tensor, taps: list[Tensor], bias: Tensor | None) -> Tensor:
    """`y[:, t] = bias + sum_k taps[k] x[:, t-k]` for x `(B, T, D)`, the sum in the order a step has it."""
    y = x * taps[0] if bias is None else torch.addcmul(bias, x, taps[0])
    for lag, tap in enumerate(taps[1 : x.shape[1]], 1):
        y = torch.addcmul(y, F.pad(x[:, :-lag], (0, 0, lag, 0)), tap)
    return y
