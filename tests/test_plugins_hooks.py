"""Hooks fire in every way through time, see the features of every position, and may change them."""

from __future__ import annotations

import contextlib
from collections import defaultdict

import pytest
import torch
from models_common import MODELS, error, inputs, layer, stepped
from plugins_common import ALL, LENGTH, TOLERANCE, blocks, changed, compare, make, train_a_step
from torch import nn
from torch.nn.modules import module as torch_modules

FILTERS = ("filter_fn", "kernel", "pos_emb")
"""Parts that only draw filters: they need not run where a filter is known."""


def parts_seen(module):
    """Every submodule that features go through, by name; what has nothing to run is left out."""
    return {
        name: part
        for name, part in module.named_modules()
        if not any(word in name for word in FILTERS)
        and not isinstance(part, nn.ModuleList)
        and "forward" in dir(type(part))
        and type(part).forward is not nn.Module.forward
    }


@contextlib.contextmanager
def collected(module):
    """Outputs of every part, by name, in the order of the calls."""
    seen = defaultdict(list)
    handles = [
        part.register_forward_hook(lambda part, args, output, name=name: seen[name].append(output))
        for name, part in parts_seen(module).items()
    ]
    yield seen
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name", ALL)
def test_every_part_is_called_in_every_way(name):
    """Whatever fires in `forward` fires in prefill, step and extend, with the same features."""
    module = make(name)
    x = inputs(module, LENGTH)
    with torch.no_grad(), collected(module) as seen:
        module(x)
    whole = {part: outputs[0] for part, outputs in seen.items()}
    # A table that is the head as well is called for both.
    calls = {part: len(outputs) for part, outputs in seen.items()}
    assert {part for part in whole if part} == {part for part in parts_seen(module) if part}
    for first in (1, 9):
        with collected(module) as seen:
            _, cache = module.prefill(x[:, :first], LENGTH - first)
            stepped(module, x[:, :20], cache, first)
            module.extend(x[:, 20:], cache)
        for part, features in whole.items():
            if not part:
                continue
            outputs = [y if y.ndim == features.ndim else y.unsqueeze(1) for y in seen[part][:: calls[part]]]
            assert len(outputs) == 22 - first, part
            assert error(torch.cat(outputs, 1), features) < TOLERANCE, part


@pytest.mark.parametrize("name", ALL)
def test_the_module_itself_is_called(name):
    """Hooks of the outermost module fire in every way too."""
    module = make(name)
    x = inputs(module, LENGTH)
    calls = []
    module.register_forward_pre_hook(lambda part, args: calls.append("before"))
    module.register_forward_hook(lambda part, args, output: calls.append("after"))
    _, cache = module.prefill(x[:, :5], 20)
    module.step(x[:, 5], cache)
    module.extend(x[:, 6:9], cache)
    module.step_all(x[:, 9], [cache])
    assert calls == ["before", "after"] * 4


@pytest.mark.parametrize("name", ALL)
def test_global_hooks(name):
    module = make(name)
    x = inputs(module, 12)
    with torch.no_grad():
        before = module(x)
    called = set()
    handle = torch_modules.register_module_forward_hook(lambda part, args, output: called.add(part))
    try:
        _, cache = module.prefill(x[:, :5], 7)
        assert {part for part in parts_seen(module).values()} <= called
        called.clear()
        module.step(x[:, 5], cache)
        assert {part for part in parts_seen(module).values()} <= called
        assert torch.equal(compare(module, x, prompts=(3,)), before)
    finally:
        handle.remove()


@pytest.mark.parametrize("name", ALL)
def test_pre_hooks_that_change_the_input(name):
    """On every part that features go through, the outermost included."""
    module = make(name)
    before = compare(module)

    def louder(part, args):
        return (1.25 * args[0], *args[1:]) if args[0].is_floating_point() else ((args[0] + 1) % 7, *args[1:])

    handles = [part.register_forward_pre_hook(louder) for part in parts_seen(module).values()]
    assert changed(compare(module), before)
    for handle in handles:
        handle.remove()
    assert torch.equal(compare(module), before)


@pytest.mark.parametrize("name", ALL)
def test_pre_hooks_with_keyword_arguments(name):
    module = make(name)
    before = compare(module)

    def other(part, args, kwargs):
        return (-args[0] if args[0].is_floating_point() else (args[0] + 1) % 7,), kwargs

    module.register_forward_pre_hook(other, with_kwargs=True)
    assert changed(compare(module), before)


@pytest.mark.parametrize("name", ALL)
def test_hooks_that_change_the_output(name):
    """Steering: a direction is added to what a block gives."""
    module = make(name)
    before = compare(module)
    torch.manual_seed(2)
    for block in blocks(module):
        with torch.no_grad():
            width = block(torch.randn(1, 1, module.width)).shape[-1] if name not in MODELS else 16
        direction = torch.randn(width)
        block.register_forward_hook(lambda part, args, output, direction=direction: output + direction)
    assert changed(compare(module), before)


@pytest.mark.parametrize("name", ALL)
def test_hooks_inside_the_networks_of_filters(name):
    """A hook that changes what draws a filter changes the filter in every way, at once."""
    module = make(name)
    before = compare(module)
    inner = [part for path, part in module.named_modules() if "implicit_filter." in path]
    for part in inner:
        part.register_forward_hook(lambda part, args, output: 1.3 * output)
    after = compare(module)
    assert changed(after, before) == bool(inner)


# What reads ids has no gradient at its input.
@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("name", ALL)
def test_backward_hooks(name):
    """Gradients are those without hooks; each block and mixer is seen."""
    module, plain = make(name).train(), make(name).train()
    seen = []
    for part in parts_seen(module).values():
        part.register_full_backward_hook(lambda part, before, after: seen.append(part))
    x = inputs(module, LENGTH)
    train_a_step(module, x)
    train_a_step(plain, x)
    assert {part for part in parts_seen(module).values()} <= set(seen)
    for (key, ours), theirs in zip(module.named_parameters(), plain.parameters(), strict=True):
        assert error(ours.grad, theirs.grad) < TOLERANCE, key


@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_of_every_block_at_every_position(name):
    """How the embeddings of inner layers are taken, while ids are generated."""
    model = layer(name)
    x = inputs(model, LENGTH)
    for source in ("prefill", "read_prompt"):
        kept = defaultdict(list)
        handles = [
            block.register_forward_hook(lambda block, args, output, seen=kept[i]: seen.append(output))
            for i, block in enumerate(blocks(model))
        ]
        with torch.no_grad():
            model(x)
        whole = {i: outputs.pop() for i, outputs in kept.items()}
        _, cache = getattr(model, source)(x[:, :8], LENGTH - 8)
        stepped(model, x, cache, 8)
        assert len(whole) == len(blocks(model))
        for i, features in whole.items():
            prompt, *steps = kept[i]
            assert error(torch.cat([prompt, torch.stack(steps, 1)], 1), features) < TOLERANCE
        for handle in handles:
            handle.remove()
