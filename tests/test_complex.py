"""Complex signals and filters: every entry against a direct sum of complex numbers, in every library."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import futurefill_rs as ff
import numpy as np
import oracle
import pytest

KINDS = [
    ("complex64", "complex64"),
    ("complex64", "float32"),
    ("complex128", "complex128"),
    ("float32", "complex64"),
]
SCHEDULES = ["auto", "naive", "epoched", "continuous", ff.Schedule(3, (2, 3))]


def signal(rng: np.random.Generator, dtype: str, *shape: int) -> np.ndarray:
    values = rng.standard_normal(shape)
    return (values + 1j * rng.standard_normal(shape) if "complex" in dtype else values).astype(dtype)


def assert_close(y: Any, reference: np.ndarray, dtype: str) -> None:
    """Twice the bound of real numbers: Karatsuba's imaginary part is a difference of sums."""
    real = {"complex64": "float32", "complex128": "float64"}[dtype]
    y = np.asarray(y)
    assert y.dtype == dtype and y.shape == reference.shape
    bound = 2 * oracle.EPS[real] * np.log2(2 * max(2, reference.shape[-1]))
    assert np.linalg.norm(y - reference) <= bound * np.linalg.norm(reference)


def result(u: str) -> str:
    return {"float32": "complex64", "float64": "complex128"}.get(u, u)


@pytest.mark.parametrize(("u_dtype", "h_dtype"), KINDS)
@pytest.mark.parametrize(("c", "f"), oracle.SHAPES)
def test_whole_sequences(lib, u_dtype, h_dtype, c, f, rng):
    for t, lags in ((1, 1), (7, 40), (150, 33)):
        u, h = signal(rng, u_dtype, *c, t), signal(rng, h_dtype, *f, lags)
        y = lib.numpy(ff.causal_conv(lib.array(u), lib.array(h)))
        assert_close(y, oracle.conv(u, h, np.complex128), result(u_dtype))
        ahead = np.zeros((*u.shape[:-1], lags - 1), u.dtype)
        filled = oracle.conv(np.concatenate([u, ahead], -1), h, np.complex128)[..., t:]
        assert_close(lib.numpy(ff.futurefill(lib.array(u), lib.array(h))), filled, result(u_dtype))


@pytest.mark.parametrize(("u_dtype", "h_dtype"), KINDS)
@pytest.mark.parametrize("method", SCHEDULES, ids=str)
def test_every_way_through_a_cache(lib, u_dtype, h_dtype, method, rng):
    for c, f in oracle.SHAPES:
        u, h = signal(rng, u_dtype, *c, 90), signal(rng, h_dtype, *f, 70)
        dtype = None if "complex" in h_dtype else lib.dtype(u_dtype)
        plan = ff.plan(lib.array(h), 90, method, dtype=dtype, engine=lib.engine)
        assert plan.dtype == lib.dtype(result(h_dtype)) and plan.filter_shape == f
        oracle.assert_same_bits(lib.numpy(plan.filters), h.astype(result(h_dtype)))
        reference = oracle.conv(u, h, np.complex128)
        y, cache = plan.prefill(lib.array(u[..., :20]), 70)
        past = oracle.conv(np.concatenate([u[..., :20], np.zeros((*c, 9))], -1), h, np.complex128)
        assert_close(lib.numpy(cache.pending(9)), past[..., 20:], result(h_dtype))
        block = cache.extend(lib.array(u[..., 20:50]))
        twin, loaded = cache.fork(), plan.load_cache(pickle.loads(pickle.dumps(cache.state_dict())))
        parts = [lib.numpy(y), lib.numpy(block)]
        for t in range(50, 90):
            x = lib.array(u[..., t])
            out = lib.numpy(cache.step(x))
            oracle.assert_same_bits(lib.numpy(twin.step(x)), out)
            oracle.assert_same_bits(lib.numpy(loaded.step(x)), out)
            parts.append(out[..., None])
        assert_close(np.concatenate(parts, -1), reference, result(u_dtype))
        assert cache.remaining == 0 and cache.output_shape == np.broadcast_shapes(c, f)
        with pytest.raises(ff.CapacityError):
            cache.step(x)


def test_batches_and_copies(lib, rng):
    u, h = signal(rng, "complex64", 3, 2, 40), signal(rng, "complex64", 2, 30)
    plan = pickle.loads(pickle.dumps(lib.plan(h, 40)))
    assert isinstance(plan, ff.Plan) and copy.deepcopy(plan) is plan
    cache = plan.new_cache((3, 2))
    assert isinstance(cache, ff.Cache)
    cache.extend(lib.array(u[..., :10]))
    cache = copy.deepcopy(pickle.loads(pickle.dumps(cache)))
    cache.reorder([2, 0, 0, 1])
    cache.reset([1])
    order = [2, 0, 0, 1]
    moved = u[order].copy()
    moved[1, :, :10] = 0
    assert_close(
        lib.numpy(cache.extend(lib.array(moved[..., 10:]))),
        oracle.conv(moved, h, complex)[..., 10:],
        "complex64",
    )
    with pytest.raises(ValueError, match=r"cache: expected a batch axis in front of the filters' \(2,\)"):
        plan.new_cache().reorder([0])


def test_results_go_where_they_are_asked(lib, rng):
    u, h = signal(rng, "complex64", 2, 12), signal(rng, "complex64", 2, 5)
    u, h = lib.array(u), lib.array(h)
    plain = ff.causal_conv(u, h)
    out = 0 * plain
    assert ff.causal_conv(u, h, out=out) is out
    oracle.assert_same_bits(lib.numpy(out), lib.numpy(plain))
    cache = lib.plan(lib.numpy(h)).new_cache()
    step = 0 * u[..., 0]
    assert cache.step(u[..., 0], out=step) is step
    wrong = 0 * u[..., :3]
    with pytest.raises(ValueError, match=r"out: expected shape \(2,\), got \(2, 3\)"):
        cache.step(u[..., 1], out=wrong)
    with pytest.raises(TypeError, match=r"out: expected complex64, got float32"):
        cache.step(u[..., 1], out=step.real)
    assert cache.position == 1


def test_what_cannot_be_right_is_refused(lib, rng):
    h = lib.array(signal(rng, "complex64", 2, 5))
    plan = ff.plan(h)
    with pytest.raises(
        TypeError, match="u: expected complex64, the precision of this plan, or less, got complex128"
    ):
        plan.new_cache().step(lib.array(signal(rng, "complex128", 2)))
    with pytest.raises(ValueError, match=r"u: expected shape \(2,\), got \(3,\)"):
        plan.new_cache().step(lib.array(signal(rng, "complex64", 3)))
    with pytest.raises(ValueError, match=r"u: expected shape \(2, m\), got \(2,\)"):
        plan.new_cache().extend(lib.array(signal(rng, "complex64", 2)))
    with pytest.raises(
        TypeError, match="dtype: expected complex64 or complex128 for complex filters, got float32"
    ):
        ff.plan(h, dtype="float32")
    with pytest.raises(TypeError, match="a complex input needs a plan with dtype=complex64"):
        ff.plan(lib.array(np.ones((2, 3), np.float32))).new_cache().step(
            lib.array(signal(rng, "complex64", 2))
        )
    with pytest.raises(TypeError, match=r"u: expected a (numpy array|torch tensor)"):
        plan.new_cache().step([1j, 2j])
    with pytest.raises(ValueError, match="NaN"):
        ff.plan(h * np.float32("nan"))
    for few in (lib.array(np.array(1j)), lib.array(np.ones((2, 0), complex))):
        with pytest.raises(ValueError, match="filters: expected at least one"):
            ff.plan(few)
    if lib.is_torch:
        with pytest.raises(TypeError, match="strided"):
            ff.causal_conv(h.to_sparse(), h)


def test_gradients():
    torch = pytest.importorskip("torch")
    make = lambda *shape: torch.randn(*shape, dtype=torch.complex128, requires_grad=True)  # noqa: E731
    torch.manual_seed(0)
    for u, h in ((make(2, 6), make(2, 4)), (make(2, 6), make(2, 4).real), (make(2, 6).real, make(2, 4))):
        u, h = u.detach().requires_grad_(), h.detach().requires_grad_()
        assert torch.autograd.gradcheck(ff.causal_conv, (u, h))
        assert torch.autograd.gradcheck(ff.futurefill, (u, h))
