"""Transforms of every length, the block lengths of any schedule among them, to float64's precision."""

import numpy as np
import oracle
import pytest
import torch
from futurefill_rs.torch_engine.transform import fft, ifft
from torch._subclasses.fake_tensor import FakeTensorMode

PI = np.longdouble("3.14159265358979323846264338327950288")


@pytest.mark.parametrize("n", [*range(1, 80), 102, 127, 206, 289, 17 * 23, 2 * 3 * 5 * 31])
def test_every_length(n, rng):
    x = rng.standard_normal((2, 3, n)) + 1j * rng.standard_normal((2, 3, n))
    place = np.arange(n)
    angles = -2 * PI * ((np.outer(place, place) % n) / np.longdouble(n))
    want = np.einsum("abj,jk->abk", x, np.cos(angles) + 1j * np.sin(angles))
    for got, exact in ((fft(torch.tensor(x)), want), (ifft(torch.tensor(want.astype(complex))), x)):
        error = np.linalg.norm((got.resolve_conj().numpy() - exact).astype(complex).ravel())
        assert error <= 2.5 * oracle.EPS["float64"] * np.linalg.norm(exact.astype(complex).ravel())


@pytest.mark.parametrize("n", [34, 64])
def test_no_rows(n):
    x = torch.ones(0, 3, n, dtype=torch.complex128)
    assert fft(x).shape == ifft(x).shape == x.shape


@pytest.mark.parametrize("n", [34, 64])
def test_tensors_without_data(n):
    with FakeTensorMode():
        x = torch.ones(2, n, dtype=torch.complex128)
        assert fft(x).shape == ifft(x).shape == x.shape
