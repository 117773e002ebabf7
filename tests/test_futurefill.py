"""futurefill: the paper's operator."""

import futurefill_rs as ff
import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st


def test_the_papers_sum_by_hand():
    assert ff.futurefill(np.array([1.0, 2.0]), np.array([1.0, 10.0, 100.0])).tolist() == pytest.approx(
        [120, 200]
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_pair_of_lengths(dtype, rng):
    for t1 in [0, 1, 2, 3, 7, 8, 31, 64, 200]:
        for t2 in [1, 2, 3, 8, 33, 100, 257]:
            v, w = rng.standard_normal((2, t1)).astype(dtype), rng.standard_normal((2, t2)).astype(dtype)
            y = ff.futurefill(v, w)
            assert y.dtype == dtype
            oracle.assert_close(y, oracle.futurefill(v, w), dtype, length=t1 + t2)


def test_it_is_a_slice_of_the_full_convolution(rng):
    v, w = rng.standard_normal(40), rng.standard_normal(60)
    np.testing.assert_allclose(ff.futurefill(v, w), np.convolve(v, w)[40:99], rtol=1e-12, atol=1e-13)


def test_empty_ends():
    assert ff.futurefill(np.zeros((3, 0)), np.ones(5)).tolist() == [[0.0] * 4] * 3
    assert ff.futurefill(np.ones(5), np.ones(1)).shape == (0,)


@given(
    b=st.sampled_from([((), (3,)), ((2, 1), (4,)), ((0,), (1,)), ((2, 3), (2, 3))]), seed=st.integers(0, 99)
)
def test_leading_axes_broadcast(b, seed):
    rng = np.random.default_rng(seed)
    v, w = rng.standard_normal((*b[0], 9)), rng.standard_normal((*b[1], 6))
    oracle.assert_close(ff.futurefill(v, w), oracle.futurefill(v, w), "float64", length=15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_torch(dtype, rng):
    v, w = (torch.tensor(rng.standard_normal(n)).to(dtype) for n in (20, 30))
    y = ff.futurefill(v, w)
    assert y.dtype == dtype
    name = str(dtype).removeprefix("torch.")
    oracle.assert_close(y.double().numpy(), oracle.futurefill(v.double(), w.double()), name, length=50)


@pytest.mark.parametrize(
    ("v", "w", "error", "text"),
    [
        ([1.0], np.ones(2), TypeError, "v: expected"),
        (np.ones(2), np.ones(2, int), TypeError, "w: expected"),
        (np.ones(2), torch.ones(2), TypeError, "torch"),
        (np.ones(2), np.ones(0), ValueError, "w: expected"),
        (np.ones(()), np.ones(2), ValueError, "v: expected"),
        (np.ones((2, 2)), np.ones((3, 2)), ValueError, r"\(2,\)"),
    ],
)
def test_errors(v, w, error, text):
    with pytest.raises(error, match=text):
        ff.futurefill(v, w)


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_the_future_of_a_filter_that_dies_out_is_accurate(library):
    rng = np.random.default_rng(5)
    v = rng.standard_normal((2, 8192)).astype("float32")
    w = (rng.standard_normal((2, 8192)) * np.exp(-np.arange(8192) / 50)).astype("float32")
    want = np.stack(
        [np.convolve(a, b)[8192 : 8192 + 8191] for a, b in zip(v.astype(float), w.astype(float), strict=True)]
    )
    if library == "torch":
        torch = pytest.importorskip("torch")
        y = ff.futurefill(torch.from_numpy(v), torch.from_numpy(w)).numpy()
    else:
        y = ff.futurefill(v, w)
    assert y.dtype == np.float32
    oracle.assert_close(y, want, "float32", length=8192)
