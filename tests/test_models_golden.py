"""Upstream's own outputs, for every layer and model: whole, and from every prompt length on."""

import pytest
import torch
from models_common import NAMES, build, error, golden, stepped

TOLERANCE = 1e-5


def test_all_golden_files_are_there():
    assert len(NAMES) == 24


@pytest.mark.parametrize("name", NAMES)
def test_forward(name):
    _, _, x, y = golden(name)
    assert error(build(name)(x), y) < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_forward_at_every_length(name):
    """What comes later changes nothing: upstream's outputs for a sequence are those for its beginnings."""
    _, _, x, y = golden(name)
    module = build(name)
    with torch.no_grad():
        for length in [*range(1, 20), 31, 32, 33, x.shape[1] - 1]:
            assert error(module(x[:, :length]), y[:, :length]) < TOLERANCE, length


@pytest.mark.parametrize("name", NAMES)
def test_prefill_and_step_from_every_prompt_length(name):
    _, _, x, y = golden(name)
    module = build(name)
    length = x.shape[1]
    for prompt in range(1, length + 1):
        got, cache = module.prefill(x[:, :prompt], length - prompt)
        assert error(got, y[:, :prompt]) < TOLERANCE, prompt
        # All steps from a few prompts, the first steps from every prompt.
        stop = length if prompt in (1, 2, 3, length // 2) else min(length, prompt + 4)
        if stop > prompt:
            steps = stepped(module, x[:, :stop], cache, prompt)
            assert error(steps, y[:, prompt:stop]) < TOLERANCE, prompt


@pytest.mark.parametrize("name", NAMES)
def test_unbounded_cache(name):
    _, _, x, y = golden(name)
    module = build(name)
    got, cache = module.prefill(x[:, :5])
    assert cache.remaining is None
    assert error(torch.cat([got, stepped(module, x, cache, 5)], 1), y) < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_weights(name):
    """Weights of 16 bits: the outputs are those of the rounded weights, and steps agree with the whole."""
    _, _, x, y = golden(name)
    module = build(name).to(torch.bfloat16)
    if x.is_floating_point():
        x = x.to(torch.bfloat16)
    whole = module(x)
    assert whole.dtype == torch.bfloat16
    # bfloat16 has 8 bits; layers multiply several rounded numbers.
    assert error(whole, y) < 0.1
    got, cache = module.prefill(x[:, :7], x.shape[1] - 7)
    # Products of three in each of seven layers make more of a rounding.
    tolerance = 0.03 if name.startswith("stripedhyena2_lm") else 0.02
    assert error(torch.cat([got, stepped(module, x, cache, 7)], 1), whole) < tolerance
