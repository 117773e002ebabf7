"""The bound on rounding, for filters of any profile and for every way in.

For a result of T positions and `bound = eps * log2(2 T)` the promise has two forms:

- Relative: `||error|| <= bound * ||y||`. It holds for every way in where the outputs so far are as large as
  the filters and inputs behind them: flat and decaying filters of any scale.
- Absolute: `||error|| <= bound * ||filters over the lags reached|| * ||inputs||`, where that exceeds `||y||`.
  It holds for all filters. A tile is one transform, so its rounding is that of its largest lag. `causal_conv`
  and `prefill` reach the lags before T. A stream has finished tiles for up to T outputs to come: it reaches
  the lags before 2 T; `pending(k)` and a prompt's effect on `max_new` outputs reach those too.
"""

import futurefill_rs as ff
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stateful_engine import LIBRARIES, draw_split, filters

RELATIVE = ("flat", "decaying", "tiny", "huge")
ABSOLUTE = (*RELATIVE, "rows", "growing", "late")
SCHEDULES = (ff.Schedule(1, (2, 2, 2, 2)), ff.Schedule(8, (4, 3)), ff.Schedule(32, (2,)))
METHODS = ("auto", "naive", "epoched", "continuous", *SCHEDULES)


def norms(x):
    return np.linalg.norm(x.astype(np.float64), axis=-1)


def off(y, want, u, h, reached):
    """The error of the whole in bounds: relative to the outputs, and to these or what is behind them."""
    if not want.size:
        return 0.0, 0.0
    bound = oracle.EPS[y.dtype.name] * np.log2(2 * u.shape[-1])
    error = np.linalg.norm(norms(y - want))
    behind = norms(h[..., :reached]) * norms(u)
    relative, absolute = norms(want), np.maximum(norms(want), behind)
    return error / np.linalg.norm(relative) / bound, error / np.linalg.norm(absolute) / bound


def ways(library, h, u, method, latency, split):
    """Every way to the outputs of u `(*C, T)`: its name, outputs, and how many lags it may have reached."""
    length = u.shape[-1]
    plan = library.plan(h, None, method, latency=latency)
    whole = library.plan(h, length, method, latency=latency)
    yield "causal_conv", library.numpy(ff.causal_conv(library.array(u), library.array(h))), length
    yield "prefill", library.numpy(plan.prefill(library.array(u), 0)[0]), length
    yield "prefill, no bound", library.numpy(plan.prefill(library.array(u))[0]), length
    for name, streaming in (("", plan), (" to a horizon", whole)):
        for way, chunks in (("extend", [length]), ("steps", [0] * length), ("split", split)):
            yield way + name, library.stream(streaming.new_cache(u.shape[:-1]), u, chunks), 2 * length
    prompt = min(split[0], length - 1)
    y, cache = whole.prefill(library.array(u[..., :prompt]), length - prompt)
    y = np.concatenate([library.numpy(y), library.stream(cache, u[..., prompt:])], -1)
    yield "prefill and steps", y, 2 * length


@pytest.mark.parametrize("library", LIBRARIES.values(), ids=str)
@given(
    profile=st.sampled_from(ABSOLUTE),
    dtype=st.sampled_from(["float32", "float64"]),
    rows=st.sampled_from([1, 3, 16, 20]),
    length=st.integers(1, 300),
    lags=st.integers(1, 400),
    method=st.sampled_from(METHODS),
    latency=st.sampled_from(["throughput", "smooth"]),
    seed=st.integers(0, 2**16),
)
def test_every_way_in(library, profile, dtype, rows, length, lags, method, latency, seed):
    rng = np.random.default_rng(seed)
    h = filters(profile, (rows,), lags, dtype, rng)
    u = rng.standard_normal((rows, length)).astype(dtype)
    wide = np.longdouble if dtype == "float64" else np.float64
    want = oracle.conv(u.astype(wide), h.astype(wide), wide)
    split = draw_split(rng, length)
    for name, y, reached in ways(library, h, u, method, latency, split):
        relative, absolute = off(y, want, u, h, reached)
        assert absolute <= 1, f"{name}: {absolute:.3g} bounds"
        if profile in RELATIVE and want.size > 64:
            assert relative <= 1, f"{name}: {relative:.3g} bounds, relative to the outputs"
