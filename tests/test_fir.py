"""`fir` beside scipy's lfilter: whole signals, chunks, axes, dtypes."""

from __future__ import annotations

import futurefill_rs as ff
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import signal


@given(st.data())
def test_chunks_agree_with_lfilter(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    taps = data.draw(st.integers(1, 40))
    shape = data.draw(st.lists(st.integers(1, 3), max_size=2))
    axis = data.draw(st.integers(-len(shape) - 1, len(shape)))
    at = axis % (len(shape) + 1)
    library = data.draw(st.sampled_from(["numpy", "torch"]))
    dtype = data.draw(st.sampled_from(["float64", "float32", "complex128", "int16"]))
    array = torch.from_numpy if library == "torch" else np.asarray
    b = rng.standard_normal(taps)
    length = data.draw(st.integers(1, 90))
    x = rng.standard_normal([*shape[:at], length, *shape[at:]]) * 100
    x = (x + 1j * x[..., ::-1] if dtype == "complex128" else x).astype(dtype)
    state = np.zeros([*shape[:at], taps - 1, *shape[at:]], x.dtype if dtype == "complex128" else float)
    expected, last = signal.lfilter(b, 1, x, axis=axis, zi=state)
    whole = np.asarray(ff.fir(array(b), array(x), axis=axis))
    np.testing.assert_allclose(whole, expected, rtol=0, atol=1e-9)
    zi, parts, start = array(state), [], 0
    while start < length:
        stop = min(length, start + int(rng.integers(31)))
        y, zi = ff.fir(array(b), array(np.take(x, range(start, stop), axis)), zi, axis)
        parts.append(np.asarray(y))
        start = stop
    np.testing.assert_allclose(np.asarray(zi), last, rtol=0, atol=1e-9)
    if parts:
        np.testing.assert_allclose(np.concatenate(parts, at), expected, rtol=0, atol=1e-9)


def test_single_precision_stays_single():
    b, x = np.ones(5, np.float32), np.ones((7, 2), np.int16)
    y, zf = ff.fir(b, x, zi=np.ones((4, 1), np.float32), axis=0)
    assert y.dtype == zf.dtype == np.float32 and y.shape == (7, 2) and zf.shape == (4, 2)
    np.testing.assert_allclose(y[:, 0], [2, 3, 4, 5, 5, 5, 5], rtol=1e-6)


def test_errors():
    b, x = np.ones(4), np.ones((2, 9))
    with pytest.raises(ValueError, match=r"zi: expected shape \(2, 3\), got \(3,\)"):
        ff.fir(b, x, np.ones(3))
    with pytest.raises(ValueError, match=r"b: expected shape \(L,\) with L at least 1, got \(0,\)"):
        ff.fir(b[:0], x)
    with pytest.raises(ValueError, match="axis: expected an axis of a signal with 2 axes, got 2"):
        ff.fir(b, x, axis=2)
    with pytest.raises(
        TypeError, match=r"fir: expected arrays of one library, got numpy\.ndarray, torch\.Tensor"
    ):
        ff.fir(b, torch.ones(3))
    with pytest.raises(TypeError, match="fir: expected numbers"):
        ff.fir(b, np.array(["a"]))
