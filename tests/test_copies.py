"""Plans and caches are pickled, copied, saved with torch and sent to other processes."""

import copy
import multiprocessing
import pickle

import futurefill_rs as ff
import joblib
import numpy as np
import oracle
import pytest
import torch
from conftest import Library

LIBRARIES = [
    Library("numpy"),
    Library("torch-cpu", device="cpu"),
    Library("torch-engine", device="cpu", engine="torch"),
]


@pytest.mark.parametrize("lib", LIBRARIES, ids=[lib.name for lib in LIBRARIES])
@pytest.mark.parametrize("method", ["auto", "naive", ff.Schedule(4, (2, 3))], ids=str)
@pytest.mark.parametrize("latency", ["throughput", "smooth"])
def test_pickles_go_on_bit_for_bit(lib, method, latency, rng):
    u, h = rng.standard_normal((3, 2, 80)), rng.standard_normal((2, 50))
    plan = lib.plan(h, 90, method, latency=latency, workers=2)
    again = pickle.loads(pickle.dumps(plan))
    assert type(again) is type(plan) and again.schedule == plan.schedule and again.latency == latency
    assert (again.horizon, again.dtype, again.workers) == (90, plan.dtype, plan.workers)
    np.testing.assert_array_equal(lib.numpy(again.filters), h)
    assert len(pickle.dumps(plan)) < h.nbytes + 2000
    assert copy.copy(plan) is plan and copy.deepcopy(plan) is plan
    cache = plan.new_cache((3, 2))
    lib.stream(cache, u[..., :37])
    copies = [copy.copy(cache), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
    oracle.assert_same_bits(lib.stream(again.new_cache((3, 2)), u), lib.stream(plan.new_cache((3, 2)), u))
    expected = lib.stream(cache, u[..., 37:])
    for other in copies:
        assert (other.position, other.remaining) == (37, 53)
        oracle.assert_same_bits(lib.stream(other, u[..., 37:]), expected)


@pytest.mark.parametrize("lib", LIBRARIES[1:], ids=[lib.name for lib in LIBRARIES[1:]])
def test_torch_save(lib, tmp_path, rng):
    u, h = rng.standard_normal((2, 40)), rng.standard_normal((2, 30))
    plan = lib.plan(h)
    cache = plan.new_cache()
    lib.stream(cache, u[:, :20])
    torch.save({"plan": plan, "cache": cache}, tmp_path / "kept")
    kept = torch.load(tmp_path / "kept", weights_only=False)
    assert kept["cache"].plan is kept["plan"]
    oracle.assert_same_bits(lib.stream(kept["cache"], u[:, 20:]), lib.stream(cache, u[:, 20:]))


def extended(plan, cache, u):
    """What another process computes."""
    fresh = plan.new_cache().extend(u)
    return np.asarray(fresh).copy(), np.asarray(cache.extend(u)).copy()


@pytest.mark.parametrize("start", ["spawn", "forkserver"])
def test_other_processes(start, rng):
    h, u = rng.standard_normal((2, 30)), rng.standard_normal((2, 25))
    tasks = []
    for lib in LIBRARIES:
        plan = lib.plan(h)
        cache = plan.new_cache()
        cache.extend(lib.array(u))
        tasks.append((plan, cache, lib.array(u)))
    with multiprocessing.get_context(start).Pool(1) as pool:
        results = pool.starmap(extended, tasks)
    for (fresh, further), task in zip(results, tasks, strict=True):
        here = extended(*task)
        oracle.assert_same_bits(fresh, here[0])
        oracle.assert_same_bits(further, here[1])


def test_joblib_takes_a_function_that_refers_to_a_plan():
    plan = ff.plan(np.ones((2, 30)))

    def total(seed):
        return float(plan.new_cache().extend(np.full((2, 10), float(seed))).sum())

    parallel = joblib.Parallel(2, backend="loky")
    assert parallel(joblib.delayed(total)(seed) for seed in range(3)) == [total(seed) for seed in range(3)]
