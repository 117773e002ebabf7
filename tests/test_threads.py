"""Threads: the number of workers, shared plans and caches, the interpreter lock, fork."""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import futurefill_rs as ff
import numpy as np
import oracle
import pytest


@pytest.fixture(autouse=True)
def default_workers():
    before = ff.get_workers()
    yield
    ff.set_workers(before)


def test_one_worker_by_default():
    assert ff.get_workers() == int(os.environ.get("FUTUREFILL_NUM_THREADS", 1))


def test_set_workers_is_a_function_and_a_context_manager():
    ff.set_workers(3)
    assert ff.get_workers() == 3
    with ff.set_workers(2):
        assert ff.get_workers() == 2
        with ff.set_workers(-1):
            assert ff.get_workers() >= 1
        assert ff.get_workers() == 2
    assert ff.get_workers() == 3
    with pytest.raises(KeyError), ff.set_workers(5):
        raise KeyError
    assert ff.get_workers() == 3


@pytest.mark.parametrize(
    ("workers", "error"),
    [
        (0, ValueError),
        (-2, ValueError),
        (2**40, ValueError),
        (True, TypeError),
        (1.5, TypeError),
        ("2", TypeError),
        (None, TypeError),
    ],
)
def test_bad_numbers_of_workers(workers, error):
    ff.set_workers(2)
    with pytest.raises(error, match="workers: expected a positive integer"):
        ff.set_workers(workers)
    assert ff.get_workers() == 2


def test_plans_take_the_default(rng):
    with ff.set_workers(2):
        plan = ff.plan(np.ones((2, 5)))
    assert plan.workers == 2
    assert ff.plan(np.ones((2, 5)), workers=1).workers == 1
    assert ff.plan(np.ones((2, 5)), workers=-1).workers >= 1


def run_python(program, **environment):
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


SHOW = "import futurefill_rs as ff; print(ff.get_workers())"


@pytest.mark.parametrize(("value", "expected"), [("3", "3"), (" 2 ", "2"), ("", "1")])
def test_environment(value, expected):
    result = run_python(SHOW, FUTUREFILL_NUM_THREADS=value)
    assert (result.stdout.strip(), result.stderr) == (expected, "")


@pytest.mark.parametrize("value", ["0", "-3", "many", "2.5"])
def test_a_bad_environment_warns_and_is_ignored(value):
    result = run_python(SHOW, FUTUREFILL_NUM_THREADS=value)
    assert result.stdout.strip() == "1"
    assert "RuntimeWarning: FUTUREFILL_NUM_THREADS" in result.stderr and repr(value) in result.stderr


@pytest.mark.parametrize("workers", [1, 2])
def test_one_plan_in_many_threads(lib, workers, rng):
    h = rng.standard_normal((4, 200)).astype(np.float32)
    plan = lib.plan(h, None, ff.Schedule(8, (4,)), workers=workers)
    inputs = rng.standard_normal((6, 4, 200)).astype(np.float32)
    alone = [lib.stream(plan.new_cache(), u) for u in inputs]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda u: lib.stream(plan.new_cache(), u), inputs))
    for a, b in zip(alone, together, strict=True):
        oracle.assert_same_bits(a, b)


def test_one_cache_in_many_threads_takes_turns(lib, rng):
    h = rng.standard_normal((4, 100)).astype(np.float32)
    cache = lib.plan(h, None, ff.Schedule(8, (4,))).new_cache()
    u = lib.array(np.ones((4, 1), np.float32))
    outputs = []

    def work():
        for i in range(40):
            outputs.append(lib.numpy(cache.step(u[:, 0]) if i % 2 else cache.extend(u)[:, 0]).copy())
            assert cache.position > 0
            cache.fork()

    with ThreadPoolExecutor(5) as pool:
        for future in [pool.submit(work) for _ in range(5)]:
            future.result()
    assert cache.position == 200
    # Every position was served exactly once, whoever asked for it.
    expected = oracle.conv(np.ones((4, 200)), h)
    ours = np.array(outputs).T
    oracle.assert_close(np.sort(ours, axis=1), np.sort(expected, axis=1), "float32")


def window_of_another_thread(work):
    """Share of `work`'s own time, run in a thread, during which this thread could run Python code."""
    window = []

    def timed():
        start = time.perf_counter()
        work()
        window.extend((start, time.perf_counter()))

    thread = threading.Thread(target=timed)
    ticks = []
    thread.start()
    while thread.is_alive():
        ticks.append(time.perf_counter())
        time.sleep(0.0005)
    thread.join()
    start, end = window
    length = end - start
    inner = [t for t in ticks if start + 0.1 * length < t < end - 0.1 * length]
    gaps = np.diff([start + 0.1 * length, *inner, end - 0.1 * length])
    return 1 - max(gaps) / (0.8 * length)


WIDE = np.ones((64, 16384), np.float32)


@pytest.mark.parametrize("call", ["extend", "prefill", "causal_conv", "plan", "fork"])
def test_bulk_work_releases_the_lock(call):
    plan = ff.plan(WIDE, None, ff.Schedule(64, (8, 8)))
    cache = plan.new_cache()
    work = {
        "extend": lambda: cache.extend(WIDE),
        "prefill": lambda: plan.prefill(WIDE, 1000),
        "causal_conv": lambda: ff.causal_conv(WIDE, WIDE),
        "plan": lambda: ff.plan(WIDE, None, ff.Schedule(64, (8, 8))),
        "fork": lambda: [cache.fork() for _ in range(20)],
    }[call]
    assert max(window_of_another_thread(work) for _ in range(3)) > 0.5


def test_a_large_tile_of_a_step_releases_the_lock():
    plan = ff.plan(np.ones((256, 32768), np.float32), None, ff.Schedule(64, (2,) * 8))
    cache = plan.new_cache()
    cache.extend(np.ones((256, 16383), np.float32))
    forks = [cache.fork() for _ in range(3)]
    u = np.ones(256, np.float32)
    assert max(window_of_another_thread(lambda fork=fork: fork.step(u)) for fork in forks) > 0.4


FORK = """
import os, signal, sys
import numpy as np, futurefill_rs as ff
signal.alarm(60)
h = np.random.default_rng(0).standard_normal((32, 2000)).astype(np.float32)
plan = ff.plan(h, None, ff.Schedule(64, (4,)), workers=2)
cache = plan.new_cache()
expected = ff.causal_conv(h, h, workers=2)
first = cache.extend(h[:, :1000])
child = os.fork()
again = ff.causal_conv(h, h, workers=2)
rest = np.stack([cache.step(x) for x in h[:, 1000:].T], axis=-1)
good = np.array_equal(again, expected) and np.allclose(rest, expected[:, 1000:], atol=1e-3)
if child == 0:
    os._exit(0 if good else 3)
status = os.waitpid(child, 0)[1]
sys.exit(0 if good and status == 0 else 4)
"""


def test_threads_then_fork_then_threads():
    result = run_python(FORK)
    assert result.returncode == 0, result.stderr
