"""What is done to weights, submodules and settings after a module was made: cached ways follow at once."""

from __future__ import annotations

import copy

import pytest
import torch
from futurefill_rs import nn as ffnn
from models_common import MODELS, error, inputs, stepped
from plugins_common import (
    ALL,
    LENGTH,
    TOLERANCE,
    WITH_LINEAR,
    changed,
    compare,
    linears,
    make,
    train_a_step,
    weights,
)
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

REWRITERS = {
    "weight_norm": lambda owner, name: weight_norm(owner, name),
    "spectral_norm": lambda owner, name: spectral_norm(owner, name),
    "parametrised weight_norm": lambda owner, name: parametrizations.weight_norm(owner, name),
    "parametrised spectral_norm": lambda owner, name: parametrizations.spectral_norm(owner, name),
    "prune": lambda owner, name: prune.random_unstructured(owner, name, 0.4),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*spectral_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("rewriter", REWRITERS)
def test_rewritten_weights(name, rewriter):
    """All weights, those of the filters too, are computed from others before each call."""
    module = make(name)
    before = compare(module)
    torch.manual_seed(3)
    for owner, weight in list(weights(module)):
        # Not what a spectral norm makes a constant of (one row) or lets grow without bound (poles).
        if weight not in ("freq", "poles", "log_poles"):
            REWRITERS[rewriter](owner, weight)
    # A spectral norm makes weights small and their sums cancel.
    tolerance = 3e-4 if "spectral" in rewriter else TOLERANCE
    first = compare(module, tolerance=tolerance)
    if "weight_norm" not in rewriter:
        assert changed(first, before)
    train_a_step(module.train(), inputs(module, LENGTH))
    assert changed(compare(module.eval(), tolerance=tolerance), first)


@pytest.mark.parametrize("name", ALL)
def test_pruning_made_permanent(name):
    module = make(name)
    compare(module)
    torch.manual_seed(3)
    # Of tied weights torch would prune the others too, now that they are one tensor again.
    chosen = list(weights(module, tied=False))
    for owner, weight in chosen:
        prune.random_unstructured(owner, weight, 0.4)
    pruned = compare(module)
    for owner, weight in chosen:
        prune.remove(owner, weight)
    assert error(compare(module), pruned) < TOLERANCE


class _Smaller(nn.Module):
    def forward(self, x):
        return 0.7 * x


@pytest.mark.parametrize("name", ALL)
def test_a_parametrisation_comes_and_goes(name):
    module = make(name)
    before = compare(module)
    chosen = list(weights(module))
    for owner, weight in chosen:
        parametrize.register_parametrization(owner, weight, _Smaller())
    after = compare(module)
    assert changed(after, before)
    with parametrize.cached():
        assert error(compare(module), after) < TOLERANCE
    for owner, weight in chosen:
        parametrize.remove_parametrizations(owner, weight, leave_parametrized=False)
    assert torch.equal(compare(module), before)


@pytest.mark.parametrize("name", ALL)
def test_every_single_parameter_counts_at_once(name):
    """Each parameter and each buffer of features is written to alone, past the version counter and by it."""
    module = make(name)
    before = compare(module)
    for key, parameter in module.named_parameters():
        for write in (lambda p: p.data, lambda p: p.detach()):
            old = parameter.detach().clone()
            write(parameter).mul_(0.8).add_(0.01)
            after = compare(module, prompts=(7,))
            assert not torch.equal(after, before), key
            write(parameter).copy_(old)
    assert torch.equal(compare(module, prompts=(7,)), before)


@pytest.mark.parametrize("name", ALL)
def test_assigned_parameters(name):
    """A new Parameter object in the place of each old one, and a state dict that is assigned."""
    module, other = make(name), make(name, seed=5)
    compare(module)
    for owner, weight in list(weights(module, 0)):
        setattr(owner, weight, nn.Parameter(getattr(owner, weight) * 0.9))
    compare(module)
    module.load_state_dict(other.state_dict(), assign=True)
    assert error(compare(module), other(inputs(module, LENGTH))) < TOLERANCE


@pytest.mark.parametrize("name", WITH_LINEAR)
def test_replaced_linear_layers(name):
    """Each by one with other weights, and by two in a row, as low-rank compression has it."""
    module = make(name)
    before = compare(module)
    torch.manual_seed(7)
    for i, (path, old) in enumerate(linears(module).items()):
        shape = old.in_features, old.out_features
        new = nn.Linear(*shape) if i % 2 else nn.Sequential(nn.Linear(shape[0], 3), nn.Linear(3, shape[1]))
        module.set_submodule(path, new)
    assert changed(compare(module), before)


CHILDREN = {
    "stu": [],
    "hyena": [
        "filter_fn",
        "filter_fn.implicit_filter",
        "filter_fn.pos_emb",
        "filter_fn.modulation",
        "short_filter",
    ],
    "long_conv": ["kernel", "activation", "output_linear"],
    "h3": ["ssm_k_kernel", "ssm_k_kernel.kernel", "kernel", "kernel.kernel", "q_proj"],
    "monarch_mixer": ["filter_fn", "filter_fn2", "short_filter", "filter_fn2.implicit_filter"],
    "attention": ["c_attn", "c_proj"],
    "causal_attention": ["Wqkv", "out_proj"],
    "flash_stu": ["layers.0", "layers.1.stu", "layers.1.mlp", "norm", "tok_emb", "lm_head"],
    "hybrid": ["layers.1.attn", "layers.3", "layers.2.stu"],
    "hyenadna": [
        "backbone.layers.0",
        "backbone.layers.1.mixer",
        "backbone.layers.0.mixer.filter_fn",
        "backbone",
    ],
    "striped_hyena": ["blocks.0", "blocks.1.filter", "blocks.1.mlp"],
    "striped_hyena_attention": ["blocks.1.inner_mha_cls", "blocks.2.filter", "unembed"],
}


@pytest.mark.parametrize(
    ("name", "path"), [(name, path) for name, paths in CHILDREN.items() for path in paths]
)
def test_replaced_submodules(name, path):
    """The submodule of a twin with other weights takes the place of ours, after plans were made."""
    module = make(name)
    before = compare(module)
    part = make(name, seed=11).get_submodule(path)
    with torch.no_grad():
        for tensor in [*part.parameters(), *part.buffers()]:
            if tensor.is_floating_point():
                tensor.mul_(0.8)
    part = nn.Tanh() if path == "activation" else part
    module.set_submodule(path, part)
    after = compare(module)
    assert changed(after, before)
    fresh = make(name)
    fresh.set_submodule(path, copy.deepcopy(part))
    assert error(after, fresh(inputs(module, LENGTH))) < TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_a_block_used_twice(name):
    """Each use has a state of its own."""
    module = make(name)
    compare(module)
    path = {"hyenadna": "backbone.layers"}
    blocks = "blocks" if name.startswith("striped_hyena") else "layers"
    layers = module.get_submodule(path.get(name, blocks))
    layers[1] = layers[0]
    compare(module)


@pytest.mark.parametrize("name", MODELS)
def test_tied_weights(name):
    """Alike weights of two blocks become one parameter, which is then trained."""
    module = make(name)
    before = compare(module)
    first, *others = next(part for part in module.modules() if isinstance(part, nn.ModuleList))
    for block in others:
        for path, parameter in list(first.named_parameters()):
            owner, _, weight = path.rpartition(".")
            try:
                part = block.get_submodule(owner)
            except AttributeError:
                continue  # a block of the other kind
            setattr(part, weight, parameter)
    tied = compare(module)
    assert changed(tied, before)
    train_a_step(module.train(), inputs(module, LENGTH))
    assert changed(compare(module.eval()), tied)


def _set(path, value):
    def change(module):
        owner, _, setting = path.rpartition(".")
        part = module.get_submodule(owner)
        assert hasattr(part, setting)
        setattr(part, setting, value)

    return change


SETTINGS = [
    ("long_conv", "lam", 0.4),
    ("hyena", "filter_fn.shift", 0.3),
    ("hyena", "filter_fn.modulate", False),
    ("hyena", "filter_fn.normalized", "before"),
    ("hyena", "filter_fn.normalized", "after"),
    ("hyena", "filter_fn.implicit_filter.1.w_mod", 2.5),
    ("monarch_mixer", "filter_fn2.shift", 0.3),
    ("h3", "kernel.kernel.disc", "zoh"),
    ("hyenadna", "backbone.layers.1.mixer.filter_fn.shift", 0.8),
]


@pytest.mark.parametrize(("name", "path", "value"), SETTINGS)
def test_settings_that_are_no_tensors(name, path, value):
    module = make(name)
    if path == "kernel.kernel.disc":
        with torch.no_grad():
            module.kernel.kernel.log_dt.add_(2)
    before = compare(module)
    _set(path, value)(module)
    assert changed(compare(module), before)


class _Adapter(nn.Module):
    """What an adapter library puts in a linear layer's place; its switch is no tensor."""

    def __init__(self, base):
        super().__init__()
        self.base, self.on = base, True
        self.a = nn.Parameter(torch.randn(2, base.in_features))
        self.b = nn.Parameter(torch.randn(base.out_features, 2))

    def forward(self, x):
        return self.base(x) + self.on * (x @ self.a.T @ self.b.T)


@pytest.mark.parametrize("name", [name for name in ALL if name.startswith(("hyena", "monarch"))])
def test_switches_inside_the_network_of_a_filter(name):
    module = make(name)
    torch.manual_seed(1)
    for path in linears(module):
        if "implicit_filter" in path:
            module.set_submodule(path, _Adapter(module.get_submodule(path)))
    outputs = []
    for on in (True, False, True):
        for part in module.modules():
            if isinstance(part, _Adapter):
                part.on = on
        outputs.append(compare(module))
    assert torch.equal(outputs[0], outputs[2]) and changed(outputs[1], outputs[0])


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("max_new", [LENGTH, None], ids=["bounded", "endless"])
def test_reused_buffers(name, max_new):
    """The caller's input is not kept, nor is what it was given: both may be written to."""
    module = make(name)
    x = inputs(module, LENGTH)
    with torch.no_grad():
        whole = module(x)
    prompt = x[:, :9].clone()
    y, cache = module.prefill(prompt, max_new)
    prompt.zero_()
    y.zero_()
    one, block = torch.empty_like(x[:, 0]), torch.empty_like(x[:, :5])
    forks = []
    for t in range(9, 15):
        one.copy_(x[:, t])
        y = module.step(one, cache)
        assert error(y, whole[:, t]) < TOLERANCE
        one.zero_()
        forks.append((t + 1, cache.fork()))
        y.zero_()
    for t in (15, 20):
        block.copy_(x[:, t : t + 5])
        y = module.extend(block, cache)
        assert error(y, whole[:, t : t + 5]) < TOLERANCE
        block.zero_()
        forks.append((t + 5, cache.fork()))
        y.zero_()
    for start, fork in forks:
        assert error(stepped(module, x[:, : start + 2], fork, start), whole[:, start : start + 2]) < TOLERANCE


def test_a_filter_far_behind_the_first_lags_is_seen():
    """One tap of a long explicit filter is written to, wherever it stands."""
    module = ffnn.CausalConv(4, 3000)
    x = torch.randn(1, 3000, 4)
    for lag in (0, 1, 777, 1501, 2999):
        module.prefill(x[:, :2990], 10)
        module.weight.data[2, lag] += 1
        with torch.no_grad():
            assert error(module.prefill(x[:, :2990], 10)[0], module(x)[:, :2990]) < TOLERANCE
            assert error(module.prefill(x, None)[0], module(x)) < TOLERANCE
