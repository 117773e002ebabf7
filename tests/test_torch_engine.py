"""The torch engine against the float64 oracle and the compiled engine, on real CPU and fake CUDA tensors."""

from __future__ import annotations

import itertools
import pickle
import random
import threading
from typing import Any

import futurefill_rs as ff
import numpy as np
import oracle
import pytest
import torch
from futurefill_rs._core import Execution
from futurefill_rs.torch_engine import TorchPlan
from futurefill_rs.torch_engine import tile as tile_module
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

SHAPES = oracle.SHAPES
METHODS = [
    "naive",
    "epoched",
    "continuous",
    "auto",
    ff.Schedule(1, ()),
    ff.Schedule(1, (2, 2, 2, 2)),
    ff.Schedule(3, (5, 2)),
    ff.Schedule(7, (3, 4)),
    ff.Schedule(16, (2, 2)),
    ff.Schedule(300, ()),
]

SMOOTH = ["auto", "continuous", ff.Schedule(1, (2, 2, 2, 2)), ff.Schedule(3, (5, 2)), ff.Schedule(7, (3, 4))]
PLANS = [(method, "throughput") for method in METHODS] + [(method, "smooth") for method in SMOOTH]


def random_pair(c: tuple[int, ...], f: tuple[int, ...], t: int, lags: int, dtype: torch.dtype) -> Any:
    generator = torch.Generator().manual_seed(t * 1000 + lags)
    u = torch.randn(*c, t, generator=generator, dtype=torch.float64).to(dtype)
    return u, torch.randn(*f, lags, generator=generator, dtype=torch.float64).to(dtype)


def steps(cache: Any, u: torch.Tensor) -> torch.Tensor:
    if u.shape[-1] == 0:
        return cache.extend(u)
    return torch.stack([cache.step(u[..., t]) for t in range(u.shape[-1])], -1)


def check(y: torch.Tensor, u: torch.Tensor, filters: torch.Tensor) -> None:
    name = str(u.dtype).removeprefix("torch.")
    assert y.dtype is u.dtype and not y.requires_grad
    reference = oracle.conv(u.double().numpy(), filters.double().numpy())
    oracle.assert_close(y.double().numpy(), reference, name)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype is b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


@pytest.mark.parametrize(("method", "latency"), PLANS, ids=str)
def test_steps_for_every_method_and_short_length(method, latency):
    for t, lags in itertools.product((1, 2, 3, 5, 16, 33, 64, 101), (1, 2, 7, 16, 40, 128)):
        u, filters = random_pair((2,), (2,), t, lags, torch.float32)
        for horizon in (None, t):
            check(steps(TorchPlan(filters, horizon, method, latency=latency).new_cache(), u), u, filters)


@pytest.mark.parametrize(
    "method", ["naive", "epoched", "continuous", "auto", ff.Schedule(600, (3,))], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_long_streams(method, dtype):
    u, filters = random_pair((2,), (2,), 3001, 1021, dtype)
    plan = TorchPlan(filters, None, method)
    check(steps(plan.new_cache(), u), u, filters)
    check(plan.new_cache().extend(u), u, filters)
    # Terms of one sign: a long sum needs partial sums to stay within the bound.
    u, filters = u.abs() + 1, filters.abs() + 1
    check(steps(TorchPlan(filters, None, method).new_cache(), u), u, filters)


@pytest.mark.parametrize(("c", "f"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_random_streams(c, f, dtype):
    rng = random.Random(repr((c, f, dtype)))
    for _ in range(12):
        t, lags = rng.randint(1, 150), rng.randint(1, 150)
        u, filters = random_pair(c, f, t, lags, dtype)
        schedule = ff.Schedule(rng.randint(1, 300), [rng.randint(2, 5) for _ in range(rng.randint(0, 3))])
        latency = rng.choice(["throughput", "smooth"])
        plan = TorchPlan(
            filters, rng.choice([None, t, t + 9]), rng.choice([schedule, "naive"]), latency=latency
        )
        prompt = rng.choice([0, rng.randint(0, t)])
        max_new = rng.choice([None, t - prompt])
        y, cache = plan.prefill(u[..., :prompt], max_new)
        parts, at = [y], prompt
        while at < t:
            if rng.random() < 0.7:
                parts.append(cache.step(u[..., at]).unsqueeze(-1))
                at += 1
            else:
                width = rng.randint(0, t - at)
                parts.append(cache.extend(u[..., at : at + width]))
                at += width
            choice = rng.random()
            if choice < 0.05:
                cache = cache.fork()
            elif choice < 0.1:
                cache = plan.load_cache(pickle.loads(pickle.dumps(cache.state_dict())))
            elif choice < 0.15 and len(c) > len(f):
                cache.reorder(range(c[0]))
            assert cache.position == at
        check(torch.cat(parts, -1), u, filters)


def test_precisions_of_input_and_filters_may_differ():
    for inner, outer in itertools.permutations([torch.bfloat16, torch.float32, torch.float64], 2):
        u, _ = random_pair((2,), (2,), 40, 20, outer)
        _, filters = random_pair((2,), (2,), 40, 20, inner)
        plan = TorchPlan(filters, 40, ff.Schedule(4, (2,)))
        assert plan.dtype is (torch.float64 if inner is torch.float64 else torch.float32)
        if outer is torch.float64:
            with pytest.raises(TypeError, match=r"u: expected float32.*plan with dtype=float64"):
                plan.new_cache().extend(u)
            plan = ff.plan(filters, 40, ff.Schedule(4, (2,)), engine="torch", dtype=torch.float64)
        y = steps(plan.new_cache(), u)
        lower = torch.bfloat16 if torch.bfloat16 in (inner, outer) else torch.float32
        assert y.dtype is outer
        reference = oracle.conv(u.double().numpy(), filters.double().numpy())
        oracle.assert_close(y.double().numpy(), reference, str(lower).removeprefix("torch."))


def test_zero_rows_and_no_positions():
    plan = TorchPlan(torch.randn(3, 9), None, ff.Schedule(2, (2,)))
    cache = plan.new_cache((0, 3))
    for _ in range(9):
        assert cache.step(torch.zeros(0, 3)).shape == (0, 3)
    assert cache.extend(torch.zeros(0, 3, 50)).shape == (0, 3, 50)
    y, cache = plan.prefill(torch.zeros(2, 3, 0), 5)
    assert y.shape == (2, 3, 0) and cache.remaining == 5
    assert cache.extend(torch.zeros(2, 3, 0)).shape == (2, 3, 0)
    assert plan.prefill(torch.zeros(3, 4), 0)[1].remaining == 0


def test_memory_is_bounded_by_the_filters_and_by_what_is_left():
    filters = torch.randn(2, 64)
    endless = TorchPlan(filters, None, ff.Schedule(4, (4,)))
    absurd = TorchPlan(filters, 2**62, ff.Schedule(4, (4, 2**20, 2**20)))
    assert absurd.new_cache().nbytes == endless.new_cache().nbytes < 64 * 2 * 4 * 20
    assert absurd.new_cache().remaining == 2**62
    sizes = {TorchPlan(torch.randn(2, 999)).prefill(torch.randn(2, p), 10)[1].nbytes for p in (5000, 700)}
    assert len(sizes) == 1


def test_spectra_of_a_shared_bank_are_stored_once():
    plan = TorchPlan(torch.randn(4, 1, 256), None, ff.Schedule(16, ()))
    cache = plan.new_cache((2, 1, 3))
    assert sum(s.numel() for s in plan._tables.spectra.values()) == 4 * 256
    assert sum(k.numel() for k in cache._memory.kept) == 2 * 3 * 256


@pytest.mark.parametrize(("method", "latency"), PLANS, ids=str)
def test_causality_bit_by_bit(method, latency):
    u, filters = random_pair((2,), (2,), 90, 60, torch.float32)
    plan = TorchPlan(filters, None, method, latency=latency)
    y = steps(plan.new_cache(), u)
    for cut in (1, 15, 16, 47, 64):
        changed = u.clone()
        changed[..., cut:] = float("nan")
        assert same_bits(steps(plan.new_cache(), changed)[..., :cut], y[..., :cut])


@pytest.mark.parametrize(("method", "latency"), PLANS, ids=str)
def test_rows_are_isolated_bit_by_bit(method, latency):
    u, filters = random_pair((5, 2), (2,), 90, 60, torch.float32)
    plan = TorchPlan(filters, None, method, latency=latency)
    y = steps(plan.new_cache((5, 2)), u)
    changed = u.clone()
    changed[3] *= -7
    changed[1, 0, 20:] = float("inf")
    z = steps(plan.new_cache((5, 2)), changed)
    for row in (0, 2, 4):
        assert same_bits(y[row], z[row])
    assert same_bits(y[1, 1], z[1, 1])


@pytest.mark.parametrize("method", ["naive", ff.Schedule(4, (2, 3)), ff.Schedule(300, (2,))], ids=str)
def test_non_finite_input_leaves_with_the_reach_and_with_a_reset(method):
    u, filters = random_pair((3, 2), (2,), 400, 30, torch.float32)
    plan = TorchPlan(filters, None, method)
    spoilt = u.clone()
    spoilt[1, :, 10] = float("nan")
    cache = plan.new_cache((3, 2))
    steps(cache, spoilt[..., :15])
    fork = cache.fork()
    cache.reset([1])
    fresh = u.clone()
    fresh[1, :, :15] = 0
    y = steps(cache, u[..., 15:100])
    reference = oracle.conv(fresh[..., :100].double().numpy(), filters.double().numpy())[..., 15:]
    oracle.assert_close(y.double().numpy(), reference, "float32")
    tail = steps(fork, u[..., 15:])[..., -60:]
    assert torch.isfinite(tail).all()


def test_reset_in_mid_stream_keeps_the_clock():
    u, filters = random_pair((4, 2), (2,), 60, 25, torch.float64)
    plan = TorchPlan(filters, 60, ff.Schedule(4, (3,)))
    for rows in (
        [1, -1],
        np.array([1, 3]),
        torch.tensor([True, True, False, True]),
        [False, True, False, True],
    ):
        cache = plan.new_cache((4, 2))
        steps(cache, u[..., :22])
        cache.reset(rows)
        assert (cache.position, cache.remaining) == (22, 38)
        fresh = u.clone()
        chosen = np.zeros(4, bool)
        chosen[np.asarray(rows)] = True
        fresh[torch.from_numpy(chosen), :, :22] = 0
        reference = oracle.conv(fresh.numpy(), filters.numpy())[..., 22:]
        oracle.assert_close(steps(cache, u[..., 22:]).numpy(), reference, "float64")
    cache.reset()
    assert (cache.position, cache.remaining) == (0, 60)
    check(steps(cache, u), u, filters)
    _, cache = plan.prefill(u[..., :30], 20)
    cache.reset()
    assert (cache.position, cache.remaining) == (0, 20)
    check(steps(cache, u[..., :20]), u[..., :20], filters)


def test_reorder_gathers_and_multiplies():
    u, filters = random_pair((3, 2), (2,), 50, 25, torch.float64)
    plan = TorchPlan(filters, 50, ff.Schedule(4, (3,)))
    for index in ([2, 0, 0, 1, -1], [1], torch.tensor([0, 2]), np.array([], np.int64)):
        cache = plan.prefill(u[..., :7])[1]
        steps(cache, u[..., 7:22])
        cache.reorder(index)
        picked = u[torch.as_tensor(np.asarray(index))]
        assert cache.shape == (len(index), 2)
        y = steps(cache, picked[..., 22:])
        oracle.assert_close(y.numpy(), oracle.conv(picked.numpy(), filters.numpy())[..., 22:], "float64")


def test_fork_is_independent():
    u, filters = random_pair((2,), (2,), 50, 25, torch.float32)
    cache = TorchPlan(filters, 50, ff.Schedule(4, (3,))).new_cache()
    steps(cache, u[..., :22])
    fork = cache.fork()
    steps(fork, -u[..., :20])
    y = steps(cache, u[..., 22:])
    reference = oracle.conv(u.double().numpy(), filters.double().numpy())[..., 22:]
    oracle.assert_close(y.double().numpy(), reference, "float32")


@pytest.mark.parametrize(("method", "latency"), PLANS, ids=str)
def test_a_loaded_state_continues_bit_by_bit(method, latency):
    u, filters = random_pair((2,), (2,), 120, 60, torch.float32)
    plan = TorchPlan(filters, None, method, latency=latency)
    for prompt, taken in ((0, 0), (0, 5), (0, 64), (9, 48), (70, 33)):
        cache = plan.prefill(u[..., :prompt])[1]
        steps(cache, u[..., prompt : prompt + taken])
        state = pickle.loads(pickle.dumps(cache.state_dict()))
        again = TorchPlan(filters, None, method, latency=latency).load_cache(state)
        assert again.position == cache.position and again.remaining == cache.remaining
        rest = u[..., prompt + taken :]
        assert same_bits(steps(again, rest), steps(cache, rest))


def test_a_state_is_a_snapshot():
    u, filters = random_pair((2,), (2,), 60, 60, torch.float32)
    plan = TorchPlan(filters, None, ff.Schedule(2, (2,)))
    cache = plan.prefill(u)[1]
    state = cache.state_dict()
    copy = pickle.loads(pickle.dumps(state))
    steps(cache, u)
    for name, array in state.items():
        assert np.array_equal(array, copy[name])


def test_states_that_do_not_fit_are_refused():
    u, filters = random_pair((2,), (2,), 30, 60, torch.float32)
    plan = TorchPlan(filters, 64, ff.Schedule(4, (2,)))
    cache = plan.new_cache()
    steps(cache, u)
    state = cache.state_dict()
    others = [
        TorchPlan(filters * 2, 64, ff.Schedule(4, (2,))),
        TorchPlan(filters, 29, ff.Schedule(4, (2,))),
        TorchPlan(filters.double(), 64, ff.Schedule(4, (2,))),
        TorchPlan(filters[:, :-1], 64, ff.Schedule(4, (2,))),
    ]
    for other in others:
        with pytest.raises(ValueError, match="state"):
            other.load_cache(state)
    damaged = {**state, "history": state["history"] + 1}
    for bad in (damaged, {**state, "clock": 31}, {}, None, [1]):
        with pytest.raises(ValueError, match="state"):
            plan.load_cache(bad)


@pytest.mark.parametrize(("method", "latency"), PLANS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_engines_agree_and_exchange_states(method, latency, dtype):
    u, filters = random_pair((2, 3), (3,), 200, 90, dtype)
    for horizon in (None, 200):
        ours = ff.plan(filters, horizon, method, engine="torch", latency=latency)
        theirs = ff.plan(filters, horizon, method, latency=latency)
        assert ours.schedule == theirs.schedule
        assert ours.filter_length == theirs.filter_length and ours.dtype is theirs.dtype
        for prompt, taken in ((0, 77), (30, 64), (50, 0)):
            mid, name = prompt + taken, str(dtype).removeprefix("torch.")
            reference = oracle.conv(u.double().numpy(), filters.double().numpy())[..., mid:]
            for first, second in ((ours, theirs), (theirs, ours)):
                cache = first.prefill(u[..., :prompt])[1]
                cache.extend(u[..., prompt:mid])
                state = cache.state_dict()
                other = second.load_cache(state)
                assert (other.position, other.remaining) == (cache.position, cache.remaining)
                oracle.assert_close(steps(other, u[..., mid:]).numpy(), reference, name)


def unchanged(cache: Any, call: Any, kind: type[Exception], text: str) -> None:
    before = cache.state_dict()
    with pytest.raises(kind, match=text):
        call()
    assert cache.state_dict()["checksum"] == before["checksum"]


def test_errors_leave_the_cache_as_it_was():
    u, filters = random_pair((2, 3), (3,), 20, 9, torch.float32)
    plan = TorchPlan(filters, 20, ff.Schedule(4, (2,)))
    cache = plan.new_cache((2, 3))
    steps(cache, u[..., :15])
    x = u[..., 0]
    shape = r"u: expected shape \(2, 3\), got \(2, 7\)"
    unchanged(cache, lambda: cache.step(torch.zeros(2, 7)), ValueError, shape)
    unchanged(cache, lambda: cache.step(x.int()), TypeError, "u: expected float16.*got int32")
    unchanged(cache, lambda: cache.step(x.to(torch.complex64)), TypeError, "got complex64")
    unchanged(cache, lambda: cache.step(x.numpy()), TypeError, "u: expected a torch tensor.*numpy.ndarray")
    unchanged(cache, lambda: cache.step(x.tolist()), TypeError, "got list")
    unchanged(cache, lambda: cache.step(x.to_sparse()), TypeError, "strided")
    unchanged(cache, lambda: cache.step(x.to("meta")), ValueError, "u: expected device cpu, got meta")
    unchanged(cache, lambda: cache.step(x, out=torch.zeros(3, 2)), ValueError, "out: expected shape")
    unchanged(
        cache, lambda: cache.step(x, out=torch.zeros(2, 3).double()), TypeError, "out: expected float32"
    )
    unchanged(cache, lambda: cache.step(x, out=torch.zeros(1, 3).expand(2, 3)), ValueError, "out")
    unchanged(cache, lambda: cache.step(x, out=np.zeros((2, 3))), TypeError, "out")
    unchanged(cache, lambda: cache.extend(x), ValueError, r"u: expected shape \(2, 3, m\), got \(2, 3\)")
    unchanged(cache, lambda: cache.extend(u), ff.CapacityError, "room for 5 more positions, got 20")
    unchanged(cache, lambda: cache.reorder([2]), IndexError, "index: 2 is out of range")
    unchanged(cache, lambda: cache.reorder([0.5]), TypeError, "index: expected integers")
    unchanged(cache, lambda: cache.reorder([[0]]), ValueError, "index: expected one axis")
    unchanged(cache, lambda: cache.reorder([True, False]), TypeError, "index: expected integers")
    unchanged(cache, lambda: cache.reset([-3]), IndexError, "rows: -3 is out of range")
    unchanged(cache, lambda: cache.reset([True]), ValueError, "rows: expected a mask")
    steps(cache, u[..., :5])
    unchanged(cache, lambda: cache.step(x), ff.CapacityError, "room for 0 more positions, got 1")
    lone = plan.new_cache()
    unchanged(lone, lambda: lone.reorder([0]), ValueError, "batch axis")
    unchanged(lone, lambda: lone.reset([0]), ValueError, "batch axis")


def test_errors_of_plans():
    filters = torch.randn(3, 9)
    for bad in (torch.zeros(3, 0), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="filters"):
            TorchPlan(bad)
    for bad in (filters.int(), filters.numpy(), [1.0]):
        with pytest.raises(TypeError, match="filters"):
            TorchPlan(bad)
    for kind, text, options in (
        (ValueError, "horizon", {"horizon": 0}),
        (TypeError, "horizon", {"horizon": 1.5}),
        (ValueError, "method", {"method": "fast"}),
        (TypeError, "method", {"method": 3}),
        (ValueError, "latency", {"latency": "low"}),
    ):
        with pytest.raises(kind, match=text):
            TorchPlan(filters, **options)
    plan = TorchPlan(filters, 10)
    for call in (
        lambda: plan.prefill(torch.zeros(3, 11)),
        lambda: plan.prefill(torch.zeros(3, 5), 6),
    ):
        with pytest.raises(ff.CapacityError):
            call()
    with pytest.raises(ValueError, match="prompt: expected device cpu, got meta"):
        plan.prefill(torch.zeros(3, 5, device="meta"))
    with pytest.raises(ValueError, match="shape"):
        plan.new_cache((2, 4))
    with pytest.raises(ValueError, match="shape"):
        plan.new_cache((-1, 3))


def test_awkward_tensors():
    u, filters = random_pair((2, 3), (3,), 40, 20, torch.float32)
    plan = TorchPlan(filters.requires_grad_(), None, ff.Schedule(4, (2,)))
    reference = oracle.conv(u.double().numpy(), filters.detach().double().numpy())
    cache, outputs = plan.new_cache((2, 3)), []
    strided = u.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    for t in range(40):
        x = strided[..., t].clone().t().contiguous().t() if t % 2 else strided[..., t].requires_grad_()
        out = torch.full((3, 2), float("nan")).t()
        y = cache.step(x, out=out)
        assert y is out
        outputs.append(y.clone())
        # The caller may reuse its buffers at once.
        out.fill_(float("nan"))
    oracle.assert_close(torch.stack(outputs, -1).numpy(), reference, "float32")
    shared = plan.new_cache((2, 3))
    for t in range(40):
        buffer = u[..., t].clone()
        assert shared.step(buffer, out=buffer) is buffer
        assert torch.equal(buffer, outputs[t])


def test_filters_may_change_after_planning():
    u, filters = random_pair((2,), (2,), 30, 20, torch.float32)
    kept = filters.clone()
    plan = TorchPlan(filters, None, ff.Schedule(4, (2,)))
    filters.zero_()
    check(steps(plan.new_cache(), u), u, kept)


def test_global_modes_of_torch():
    u, filters = random_pair((2, 3), (3,), 40, 20, torch.float32)
    expected = steps(TorchPlan(filters, None, ff.Schedule(4, (2,))).new_cache((2, 3)), u)

    def run() -> torch.Tensor:
        plan = TorchPlan(filters, None, ff.Schedule(4, (2,)))
        cache = plan.new_cache((2, 3))
        first = steps(cache, u[..., :7])
        cache.reorder([0, 1])
        cache = plan.load_cache(cache.fork().state_dict())
        return torch.cat((first, steps(cache, u[..., 7:])), -1)

    with torch.inference_mode():
        plan = TorchPlan(filters, None, ff.Schedule(4, (2,)))
        cache = plan.prefill(u[..., :3])[1]
        steps(cache, u[..., 3:9])
        assert torch.equal(run(), expected)
    # A cache made under inference mode goes on outside it, and the other way round.
    steps(cache, u[..., 9:20])
    with torch.inference_mode():
        tail = steps(cache, u[..., 20:])
    assert torch.allclose(tail, expected[..., 20:], atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(run(), expected)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(run(), expected)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert torch.equal(run(), expected)


def test_threads_share_a_plan_and_take_turns_on_a_cache():
    u, filters = random_pair((2,), (2,), 60, 30, torch.float32)
    plan = TorchPlan(filters, None, ff.Schedule(4, (2,)))
    expected = steps(plan.new_cache(), u)
    results: list[torch.Tensor] = []
    shared = plan.new_cache()

    def work() -> None:
        results.append(steps(plan.new_cache(), u))
        for _ in range(25):
            shared.step(u[..., 0])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(torch.equal(r, expected) for r in results)
    assert shared.position == 100


def test_executions_of_schedules():
    def blocks(base, fans, lags, capacity, latency="throughput"):
        run = Execution(ff.Schedule(base, fans), capacity, lags, latency)
        return run.base, [level.block for level in run.levels], run.ring

    assert blocks(8, (2, 2), 1000, None) == (8, [8, 16, 32], 32)
    assert blocks(8, (2, 2), 1000, None, "smooth") == (8, [8, 16, 32], 64)
    assert blocks(8, (2, 2), 20, None) == (8, [8, 16], 16)
    assert blocks(8, (2, 2), 16, None) == (8, [8], 8)
    assert blocks(8, (2, 2), 5, None)[0] == 5
    assert blocks(8, (2, 2), 100, 8) == (8, [], 8)
    assert blocks(None, (), 100, 30) == (None, [], 30)
    assert blocks(8, (2, 2), 100, 0)[1] == []


@pytest.mark.parametrize("latency", ["throughput", "smooth"])
@pytest.mark.parametrize("capacity", [None, 90])
def test_tiles_take_each_input_to_each_output_once(latency, capacity):
    """Every pair of an input and a later output within the filters' reach, by one tile or in a base block."""
    for base, fans, lags in itertools.product((1, 3, 4), ((), (2,), (3, 2), (2, 2, 2)), (1, 7, 50, 200)):
        run = Execution(ff.Schedule(base, fans), capacity, lags, latency)
        if not run.levels:
            continue
        end = 90
        met = np.zeros((end + 400, end), int)
        for t in range(end):
            start = t - t % run.base
            met[t, start : t + 1] += 1
            for tile in run.tiles(t):
                n, late = run.levels[tile.level].block, int(tile.delayed)
                assert tile.source == (t - n) % run.ring
                assert tile.target == ((t + n) % (2 * n) if tile.delayed else t % run.ring)
                for age in range(tile.count):
                    first = t - (age + 1) * n
                    assert first >= 0
                    met[t + late * n : t + (late + 1) * n, first : first + n] += 1
        inputs = np.arange(end)
        for t in range(end):
            within = (inputs <= t) & (inputs > t - lags)
            assert (met[t, within] == 1).all(), (base, fans, lags, t)
            assert (met[t, inputs > t] == 0).all() and met[t].max() <= 1


class _Recorder(TorchDispatchMode):
    """Every operator called, with the devices of its results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, set[str]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [r for r in torch.utils._pytree.tree_leaves(result) if isinstance(r, torch.Tensor)]
        self.calls.append((func.overloadpacket.__name__, {t.device.type for t in tensors}))
        return result


SYNCHRONISING = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique"}


@pytest.mark.parametrize(("method", "latency"), PLANS, ids=str)
def test_a_step_on_fake_cuda_tensors_never_leaves_the_device(method, latency):
    with FakeTensorMode():
        filters = torch.randn(3, 40, device="cuda")
        cache = TorchPlan(filters, None, method, latency=latency).new_cache((2, 3))
        x, out = torch.randn(2, 3, device="cuda"), torch.empty(2, 3, device="cuda")
        cache.extend(torch.randn(2, 3, 50, device="cuda"))
        with _Recorder() as recorder:
            for _ in range(45):
                assert cache.step(x).device.type == "cuda"
                assert cache.step(x, out=out) is out
        assert recorder.calls
        for name, devices in recorder.calls:
            assert name not in SYNCHRONISING and devices <= {"cuda"}, name


def test_static_steps_are_steps():
    u, filters = random_pair((2, 3), (3,), 90, 60, torch.float32)
    plan = TorchPlan(filters, 90, ff.Schedule(8, (3,)))
    cache, outputs = plan.prefill(u[..., :7])[1], []
    for t in range(7, 90):
        if t % 11 == 0:
            outputs.append(cache.step(u[..., t]))
            continue
        cache.advance()
        out = torch.empty(2, 3) if t % 2 else None
        outputs.append(cache.static_step(u[..., t], out=out))
        if t == 50:
            cache = cache.fork()
        if t == 60:
            cache.reorder([0, 1])
    reference = oracle.conv(u.double().numpy(), filters.double().numpy())[..., 7:]
    oracle.assert_close(torch.stack(outputs, -1).numpy(), reference, "float32")
    with pytest.raises(ff.CapacityError):
        cache.advance()
    with pytest.raises(ValueError, match="advance"):
        plan.new_cache().static_step(u[0, :, 0])


@pytest.mark.parametrize(("method", "latency"), PLANS, ids=str)
@pytest.mark.parametrize(("c", "f"), [((2, 3), (3,)), ((), ()), ((2, 1, 3), (4, 1))])
def test_static_steps_of_every_schedule(method, latency, c, f):
    u, filters = random_pair(c, f, 150, 60, torch.float32)
    for horizon, prompt in ((None, 0), (150, 25)):
        plan = TorchPlan(filters, horizon, method, latency=latency)
        y, cache = plan.prefill(u[..., :prompt])
        outputs = [y]
        for t in range(prompt, 150):
            cache.advance()
            outputs.append(cache.static_step(u[..., t]).unsqueeze(-1))
        check(torch.cat(outputs, -1), u, filters)


@pytest.mark.parametrize(("method", "latency"), PLANS, ids=str)
def test_static_steps_are_the_same_operators_at_every_position(method, latency):
    with FakeTensorMode():
        plan = TorchPlan(torch.randn(3, 40, device="cuda"), None, method, latency=latency)
        cache = plan.new_cache((2, 3))
        x, out = torch.randn(2, 3, device="cuda"), torch.empty(2, 3, device="cuda")
        recorded = []
        for _ in range(30):
            cache.advance()
            with _Recorder() as recorder:
                cache.static_step(x, out=out)
            recorded.append(recorder.calls)
        assert all(calls == recorded[0] for calls in recorded)
        assert all(devices <= {"cuda"} and name not in SYNCHRONISING for name, devices in recorded[0])


@pytest.mark.parametrize(("method", "latency"), PLANS, ids=str)
def test_static_tiles_never_leave_the_device(method, latency):
    with FakeTensorMode():
        plan = TorchPlan(torch.randn(3, 40, device="cuda"), None, method, latency=latency)
        cache = plan.new_cache((2, 3))
        with _Recorder() as recorder:
            for tile in cache._memory.first_tiles():
                cache._memory.static_tile(tile, torch.zeros(4, dtype=torch.int64, device="cuda"))
        assert all(devices <= {"cuda"} and name not in SYNCHRONISING for name, devices in recorder.calls)


def test_more_memory_than_there_is():
    for engine in (None, "torch"):
        plan = ff.plan(torch.ones(3, 8), None, engine=engine)
        with pytest.raises(MemoryError):
            plan.new_cache((2**40, 3))


def test_reordering_in_place_keeps_the_memory():
    cache = TorchPlan(torch.randn(2, 40), None, ff.Schedule(8, (2,))).new_cache((3, 2))
    cache.step(torch.randn(3, 2))
    before = [values.data_ptr() for values in cache._memory.arrays()]
    cache.reorder([2, 0, 0])
    assert [values.data_ptr() for values in cache._memory.arrays()] == before


class _Late:
    """A stream at its slowest: what it is given runs when somebody waits for it."""

    def __init__(self, device: torch.device, name: str, real: bool) -> None:
        assert real
        self.work: Any = None

    def start(self, work: Any, uses: Any) -> None:
        assert self.work is None and all(isinstance(tensor, torch.Tensor) for tensor in uses)
        self.work = work

    def wait(self) -> None:
        if self.work is not None:
            self.work()
        self.work = None


@pytest.mark.parametrize("method", SMOOTH, ids=str)
@pytest.mark.parametrize("horizon", [None, 300])
def test_early_tiles_may_end_at_any_time_before_they_are_due(method, horizon, monkeypatch):
    u, filters = random_pair((3, 2), (2,), 300, 130, torch.float32)
    plan = TorchPlan(filters, horizon, method, latency="smooth")

    def stream() -> list[Any]:
        y, cache = plan.prefill(u[..., :11])
        outputs = [y]
        for t in range(11, 200):
            outputs.append(cache.step(u[..., t]).unsqueeze(-1))
            if t == 70:
                cache = cache.fork()
            if t == 90:
                cache.reorder([0, 1, 2])
            if t == 110:
                cache = plan.load_cache(cache.state_dict())
            if t == 130:
                cache.reset([])
        return [*outputs, cache.extend(u[..., 200:])]

    at_once = torch.cat(stream(), -1)
    monkeypatch.setattr(tile_module, "Side", _Late)
    assert same_bits(torch.cat(stream(), -1), at_once)
    check(at_once, u, filters)


class _Recording(TorchDispatchMode):
    """Stands for a CUDA graph: keeps the operators of some work, to run them again on the same memory."""

    def __init__(self, work: Any, device: torch.device, pool: Any) -> None:
        super().__init__()
        self.calls: list[Any] = []
        before: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.before = before
        with self:
            work()
        # Recorded, not run: the memory is what it was.
        for tensor, values in reversed(before):
            tensor.copy_(values)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for value, argument in zip(args, func._schema.arguments, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.before.append((value, value.clone()))
        if isinstance(kwargs.get("out"), torch.Tensor):
            self.before.append((kwargs["out"], kwargs["out"].clone()))
        result = func(*args, **kwargs)
        alias = func._schema.returns[0].alias_info
        if alias is None or alias.is_write:
            self.calls.append((func, args, kwargs, result if alias is None else None))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            if result is not None:
                result.copy_(again)


@pytest.mark.parametrize(("method", "latency"), PLANS, ids=str)
@pytest.mark.parametrize(("c", "f"), [((2, 3), (3,)), ((), ()), ((2, 1, 3), (4, 1))])
def test_recorded_tiles_are_tiles(method, latency, c, f, monkeypatch):
    monkeypatch.setattr(tile_module, "record", _Recording)
    monkeypatch.setattr(tile_module, "check_recordable", lambda device, real: None)
    u, filters = random_pair(c, f, 300, 130, torch.float32)
    for horizon, prompt in ((None, 0), (300, 25)):
        plan = TorchPlan(filters, horizon, method, latency=latency)
        y, cache = plan.prefill(u[..., :prompt])
        outputs = [y, steps(cache, u[..., prompt:45])]
        assert cache.capture_tiles() == len(cache._memory.levels)
        outputs.append(steps(cache, u[..., 45:200]))
        if c:
            cache.reorder(range(c[0]))
            assert len(cache._memory.tile_graphs) == len(cache._memory.levels)
        outputs.append(cache.extend(u[..., 200:290]))
        cache = cache.fork()
        assert not cache._memory.tile_graphs
        outputs.append(steps(cache, u[..., 290:]))
        check(torch.cat(outputs, -1), u, filters)


def test_tiles_are_recorded_only_on_cuda():
    for method in ("naive", ff.Schedule(8, (2,))):
        cache = TorchPlan(torch.randn(2, 40), None, method).new_cache()
        with pytest.raises(ValueError, match="cache: expected one on a CUDA device, got cpu"):
            cache.capture_tiles()
    with FakeTensorMode():
        cache = TorchPlan(torch.randn(2, 40, device="cuda"), None, ff.Schedule(8, (2,))).new_cache()
        with pytest.raises(ValueError, match="cache: expected one on a CUDA device, got fake tensors"):
            cache.capture_tiles()


def test_a_recording_that_fails_leaves_the_one_before(monkeypatch):
    monkeypatch.setattr(tile_module, "record", _Recording)
    monkeypatch.setattr(tile_module, "check_recordable", lambda device, real: None)
    u, filters = random_pair((2,), (2,), 90, 60, torch.float32)
    cache = TorchPlan(filters, None, ff.Schedule(4, (2, 2))).new_cache()
    cache.capture_tiles()
    y = [steps(cache, u[..., :30])]
    monkeypatch.setattr(tile_module, "record", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cache.capture_tiles()
    check(torch.cat([*y, steps(cache, u[..., 30:])], -1), u, filters)


@pytest.mark.parametrize("latency", ["throughput", "smooth"])
@pytest.mark.parametrize("name", ["_tile", "given", "_join", "_accumulate"])
def test_a_tile_that_fails_is_run_again(name, latency, monkeypatch):
    u, filters = random_pair((2,), (2,), 90, 60, torch.float32)
    cache = TorchPlan(filters, None, ff.Schedule(4, (2, 3)), latency=latency).new_cache()
    outputs, failures = [], 0
    for t in range(90):
        if t % 4 == 0 and t:
            with monkeypatch.context() as context:
                context.setattr(tile_module.Memory, name, lambda *_: 1 / 0)
                for _ in range(2):
                    with pytest.raises(ZeroDivisionError):
                        cache.step(u[..., t])
                    failures += 1
        outputs.append(cache.step(u[..., t]))
    assert failures
    check(torch.stack(outputs, -1), u, filters)


@pytest.mark.parametrize("latency", ["throughput", "smooth"])
@pytest.mark.parametrize("name", ["_tile", "_join"])
def test_a_block_whose_tile_fails_is_not_taken(name, latency, monkeypatch):
    u, filters = random_pair((2,), (2,), 96, 60, torch.float32)
    plan = TorchPlan(filters, None, ff.Schedule(4, (2, 3)), latency=latency)
    cache, reference = plan.new_cache(), oracle.conv(u.double().numpy(), filters.double().numpy())
    with monkeypatch.context() as context:
        context.setattr(tile_module.Memory, name, lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cache.extend(u[..., :48])
    assert cache.position == 0
    oracle.assert_close(cache.extend(u).double().numpy(), reference, "float32")


def test_static_steps_in_inference_mode():
    u, filters = random_pair((2,), (2,), 30, 20, torch.float32)
    for method in ("naive", ff.Schedule(4, (2,))):
        cache, outputs = TorchPlan(filters, None, method).new_cache(), []
        with torch.inference_mode():
            for t in range(30):
                out = torch.empty(2)
                cache.advance()
                assert cache.static_step(u[..., t], out=out) is out
                outputs.append(out)
        check(torch.stack(outputs, -1).clone(), u, filters)


@pytest.mark.parametrize("engine", [None, "torch"])
def test_outputs_need_memory_of_their_own(engine):
    cache = ff.plan(torch.randn(3, 20), None, engine=engine).new_cache((2, 3))
    x = torch.randn(2, 3)
    for out in (torch.empty(3).expand(2, 3), torch.empty(9).as_strided((2, 3), (1, 1))):
        with pytest.raises(ValueError, match="out: expected memory of its own for every entry"):
            cache.step(x, out=out)
    assert cache.position == 0
    y = ff.plan(torch.ones(3, 1), None, engine=engine).new_cache((2, 3)).step
    for out in (torch.empty(3, 2).T, torch.empty(2, 6)[:, ::2], torch.empty(4, 1, 3).transpose(0, 1)[0, 1:3]):
        assert torch.equal(y(x, out=out), x)
    negated = torch.empty(2, 3, dtype=torch.complex64).conj().imag
    assert negated.is_neg() and torch.equal(y(x, out=negated), x)


def test_a_step_is_five_operators():
    cache = TorchPlan(torch.randn(3, 40), None, ff.Schedule(8, (2,))).new_cache((2, 3))
    x, out = torch.randn(2, 3), torch.empty(2, 3)
    cache.step(x, out=out)
    with _Recorder() as recorder:
        cache.step(x, out=out)
    views = {"detach", "select", "slice", "view"}
    names = [name for name, _ in recorder.calls if name not in views]
    assert names == ["copy_", "mul", "sum", "add_", "copy_"]


@pytest.mark.parametrize(("method", "latency"), PLANS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_whole_api_on_fake_cuda_tensors(method, latency, dtype):
    with FakeTensorMode():
        filters = torch.randn(3, 40, device="cuda").to(dtype)
        plan = ff.plan(filters, 300, method, latency=latency)
        assert isinstance(plan, TorchPlan) and plan.device.type == "cuda"
        y, cache = plan.prefill(torch.randn(2, 3, 20, device="cuda").to(dtype), 200)
        assert y.shape == (2, 3, 20) and y.device.type == "cuda" and y.dtype is dtype
        x = torch.randn(2, 3, device="cuda").to(dtype)
        for _ in range(45):
            y = cache.step(x)
            assert y.shape == (2, 3) and y.device.type == "cuda" and y.dtype is dtype
        y = cache.extend(torch.randn(2, 3, 77, device="cuda").to(dtype))
        assert y.shape == (2, 3, 77) and y.device.type == "cuda"
        fork = cache.fork()
        fork.reorder([1, 0, 1])
        fork.step(torch.randn(3, 3, device="cuda"))
        fork.reorder(torch.tensor([0, 2], device="cuda"))
        for rows in ([0], torch.tensor([1], device="cuda"), torch.tensor([True, False], device="cuda")):
            fork.reset(rows)
        fork.step(x)
        loaded = plan.load_cache(fork.state_dict())
        assert (loaded.position, loaded.remaining) == (fork.position, fork.remaining)
        assert loaded.step(x).device.type == "cuda"
        loaded.reset()
        with pytest.raises(ValueError, match="u: expected device cuda:0, got cpu"):
            cache.step(torch.randn(2, 3))
        with pytest.raises(ValueError, match="prompt: expected device cuda:0, got cpu"):
            plan.prefill(torch.randn(3, 5))
        with pytest.raises(ValueError, match="out: expected device cuda:0, got cpu"):
            cache.step(x, out=torch.empty(2, 3, dtype=dtype))
        y = ff.causal_conv(torch.randn(2, 3, 9, device="cuda").to(dtype), filters)
        assert y.shape == (2, 3, 9) and y.device.type == "cuda" and y.dtype is dtype
        y = ff.futurefill(torch.randn(2, 3, 9, device="cuda").to(dtype), filters)
        assert y.shape == (2, 3, 39) and y.device.type == "cuda"


def test_selftest_reports_on_this_machine(capsys):
    from futurefill_rs import selftest

    assert selftest.main(["--device", "cpu"]) == 0
    report = capsys.readouterr().out
    assert "all checks passed" in report and "FAILED" not in report
    if not torch.cuda.is_available():
        assert selftest.main(["--device", "cuda"]) == 1


@pytest.mark.cuda
def test_on_a_real_gpu():
    from futurefill_rs import selftest

    assert selftest.run("cuda")
