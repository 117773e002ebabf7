"""Plans kept for later prompts, and how it is known that their filters are still the same.

What shapes a filter cannot be listed: weights, but also adapters that are switched, hooks, settings that are
no tensors, modules put in the place of others. So the filters themselves are asked: each prompt computes
them again and compares, all their values or as many as decide. An operator whose filters cost much more than
a prompt says with `signature` which tensors decide.
"""

from __future__ import annotations

import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import futurefill_rs as ff
from futurefill_rs._torch_args import borrowed, is_fake
from futurefill_rs.nn.operators.precision import at_least_float32, precisely

PLAN_BYTES = 64 << 20
"""Plans other than the last one used are dropped while an operator's plans take more than this."""

SAMPLES = 48
"""Lags, of many, at which filters drawn by a network are compared."""

Filters = Callable[[int | None], Tensor]
Signature = Callable[[int | None], Iterable[Tensor]]


class Plans:
    """The plans of a layer's operators.

    It belongs to a layer and holds nothing of it: a shallow copy of the layer may share it, and no copy needs
    it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # By operator; for each kind of plan what its filters were recognised by, and the plan.
        self._plans: dict[str, OrderedDict[tuple[Any, ...], tuple[Any, Any]]] = {}
        self._depth = 0
        self._compared: set[tuple[Any, ...]] = set()

    def get(
        self,
        name: str,
        filters: Filters,
        signature: Signature | None,
        horizon: int | None,
        method: Any,
        device: torch.device,
    ) -> Any:
        """A plan for `filters(horizon)` of the operator `name` of the layer.

        `signature(horizon)` gives tensors on which these filters depend alone; None: the filters themselves.
        """
        key = (horizon, method)
        if self._depth:
            with self._lock:
                if (name, *key) in self._compared:
                    return self._plans[name][key][1]
        # Not inference tensors: the plan outlives the inference mode it may have been made in.
        with torch.inference_mode(False), torch.no_grad():
            lags: Tensor | None = None
            if signature is None:
                lags = computed(filters, horizon, device)
                mark = _mark((lags,))
            else:
                mark = _mark(precisely(signature, horizon, device))
            with self._lock:
                plans = self._plans.get(name, OrderedDict())
                made_from, plan = plans.get(key, (None, None))
            if mark is None or made_from != mark:
                lags = computed(filters, horizon, device) if lags is None else lags
                plan = ff.plan(lags, horizon, method)
        if mark is not None:
            with self._lock:
                if made_from != mark and made_from is not None:
                    # Those for other horizons are of the old filters too.
                    self._plans.pop(name, None)
                    self._compared = {kept for kept in self._compared if kept[0] != name}
                self._keep(name, key, mark, plan)
        return plan

    def _keep(self, name: str, key: tuple[Any, ...], mark: Any, plan: Any) -> None:
        plans = self._plans.setdefault(name, OrderedDict())
        plans[key] = mark, plan
        plans.move_to_end(key)
        while len(plans) > 1 and sum(plan.nbytes for _, plan in plans.values()) > PLAN_BYTES:
            dropped, _ = plans.popitem(last=False)
            self._compared.discard((name, *dropped))
        if self._depth:
            self._compared.add((name, *key))

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Within the block plans are compared with the filters once only."""
        with self._lock:
            self._depth += 1
        try:
            yield
        finally:
            with self._lock:
                self._depth -= 1
                if not self._depth:
                    self._compared.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> Plans:
        return Plans()

    def __reduce__(self) -> tuple[Any, ...]:
        return Plans, ()


def computed(filters: Filters, length: int | None, device: torch.device) -> Tensor:
    """The first `length` lags, in at least float32 whatever is cast around the layer."""
    return at_least_float32(precisely(filters, length, device))


def sampled(length: int, device: torch.device) -> Tensor:
    """At most `SAMPLES` of `length` lags, the first and the last ones among them."""
    if length > SAMPLES:
        ends, between = 8, SAMPLES - 16
        middle = (ends + (length - 2 * ends - 1) * i // (between - 1) for i in range(between))
        lags = [*range(ends), *middle, *range(length - ends, length)]
    else:
        lags = list(range(length))
    return torch.tensor(lags, device=device)


def _mark(tensors: Iterable[Tensor]) -> tuple[Any, ...] | None:
    """Checksums of all values' bits, with dtypes, devices and shapes; None where tensors have no values."""
    mark: list[Any] = []
    for tensor in tensors:
        if is_fake(tensor) or tensor.is_meta:
            return None
        mark.append((tensor.dtype, tensor.device, tuple(tensor.shape), *_checksums(tensor.detach())))
    return tuple(mark)


def _checksums(values: Tensor) -> tuple[int, int]:
    values = values.resolve_conj().resolve_neg().contiguous().flatten().view(torch.uint8)
    if values.device.type != "cpu":
        values = _condensed(values).cpu().view(torch.uint8)
    data: Any = borrowed(values)
    return zlib.crc32(data), zlib.adler32(data)


def _condensed(data: Tensor) -> Tensor:
    """One int64 for each 4 KB of a tensor of bytes: the values times odd numbers, summed modulo 2**64.

    Any change of one value shows, one of several with a probability that differs from 1 by about 2**-60.
    """
    width = 1024
    data = torch.nn.functional.pad(data, (0, -data.numel() % (4 * width)))
    rows = data.view(torch.int32).view(-1, width)
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(1 << 62), 1 << 62, (width,), generator=generator, device="cpu") * 2 + 1
    factors = factors.to(data.device)
    return torch.cat(
        [(part.long() * factors).sum(1) for part in torch.split(rows, 4096)] or [rows.long().sum(1)]
    )
