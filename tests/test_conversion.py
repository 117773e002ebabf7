"""States under another schedule, latency or horizon, and what the past adds to the outputs to come."""

import itertools

import futurefill_rs as ff
import numpy as np
import oracle
import pytest
from conftest import Library

ENGINES = [Library("numpy"), Library("torch-engine", device="cpu", engine="torch")]
METHODS = ["naive", "epoched", "continuous", ff.Schedule(4, (2, 3)), ff.Schedule(34, ())]


@pytest.mark.parametrize("lib", ENGINES, ids=[lib.name for lib in ENGINES])
@pytest.mark.parametrize("lags", [1, 9, 60])
@pytest.mark.parametrize(("horizon", "other", "prompt"), [(None, None, 0), (200, 150, 0), (None, 150, 11)])
def test_a_state_goes_on_under_another_schedule(lib, lags, horizon, other, prompt, rng):
    for first, second in itertools.product(METHODS, METHODS):
        latency = rng.permutation(["throughput", "smooth"]).tolist()
        u, h = rng.standard_normal((2, 3, 150)), rng.standard_normal((3, lags))
        plan = lib.plan(h, horizon, first, latency=latency[0])
        _, cache = plan.prefill(lib.array(u[..., :prompt]))
        at = int(rng.integers(prompt, 140))
        cache.extend(lib.array(u[..., prompt:at]))
        again = lib.plan(h, other, second, latency=latency[1]).load_cache(cache.state_dict())
        assert again.position == at and again.remaining == (None if other is None else other - at)
        y = lib.stream(again, u[..., at:], [3] + [0] * (147 - at))
        reference = oracle.conv(u, h)
        assert np.linalg.norm(y - reference[..., at:]) < 2e-15 * np.linalg.norm(reference)


@pytest.mark.parametrize("lib", ENGINES, ids=[lib.name for lib in ENGINES])
@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("latency", ["throughput", "smooth"])
def test_pending(lib, method, latency, rng):
    u, h = rng.standard_normal((2, 3, 100)), rng.standard_normal((3, 60))
    cache = lib.plan(h, 100, method, latency=latency).new_cache((2, 3))
    plain = lib.plan(h, 100, method, latency=latency).new_cache((2, 3))
    for t in range(100):
        past = u.copy()
        past[..., t:] = 0
        known = oracle.conv(past, h)
        for k in {0, 1, 2, (7 * t) % (101 - t)} & set(range(101 - t)):
            y = lib.numpy(cache.pending(k))
            assert y.shape == (2, 3, k) and y.dtype == np.float64
            np.testing.assert_allclose(y, known[..., t : t + k], atol=1e-13)
        with pytest.raises(ff.CapacityError):
            cache.pending(101 - t)
        assert cache.position == t
        x = lib.array(u[..., t])
        oracle.assert_same_bits(lib.numpy(cache.step(x)), lib.numpy(plain.step(x)))
