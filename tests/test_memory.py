"""Memory that cannot be had is a MemoryError, wherever it is asked for, and never the end of the process."""

import subprocess
import sys

import pytest

CALLS = {
    "plan": "h = np.ones((64, 2**16), np.float32); ask = lambda: ff.plan(h)",
    "few rows": "h = np.ones((3, 2**20), np.float32); ask = lambda: ff.plan(h)",
    "new_cache": "p = ff.plan(np.ones((64, 2**16), np.float32)); ask = p.new_cache",
    "prefill": "p = ff.plan(np.ones((64, 2**16), np.float32)); ask = lambda: p.prefill(p.filters)",
    "fork": "c = ff.plan(np.ones((64, 2**16), np.float32)).new_cache(); ask = c.fork",
    "state_dict": "c = ff.plan(np.ones((64, 2**16), np.float32)).new_cache(); ask = c.state_dict",
    "extend": "c = ff.plan(np.ones((64, 64), np.float32)).new_cache(); u = np.ones((64, 2**18), np.float32);"
    "ask = lambda: c.extend(u)",
    "causal_conv": "u = np.ones((64, 2**18), np.float32); ask = lambda: ff.causal_conv(u, u)",
    "few rows at once": "u = np.ones((3, 2**21), np.float32); ask = lambda: ff.causal_conv(u, u)",
    "futurefill": "u = np.ones((64, 2**18), np.float32); ask = lambda: ff.futurefill(u, u)",
    "other precision": "u, h = np.ones((64, 2**16), np.float32), np.ones(9);"
    "ask = lambda: ff.causal_conv(u, h)",
}
PROGRAM = """
import resource
import numpy as np, futurefill_rs as ff
{call}
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
refused = 0
for room in (*range(0, 4000, 190), 10_000, 30_000, 60_000, 100_000):
    resource.setrlimit(resource.RLIMIT_AS, (used + (room << 10), resource.RLIM_INFINITY))
    try:
        ask()
    except MemoryError:
        refused += 1
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert refused, "there was room for it"
ask()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
@pytest.mark.parametrize("call", CALLS)
def test_a_limit_of_memory_is_a_memory_error(call):
    program = PROGRAM.format(call=CALLS[call])
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
