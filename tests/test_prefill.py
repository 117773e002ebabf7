"""prefill: outputs at every prompt position, and a cache sized by what is still to come."""

import futurefill_rs as ff
import numpy as np
import oracle
import pytest
from conftest import LIBRARIES
from hypothesis import given
from hypothesis import strategies as st

METHODS = ["auto", "naive", "epoched", "continuous", ff.Schedule(3, (2, 5))]


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("prompt", [0, 1, 2, 30, 64, 101])
@pytest.mark.parametrize("max_new", [1, 7, 60])
def test_prompt_then_steps(lib, method, prompt, max_new, rng):
    u = rng.standard_normal((2, 3, prompt + max_new)).astype(np.float32)
    h = rng.standard_normal((3, 50)).astype(np.float32)
    y, cache = lib.plan(h, None, method).prefill(lib.array(u[..., :prompt]), max_new)
    assert tuple(y.shape) == (2, 3, prompt)
    assert (cache.position, cache.remaining) == (prompt, max_new)
    y = np.concatenate([lib.numpy(y), lib.stream(cache, u[..., prompt:])], axis=-1)
    oracle.assert_close(y, oracle.conv(u, h), "float32")
    with pytest.raises(ff.CapacityError):
        cache.step(lib.array(u[..., 0]))


@given(
    library=st.sampled_from([param.values[0] for param in LIBRARIES if param.id != "cuda"]),
    base=st.integers(1, 9),
    fans=st.lists(st.integers(2, 4), max_size=2),
    prompt=st.integers(0, 70),
    lags=st.integers(1, 90),
    split=st.lists(st.integers(0, 12), min_size=1, max_size=12),
    spare=st.sampled_from([None, 0, 5]),
    seed=st.integers(0, 2**16),
)
def test_any_prompt(library, base, fans, prompt, lags, split, spare, seed):
    rng = np.random.default_rng(seed)
    t = sum(m or 1 for m in split)
    u = rng.standard_normal((2, prompt + t)).astype(np.float32)
    h = rng.standard_normal((2, lags)).astype(np.float32)
    max_new = None if spare is None else t + spare
    y, cache = library.plan(h, None, ff.Schedule(base, fans)).prefill(library.array(u[:, :prompt]), max_new)
    y = np.concatenate([library.numpy(y), library.stream(cache, u[:, prompt:], split)], axis=-1)
    oracle.assert_close(y, oracle.conv(u, h), "float32")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_broadcast_bank(lib, dtype, rng):
    u, h = rng.standard_normal((2, 1, 3, 40)).astype(dtype), rng.standard_normal((4, 1, 25)).astype(dtype)
    y, cache = lib.plan(h).prefill(lib.array(u[..., :30]), 10)
    assert y.dtype == lib.dtype(dtype)
    y = np.concatenate([lib.numpy(y), lib.stream(cache, u[..., 30:])], axis=-1)
    oracle.assert_close(y, oracle.conv(u, h), dtype)


def test_cache_size_depends_on_the_new_positions_alone(lib):
    plan = lib.plan(np.ones((2, 4000), np.float32), method=ff.Schedule(16, (4,)))
    sizes = {p: plan.prefill(lib.array(np.ones((2, p), np.float32)), 100)[1].nbytes for p in (10, 100, 3000)}
    assert len(set(sizes.values())) == 1
    assert sizes[10] <= 4 * 100 * 2 * 4 + 4096
    assert sizes[10] < plan.prefill(lib.array(np.ones((2, 10), np.float32)), 1000)[1].nbytes


def test_max_new_defaults_to_the_rest_of_the_horizon(lib):
    prompt = lib.array(np.ones((2, 30), np.float32))
    filters = np.ones((2, 5), np.float32)
    assert lib.plan(filters, 100).prefill(prompt)[1].remaining == 70
    assert lib.plan(filters).prefill(prompt)[1].remaining is None
    assert lib.plan(filters, 30).prefill(prompt)[1].remaining == 0


def test_capacity(lib):
    plan = lib.plan(np.ones((2, 5), np.float32), 20)
    for prompt, max_new in [(21, None), (21, 0), (15, 6), (0, 21), (5, 2**62)]:
        with pytest.raises(ff.CapacityError):
            plan.prefill(lib.array(np.ones((2, prompt), np.float32)), max_new)
    assert plan.prefill(lib.array(np.ones((2, 15), np.float32)), 5)[1].remaining == 5


def test_no_new_positions(lib):
    y, cache = lib.plan(np.ones((2, 5), np.float32), 20).prefill(lib.array(np.ones((2, 15), np.float32)), 0)
    assert (tuple(y.shape), cache.remaining, cache.position) == ((2, 15), 0, 15)
    with pytest.raises(ff.CapacityError):
        cache.step(lib.array(np.ones(2, np.float32)))


def test_reset_gives_back_max_new(lib, rng):
    u, h = rng.standard_normal((2, 40)).astype(np.float32), rng.standard_normal((2, 30)).astype(np.float32)
    _, cache = lib.plan(h, 100, ff.Schedule(4, (2,))).prefill(lib.array(u[:, :20]), 40)
    lib.stream(cache, u[:, 20:30])
    cache.reset()
    assert (cache.position, cache.remaining) == (0, 40)
    oracle.assert_close(lib.stream(cache, u), oracle.conv(u, h), "float32")


@pytest.mark.parametrize(
    ("max_new", "error"), [(-1, ValueError), (True, TypeError), (2.0, TypeError), (2**64, ValueError)]
)
def test_bad_max_new(lib, max_new, error):
    plan = lib.plan(np.ones((2, 5), np.float32))
    with pytest.raises(error, match="max_new: expected"):
        plan.prefill(lib.array(np.ones((2, 3), np.float32)), max_new)


def test_bad_prompts(lib):
    plan = lib.plan(np.ones((2, 5), np.float32))
    with pytest.raises(ValueError, match="prompt: "):
        plan.prefill(lib.array(np.ones((3, 4), np.float32)), 1)
    with pytest.raises(ValueError, match="prompt: "):
        plan.prefill(lib.array(np.float32(1)), 1)
    with pytest.raises(TypeError, match="prompt: expected"):
        plan.prefill([[1.0], [2.0]], 1)


def test_zero_rows(lib):
    y, cache = lib.plan(np.ones((3, 5), np.float32)).prefill(lib.array(np.ones((0, 3, 7), np.float32)), 4)
    assert tuple(y.shape) == (0, 3, 7)
    assert tuple(cache.step(lib.array(np.ones((0, 3), np.float32))).shape) == (0, 3)
