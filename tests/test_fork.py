"""Forked children: a cache that another thread was in is an error or works, and never waits."""

import subprocess
import sys

import pytest

PROGRAM = """
import os, signal, sys, threading
import numpy as np, futurefill_rs as ff
plan = ff.plan(np.ones((64, 4000), np.float32), workers=3)
u = np.ones(64, np.float32)
busy = [plan.new_cache() for _ in range(2)]
block = np.ones((64, 3000), np.float32)
stop = False

def work(cache):
    while not stop:
        cache.step(u)
        cache.extend(block)

threads = [threading.Thread(target=work, args=(cache,)) for cache in busy]
for thread in threads:
    thread.start()
bad = 0
for _ in range(20):
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        try:
            cache = {cache}
            for _ in range(100):
                cache.step(u)
        except RuntimeError as error:
            os._exit(0 if "when this process was forked" in str(error) else 3)
        os._exit(0)
    bad += os.waitpid(child, 0)[1] != 0
stop = True
for thread in threads:
    thread.join()
sys.exit(bad)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
@pytest.mark.parametrize(
    "cache",
    ["busy[0]", "busy[0].fork()", "plan.new_cache()", "plan.prefill(block)[1]", "ff.plan(block).new_cache()"],
)
def test_a_child_of_busy_threads_never_waits(cache):
    program = PROGRAM.replace("{cache}", cache)
    command = [sys.executable, "-W", "ignore", "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
