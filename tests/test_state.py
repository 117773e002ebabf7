"""state_dict and load_cache: bit-identical continuation, and every kind of damage refused."""

import itertools
import pickle
import subprocess
import sys

import futurefill_rs as ff
import numpy as np
import oracle
import pytest
from conftest import Library

METHODS = ["auto", "naive", "epoched", "continuous", ff.Schedule(3, (2, 2)), ff.Schedule(4, (3,))]
PLANS = [(method, "throughput") for method in METHODS]
PLANS += [(method, "smooth") for method in ("auto", "continuous", ff.Schedule(3, (2, 2)))]


def signals(rng, t=90, lags=60, dtype="float32"):
    return rng.standard_normal((3, 2, t)).astype(dtype), rng.standard_normal((2, lags)).astype(dtype)


@pytest.mark.parametrize(("method", "latency"), PLANS, ids=str)
@pytest.mark.parametrize("horizon", [None, 90, 2000])
@pytest.mark.parametrize("at", [0, 1, 12, 33, 48, 90])
def test_continuation_is_bit_identical(lib, method, latency, horizon, at, rng):
    u, h = signals(rng)
    plan = lib.plan(h, horizon, method, latency=latency)
    cache = plan.new_cache((3, 2))
    if at:
        lib.stream(cache, u[..., :at])
    state = pickle.loads(pickle.dumps(cache.state_dict()))
    other = lib.plan(h, horizon, method, latency=latency).load_cache(state)
    assert (other.position, other.remaining) == (cache.position, cache.remaining)
    if at < 90:
        split = [0] * 20 + [7]
        oracle.assert_same_bits(lib.stream(other, u[..., at:], split), lib.stream(cache, u[..., at:], split))


@pytest.mark.parametrize(("method", "latency"), PLANS, ids=str)
@pytest.mark.parametrize("prompt", [1, 30, 64])
@pytest.mark.parametrize("at", [0, 5, 17, 25])
def test_after_a_prefill(lib, method, latency, prompt, at, rng):
    u, h = signals(rng, t=prompt + 26)
    plan = lib.plan(h, None, method, latency=latency)
    _, cache = plan.prefill(lib.array(u[..., :prompt]), 26)
    if at:
        lib.stream(cache, u[..., prompt : prompt + at])
    other = plan.load_cache(cache.state_dict())
    assert (other.position, other.remaining) == (prompt + at, 26 - at)
    rest = u[..., prompt + at :]
    oracle.assert_same_bits(lib.stream(other, rest), lib.stream(cache, rest))


def test_after_reorder_and_reset(lib, rng):
    u, h = signals(rng)
    plan = lib.plan(h, 90, ff.Schedule(4, (2, 2)))
    cache = plan.new_cache((3, 2))
    lib.stream(cache, u[..., :37])
    cache.reorder([2, 2, 0, 1])
    cache.reset([1])
    other = plan.load_cache(cache.state_dict())
    rest = rng.standard_normal((4, 2, 53)).astype(np.float32)
    oracle.assert_same_bits(lib.stream(other, rest), lib.stream(cache, rest))


def test_a_snapshot_is_a_copy(lib, rng):
    u, h = signals(rng)
    plan = lib.plan(h, 90)
    cache = plan.new_cache((3, 2))
    lib.stream(cache, u[..., :40])
    state = cache.state_dict()
    first = lib.stream(cache, u[..., 40:])
    for _ in range(2):
        oracle.assert_same_bits(lib.stream(plan.load_cache(state), u[..., 40:]), first)


@pytest.mark.parametrize(("method", "latency"), PLANS, ids=str)
def test_saving_disturbs_nothing(lib, method, latency, rng):
    u, h = signals(rng)
    plan = lib.plan(h, 90, method, latency=latency)
    clean = lib.stream(plan.new_cache((3, 2)), u)
    cache, outputs = plan.new_cache((3, 2)), []
    for t in range(90):
        outputs.append(lib.numpy(cache.step(lib.array(u[..., t]))))
        cache.state_dict()
    oracle.assert_same_bits(np.stack(outputs, axis=-1), clean)


@pytest.mark.parametrize(("method", "latency"), PLANS, ids=str)
@pytest.mark.parametrize("prompt", [0, 20])
def test_engines_read_each_others_states(method, latency, prompt, rng):
    libraries = [
        Library("numpy"),
        Library("cpu", device="cpu"),
        Library("engine", device="cpu", engine="torch"),
    ]
    for first in libraries:
        for second in libraries:
            u, h = signals(rng)
            _, cache = first.plan(h, None, method, latency=latency).prefill(
                first.array(u[..., :prompt]), 90 - prompt
            )
            first.stream(cache, u[..., prompt:50])
            other = second.plan(h, None, method, latency=latency).load_cache(cache.state_dict())
            y = second.stream(other, u[..., 50:])
            oracle.assert_close(y, oracle.conv(u, h)[..., 50:], "float32", 90)


PROGRAM = """
import pickle, sys
import numpy as np, futurefill_rs as ff
with open(sys.argv[1], "rb") as file:
    filters, state, u = pickle.load(file)
cache = ff.plan(filters, 300).load_cache(state)
np.save(sys.argv[2], np.stack([cache.step(x) for x in np.moveaxis(u, -1, 0)], axis=-1))
assert "torch" not in sys.modules
"""


def test_in_another_process(tmp_path, rng):
    u, h = signals(rng, 300, 300)
    cache = ff.plan(h, 300).new_cache((3, 2))
    cache.extend(u[..., :200])
    (tmp_path / "in").write_bytes(pickle.dumps((h, cache.state_dict(), u[..., 200:])))
    arguments = [sys.executable, "-c", PROGRAM, str(tmp_path / "in"), str(tmp_path / "out.npy")]
    subprocess.run(arguments, check=True, timeout=120)
    y = np.stack([cache.step(u[..., t]) for t in range(200, 300)], axis=-1)
    oracle.assert_same_bits(np.load(tmp_path / "out.npy"), y)


@pytest.fixture
def saved(lib, rng):
    u, h = signals(rng, lags=40)
    plan = lib.plan(h, 90, ff.Schedule(4, (2, 2)))
    cache = plan.new_cache((3, 2))
    lib.stream(cache, u[..., :37])
    return plan, cache.state_dict()


def test_the_state_is_flat_arrays(saved):
    _, state = saved
    assert type(state) is dict and all(type(array) is np.ndarray for array in state.values())
    numbers = {name: array.tolist() for name, array in state.items() if array.dtype == np.int64}
    del numbers["filter_digest"], numbers["checksum"]
    assert numbers == {
        "version": 3,
        "shape": [3, 2],
        "filter_shape": [2],
        "filter_length": 40,
        "base": 4,
        "fans": [2, 2],
        "smooth": 0,
        "horizon": 90,
        "capacity": 90,
        "clock": 37,
        "position": 37,
    }
    shapes = {name: array.shape for name, array in state.items() if array.dtype == np.float32}
    assert shapes["history"] == (6, 16) and shapes["pending"] == (6, 16) and shapes["seed"] == (6, 0)
    assert {name for name in shapes if name.startswith("spectra")} == {f"spectra_{k}" for k in range(3)}
    assert len(numbers) + len(shapes) + 2 == len(state)


def test_every_key_is_needed(saved):
    plan, state = saved
    for key in state:
        with pytest.raises(ValueError, match=r"state"):
            plan.load_cache({k: v for k, v in state.items() if k != key})
    with pytest.raises(ValueError, match=r"state"):
        plan.load_cache({**state, "more": np.zeros(3)})


@pytest.mark.parametrize(
    "value",
    [None, -1, 0, 1, 7, 2**70, 1.5, "x", b"x", (), (1,), (2, -3), [3, 2], {}, True, np.zeros(3), object()],
    ids=str,
)
def test_every_wrong_field_is_refused(saved, value):
    plan, state = saved
    for key in state:
        if type(value) is int and state[key].shape == () and state[key] == value:
            continue
        with pytest.raises(ValueError, match=r"state"):
            plan.load_cache({**state, key: value})


def test_damaged_arrays(saved):
    plan, state = saved
    for name, array in state.items():
        for wrong in [
            array.astype(np.int32),
            array[..., None],
            array.tolist() if array.ndim else [3],
            None,
            array.astype(complex),
            array.astype(object),
        ]:
            with pytest.raises(ValueError, match=r"state"):
                plan.load_cache({**state, name: wrong})
        if array.size:
            flipped = array.copy()
            flipped.reshape(-1).view(np.uint8)[0] ^= 1
            with pytest.raises(ValueError, match=r"state"):
                plan.load_cache({**state, name: flipped})


@pytest.mark.parametrize("store", ["npz", "npz mapping", "safetensors", "torch safetensors", "integers"])
def test_states_survive_files(saved, store, lib, tmp_path, rng):
    import safetensors.numpy
    import safetensors.torch
    import torch

    plan, state = saved
    if store.startswith("npz"):
        np.savez(tmp_path / "state.npz", **state)
        kept = np.load(tmp_path / "state.npz")
        kept = kept if store == "npz mapping" else dict(kept)
    elif store == "safetensors":
        safetensors.numpy.save_file(state, tmp_path / "state")
        kept = safetensors.numpy.load_file(tmp_path / "state")
    elif store == "torch safetensors":
        tensors = {name: torch.from_numpy(array) for name, array in state.items()}
        safetensors.torch.save_file(tensors, tmp_path / "state")
        kept = safetensors.torch.load_file(tmp_path / "state")
    else:
        kept = {name: int(array) if array.shape == () else array for name, array in state.items()}
    u = rng.standard_normal((3, 2, 53)).astype(np.float32)
    oracle.assert_same_bits(lib.stream(plan.load_cache(kept), u), lib.stream(plan.load_cache(state), u))


@pytest.mark.parametrize("state", [None, 3, "state", [], {}, {"format": 1}, np.zeros(3)], ids=str)
def test_no_state_at_all(lib, state):
    with pytest.raises(ValueError, match=r"state"):
        lib.plan(np.ones((2, 4), np.float32)).load_cache(state)


def test_a_resealed_lie_is_refused(lib, saved):
    from futurefill_rs import _state

    plan, state = saved
    lies = [
        {"shape": (2, 2)},
        {"shape": (2**40, 2**40)},
        {"shape": (3, 5)},
        {"clock": 91, "position": 91},
        {"capacity": 5, "clock": 1, "position": 1},
        {"base": 8},
        {"base": None},
        {"fans": (2,)},
        {"fans": (2**40, 2**40)},
        {"history": state["history"][:, :3]},
        {"pending": state["pending"][:2]},
        {"spectra_2": state["spectra_2"][:, :1]},
        {"spectra_2": None},
        {"history": np.zeros((2**40, 0), np.float32), "shape": (2**39, 2)},
    ]
    for lie in lies:
        fields = {k: v for k, v in {**state, **lie}.items() if k not in ("version", "checksum")}
        sealed = _state.seal({k: v for k, v in fields.items() if k != "spectra_2" or v is not None})
        with pytest.raises(ValueError, match=r"state|shape"):
            plan.load_cache(sealed)


def test_other_plans_refuse_the_state(lib, saved, rng):
    _, state = saved
    h = rng.standard_normal((2, 40)).astype(np.float32)
    same = ff.Schedule(4, (2, 2))
    others = [
        lib.plan(h, 90, same),
        lib.plan(h[:, :39], 90, same),
        lib.plan(h[:1], 90, same),
        lib.plan(h.astype(np.float64), 90, same),
    ]
    for other in others:
        with pytest.raises(ValueError, match=r"state: expected"):
            other.load_cache(state)


def test_byte_swapped_arrays_are_read_right_or_refused(saved, lib):
    plan, state = saved
    swapped = {name: array.astype(array.dtype.newbyteorder()) for name, array in state.items()}
    try:
        cache = plan.load_cache(swapped)
    except ValueError:
        return
    u = np.ones((3, 2, 20), np.float32)
    oracle.assert_same_bits(lib.stream(cache, u), lib.stream(plan.load_cache(state), u))


def test_engines_read_each_others_states_of_no_rows(rng):
    h = rng.standard_normal((2, 60)).astype(np.float32)
    libraries = [Library("numpy"), Library("engine", device="cpu", engine="torch")]
    for first, second in itertools.permutations(libraries):
        plan = first.plan(h, 90, ff.Schedule(4, (2, 2)))
        cache = plan.new_cache((3, 2))
        first.stream(cache, rng.standard_normal((3, 2, 21)).astype(np.float32))
        cache.reorder([])
        other = second.plan(h, 90, ff.Schedule(4, (2, 2))).load_cache(cache.state_dict())
        assert (other.position, other.remaining) == (21, 69)
        assert second.stream(other, np.zeros((0, 2, 5), np.float32)).shape == (0, 2, 5)


def test_states_at_the_end_of_a_capacity_are_equal(lib, rng):
    """Whatever way a cache came there: no tile has taken the last block, which is part of the state still."""
    u, h = rng.standard_normal((3, 20)), rng.standard_normal((3, 9))
    for schedule, latency in itertools.product(
        (ff.Schedule(2), ff.Schedule(2, (2,))), ("throughput", "smooth")
    ):
        plan = lib.plan(h, 20, schedule, latency=latency)
        states = []
        for at in range(1, 20):
            cache = plan.new_cache()
            lib.stream(cache, u[:, :at])
            cache = plan.load_cache(cache.state_dict())
            lib.stream(cache, u[:, at:])
            states.append(cache.state_dict())
            assert plan.load_cache(states[-1]).state_dict().keys() == states[-1].keys()
        for state in states:
            for name, values in state.items():
                np.testing.assert_array_equal(values, states[0][name], name)
