"""step and extend: the same exact outputs for every schedule, split, shape and library."""

import futurefill_rs as ff
import numpy as np
import oracle
import pytest
from conftest import LIBRARIES
from hypothesis import given
from hypothesis import strategies as st

METHODS = ["auto", "naive", "epoched", "continuous"]
SCHEDULES = [
    *METHODS,
    ff.Schedule(1, ()),
    ff.Schedule(1, (2, 2, 2, 2)),
    ff.Schedule(3, (5, 2)),
    ff.Schedule(8, (4, 3)),
    ff.Schedule(7, (3,)),
]


def signals(rng, c, f, t, lags, dtype="float32"):
    return rng.standard_normal((*c, t)).astype(dtype), rng.standard_normal((*f, lags)).astype(dtype)


@pytest.mark.parametrize("method", SCHEDULES, ids=str)
@pytest.mark.parametrize(("t", "lags"), [(1, 1), (40, 1), (5, 40), (100, 100), (150, 33), (97, 131)])
@pytest.mark.parametrize("bounded", [True, False])
def test_stepping_is_the_direct_sum(lib, method, t, lags, bounded, rng):
    u, h = signals(rng, (3,), (3,), t, lags)
    cache = lib.plan(h, t if bounded else None, method).new_cache()
    oracle.assert_close(lib.stream(cache, u), oracle.conv(u, h), "float32")
    assert cache.position == t
    assert cache.remaining == (0 if bounded else None)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_longer_streams(lib, method, dtype, rng):
    u, h = signals(rng, (2,), (2,), 1500, 700, dtype)
    cache = lib.plan(h, 1500, method).new_cache()
    oracle.assert_close(lib.stream(cache, u), oracle.conv(u, h), dtype)


@pytest.mark.parametrize("latency", ["throughput", "smooth"])
def test_latency(lib, latency, rng):
    u, h = signals(rng, (2,), (2,), 600, 600)
    for method in ("auto", ff.Schedule(16, (2, 2, 2))):
        cache = lib.plan(h, 600, method, latency=latency).new_cache()
        oracle.assert_close(lib.stream(cache, u), oracle.conv(u, h), "float32")


@pytest.mark.parametrize(
    ("c", "f"),
    [
        ((), ()),
        ((3,), (3,)),
        ((2, 3), (3,)),
        ((2, 3), ()),
        ((), (4,)),
        ((2, 1, 3), (4, 1)),
        ((1,), (5,)),
        ((20,), (20,)),
    ],
)
def test_broadcasting(lib, c, f, rng):
    u, h = signals(rng, c, f, 70, 50)
    cache = lib.plan(h, 100, ff.Schedule(4, (4,))).new_cache(c)
    y = lib.stream(cache, u, [0] * 20 + [30])
    assert y.shape == (*np.broadcast_shapes(c, f), 70)
    oracle.assert_close(y, oracle.conv(u, h), "float32")


@pytest.mark.parametrize("c", [(0,), (0, 3), (2, 0, 3)])
def test_zero_rows(lib, c):
    cache = lib.plan(np.ones((3, 9), np.float32) if c != (0,) else np.ones(9, np.float32), 50).new_cache(c)
    y = lib.stream(cache, np.zeros((*c, 30), np.float32), [0] * 12 + [18])
    assert y.shape == (*c, 30)
    assert cache.position == 30


def test_filters_without_rows(lib):
    cache = lib.plan(np.ones((0, 9), np.float32), 20).new_cache()
    assert lib.stream(cache, np.zeros((0, 20), np.float32)).shape == (0, 20)


@given(
    library=st.sampled_from([param.values[0] for param in LIBRARIES if param.id != "cuda"]),
    base=st.integers(1, 12),
    fans=st.lists(st.integers(2, 5), max_size=3),
    lags=st.integers(1, 90),
    split=st.lists(st.integers(0, 25), max_size=20),
    horizon=st.sampled_from([None, 0, 7, 1000]),
    seed=st.integers(0, 2**16),
)
def test_any_schedule_in_any_split(library, base, fans, lags, split, horizon, seed):
    rng = np.random.default_rng(seed)
    t = sum(m or 1 for m in split)
    u, h = signals(rng, (2,), (2,), t, lags)
    bound = None if horizon is None else max(1, t + horizon)
    cache = library.plan(h, bound, ff.Schedule(base, fans)).new_cache()
    if t:
        oracle.assert_close(library.stream(cache, u, split), oracle.conv(u, h), "float32")
    assert cache.position == t


@pytest.mark.parametrize("method", SCHEDULES, ids=str)
def test_impulse_gives_back_the_filters(lib, method, rng):
    _, h = signals(rng, (2,), (2,), 1, 60)
    u = np.zeros((2, 80), np.float32)
    u[:, 0] = 1
    y = lib.stream(lib.plan(h, 80, method).new_cache(), u)
    oracle.assert_close(y, oracle.conv(u, h), "float32")


@pytest.mark.parametrize("method", [*METHODS, ff.Schedule(5, (2, 3))], ids=str)
def test_the_future_never_changes_the_past_bit_by_bit(lib, method, rng):
    u, h = signals(rng, (2,), (2,), 120, 120)
    plan = lib.plan(h, 120, method)
    clean = lib.stream(plan.new_cache(), u)
    for cut in (1, 40, 77):
        changed = u.copy()
        changed[:, cut:] = np.nan
        oracle.assert_same_bits(lib.stream(plan.new_cache(), changed)[:, :cut], clean[:, :cut])


@pytest.mark.parametrize("method", [*METHODS, ff.Schedule(5, (2, 3))], ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_rows_never_see_each_other(lib, method, value, rng):
    u, h = signals(rng, (2, 3), (3,), 100, 70)
    plan = lib.plan(h, 100, method)
    split = [0] * 30 + [40] + [0] * 30
    clean = lib.stream(plan.new_cache((2, 3)), u, split)
    u[0, 1, 20:] = value
    y = lib.stream(plan.new_cache((2, 3)), u, split)
    others = np.ones((2, 3), bool)
    others[0, 1] = False
    oracle.assert_same_bits(y[others], clean[others])


@pytest.mark.parametrize("method", [*METHODS, ff.Schedule(4, (4,))], ids=str)
def test_a_bad_input_leaves_with_the_filters_reach(lib, method, rng):
    u, h = signals(rng, (1,), (1,), 400, 10)
    u[:, 5] = np.nan
    y = lib.stream(lib.plan(h, None, method).new_cache(), u)
    assert np.isnan(y[:, 5:15]).all()
    assert np.isfinite(y[:, :5]).all() and np.isfinite(y[:, 100:]).all()
    oracle.assert_close(y[:, 100:], oracle.conv(np.nan_to_num(u), h)[:, 100:], "float32")


def test_steps_of_the_direct_sum_keep_signs(lib):
    """Tiles may give -1e-11 where nothing is negative; the direct sum never does."""
    h = np.exp(-np.arange(900) / 20)
    for dtype in ("float32", "float64"):
        cache = lib.plan(h.astype(dtype), method="naive").new_cache((3,))
        u = np.zeros((3, 1200), dtype)
        u[:, :5] = 1
        assert lib.stream(cache, u).min() >= 0


@pytest.mark.parametrize("workers", [2, 3, -1])
def test_workers_do_not_change_a_bit(lib, workers, rng):
    u, h = signals(rng, (40,), (40,), 700, 700)
    split = [0] * 300 + [100] + [0] * 300
    one = lib.stream(lib.plan(h, 700, ff.Schedule(16, (4,)), workers=1).new_cache(), u, split)
    many = lib.stream(lib.plan(h, 700, ff.Schedule(16, (4,)), workers=workers).new_cache(), u, split)
    oracle.assert_same_bits(one, many)


def test_capacity(lib, rng):
    u, h = signals(rng, (2,), (2,), 10, 4)
    cache = lib.plan(h, 10).new_cache()
    lib.stream(cache, u[:, :8])
    with pytest.raises(ff.CapacityError):
        cache.extend(lib.array(u[:, :3]))
    assert (cache.position, cache.remaining) == (8, 2)
    y = lib.stream(cache, u[:, 8:])
    oracle.assert_close(y, oracle.conv(u, h)[:, 8:], "float32")
    with pytest.raises(ff.CapacityError) as caught:
        cache.step(lib.array(u[:, 0]))
    assert isinstance(caught.value, ValueError)
    assert tuple(cache.extend(lib.array(u[:, :0])).shape) == (2, 0)
    assert (cache.position, cache.remaining) == (10, 0)


def test_horizon_of_one(lib):
    cache = lib.plan(np.full((2, 5), 3.0, np.float32), 1).new_cache()
    assert lib.numpy(cache.step(lib.array(np.ones(2, np.float32)))).tolist() == [3, 3]
    assert cache.remaining == 0


WRONG = [
    ("step", (3,), ValueError, r"u: expected shape \(2, 3\), got \(3,\)"),
    ("step", (2, 7), ValueError, r"u: expected shape \(2, 3\), got \(2, 7\)"),
    ("step", (2, 3, 1), ValueError, r"u: expected shape \(2, 3\), got \(2, 3, 1\)"),
    ("extend", (2, 3), ValueError, "u: expected shape"),
    ("extend", (3, 2, 5), ValueError, "u: expected shape"),
    ("extend", (), ValueError, "u: expected shape"),
]


@pytest.mark.parametrize(("call", "shape", "error", "text"), WRONG)
def test_wrong_shapes_change_nothing(lib, call, shape, error, text, rng):
    u, h = signals(rng, (2, 3), (3,), 40, 20)
    cache = lib.plan(h, 40, ff.Schedule(4, (2,))).new_cache((2, 3))
    first = lib.stream(cache, u[..., :13])
    with pytest.raises(error, match=text):
        getattr(cache, call)(lib.array(np.ones(shape, np.float32)))
    assert cache.position == 13
    y = np.concatenate([first, lib.stream(cache, u[..., 13:])], axis=-1)
    oracle.assert_same_bits(y, lib.stream(cache.plan.new_cache((2, 3)), u))
