"""Long calls: Ctrl-C, `progress=`, and what a cache is after either has ended a call early."""

import subprocess
import sys

import futurefill_rs as ff
import numpy as np
import oracle
import pytest

LONG_CALLS = {
    "causal_conv": "u = np.ones((64, 2**19)); ready(); ff.causal_conv(u, u)",
    "causal_conv of other strides": "u = np.ones((2**18, 96)).T; ready(); ff.causal_conv(u, u)",
    "futurefill": "u = np.ones((96, 2**19), np.float32); ready(); ff.futurefill(u, u)",
    "plan": "h = np.ones((1000, 2**17), np.float32); ready(); ff.plan(h)",
    "prefill": "p = ff.plan(np.ones((64, 2**19), np.float32)); ready(); p.prefill(p.filters)",
    "extend": "c = ff.plan(np.ones((128, 2**18), np.float32)).new_cache(); ready(); c.extend(c.plan.filters)",
    "naive extend": "c = ff.plan(np.ones((64, 2**17), np.float32), None, 'naive').new_cache(); ready();"
    "c.extend(c.plan.filters)",
}
PROGRAM = """
import signal, time
import numpy as np, futurefill_rs as ff
def stop(signum, frame):
    global heard
    heard = time.process_time()
    raise KeyboardInterrupt
# In time of this process, whatever else the machine does.
def ready():
    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, 0.3)
    global start
    start = time.process_time()
try:
    {call}
    raise SystemExit("the call ended by itself")
except KeyboardInterrupt:
    print(heard - start - 0.3, time.process_time() - heard)
"""


@pytest.mark.parametrize("call", LONG_CALLS)
def test_a_signal_ends_a_long_call_within_a_quarter_of_a_second(call):
    program = PROGRAM.format(call=LONG_CALLS[call])
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert sum(map(float, result.stdout.split())) < 0.25, result.stdout


class Stop(Exception):
    pass


def stop(done, total):
    raise Stop


@pytest.mark.parametrize("method", ["auto", "naive", "epoched", "continuous"])
@pytest.mark.parametrize("latency", ["throughput", "smooth"])
@pytest.mark.parametrize("start", ["empty", "prefilled", "midway"])
def test_an_extend_that_is_ended_leaves_the_cache_as_it_was(method, latency, start, rng):
    h = rng.standard_normal((5, 300)).astype(np.float32)
    u = rng.standard_normal((5, 900)).astype(np.float32)
    plan = ff.plan(h, 2000, method, latency=latency)
    cache = plan.prefill(u[:, :77])[1] if start == "prefilled" else plan.new_cache()
    if start == "midway":
        cache.extend(u[:, :201])
    before = cache.fork()
    with pytest.raises(Stop):
        cache.extend(u, progress=stop)
    assert (cache.position, cache.remaining) == (before.position, before.remaining)
    for split in ([0] * 3, [400], [0] * 2):
        for m in split:
            x = u[:, : max(m, 1)]
            y = cache.extend(x) if m else cache.step(x[:, 0])
            oracle.assert_same_bits(y, before.extend(x) if m else before.step(x[:, 0]))


CALLS = {
    "plan": lambda h, tell: ff.plan(h, progress=tell),
    "prefill": lambda h, tell: ff.plan(h).prefill(h, progress=tell),
    "extend": lambda h, tell: ff.plan(h).new_cache().extend(h, progress=tell),
    "causal_conv": lambda h, tell: ff.causal_conv(h, h, progress=tell),
    "futurefill": lambda h, tell: ff.futurefill(h, h, progress=tell),
}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("call", CALLS)
def test_progress_never_goes_back_and_ends_with_all(call, workers):
    told = []
    h = np.ones((64, 2**16), np.float32)
    with ff.set_workers(workers):
        CALLS[call](h, lambda done, total: told.append((done, total)))
    totals = {total for _, total in told}
    done = [done for done, _ in told]
    assert len(totals) == 1 and done == sorted(done) and done[-1] == totals.pop() > 0
    assert all(type(number) is int for pair in told for number in pair)


def test_progress_of_an_extend_follows_its_positions():
    told = []
    cache = ff.plan(np.ones((64, 2**17), np.float32)).new_cache()
    cache.extend(np.ones((64, 2**17), np.float32), progress=lambda done, total: told.append(done / total))
    # No more than the last tiles, which are the largest, at once.
    assert sum(share > 0.95 for share in told) <= max(2, len(told) // 3)


@pytest.mark.parametrize("call", CALLS)
def test_what_progress_raises_ends_the_call(call):
    with pytest.raises(Stop):
        CALLS[call](np.ones((3, 100), np.float32), stop)


def test_progress_may_use_the_engine_but_not_the_cache_itself():
    plan = ff.plan(np.ones((3, 100), np.float32))
    cache, u = plan.new_cache(), np.ones((3, 50), np.float32)
    np.testing.assert_array_equal(
        cache.extend(u, progress=lambda *_: ff.causal_conv(u, u)), plan.new_cache().extend(u)
    )
    with pytest.raises(RuntimeError, match="this thread is in a call of it already"):
        cache.extend(u, progress=lambda *_: cache.position)
    assert cache.position == 50


WAITING = """
import signal, threading, time
import numpy as np, futurefill_rs as ff
cache = ff.plan(np.ones((64, 2**17), np.float32), None, "naive").new_cache()
u = np.ones((64, 2**17), np.float32)
def work():
    try:
        cache.extend(u, progress=lambda *_: None if time.monotonic() < end else 1 / 0)
    except ZeroDivisionError:
        pass
end = time.monotonic() + 3
thread = threading.Thread(target=work)
thread.start()
time.sleep(0.3)
def stop(*_):
    raise KeyboardInterrupt
signal.signal(signal.SIGALRM, stop)
signal.setitimer(signal.ITIMER_REAL, 0.2)
start = time.monotonic()
try:
    cache.position
except KeyboardInterrupt:
    print(time.monotonic() - start)
thread.join()
assert cache.position == 0
"""


def test_a_signal_ends_waiting_for_a_cache():
    result = subprocess.run([sys.executable, "-c", WAITING], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 2
