"""Ways to differentiate and to save memory: activation checkpointing, functional calls, vmap, replicas."""

from __future__ import annotations

import copy

import pytest
import torch
from models_common import MODELS, error, inputs
from plugins_common import ALL, LENGTH, ONE_OF_EACH, TOLERANCE, blocks, changed, compare, make
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointWrapper,
    apply_activation_checkpointing,
)
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint


def saved_bytes(call):
    """What autograd keeps for the backward pass of a call, and the call's result."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = call()
    return sum(kept.values()), y


def gradients(module, y):
    module.zero_grad()
    y.square().mean().backward()
    return {key: parameter.grad.clone() for key, parameter in module.named_parameters()}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_a_checkpointed_call(name, reentrant):
    module = make(name).train()
    x = inputs(module, LENGTH)
    if reentrant and not x.is_floating_point():
        pytest.skip("torch: the reentrant way needs an input that wants a gradient; ids have none")
    x = x.requires_grad_() if x.is_floating_point() else x
    much, y = saved_bytes(lambda: module(x))
    want = gradients(module, y)
    little, y = saved_bytes(lambda: checkpoint(module, x, use_reentrant=reentrant))
    got = gradients(module, y)
    assert little < much
    for key in want:
        assert error(got[key], want[key]) < TOLERANCE, key


@pytest.mark.parametrize("name", MODELS)
def test_checkpointed_blocks(name):
    """Memory is saved, gradients and all cached ways stay what they were."""
    plain, module = make(name).train(), make(name).train()
    x = inputs(module, 48)
    kinds = tuple({type(block) for block in blocks(module)})
    compare(module)
    apply_activation_checkpointing(module, check_fn=lambda part: isinstance(part, kinds))
    assert all(isinstance(block, CheckpointWrapper) for block in blocks(module))
    much, y = saved_bytes(lambda: plain(x))
    want = gradients(plain, y)
    little, z = saved_bytes(lambda: module(x))
    assert little < 0.7 * much
    assert error(z, y) < TOLERANCE
    got = gradients(module, z)
    for key, value in got.items():
        assert error(value, want[key.replace("_checkpoint_wrapped_module.", "")]) < TOLERANCE, key
    compare(module.eval())


@pytest.mark.parametrize("name", ALL)
def test_functional_call(name):
    """Other weights for one call; none of them stays behind in a plan."""
    module, other = make(name), make(name, seed=4)
    x = inputs(module, LENGTH)
    before = compare(module, x)
    state = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    with torch.no_grad():
        assert error(functional_call(module, state, (x,)), other(x)) < TOLERANCE
    assert torch.equal(compare(module, x), before)


# torch's own: its forward mode uses torch.jit, and not every operator has a batched form.
TORCHS = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:FutureWarning", "ignore:There is a performance drop:UserWarning"
)


@TORCHS
@pytest.mark.parametrize("name", ALL)
def test_gradients_by_torch_func(name):
    module = make(name)
    x = inputs(module, 12)
    parameters = dict(module.named_parameters())

    def loss(parameters, x):
        return functional_call(module, parameters, (x,)).square().mean()

    want = gradients(module, module(x))
    for key, value in grad(loss)(parameters, x).items():
        assert error(value, want[key]) < TOLERANCE, key
    # The same along one direction, forwards.
    directions = {key: torch.randn_like(value) for key, value in parameters.items()}
    # torch's fused attention on a CPU has no forward mode.
    with sdpa_kernel(SDPBackend.MATH):
        _, slope = jvp(lambda parameters: loss(parameters, x), (parameters,), (directions,))
    expected = sum((want[key] * direction).sum() for key, direction in directions.items())
    assert error(slope, expected) < 1e-3


@TORCHS
@pytest.mark.parametrize("name", ALL)
def test_vmap_over_inputs_and_over_models(name):
    module, other = make(name), make(name, seed=4)
    x = torch.stack([inputs(module, 12, seed=seed) for seed in (1, 2, 3)])
    with torch.no_grad():
        want = torch.stack([module(part) for part in x])
        assert error(vmap(module)(x), want) < TOLERANCE
        parameters, buffers = stack_module_state([module, other])

        def call(parameters, buffers, x):
            return functional_call(module, (parameters, buffers), (x,))

        both = vmap(call, in_dims=(0, 0, None))(parameters, buffers, x[0])
    assert error(both, torch.stack([want[0], other(x[0])])) < TOLERANCE


@TORCHS
@pytest.mark.parametrize("name", ONE_OF_EACH + MODELS)
def test_gradients_of_each_sample(name):
    module = make(name)
    x = inputs(module, 12, batch=3)
    parameters = dict(module.named_parameters())

    def loss(parameters, row):
        return functional_call(module, parameters, (row.unsqueeze(0),)).square().mean()

    each = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    whole = gradients(module, module(x))
    for key, value in each.items():
        assert error(value.mean(0), whole[key]) < TOLERANCE, key


def _replica(module: nn.Module) -> nn.Module:
    """A shallow copy of a tree of modules, as DataParallel makes one for each device."""
    replicas = {part: part._replicate_for_data_parallel() for part in module.modules()}
    for part, twin in replicas.items():
        for key, child in part._modules.items():
            twin._modules[key] = None if child is None else replicas[child]
        for key, parameter in part._parameters.items():
            setattr(twin, key, None if parameter is None else 0.8 * parameter)
    return replicas[module]


@pytest.mark.parametrize("name", ALL)
def test_replicas_use_their_own_weights(name):
    module = make(name)
    x = inputs(module, LENGTH)
    before = compare(module, x)
    twin = _replica(module)
    smaller = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in smaller.parameters():
            parameter.mul_(0.8)
        got = twin(x)
    assert changed(got, before)
    assert error(got, smaller(x)) < TOLERANCE
    assert error(compare(twin, x), got) < TOLERANCE
    assert torch.equal(compare(module, x), before)


@pytest.mark.parametrize("name", ALL)
def test_a_shallow_copy_is_a_module_of_its_own(name):
    """New parameters in the copy alone."""
    module = make(name)
    x = inputs(module, LENGTH)
    before = compare(module, x)
    twin = copy.copy(module)
    twin._parameters, twin._modules = dict(module._parameters), dict(module._modules)
    for key, parameter in twin._parameters.items():
        twin._parameters[key] = None if parameter is None else nn.Parameter(0.8 * parameter)
    for key in list(twin._modules):
        twin._modules[key] = copy.deepcopy(twin._modules[key])
        if twin._modules[key] is not None:
            with torch.no_grad():
                for parameter in twin._modules[key].parameters():
                    parameter.mul_(0.8)
    assert changed(compare(twin, x), before)
    assert torch.equal(compare(module, x), before)
