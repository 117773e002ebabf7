"""Schedules are data."""

import pickle

import futurefill_rs as ff
import numpy as np
import pytest


def test_repr_eq_hash_pickle():
    schedule = ff.Schedule(128, (8, 8))
    assert repr(schedule) == "Schedule(base=128, fans=(8, 8))"
    assert (schedule.base, schedule.fans) == (128, (8, 8))
    assert eval(repr(schedule), {"Schedule": ff.Schedule}) == schedule
    assert schedule == ff.Schedule(base=128, fans=[8, 8])
    assert schedule != ff.Schedule(128, (8, 4)) and schedule != ff.Schedule(64, (8, 8)) and schedule != 128
    assert len({schedule, ff.Schedule(128, (8, 8)), ff.Schedule(128, (8,))}) == 2
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert repr(ff.Schedule(3, (2,))) == "Schedule(base=3, fans=(2,))"


def test_immutable():
    with pytest.raises(AttributeError):
        ff.Schedule(4).base = 3


def test_named_schedules():
    assert ff.Schedule.naive() == ff.Schedule(None, ())
    assert ff.Schedule.naive().base is None
    assert ff.Schedule.epoched(1000, epoch=50) == ff.Schedule(50, ())
    epoch = ff.Schedule.epoched(4096).base
    assert 150 <= epoch <= 300  # sqrt(4096 * 12) = 222
    continuous = ff.Schedule.continuous(4096)
    assert continuous.base >= 1 and set(continuous.fans) == {2}
    assert continuous.base * 2 ** len(continuous.fans) <= 2 * 4096
    assert isinstance(ff.Schedule.auto(4096, 4096), ff.Schedule)
    assert isinstance(ff.Schedule.auto(None, 4096), ff.Schedule)


def test_auto_is_a_function_of_its_arguments():
    assert ff.Schedule.auto(2**14, 2**14, rows=256) == ff.Schedule.auto(2**14, 2**14, rows=256)
    assert ff.Schedule.auto(2**17, 2**17, rows=256).fans != ()


def test_cost_has_the_right_order():
    t = 2**16
    naive, epoched, continuous = (
        s.cost(t, t) for s in (ff.Schedule.naive(), ff.Schedule.epoched(t), ff.Schedule.continuous(t))
    )
    assert naive.flops > 5 * epoched.flops > 5 * continuous.flops
    for cost in (naive, epoched, continuous):
        assert cost.flops > 0 and cost.bytes_moved > 0 and cost.state_bytes > 0


@pytest.mark.parametrize("size", [1, 2, 2**31, 2**62, np.int64(7)])
def test_sizes_without_bound(size):
    assert ff.Schedule.epoched(size).base >= 1
    assert ff.Schedule.continuous(size).base >= 1
    assert ff.Schedule.auto(size, 100).cost(size, 100).flops > 0
    assert ff.Schedule(size, (2,)).cost(size, 100).flops > 0


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((0,), ValueError, "base: expected a positive integer"),
        ((-3,), ValueError, "base: "),
        ((True,), TypeError, "base: .*bool"),
        ((2.0,), TypeError, "base: .*float"),
        ((2**64,), ValueError, "base: "),
        ((4, (1,)), ValueError, "fans: "),
        ((4, (2, 0)), ValueError, "fans: "),
        ((4, (2.5,)), TypeError, "fans: "),
        ((4, 2), TypeError, "fans: "),
        ((None, (2,)), ValueError, "fans: "),
    ],
)
def test_errors(arguments, error, text):
    with pytest.raises(error, match=text):
        ff.Schedule(*arguments)


@pytest.mark.parametrize("horizon", [0, -1, 2**63])
def test_bad_horizons(horizon):
    for make in (ff.Schedule.epoched, ff.Schedule.continuous, lambda n: ff.Schedule.auto(n, 8)):
        with pytest.raises(ValueError, match="horizon: expected"):
            make(horizon)
