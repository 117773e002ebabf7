"""plan: what it takes, what it refuses, what it says about itself."""

import futurefill_rs as ff
import numpy as np
import oracle
import pytest
import torch

METHODS = ["auto", "naive", "epoched", "continuous"]


def test_properties(lib):
    plan = lib.plan(np.ones((3, 40), np.float32), 100)
    assert plan.filter_length == 40
    assert plan.horizon == 100
    assert plan.dtype == lib.dtype("float32")
    assert plan.nbytes > 0
    assert isinstance(plan.schedule, ff.Schedule)
    cache = plan.new_cache()
    assert cache.plan is plan
    assert (cache.position, cache.remaining) == (0, 100)
    assert cache.nbytes > 0
    assert lib.plan(np.ones((3, 40))).dtype == lib.dtype("float64")
    assert lib.plan(np.ones(4)).horizon is None
    assert lib.plan(np.ones(4)).new_cache().remaining is None


def test_half_precision_filters_are_kept_in_float32(lib):
    for name in lib.dtypes[2:]:
        assert lib.plan(np.ones((2, 5)), dtype=name).dtype == torch.float32


def test_methods_by_name(lib):
    filters = np.ones((2, 500), np.float32)
    plans = {method: lib.plan(filters, 500, method) for method in METHODS}
    assert plans["naive"].schedule == ff.Schedule.naive()
    assert plans["epoched"].schedule == ff.Schedule.epoched(500)
    assert plans["continuous"].schedule == ff.Schedule.continuous(500)
    schedule = ff.Schedule(5, (3, 2))
    assert lib.plan(filters, method=schedule).schedule == schedule


def test_default_shape_is_the_filters(lib):
    cache = lib.plan(np.ones((2, 3, 5), np.float32)).new_cache()
    assert tuple(cache.step(lib.array(np.ones((2, 3), np.float32))).shape) == (2, 3)


@pytest.mark.parametrize("horizon", [2**40, 2**62, 2**63 - 1])
@pytest.mark.parametrize("method", METHODS)
def test_absurd_horizons_are_bounded_by_the_filters(lib, horizon, method, rng):
    h, u = rng.standard_normal((2, 9)), rng.standard_normal((2, 30))
    try:
        cache = lib.plan(h, horizon, method).new_cache()
    except (ValueError, MemoryError):
        return
    assert cache.remaining == horizon
    oracle.assert_close(lib.stream(cache, u), oracle.conv(u, h), "float64")
    assert cache.remaining == horizon - 30


@pytest.mark.parametrize(
    "schedule", [(2**62, (2,)), (2**62, (2**62,)), (2**31, (2**31, 2**31)), (1, (2,) * 70)]
)
def test_absurd_schedules(lib, schedule, rng):
    h, u = rng.standard_normal((2, 9)), rng.standard_normal((2, 30))
    for horizon in (None, 40, 2**62):
        try:
            cache = lib.plan(h, horizon, ff.Schedule(*schedule)).new_cache()
        except (ValueError, MemoryError):
            continue
        oracle.assert_close(lib.stream(cache, u), oracle.conv(u, h), "float64")


def test_absurd_shapes_are_errors(lib):
    plan = lib.plan(np.ones(4, np.float32), 10)
    for shape in [(2**62,), (2**40, 2**40), (2**31, 2**31, 4)]:
        with pytest.raises((ValueError, MemoryError, RuntimeError)):
            plan.new_cache(shape)


@pytest.mark.parametrize("rows", [2**36, 2**45])
def test_more_rows_than_memory_is_an_error_before_memory_is_touched(rows):
    plan = ff.plan(np.ones(6, np.float32), None, ff.Schedule(2, (2,)))
    with pytest.raises(MemoryError):
        plan.new_cache((rows,))
    with pytest.raises(MemoryError):
        plan.prefill(np.broadcast_to(np.float32(1), (rows, 3)), 5)


FILTERS = np.ones((2, 6), np.float32)
BAD_OPTIONS = [
    ({"horizon": 0}, ValueError, "horizon: expected a positive integer.*got 0"),
    ({"horizon": -5}, ValueError, "horizon: .*got -5"),
    ({"horizon": 2**64}, ValueError, "horizon: "),
    ({"horizon": True}, TypeError, "horizon: .*bool"),
    ({"horizon": 10.0}, TypeError, "horizon: .*float"),
    ({"method": "fast"}, ValueError, "method: expected .*'auto'.*got 'fast'"),
    ({"method": 3}, TypeError, "method: "),
    ({"workers": 0}, ValueError, "workers: "),
    ({"workers": -2}, ValueError, "workers: "),
    ({"workers": True}, TypeError, "workers: "),
    ({"workers": 1.0}, TypeError, "workers: "),
    ({"max_memory": 0}, ValueError, "max_memory: "),
    ({"max_memory": "1 GB"}, TypeError, "max_memory: "),
    ({"latency": "low"}, ValueError, "latency: expected 'throughput' or 'smooth', got 'low'"),
    ({"engine": "rust"}, ValueError, "engine: expected None or 'torch', got 'rust'"),
]


@pytest.mark.parametrize(("options", "error", "text"), BAD_OPTIONS)
def test_bad_options(lib, options, error, text):
    with pytest.raises(error, match=text):
        ff.plan(lib.array(FILTERS), **{"engine": lib.engine, **options})


def test_bad_filters(lib):
    with pytest.raises(ValueError, match=r"filters: expected at least (one|1) lag"):
        lib.plan(np.ones((2, 0), np.float32))
    with pytest.raises(ValueError, match=r"filters: "):
        lib.plan(np.array(1.0))
    with pytest.raises(TypeError, match=r"filters: expected .*float32.*int"):
        lib.plan(np.ones((2, 3), int))


def test_filters_of_no_library():
    for filters in ([1.0, 2.0], 1.0, None, "abc", range(4)):
        with pytest.raises(TypeError, match=r"filters: expected .*float32"):
            ff.plan(filters)
    with pytest.raises(TypeError, match=r"filters: .*float16"):
        ff.plan(np.ones(3, np.float16))
    with pytest.raises(TypeError, match=r"filters: .*longdouble|float128"):
        ff.plan(np.ones(3, np.longdouble))


def test_engine_torch_needs_tensors():
    with pytest.raises(TypeError, match=r"torch"):
        ff.plan(FILTERS, engine="torch")


def test_max_memory_is_honoured_or_the_least_is_named(lib):
    filters = np.ones((4, 4096), np.float32)
    free = lib.plan(filters, 4096)
    tight = lib.plan(filters, 4096, max_memory=free.new_cache().nbytes * 2)
    assert tight.new_cache().nbytes <= free.new_cache().nbytes * 2
    with pytest.raises(ValueError, match=r"max_memory: expected at least \d+"):
        lib.plan(filters, 4096, max_memory=1)


@pytest.mark.parametrize("shape", [(4,), (2, 3), (3, 2, 5)])
def test_shape_must_broadcast(lib, shape):
    with pytest.raises(ValueError, match=r"shape: expected"):
        lib.plan(FILTERS).new_cache(shape)


@pytest.mark.parametrize(
    ("shape", "error"), [((-1, 2), ValueError), ((True, 2), TypeError), ((2.0,), TypeError)]
)
def test_shape_must_be_sizes(lib, shape, error):
    with pytest.raises(error, match=r"shape: expected"):
        lib.plan(FILTERS).new_cache(shape)


def test_shape_forms(lib):
    plan = lib.plan(np.ones(3, np.float32))
    for shape in [(4,), [4], 4, np.array([4])]:
        assert tuple(plan.new_cache(shape).step(lib.array(np.ones(4, np.float32))).shape) == (4,)


def test_a_plan_does_not_follow_later_changes_of_its_filters(lib):
    filters = lib.array(np.ones((2, 6), np.float32))
    plan = ff.plan(filters, engine=lib.engine)
    filters[...] = 100
    u = np.ones((2, 4), np.float32)
    oracle.assert_close(lib.stream(plan.new_cache(), u), oracle.conv(u, FILTERS), "float32")


@pytest.mark.parametrize("shape", [(), (1,)])
def test_one_filter_for_all_channels_is_kept_once(lib, shape, rng):
    """It costs no more than its copies, in the cache as in the plan."""
    h, u = rng.standard_normal((*shape, 900)).astype(np.float32), rng.standard_normal((40, 700))
    for method in ("naive", ff.Schedule(16, (2, 2, 2)), ff.Schedule(7, (3,))):
        one, copies = lib.plan(h, 700, method), lib.plan(np.broadcast_to(h, (40, 900)), 700, method)
        assert one.nbytes <= copies.nbytes / 20
        caches = [plan.new_cache((40,)) for plan in (one, copies)]
        assert caches[0].nbytes <= caches[1].nbytes
        y, want = (lib.stream(cache, u.astype(np.float32), [64, 0, 300]) for cache in caches)
        oracle.assert_close(y, want, "float32")
