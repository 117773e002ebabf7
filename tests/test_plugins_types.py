"""Dtypes, devices and modes that torch sets around a call, and copies of modules."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle

import futurefill_rs as ff
import pytest
import torch
from models_common import LAYERS, MODELS, error, inputs, stepped
from plugins_common import ALL, LENGTH, TOLERANCE, WITH_LINEAR, changed, compare, linears, make, train_a_step
from torch import nn

NARROW = {torch.bfloat16: 0.03, torch.float16: 0.01}


@contextlib.contextmanager
def default_dtype(dtype):
    old = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(old)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_autocast(name, dtype):
    """The cached ways under autocast agree with forward under autocast; float32 afterwards is float32."""
    module = make(name)
    exact = compare(module)
    module = make(name)
    with torch.autocast("cpu", dtype):
        narrow = compare(module, tolerance=NARROW[dtype])
    assert error(narrow, exact) < NARROW[dtype]
    assert torch.equal(compare(module), exact)


@pytest.mark.parametrize(
    "name", [name for name in ALL if name.startswith(("hyena", "h3", "monarch", "stu", "modal"))]
)
def test_filters_keep_their_precision_under_autocast(name):
    """Only what stands around a convolution is rounded: under autocast a filter is what it is without."""
    module = make(name)
    x = inputs(module, LENGTH)
    for part in linears(module).values():
        with torch.no_grad():
            part.weight.copy_(part.weight.bfloat16())
    with torch.no_grad():
        exact, _ = module.prefill(x[:, :9], LENGTH - 9)
        with torch.autocast("cpu", torch.bfloat16):
            _, cache = module.prefill(x[:, :9], LENGTH - 9)
        # The history was rounded, the filters were not: far below the error of a rounded network.
        fresh = make(name)
        for part in linears(fresh).values():
            part.weight.copy_(part.weight.bfloat16())
        assert torch.equal(fresh.prefill(x[:, :9], LENGTH - 9)[0], exact)
        assert error(module.prefill(x[:, :9], LENGTH - 9)[0], exact) == 0
        assert cache.position == 9


@pytest.mark.parametrize("name", ALL)
def test_training_under_autocast(name):
    module = make(name).train()
    x = inputs(module, LENGTH)
    before = compare(module)
    with torch.autocast("cpu", torch.bfloat16):
        train_a_step(module, x)
    assert changed(compare(module.eval()), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_made_under_another_default_dtype(name, dtype):
    with default_dtype(dtype):
        module = make(name)
        x = inputs(module, LENGTH, dtype=dtype)
        got = compare(module, x, tolerance={torch.bfloat16: 0.03, torch.float64: 1e-11}[dtype])
    assert got.dtype == dtype
    # Filters are what the values of the weights make them, whatever the default was: once more in float64.
    wide = copy.deepcopy(module).double()
    exact = wide(x.double() if x.is_floating_point() else x)
    assert error(got, exact) < {torch.bfloat16: 0.2 if name in MODELS else 0.05, torch.float64: 1e-11}[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_the_default_dtype_changes_afterwards(name, dtype):
    """It is for new tensors; a module that exists has its own."""
    module, untouched = make(name), make(name)
    x = inputs(module, LENGTH)
    with default_dtype(dtype):
        got = compare(module, x)
    assert got.dtype == torch.float32
    assert torch.equal(got, untouched(x))


@pytest.mark.parametrize("name", ALL)
def test_the_default_device_is_elsewhere(name):
    """A module runs where its weights are: nothing new may be made on the default device."""
    module, untouched = make(name), make(name)
    x = inputs(module, LENGTH)
    with torch.device("meta"):
        y = module(x)
        got, cache = module.prefill(x[:, :5], 20)
        fork = cache.fork()
        fork.reorder([1, 0])
        fork.reset([1])
        steps = stepped(module, x[:, :9], cache, 5)
        rest = module.extend(x[:, 9:25], cache)
        late = module(x, starts=torch.tensor([0, 3], device="cpu"))
    with torch.no_grad():
        whole = untouched(x)
        assert torch.equal(y, whole)
        assert error(torch.cat([got, steps, rest], 1), whole[:, :25]) < TOLERANCE
        assert error(late[:1], whole[:1]) < TOLERANCE


@pytest.mark.parametrize("name", ALL)
def test_inference_mode(name):
    """Within, without, and from one to the other; training goes on afterwards."""
    module = make(name)
    x = inputs(module, LENGTH)
    want = compare(module, x)
    with torch.inference_mode():
        assert torch.equal(compare(module, x), want)
        _, inside = module.prefill(x[:, :5], 20)
    _, outside = module.prefill(x[:, :5], 20)
    assert error(stepped(module, x[:, :12], inside, 5), want[:, 5:12]) < TOLERANCE
    with torch.inference_mode():
        assert error(stepped(module, x[:, :12], outside, 5), want[:, 5:12]) < TOLERANCE
        fork = outside.fork()
    fork.reorder([1, 0])
    assert error(module.step(x[[1, 0], 12], fork), want[[1, 0], 12]) < TOLERANCE
    train_a_step(module.train(), x)
    assert changed(compare(module.eval(), x), want)


@pytest.mark.parametrize("name", ALL)
def test_made_in_inference_mode(name):
    want = compare(make(name))
    with torch.inference_mode():
        module = make(name)
        assert torch.equal(compare(module), want)
    assert torch.equal(compare(module), want)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": lambda module: _saved(module),
}


def _saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _damp(part, args, output):
    return 0.9 * output if isinstance(output, torch.Tensor) else output


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("name", ALL)
def test_copies_have_a_life_of_their_own(name, way):
    """Copied after use and with a hook: the copy follows its own weights and hooks, the original its own."""
    module = make(name)
    for part in linears(module).values():
        part.register_forward_hook(_damp)
    before = compare(module)
    twin = COPIES[way](module)
    assert torch.equal(compare(twin), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.9)
    assert changed(compare(twin), before)
    assert torch.equal(compare(module), before)
    _, cache = module.prefill(inputs(module, 5), 20)
    assert not any(isinstance(value, nn.Module) and value is module for value in twin.__dict__.values())
    assert cache.position == 5


# torch's norm does it slowly and says so.
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
@pytest.mark.parametrize("name", ALL)
def test_half_the_module_in_another_dtype(name):
    """Linear layers alone in bfloat16: right or refused with the dtypes named."""
    module = make(name)
    x = inputs(module, LENGTH)
    exact = compare(module, x)
    if name not in WITH_LINEAR:
        return
    for part in linears(module).values():
        part.to(torch.bfloat16)
    try:
        module(x)
    except (TypeError, RuntimeError) as refusal:
        assert "dtype" in str(refusal) or "expected torch." in str(refusal)
        if name in LAYERS:
            compare(module, x.bfloat16(), tolerance=0.03)
    else:
        assert error(compare(module, x, tolerance=0.03), exact) < 0.1


def test_generation_from_a_model_made_in_inference_mode():
    with torch.inference_mode():
        model = make("hyenadna")
    ids = inputs(model, 5)
    assert torch.equal(ff.generate(model, ids, 9), ff.generate(make("hyenadna"), ids, 9))
