"""The oracle itself, on vectors worked out by hand."""

import numpy as np
import oracle
import pytest


def test_conv_by_hand():
    assert oracle.conv([1, 2, 3], [10, 1]).tolist() == [10, 21, 32]
    assert oracle.conv([1, 2], [1, 1, 1, 1]).tolist() == [1, 3]
    assert oracle.conv([[1, 0, 0], [0, 1, 0]], [[1, 2, 3], [4, 5, 6]]).tolist() == [[1, 2, 3], [0, 4, 5]]
    assert oracle.conv(np.zeros((2, 0)), [1.0]).shape == (2, 0)


def test_conv_equals_numpy(rng):
    u, h = rng.standard_normal(17), rng.standard_normal(9)
    np.testing.assert_allclose(oracle.conv(u, h), np.convolve(u, h)[:17], rtol=1e-13)


def test_futurefill_by_hand():
    # s = 1: v2 w2 + v1 w3 = 20 + 100; s = 2: v2 w3 = 200
    assert oracle.futurefill([1, 2], [1, 10, 100]).tolist() == [120, 200]
    assert oracle.futurefill([], [1, 2, 3]).tolist() == [0, 0]
    assert oracle.futurefill([1, 2, 3], [7]).shape == (0,)


def test_futurefill_equals_numpy(rng):
    for t1, t2 in [(1, 2), (5, 3), (3, 8), (4, 4)]:
        v, w = rng.standard_normal(t1), rng.standard_normal(t2)
        expected = np.convolve(v, w)[t1 : t1 + t2 - 1]
        np.testing.assert_allclose(oracle.futurefill(v, w), expected, rtol=1e-12, atol=1e-14)


def test_assert_close_is_strict():
    reference = np.ones(4)
    oracle.assert_close(reference + 2.0**-23, reference, "float32")
    with pytest.raises(AssertionError):
        oracle.assert_close(reference + 4 * 2.0**-23, reference, "float32")
