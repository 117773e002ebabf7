"""causal_conv: whole sequences at once (gradients are tested with the torch operator)."""

import futurefill_rs as ff
import numpy as np
import oracle
import pytest
import torch
from conftest import Library
from hypothesis import given
from hypothesis import strategies as st

NUMPY, TORCH = Library("numpy"), Library("torch-cpu", device="cpu")
BOTH = pytest.mark.parametrize("lib", [NUMPY, TORCH], ids=["numpy", "torch"])
LENGTHS = [1, 2, 3, 5, 16, 17, 63, 64, 65, 127, 300, 1021]


@BOTH
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_lengths(lib, dtype, rng):
    for t in LENGTHS:
        for lags in LENGTHS:
            u, h = rng.standard_normal((2, t)).astype(dtype), rng.standard_normal((2, lags)).astype(dtype)
            y = ff.causal_conv(lib.array(u), lib.array(h))
            assert y.dtype == lib.dtype(dtype)
            oracle.assert_close(lib.numpy(y), oracle.conv(u, h), dtype)


SHAPES = [
    ((3,), (3,)),
    ((2, 3), (3,)),
    ((2, 3), ()),
    ((), (4,)),
    ((), ()),
    ((2, 1, 3), (4, 1)),
    ((5, 1), (1, 6)),
]


@BOTH
@pytest.mark.parametrize(("c", "f"), SHAPES)
def test_broadcasting(lib, c, f, rng):
    u, h = rng.standard_normal((*c, 50)), rng.standard_normal((*f, 20))
    y = lib.numpy(ff.causal_conv(lib.array(u), lib.array(h)))
    assert y.shape == (*np.broadcast_shapes(c, f), 50)
    oracle.assert_close(y, oracle.conv(u, h), "float64")


@BOTH
def test_zero_rows_and_no_positions(lib):
    for c, t in [((0, 3), 5), ((2, 3), 0), ((0,), 0)]:
        u, h = np.zeros((*c, t), np.float32), np.ones((3, 4), np.float32)[: c[-1]]
        y = ff.causal_conv(lib.array(u), lib.array(h))
        assert tuple(y.shape) == (*c, t)


@given(
    t=st.integers(0, 200), lags=st.integers(1, 200), rows=st.integers(1, 3), seed=st.integers(0, 2**32 - 1)
)
def test_any_length(t, lags, rows, seed):
    rng = np.random.default_rng(seed)
    u, h = (rng.standard_normal((rows, n)).astype(np.float32) for n in (t, lags))
    oracle.assert_close(ff.causal_conv(u, h), oracle.conv(u, h), "float32")


def test_one_row_equals_all_rows_bit_by_bit(rng):
    u, h = (rng.standard_normal((5, n)).astype(np.float32) for n in (700, 400))
    y = ff.causal_conv(u, h)
    for row in range(5):
        oracle.assert_same_bits(y[row], ff.causal_conv(u[row], h[row]))


def test_workers_do_not_change_a_bit(rng):
    u, h = (rng.standard_normal((9, 3000)).astype(np.float32) for _ in range(2))
    y = ff.causal_conv(u, h)
    for workers in (2, 3, -1):
        oracle.assert_same_bits(y, ff.causal_conv(u, h, workers=workers))


def test_mixed_precision_has_the_inputs_dtype(rng):
    u, h = rng.standard_normal(100), rng.standard_normal(30)
    for first, second in [("float32", "float64"), ("float64", "float32")]:
        x, f = u.astype(first), h.astype(second)
        y = ff.causal_conv(x, f)
        assert y.dtype == first
        oracle.assert_close(y, oracle.conv(x, f), "float32")


def test_half_precision(rng):
    u = torch.tensor(rng.standard_normal((2, 300)))
    h = torch.tensor(rng.standard_normal((2, 50)))
    for dtype in (torch.bfloat16, torch.float16):
        x, f = u.to(dtype), h.to(dtype)
        y = ff.causal_conv(x, f)
        assert y.dtype == dtype
        name = str(dtype).removeprefix("torch.")
        oracle.assert_close(y.double().numpy(), oracle.conv(x.double().numpy(), f.double().numpy()), name)


ONE = np.ones(3, np.float32)
BAD = [
    (([1.0], ONE), TypeError, "u: expected .*float32.*got list"),
    ((ONE, 3), TypeError, "filters: expected .*float32.*got int"),
    ((ONE.astype(int), ONE), TypeError, "u: .*int64"),
    ((ONE.astype(np.float16), ONE), TypeError, "u: .*float16"),
    ((ONE, ONE.astype(np.clongdouble)), TypeError, "filters: .*complex256"),
    ((ONE, torch.ones(3)), TypeError, "torch"),
    ((torch.ones(3), ONE), TypeError, "torch"),
    ((torch.ones(3).to_sparse(), torch.ones(3)), TypeError, "u: expected a strided tensor"),
    ((np.ones((2, 3)), np.ones((3, 3))), ValueError, r"\(2,\)"),
    ((ONE, np.ones((2, 0))), ValueError, "filters: expected at least one lag"),
    ((np.float32(1), ONE), ValueError, "u: "),
    ((ONE, np.array(1.0)), ValueError, "filters: "),
]


@pytest.mark.parametrize(("arguments", "error", "text"), BAD)
def test_errors(arguments, error, text):
    with pytest.raises(error, match=text):
        ff.causal_conv(*arguments)


@pytest.mark.parametrize(
    ("workers", "error"), [(0, ValueError), (-2, ValueError), (True, TypeError), ("2", TypeError)]
)
def test_bad_workers(workers, error):
    with pytest.raises(error, match="workers: expected"):
        ff.causal_conv(ONE, ONE, workers=workers)
