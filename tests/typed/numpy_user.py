"""A user of numpy arrays: passes mypy --strict and pyright's strict mode, with torch installed or not."""

# pyright: strict
from __future__ import annotations

import pickle
from typing import Any, Literal

import futurefill_rs as ff
import numpy as np
from futurefill_rs import CapacityError, Schedule
from numpy.typing import NDArray
from typing_extensions import assert_type

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


class Filter:
    """What keeps a plan and a cache of any library names them so."""

    plan: ff.Plan
    cache: ff.Cache

    def __init__(self, filters: F64, horizon: int | None) -> None:
        self.plan = ff.plan(filters, horizon)
        self.cache = self.plan.new_cache()

    def __call__(self, u: F64) -> F64:
        return self.cache.step(u)


def demodulate(iq: NDArray[np.complex64], taps: NDArray[np.complex64]) -> NDArray[np.complex64]:
    assert_type(ff.causal_conv(np.ones(3, np.float32), taps), NDArray[np.complex64])
    assert_type(ff.causal_conv(np.ones(3), taps), NDArray[np.complex128])
    assert_type(ff.futurefill(iq, np.ones(3)), NDArray[np.complex64])
    y, cache = ff.plan(taps).prefill(iq)
    return cache.step(y[..., -1])


def generate(plan: ff.Plan, u: F32, count: int) -> F32:
    y, cache = plan.prefill(u, count)
    assert_type(y, F32)
    out = np.empty(y.shape[:-1], np.float32)
    for _ in range(count):
        assert_type(cache.step(y[..., -1], out=out), F32)
    return out


def narrowed(value: ff.Plan | ff.Cache | None) -> int:
    if isinstance(value, ff.Plan):
        assert_type(value, ff.Plan)
        return value.filter_length
    if isinstance(value, ff.Cache):
        assert_type(value, ff.Cache)
        return value.position
    return 0


def told(done: int, total: int) -> None:
    print(done, total)


filters: F32 = np.ones((2, 8), np.float32)
plan = ff.plan(filters, 100, "auto", workers=1, max_memory=1 << 20, latency="smooth", progress=told)
as_declared: ff.Plan = plan
assert_type(plan.schedule, Schedule)
assert_type(plan.schedule.base, int | None)
assert_type(plan.schedule.fans, tuple[int, ...])
assert_type(plan.schedule.cost(None, 8).flops, float)
assert_type(plan.horizon, int | None)
assert_type(plan.filter_length, int)
assert_type(plan.filter_shape, tuple[int, ...])
assert_type(plan.latency, Literal["throughput", "smooth"])
assert_type(plan.nbytes, int)
assert_type(plan.workers, int)

cache = plan.new_cache((3, 2))
one: ff.Cache = cache
assert_type(cache.step(np.ones((3, 2), np.float32)), F32)
assert_type(cache.step(np.ones((3, 2), np.float32), out=np.ones((3, 2), np.float32)), F32)
assert_type(cache.extend(np.ones((3, 2, 5), np.float32), progress=told), F32)
assert_type(cache.position, int)
assert_type(cache.remaining, int | None)
assert_type(cache.shape, tuple[int, ...])
cache.reorder([0, 0, 1])
cache.reorder(np.arange(2))
cache.reset(np.array([True, False]))
cache.reset()
assert cache.pending(3).shape == (2, 2, 3)
fork = cache.fork()
assert ff.plan(np.ones(3)).new_cache().step(0.5).shape == ()
state: dict[str, NDArray[Any]] = cache.state_dict()
other = ff.plan(filters, method=Schedule(4, (2,)), dtype=np.float64)
assert_type(other.prefill(np.ones((2, 5)), 3)[0], F64)
assert_type(plan.load_cache(state).step(np.ones((2, 2), np.float32)), F32)
again: ff.Plan = pickle.loads(pickle.dumps(plan))

assert_type(ff.causal_conv(np.ones((2, 9)), np.ones(3, np.float32)), F64)
assert_type(ff.causal_conv(np.ones((2, 9), np.float32), filters, out=np.ones((2, 9), np.float32)), F32)
assert_type(ff.futurefill(np.ones(3), np.ones(4)), F64)

try:
    plan.prefill(np.ones((2, 101), np.float32))
except CapacityError as error:
    refused: ValueError = error

ff.set_workers(1)
with ff.set_workers(2):
    assert_type(ff.get_workers(), int)
ff.show_config()
assert_type(ff.__version__, str)

assert narrowed(plan) == 8 and narrowed(cache) == 0 and narrowed(None) == 0
assert generate(plan, np.ones((2, 5), np.float32), 3).shape == (2,)
assert Filter(np.ones((2, 3)), None)(np.ones(2)).shape == (2,)
