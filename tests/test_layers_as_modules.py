"""What is hung on a module acts in every way through time: prefill, step and extend agree with forward."""

import copy

import futurefill_rs as ff
import pytest
import torch
from futurefill_rs import models
from models_common import DNA, FLASH, LAYERS, MODELS, error, inputs, layer, stepped
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils import parametrizations, prune

ALL = [*LAYERS, *MODELS]
TOLERANCE = 1e-5
PROMPT, LENGTH = 17, 40


def cached(module, x, prompt=PROMPT):
    """Outputs for x by a prefill, steps and an extend."""
    y, cache = module.prefill(x[:, :prompt], x.shape[1] - prompt)
    middle = prompt + 5
    steps = stepped(module, x[:, :middle], cache, prompt)
    return torch.cat([y, steps, module.extend(x[:, middle:], cache)], 1)


def disagreement(module, x):
    with torch.no_grad():
        return error(cached(module, x), module(x))


class Adapter(nn.Module):
    """What peft's LoRA layer is: the old layer, a low-rank part, a switch that is no tensor."""

    def __init__(self, base):
        super().__init__()
        self.base, self.on = base, True
        self.a = nn.Parameter(torch.randn(2, base.in_features))
        self.b = nn.Parameter(torch.randn(base.out_features, 2) / 4)

    def forward(self, x):
        return self.base(x) + self.on * (x @ self.a.T @ self.b.T)


@pytest.mark.parametrize("name", ["hyena", "monarch_mixer", "h3", "long_conv", "attention", *MODELS])
def test_adapters_around_every_linear_layer_are_followed_when_they_switch(name):
    module = layer(name)
    adapters = []
    for owner in list(module.modules()):
        for key, child in list(owner.named_children()):
            if type(child) is nn.Linear and not isinstance(owner, Adapter):
                adapters.append(Adapter(child))
                setattr(owner, key, adapters[-1])
    assert adapters
    x = inputs(module, LENGTH)
    outputs = []
    for on in (True, False, True):
        for adapter in adapters:
            adapter.on = on
        assert disagreement(module, x) < TOLERANCE
        outputs.append(module(x))
    assert error(outputs[1], outputs[0]) > 1e-3


@pytest.mark.parametrize("name", ALL)
def test_a_prompt_read_under_autocast_leaves_no_plan_of_its_precision(name):
    module = layer(name)
    x = inputs(module, LENGTH)
    with torch.autocast("cpu", torch.bfloat16):
        module.prefill(x[:, :PROMPT], LENGTH - PROMPT)
        assert disagreement(module, x) < 0.05
    assert disagreement(module, x) < TOLERANCE


SETTINGS = {
    "long_conv": [lambda m: setattr(m, "lam", 0.0)],
    "hyena": [
        lambda m: setattr(m.filter_fn, "shift", 0.3),
        lambda m: setattr(m.filter_fn, "modulate", False),
        lambda m: setattr(m.filter_fn, "normalized", "before"),
        lambda m: setattr(m, "layout", "o d"),
        lambda m: m.filter_fn.implicit_filter.__setitem__(2, nn.Linear(8, 8)),
        lambda m: setattr(m, "filter_fn", copy.deepcopy(layer("hyena", 5).filter_fn)),
        lambda m: m.filter_fn.register_forward_hook(lambda module, args, y: 2 * y),
        lambda m: m.filter_fn.pos_emb.z.data[0, 13].add_(1.0),
    ],
    "h3": [lambda m: setattr(m.kernel, "kernel", copy.deepcopy(layer("h3", 5).kernel.kernel))],
    "stu": [lambda m: m.phi.data[12].add_(0.5)],
    "causal_attention": [lambda m: setattr(m, "rotary_base", 77.0)],
    "attention": [lambda m: setattr(m, "window_size", 3)],
}


@pytest.mark.parametrize(
    ("name", "change"), [(name, change) for name, changes in SETTINGS.items() for change in changes]
)
def test_whatever_shapes_a_filter_is_followed(name, change):
    module = layer(name)
    x = inputs(module, LENGTH)
    with torch.no_grad():
        before = module(x)
        cached(module, x)
        change(module)
        assert error(module(x), before) > 1e-4
        assert disagreement(module, x) < TOLERANCE


def test_a_small_write_into_large_filters_of_sixteen_bits_is_followed():
    module = ff.nn.CausalConv(300, 2000).bfloat16()
    x = torch.randn(1, LENGTH, 300)
    module.prefill(x, 0)
    module.weight.data[200, 31] = 40.0
    assert error(module.prefill(x, 0)[0], module(x)) < TOLERANCE


@pytest.mark.parametrize("name", ALL)
def test_a_running_cache_keeps_its_filters_and_its_past(name):
    """A caller may use the memory of inputs and outputs again, also with forks about."""
    module = layer(name)
    x = inputs(module, LENGTH)
    y, prompt = module(x), x[:, :PROMPT].clone()
    _, cache = module.prefill(prompt, LENGTH - PROMPT)
    prompt.zero_()
    position, block = x[:, 0].clone(), x[:, :3].clone()
    for t in range(PROMPT, LENGTH - 3, 4):
        position.copy_(x[:, t])
        got = module.step(position, cache)
        assert error(got, y[:, t]) < TOLERANCE
        got.zero_()
        fork = cache.fork()
        position.zero_()
        block.copy_(x[:, t + 1 : t + 4])
        for kept in (fork, cache):
            got = module.extend(block, kept)
            assert error(got, y[:, t + 1 : t + 4]) < TOLERANCE
            got.zero_()
        block.zero_()


@pytest.mark.parametrize("name", MODELS)
def test_every_module_of_a_model_is_called_in_every_way_through_time(name):
    module = layer(name)
    x = inputs(module, LENGTH)
    calls = set()
    names = {part: key for key, part in module.named_modules() if not isinstance(part, nn.ModuleList)}
    handle = nn.modules.module.register_module_forward_hook(lambda part, args, y: calls.add(names[part]))
    try:
        seen = []
        _, cache = module.prefill(x[:, :PROMPT], LENGTH - PROMPT)
        seen.append(set(calls))
        for call, part in ((module.step, x[:, 20]), (module.extend, x[:, 20:25])):
            calls.clear()
            call(part, cache)
            seen.append(set(calls))
        calls.clear()
        module(x)
    finally:
        handle.remove()
    assert calls == set(names.values())
    # The modules of a filter are asked when the filter is planned.
    drawn = {key for key in calls if "filter_fn" in key}
    assert all(calls - drawn <= found for found in seen)


@pytest.mark.parametrize(("name", "blocks"), [("hyenadna", "backbone.layers"), ("hybrid", "layers"),
                                              ("striped_hyena_attention", "blocks")])  # fmt: skip
def test_hidden_states_of_every_block_come_in_every_way(name, blocks):
    module = layer(name)
    x = inputs(module, LENGTH)
    found = []
    for block in module.get_submodule(blocks):
        block.register_forward_hook(lambda block, args, y: found.append(y))
    module(x)
    whole = found[:]
    found.clear()
    y, cache = module.prefill(x[:, :PROMPT], LENGTH - PROMPT)
    prompt = found[:]
    found.clear()
    for t in range(PROMPT, LENGTH):
        module.step(x[:, t], cache)
        for i, y in enumerate(found):
            assert error(y, whole[i][:, t]) < TOLERANCE
        found.clear()
    for got, want in zip(prompt, whole, strict=True):
        assert error(got, want[:, :PROMPT]) < TOLERANCE


@pytest.mark.parametrize("name", LAYERS)
def test_a_pre_hook_that_changes_the_input_acts_in_every_way(name):
    module = layer(name)
    x = inputs(module, LENGTH)
    before = module(x)
    module.register_forward_pre_hook(lambda module, args: (args[0] * 2 + 1,))
    assert error(module(x), before) > 1e-2
    assert disagreement(module, x) < TOLERANCE


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "wrap",
    [
        lambda part, name: prune.random_unstructured(part, name, 0.5),
        lambda part, name: nn.utils.weight_norm(part, name),
        lambda part, name: parametrizations.weight_norm(part, name),
    ],
    ids=["prune", "weight_norm", "parametrised"],
)
@pytest.mark.parametrize(
    ("name", "part", "key"),
    [
        ("causal_conv", "", "weight"),
        ("long_conv", "kernel", "kernel"),
        ("hyena", "short_filter", "weight"),
        ("hyena", "filter_fn.implicit_filter.2", "weight"),
        ("stu", "", "M_filters"),
        ("hcm", "", "h"),
        ("flash_stu", "lm_head", "weight"),
    ],
)
def test_weights_that_are_made_from_others_are_followed(name, part, key, wrap):
    module = layer(name)
    wrap(module.get_submodule(part), key)
    x = inputs(module, LENGTH)
    assert disagreement(module, x) < TOLERANCE
    optimiser = torch.optim.SGD(module.parameters(), 0.1)
    module(x).square().mean().backward()
    optimiser.step()
    assert disagreement(module, x) < TOLERANCE


class Scaled(torch.Tensor):
    """A weight-only quantised tensor that knows `linear` and no view, as torchao's are."""

    @staticmethod
    def __new__(cls, w):
        return torch.Tensor._make_wrapper_subclass(cls, w.shape, dtype=w.dtype, device=w.device)

    def __init__(self, w):
        self.scale = w.abs().amax(1, keepdim=True) / 127
        self.q = (w / self.scale).round().to(torch.int8)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            x, w, *bias = args
            return nn.functional.linear(x, w.q * w.scale, *(bias or [(kwargs or {}).get("bias")]))
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"Scaled: {func}")


@pytest.mark.parametrize("name", ["hyena", "monarch_mixer", "h3", "long_conv", "attention", *MODELS])
def test_quantised_weights_need_no_more_than_linear(name):
    module = layer(name)
    for part in module.modules():
        if isinstance(part, nn.Linear):
            assert type(part) is nn.Linear
            part.weight = nn.Parameter(Scaled(part.weight.detach().clone()), requires_grad=False)
    x = inputs(module, LENGTH, batch=1)
    assert disagreement(module, x) < TOLERANCE


@pytest.mark.parametrize("name", ALL)
def test_a_shallow_copy_computes_with_its_own_parts(name):
    """What DataParallel makes: the attributes are shared, parameters and modules are others."""

    def replica(module):
        twin = copy.copy(module)
        twin._modules = {key: part and replica(part) for key, part in module._modules.items()}
        twin._parameters = {
            key: p if p is None else nn.Parameter(p.detach() * 0.9) for key, p in module._parameters.items()
        }
        return twin

    module = layer(name)
    x = inputs(module, LENGTH)
    y = module(x)
    module.prefill(x[:, :PROMPT], LENGTH - PROMPT)
    twin = replica(module)
    assert error(twin(x), y) > 1e-2
    assert disagreement(twin, x) < TOLERANCE
    assert disagreement(module, x) < TOLERANCE and error(module(x), y) == 0


@pytest.mark.parametrize("name", ALL)
def test_fake_tensors_leave_nothing_behind(name):
    module = layer(name)
    x = inputs(module, LENGTH)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        module(x)
    assert disagreement(module, x) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_modules_made_under_another_default_dtype(name, dtype):
    torch.set_default_dtype(dtype)
    try:
        module = layer(name)
        x = inputs(module, LENGTH)
        assert disagreement(module, x) < (0.03 if dtype == torch.bfloat16 else 1e-6)
        assert module(x).dtype == dtype or name == "hyenadna"
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", ALL)
def test_functional_call(name):
    module = layer(name)
    x = inputs(module, LENGTH)
    other = {key: 1.5 * p.detach() for key, p in module.named_parameters()}
    y = torch.func.functional_call(module, other, (x,))
    assert error(y, module(x)) > 1e-3
    if name in LAYERS:
        pair = torch.stack([x, x.flip(1)])
        both = torch.func.vmap(lambda u: torch.func.functional_call(module, other, (u,)))(pair)
        assert error(both[0], y) < TOLERANCE


def test_frozen_compares_each_kind_of_plan_once():
    module = models.HyenaDNA(DNA).eval()
    x = inputs(module, LENGTH)
    calls = []
    for block in module.backbone.layers:
        block.mixer.filter_fn.register_forward_hook(lambda *args: calls.append(args))
    with module.frozen():
        module.prefill(x[:, :PROMPT], 10)
        first = len(calls)
        for _ in range(3):
            module.prefill(x[:, :PROMPT], 10)
        assert first and len(calls) == first
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.2)
    assert disagreement(module, x) < TOLERANCE
    with module.frozen():
        assert disagreement(module, x) < TOLERANCE


def test_a_cache_of_another_model_is_refused():
    deep, flat = (models.FlashSTU({**FLASH, "n_layers": n}).eval() for n in (2, 1))
    x = inputs(deep, 8)
    caches = [model.prefill(x, 4)[1] for model in (deep, flat)]
    with pytest.raises(RuntimeError, match="cache: expected one of this layer, got one with 2 states"):
        flat.step(x[:, 0], caches[0])
    with pytest.raises(ValueError, match="cache: expected the states of this layer"):
        deep.step(x[:, 0], caches[1])
