"""fork, reorder and reset: batches whose entries come, go and multiply in mid-stream."""

import futurefill_rs as ff
import numpy as np
import oracle
import pytest
import torch

METHODS = ["auto", "naive", "epoched", "continuous", ff.Schedule(3, (2, 2))]


def make(rng, batch=3, t=90, lags=60):
    u = rng.standard_normal((batch, 2, t)).astype(np.float32)
    h = rng.standard_normal((2, lags)).astype(np.float32)
    return u, h


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("at", [0, 1, 31, 32, 50])
def test_fork_is_independent(lib, method, at, rng):
    u, h = make(rng)
    cache = lib.plan(h, 90, method).new_cache((3, 2))
    lib.stream(cache, u[..., :at]) if at else None
    other = cache.fork()
    assert (other.position, other.remaining) == (at, 90 - at)
    assert other.plan is cache.plan
    mine = lib.stream(cache, u[..., at:])
    theirs = lib.stream(other, -u[..., at:])
    flipped = np.concatenate([u[..., :at], -u[..., at:]], axis=-1)
    oracle.assert_close(mine, oracle.conv(u, h)[..., at:], "float32", 90)
    oracle.assert_close(theirs, oracle.conv(flipped, h)[..., at:], "float32", 90)


def test_fork_continues_bit_by_bit(lib, rng):
    u, h = make(rng)
    cache = lib.plan(h, 90, ff.Schedule(4, (2, 2))).new_cache((3, 2))
    lib.stream(cache, u[..., :37])
    other = cache.fork()
    oracle.assert_same_bits(lib.stream(cache, u[..., 37:]), lib.stream(other, u[..., 37:]))


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("at", [0, 13, 32, 45])
@pytest.mark.parametrize("index", [[2, 0, 1], [0], [1, 1, -1, 0, 0], [], [-3, -1]])
def test_reorder_gathers_the_batch(lib, method, at, index, rng):
    u, h = make(rng)
    cache = lib.plan(h, 90, method).new_cache((3, 2))
    if at:
        lib.stream(cache, u[..., :at])
    assert cache.reorder(index) is None
    gathered = u[np.array(index, int)]
    y = lib.stream(cache, gathered[..., at:], [0] * 10 + [5])
    assert y.shape == (len(index), 2, 90 - at)
    oracle.assert_close(y, oracle.conv(gathered, h)[..., at:], "float32", 90)


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("prompt", [0, 20])
@pytest.mark.parametrize("at", [0, 9, 32, 47])
def test_reset_rows_start_again(lib, method, prompt, at, rng):
    u, h = make(rng)
    _, cache = lib.plan(h, 90, method).prefill(lib.array(u[..., :prompt]), 90 - prompt)
    now = prompt + at
    if at:
        lib.stream(cache, u[..., prompt:now])
    cache.reset([0, 2])
    assert (cache.position, cache.remaining) == (now, 90 - now)
    y = lib.stream(cache, u[..., now:])
    u[0, :, :now] = u[2, :, :now] = 0
    oracle.assert_close(y, oracle.conv(u, h)[..., now:], "float32", 90)


def test_reset_cures_a_bad_row(lib, rng):
    u, h = make(rng)
    cache = lib.plan(h, 90, ff.Schedule(4, (2, 2))).new_cache((3, 2))
    bad = u[..., :50].copy()
    bad[1] = np.nan
    lib.stream(cache, bad)
    cache.reset([1])
    y = lib.stream(cache, u[..., 50:])
    u[1, :, :50] = 0
    oracle.assert_close(y, oracle.conv(u, h)[..., 50:], "float32", 90)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_reset_everything(lib, method, rng):
    u, h = make(rng)
    cache = lib.plan(h, 90, method).new_cache((3, 2))
    first = lib.stream(cache, u)
    assert cache.remaining == 0
    cache.reset()
    assert (cache.position, cache.remaining) == (0, 90)
    oracle.assert_same_bits(lib.stream(cache, u), first)


ROWS = [
    ([1], [1]),
    ((0, -1), [0, 2]),
    (np.array([2, 2]), [2]),
    (np.array([True, False, True]), [0, 2]),
    ([False, True, False], [1]),
    (torch.tensor([0, 1]), [0, 1]),
    (torch.tensor([True, False, False]), [0]),
    (np.array([1], np.uint8), [1]),
    (range(2), [0, 1]),
    (1, [1]),
    (np.int32(-1), [2]),
    ([], []),
    (np.zeros(0, int), []),
    (np.zeros(3, bool), []),
]


@pytest.mark.parametrize(("rows", "meant"), ROWS, ids=[str(i) for i in range(len(ROWS))])
def test_rows_as_numpy_reads_them(lib, rows, meant, rng):
    u, h = make(rng, t=30)
    cache = lib.plan(h, 30).new_cache((3, 2))
    lib.stream(cache, u[..., :10])
    cache.reset(rows)
    y = lib.stream(cache, u[..., 10:])
    u[meant, :, :10] = 0
    oracle.assert_close(y, oracle.conv(u, h)[..., 10:], "float32", 30)


INDICES = [
    [1, 0],
    (1, 0),
    np.array([1, 0]),
    torch.tensor([1, 0]),
    np.array([1, 0], np.uint64),
    np.array([-2, -3], np.int8),
]


@pytest.mark.parametrize("index", INDICES, ids=[str(i) for i in range(len(INDICES))])
def test_index_as_numpy_reads_it(lib, index, rng):
    u, h = make(rng, t=30)
    cache = lib.plan(h, 30).new_cache((3, 2))
    lib.stream(cache, u[..., :10])
    cache.reorder(index)
    y = lib.stream(cache, u[[1, 0], :, 10:])
    oracle.assert_close(y, oracle.conv(u[[1, 0]], h)[..., 10:], "float32", 30)


BAD_INDICES = [
    ([3], (IndexError, ValueError), "3"),
    ([-4], (IndexError, ValueError), "-4"),
    ([0, 2**40], (IndexError, ValueError), str(2**40)),
    ([2**70], (IndexError, ValueError), str(2**70)),
    ([0.5], TypeError, "expected"),
    (np.zeros(2), TypeError, "expected"),
    (["a"], TypeError, "expected integers.*, got <U1"),
    ("a", TypeError, "expected integers.*, got str"),
    ([[0, 1], [1, 0]], ValueError, "expected one axis, got 2 axes"),
]


@pytest.mark.parametrize(("index", "error", "text"), BAD_INDICES)
@pytest.mark.parametrize("call", ["reorder", "reset"])
def test_bad_indices_change_nothing(lib, call, index, error, text, rng):
    u, h = make(rng, t=30)
    cache = lib.plan(h, 30, ff.Schedule(4, (2,))).new_cache((3, 2))
    lib.stream(cache, u[..., :10])
    with pytest.raises(error, match=text) as caught:
        getattr(cache, call)(index)
    assert ("index" if call == "reorder" else "rows") in str(caught.value)
    assert cache.position == 10
    oracle.assert_close(lib.stream(cache, u[..., 10:]), oracle.conv(u, h)[..., 10:], "float32", 30)


@pytest.mark.parametrize(
    "index", [[True, False, True], np.array([True, False, True]), torch.tensor([True] * 3)]
)
def test_reorder_refuses_booleans(lib, index):
    cache = lib.plan(np.ones((2, 5), np.float32)).new_cache((3, 2))
    with pytest.raises(TypeError, match="index: expected integers"):
        cache.reorder(index)


def test_a_mask_of_the_wrong_length(lib):
    cache = lib.plan(np.ones((2, 5), np.float32)).new_cache((3, 2))
    with pytest.raises((ValueError, IndexError), match="rows: "):
        cache.reset(np.array([True, False]))


@pytest.mark.parametrize(("f", "c"), [((2,), (2,)), ((), ()), ((3, 2), (3, 2)), ((1, 2), (3, 2))])
def test_no_batch_axis(lib, f, c):
    cache = lib.plan(np.ones((*f, 5), np.float32)).new_cache(c)
    for call in (lambda: cache.reorder([0]), lambda: cache.reset([0])):
        with pytest.raises(ValueError, match="batch axis"):
            call()
    cache.reset()


def test_a_batch_that_comes_and_goes(lib, rng):
    h = rng.standard_normal((2, 40)).astype(np.float32)
    plan = lib.plan(h, None, ff.Schedule(4, (2, 2)))
    cache = plan.new_cache((2, 2))
    past = np.zeros((2, 2, 0), np.float32)
    for step in range(60):
        if step in (7, 16, 33):
            index = rng.integers(0, past.shape[0], size=rng.integers(1, 5))
            cache.reorder(index)
            past = past[index]
        if step in (12, 32, 40):
            cache.reset([-1])
            past[-1] = 0
        x = rng.standard_normal((past.shape[0], 2)).astype(np.float32)
        past = np.concatenate([past, x[..., None]], axis=-1)
        y = lib.numpy(cache.step(lib.array(x)))
        np.testing.assert_allclose(y, oracle.conv(past, h)[..., -1], rtol=1e-4, atol=1e-4)
