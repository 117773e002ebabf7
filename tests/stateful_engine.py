"""The world of `ff.plan`: any filters, schedule and library, and every operation on a cache."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import futurefill_rs as ff
import numpy as np
import oracle
from conftest import Library
from numpy.lib.stride_tricks import sliding_window_view
from stateful import Setup, World

LIBRARIES = {
    "numpy": Library("numpy"),
    "torch-cpu": Library("torch-cpu", device="cpu"),
    "torch-engine": Library("torch-engine", device="cpu", engine="torch"),
}
TINY = float(np.finfo(float).tiny)
WIDTHS = (1, 2, 3, 5, 8, 15, 16, 17, 24, 33)
# Later lags dwarf the ones before: the bound counts all lags of a tile (see test_error_bound.py).
STEEP = ("growing", "late")
PROFILES = ("flat", "flat", "decaying", "tiny", "huge", "rows", *STEEP)


def filters(
    profile: str, shape: tuple[int, ...], lags: int, dtype: str, rng: np.random.Generator
) -> np.ndarray:
    """Filters `(*shape, lags)` whose size follows a profile along the lags."""
    values = rng.standard_normal((*shape, lags))
    age = np.arange(lags) / lags
    if profile == "decaying":
        values *= np.exp(-rng.uniform(1, 20) * age)
    elif profile == "growing":
        values *= np.exp(rng.uniform(1, 20) * age)
    elif profile == "late":
        values[..., : rng.integers(lags)] *= 10.0 ** rng.uniform(-12, -2)
    elif profile in ("tiny", "huge"):
        values *= 1e-30 if profile == "tiny" else 1e30
    elif profile == "rows":
        values *= 10.0 ** rng.uniform(-12, 12, (*shape, 1))
    return values.astype(dtype)


def draw_method(rng: np.random.Generator) -> Any:
    if rng.random() < 0.4:
        return ("auto", "naive", "epoched", "continuous")[rng.integers(4)]
    return [int(rng.integers(1, 41)), [int(fan) for fan in rng.integers(2, 6, rng.integers(4))]]


def method_of(value: Any) -> Any:
    return value if isinstance(value, str) else ff.Schedule(value[0], tuple(value[1]))


def size(rng: np.random.Generator, most: int) -> int:
    """A length from 1 to `most`, short ones as likely as long ones."""
    return round(math.exp(rng.uniform(0, math.log(most))))


def draw_split(rng: np.random.Generator, m: int) -> list[int]:
    """m positions in steps (0) and blocks, as `Library.stream` takes them."""
    split = []
    while m:
        split.append(0 if rng.random() < 0.5 else int(rng.integers(m + 1)))
        m -= max(1, split[-1])
    return split


def same(a: Any, b: Any) -> bool:
    """Whether two states are equal bit for bit."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return type(a) is type(b) and bool(a == b)


def through_npz(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    np.savez(file, **state)
    file.seek(0)
    with np.load(file) as saved:
        return dict(saved)


PASSAGES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "memory": lambda state: state,
    "pickle": lambda state: pickle.loads(pickle.dumps(state)),
    "npz": through_npz,
}
COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
}


class EngineWorld(World):
    name = "engine"
    operations: ClassVar[dict[str, int]] = {
        "step": 8,
        "extend": 6,
        "prefill": 3,
        "new_cache": 1,
        "fork": 3,
        "reorder": 6,
        "reset_rows": 4,
        "reset": 1,
        "state": 3,
        "move": 2,
        "reschedule": 2,
        "copies": 2,
        "pending": 3,
        "refuse": 5,
        "strangers": 3,
        "workers": 2,
    }

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Setup:
        width = int(rng.choice(WIDTHS))
        shape = ((), (width,), (width, 1), (2, 1), (3, 4), (1,))[rng.integers(6)]
        core = [int(n if n > 1 and rng.random() < 0.8 else 1 if n > 1 else rng.choice(WIDTHS)) for n in shape]
        least, axes = int(rng.random() > 0.1), rng.choice(3, p=(0.2, 0.6, 0.2))
        batch = [int(n) for n in rng.integers(least, 5, axes)]
        lags = size(rng, 300)
        return {
            "library": str(rng.choice(list(LIBRARIES), p=(0.5, 0.25, 0.25))),
            "dtype": str(rng.choice(["float32", "float64"])),
            "filters": list(shape),
            "lags": lags,
            "profile": str(rng.choice(PROFILES)),
            "shape": [*batch, *core],
            "horizon": None if rng.random() < 0.4 else 20 + size(rng, 500),
            "method": draw_method(rng),
            "latency": str(rng.choice(["throughput", "smooth"])),
            "workers": int(rng.integers(1, 4)),
        }

    @classmethod
    def simpler(cls, setup: Setup) -> Iterator[Setup]:
        plain = {
            "library": "numpy",
            "workers": 1,
            "latency": "throughput",
            "horizon": None,
            "profile": "flat",
            "dtype": "float64",
            "method": [1, []],
        }
        yield from ({**setup, key: value} for key, value in plain.items() if setup[key] != value)
        if not isinstance(setup["method"], str):
            base, fans = setup["method"]
            yield from ({**setup, "method": [n, fans]} for n in (1, 2, base // 2, base - 1) if 0 < n < base)
            yield from ({**setup, "method": [base, fans[:n] + fans[n + 1 :]]} for n in range(len(fans)))
            yield from ({**setup, "method": [base, [2] * len(fans)]} for _ in [0] if set(fans) - {2})
        for lags in (1, 2, 4, setup["lags"] // 2, setup["lags"] - 1):
            if 0 < lags < setup["lags"]:
                yield {**setup, "lags": lags}
        shape, kept = setup["shape"], setup["filters"]
        batch = len(shape) - len(kept)
        yield from ({**setup, "shape": shape[:n] + shape[n + 1 :]} for n in range(batch))
        ones = ([*shape[:n], 1, *shape[n + 1 :]] for n in range(batch) if shape[n] > 1)
        yield from ({**setup, "shape": one} for one in ones)
        if kept:
            yield {**setup, "filters": kept[1:], "shape": shape[:batch] + shape[batch + 1 :]}
            yield {**setup, "filters": [1] * len(kept), "shape": shape[:batch] + [1] * len(kept)}

    def __init__(self, setup: Setup, rng: np.random.Generator) -> None:
        self.setup = setup
        self.dtype, self.shape = setup["dtype"], tuple(setup["shape"])
        self.wide = np.longdouble if self.dtype == "float64" else np.float64
        self.filters = filters(setup["profile"], tuple(setup["filters"]), setup["lags"], self.dtype, rng)
        self.exact = self.filters.astype(self.wide)
        self.options = {key: setup[key] for key in ("horizon", "method", "latency", "workers")}
        self.batched = len(self.shape) > len(setup["filters"])
        self.library = LIBRARIES[setup["library"]]
        self.plan = self.planned(self.library)
        self.begin(self.plan.new_cache(self.shape), np.zeros((*self.shape, 0)), setup["horizon"])

    def __repr__(self) -> str:
        return f"{self.library.name} {self.cache!r}"

    def planned(self, library: Library, **changed: Any) -> Any:
        options = {**self.options, **changed}
        return library.plan(self.filters, method=method_of(options.pop("method")), **options)

    def begin(self, cache: Any, past: np.ndarray, capacity: int | None, lags: int = 0) -> None:
        """Go on with `cache`, which knows the inputs `past` `(*C, T)` and holds `capacity` more positions."""
        self.cache, self.capacity, self.remaining, self.position = cache, capacity, capacity, past.shape[-1]
        self.past = past.astype(self.wide)
        # Lags of which some tile so far may hold the rounding.
        self.lags = lags
        self.want = self.got = self.truth(self.past, 0)

    # What is right.

    def truth(self, past: np.ndarray, m: int) -> np.ndarray:
        """Outputs `(*O, m)` at the last m positions of the inputs `past`."""
        if not m:
            return np.zeros((*np.broadcast_shapes(past.shape[:-1], self.exact.shape[:-1]), 0), self.wide)
        lags = min(past.shape[-1], self.exact.shape[-1])
        recent = past[..., max(0, past.shape[-1] - m - lags + 1) :]
        recent = np.pad(recent, [(0, 0)] * (past.ndim - 1) + [(m + lags - 1 - recent.shape[-1], 0)])
        taps = self.exact[..., lags - 1 :: -1]
        return np.einsum("...mj,...j->...m", sliding_window_view(recent, lags, -1), taps)

    def random(self, rng: np.random.Generator, m: int) -> np.ndarray:
        """Inputs `(*C, m)`: noise, a constant, or impulses."""
        u = rng.standard_normal((*self.shape, m))
        kind = rng.integers(6)
        if kind == 0:
            u = np.ones_like(u)
        elif kind == 1:
            u *= rng.random(u.shape) < 0.1
        return u.astype(self.dtype)

    def compare(self, got: np.ndarray, want: np.ndarray, past: np.ndarray, reached: int) -> None:
        """Rows of `got` within the bound, relative to themselves or to the filters and inputs behind them."""
        if got.size == 0:
            return
        length = past.shape[-1]
        bound = oracle.EPS[self.dtype] * math.log2(2 * max(1, length))
        lags = max(length, reached, 2 * length if self.setup["profile"] in STEEP else 0)
        taps = np.linalg.norm(self.exact[..., :lags].astype(np.float64), axis=-1)
        scale = taps * np.linalg.norm(past.astype(np.float64), axis=-1)
        error = np.linalg.norm((got - want).astype(np.float64), axis=-1)
        norm = np.linalg.norm(want.astype(np.float64), axis=-1)
        # The promise is for the whole. A row alone may have worse luck, but never more than this.
        reference = np.maximum(norm, scale)
        off = np.max(error / np.where(reference > 0, reference, 1)) / bound
        assert off <= 2, f"a row is off by {off:.3g} times the bound"
        off = np.linalg.norm(error) / max(np.linalg.norm(reference), TINY) / bound
        assert off <= 1, f"the whole is off by {off:.3g} times the bound"
        # A few outputs may cancel, and those of few lags, which may be differences; many do not.
        if self.setup["profile"] not in STEEP and got.size >= 64 and min(length, self.setup["lags"]) >= 16:
            off = np.linalg.norm(error) / max(np.linalg.norm(norm), TINY) / bound
            assert off <= 1, f"the whole is off by {off:.3g} times the bound, relative to itself"

    def takes(self, m: int) -> int:
        """m, or as many positions as are left; what is too much is refused first."""
        if self.remaining is not None and m > self.remaining:
            u = self.array(np.zeros((*self.shape, m), self.dtype))
            self.refused(ff.CapacityError, lambda: self.cache.extend(u))
            return self.remaining
        return m

    def array(self, values: np.ndarray) -> Any:
        return self.library.array(values)

    def feed(self, cache: Any, u: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Outputs of `cache` for u in a random split."""
        if not u.shape[-1]:
            return self.truth(u, 0).astype(self.dtype)
        return self.library.stream(cache, u, draw_split(rng, u.shape[-1]))

    def took(self, u: np.ndarray, y: np.ndarray) -> None:
        """The cache has answered the inputs u with y."""
        m = u.shape[-1]
        self.past = np.concatenate([self.past, u.astype(self.wide)], axis=-1)
        want = self.truth(self.past, m)
        assert y.shape == want.shape and y.dtype == self.dtype, f"{y.dtype} {y.shape}"
        assert np.isfinite(y).all()
        self.want = np.concatenate([self.want, want], axis=-1)
        self.got = np.concatenate([self.got, y.astype(self.wide)], axis=-1)
        self.position += m
        self.remaining = None if self.remaining is None else self.remaining - m
        assert (self.cache.position, self.cache.remaining) == (self.position, self.remaining)
        self.compare(self.got, self.want, self.past, self.lags)

    def advance(self, rng: np.random.Generator, *others: Any, most: int = 12) -> None:
        """Go on, and the same bits from `others`."""
        m = self.takes(int(rng.integers(most + 1)))
        u, seed = self.random(rng, m), int(rng.integers(2**32))
        outputs = [self.feed(cache, u, np.random.default_rng(seed)) for cache in (self.cache, *others)]
        for y in outputs[1:]:
            oracle.assert_same_bits(y, outputs[0])
        for other in others:
            assert same(other.state_dict(), self.cache.state_dict()), "the states part"
        self.took(u, outputs[0])

    def refused(self, kind: Any, call: Callable[[], Any]) -> None:
        """`call` fails as it should and changes nothing."""
        before = self.cache.state_dict()
        try:
            call()
        except kind:
            pass
        else:
            raise AssertionError(f"expected {kind}")
        assert same(self.cache.state_dict(), before), "a call that failed has changed the state"
        assert (self.cache.position, self.cache.remaining) == (self.position, self.remaining)

    def rows(self, rng: np.random.Generator, repeat: bool) -> Any:
        """Random indices of the batch, in one of the forms that numpy reads."""
        n = self.shape[0]
        count = int(rng.integers(0, 7)) if repeat else int(rng.integers(0, n + 1))
        index = rng.integers(-n, n, count if n else 0) if repeat else rng.permutation(n)[:count]
        return (index, index.tolist(), tuple(index), self.array(index))[rng.integers(4)]

    # Operations.

    def step(self, rng: np.random.Generator) -> None:
        m = self.takes(size(rng, 40))
        u = self.random(rng, m)
        y = np.zeros((*self.want.shape[:-1], m), self.dtype)
        out = self.array(np.zeros(self.want.shape[:-1], self.dtype)) if rng.random() < 0.5 else None
        for t in range(m):
            if out is None:
                y[..., t] = self.library.numpy(self.cache.step(self.array(u[..., t])))
            else:
                assert self.cache.step(self.array(u[..., t]), out=out) is out
                y[..., t] = self.library.numpy(out)
        self.took(u, y)

    def extend(self, rng: np.random.Generator) -> None:
        u = self.random(rng, self.takes(0 if rng.random() < 0.1 else size(rng, 100)))
        self.took(u, self.library.numpy(self.cache.extend(self.array(u))))

    def prefill(self, rng: np.random.Generator) -> None:
        horizon = self.options["horizon"]
        p = 0 if rng.random() < 0.1 else size(rng, 100)
        p = p if horizon is None else min(p, horizon)
        u = self.random(rng, p)
        new = None if rng.random() < 0.3 else size(rng, 200)
        if horizon is not None and new is not None and p + new > horizon:
            self.refused(ff.CapacityError, lambda: self.plan.prefill(self.array(u), new))
            new = horizon - p
        rest = new if new is not None or horizon is None else horizon - p
        y, cache = self.plan.prefill(self.array(u), new)
        self.begin(cache, u[..., :0], rest, self.setup["lags"] if rest is None else p + rest)
        if rest is not None:
            self.remaining = rest + p
        self.took(u, self.library.numpy(y))

    def new_cache(self, rng: np.random.Generator) -> None:
        self.begin(self.plan.new_cache(self.shape), np.zeros((*self.shape, 0)), self.options["horizon"])
        self.advance(rng)

    def fork(self, rng: np.random.Generator) -> None:
        """Two forks go on as the cache does, whatever a third one meets."""
        before = self.cache.state_dict()
        first, other = self.cache.fork(), self.cache.fork()
        self.feed(other, self.random(rng, self.takes(int(rng.integers(20)))) * 1e3, rng)
        other.reset()
        assert same(self.cache.state_dict(), before)
        self.advance(rng, first)
        if rng.random() < 0.5:
            self.cache = first

    def reorder(self, rng: np.random.Generator) -> None:
        if not self.batched:
            return self.refused(ValueError, lambda: self.cache.reorder([0]))
        index = self.rows(rng, repeat=True)
        assert self.cache.reorder(index) is None
        self.gather(np.array([int(i) for i in index], int))
        self.advance(rng)

    def gather(self, index: np.ndarray) -> None:
        self.past, self.want, self.got = self.past[index], self.want[index], self.got[index]
        self.shape = self.past.shape[:-1]

    def forget(self, rows: Any) -> None:
        self.past[rows], self.want[rows], self.got[rows] = 0, 0, 0

    def reset_rows(self, rng: np.random.Generator) -> None:
        if not self.batched:
            return self.refused(ValueError, lambda: self.cache.reset([0]))
        rows = self.rows(rng, repeat=False)
        chosen = np.zeros(self.shape[0], bool)
        chosen[[int(row) for row in rows]] = True
        self.cache.reset(rows if rng.random() < 0.7 else self.array(chosen))
        self.forget(chosen)
        self.advance(rng)

    def reset(self, rng: np.random.Generator) -> None:
        """Everything starts again, and with the bits of a new cache where there was no prompt."""
        self.cache.reset()
        self.begin(self.cache, self.past[..., :0], self.capacity)
        self.advance(rng)

    def state(self, rng: np.random.Generator) -> None:
        """A loaded cache goes on bit by bit."""
        passage = PASSAGES[rng.choice(list(PASSAGES))]
        plan = self.plan if rng.random() < 0.5 else self.planned(self.library)
        loaded = plan.load_cache(passage(self.cache.state_dict()))
        self.advance(rng, loaded, most=40)
        self.cache = loaded

    def copies(self, rng: np.random.Generator) -> None:
        copied = COPIES[rng.choice(list(COPIES))](self.cache)
        self.advance(rng, copied)
        self.cache = copied

    def move(self, rng: np.random.Generator) -> None:
        """Another engine goes on."""
        self.library = LIBRARIES[rng.choice(list(LIBRARIES))]
        before, self.plan = self.plan.schedule, self.planned(self.library)
        self.cache = self.plan.load_cache(self.cache.state_dict())
        if self.plan.schedule != before:
            # The engines plan by costs of their own.
            self.capacity, self.lags = self.capacity_now(), self.setup["lags"]
        self.advance(rng, most=40)

    def reschedule(self, rng: np.random.Generator) -> None:
        """Another schedule, latency and horizon go on from the same filters' history."""
        left, state = self.remaining, self.cache.state_dict()
        extra = int(rng.integers(1, 30)) if rng.random() < 0.3 else 0
        changed = {"method": draw_method(rng), "latency": str(rng.choice(["throughput", "smooth"]))}
        horizon = None if left is None else max(1, self.position + left + extra)
        plan = self.planned(self.library, **changed, horizon=horizon)
        try:
            cache = plan.load_cache(state)
        except ValueError:
            # What the past adds is known as far as the old capacity reached.
            assert left is not None and left < min(self.setup["lags"] - 1, left + extra)
            horizon = max(1, self.position + left)
            plan = self.planned(self.library, **changed, horizon=horizon)
            cache = plan.load_cache(state)
        assert cache.position == self.position
        assert cache.remaining in (left, None if left is None else left + extra)
        self.options |= {**changed, "horizon": horizon}
        self.cache, self.plan, self.remaining = cache, plan, cache.remaining
        self.capacity, self.lags = self.capacity_now(), self.setup["lags"]
        self.advance(rng, most=60)

    def capacity_now(self) -> int | None:
        """What a reset of everything leaves."""
        fork = self.cache.fork()
        fork.reset()
        assert fork.position == 0
        left: int | None = fork.remaining
        assert (left is None) == (self.remaining is None) and (left is None or left >= self.remaining)
        return left

    def pending(self, rng: np.random.Generator) -> None:
        """What the past adds to the next outputs, and a cache that stays as it is."""
        k = self.takes(0 if rng.random() < 0.1 else size(rng, 60))
        before = self.cache.state_dict()
        y = self.library.numpy(self.cache.pending(k))
        assert same(self.cache.state_dict(), before)
        if self.remaining is not None:
            self.refused(ff.CapacityError, lambda: self.cache.pending(self.remaining + 1))
        past = np.concatenate([self.past, np.zeros((*self.shape, k), self.wide)], axis=-1)
        want = self.truth(past, k)
        assert y.shape == want.shape and y.dtype == self.dtype
        # A few outputs of a long past: relative to what is behind them, not to themselves.
        got, want = np.concatenate([self.got, y], -1), np.concatenate([self.want, want], -1)
        self.compare(got, want, past, max(self.lags, past.shape[-1]))

    def refuse(self, rng: np.random.Generator) -> None:
        """A call that must fail, and then the same bits as if it had not been made."""
        n = self.shape[0] if self.shape else 0
        o = self.want.shape[:-1]

        def zeros(*shape: int, dtype: str = self.dtype) -> Any:
            return self.array(np.zeros(shape, dtype))

        def step(u: Any, **options: Any) -> Callable[[], Any]:
            return lambda: self.cache.step(u, **options)

        wrong = {
            "shape": (ValueError, step(zeros(*self.shape, 7))),
            "block": (ValueError, lambda: self.cache.extend(zeros(7, 5, *self.shape, 4))),
            "dtype": (TypeError, step(zeros(*self.shape, dtype="int64"))),
            "list": (TypeError, lambda: self.cache.extend([0.0])),
            "out": ((ValueError, TypeError), step(zeros(*self.shape), out=zeros(*o, 2))),
            "index": ((IndexError, ValueError), lambda: self.cache.reorder([0, n])),
            "float index": ((TypeError, ValueError), lambda: self.cache.reorder([0.5])),
            "rows": ((IndexError, ValueError), lambda: self.cache.reset([-n - 1])),
            "state": (ValueError, lambda: self.plan.load_cache({})),
        }
        if self.dtype == "float32":
            wrong["precision"] = (TypeError, step(zeros(*self.shape, dtype="float64")))
        other = self.cache.fork()
        self.refused(*wrong[rng.choice(list(wrong))])
        self.advance(rng, other)

    def strangers(self, rng: np.random.Generator) -> None:
        """Whatever one row meets, the others keep their bits; a reset forgets it."""
        if not math.prod(self.shape):
            return
        clean, spoilt = self.cache.fork(), self.cache.fork()
        u, seed = self.random(rng, self.takes(int(rng.integers(1, 20)))), int(rng.integers(2**32))
        row = tuple(int(rng.integers(n)) for n in self.shape)
        bad = u.copy()
        bad[row] = rng.choice([np.nan, np.inf, 1e30])
        ours = np.ones(self.shape, bool)
        ours[row] = False
        ours = np.broadcast_to(ours, self.want.shape[:-1])
        with np.errstate(all="ignore"):
            a = self.feed(clean, u, np.random.default_rng(seed))
            b = self.feed(spoilt, bad, np.random.default_rng(seed))
        oracle.assert_same_bits(a[ours], b[ours])
        if self.batched:
            clean.reset([row[0]])
            spoilt.reset([row[0]])
            m = 12 if clean.remaining is None else min(12, clean.remaining)
            u, seed = self.random(rng, m), int(rng.integers(2**32))
            a, b = (self.feed(cache, u, np.random.default_rng(seed)) for cache in (clean, spoilt))
            oracle.assert_same_bits(a, b)

    def workers(self, rng: np.random.Generator) -> None:
        """The same bits from any number of workers."""
        plan = self.planned(self.library, workers=int(rng.integers(1, 4)))
        self.advance(rng, plan.load_cache(self.cache.state_dict()), most=60)
