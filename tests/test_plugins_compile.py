"""Compilers around layers: few graphs for every length; cached ways are right."""

from __future__ import annotations

import futurefill_rs as ff
import pytest
import torch
from models_common import error, inputs
from plugins_common import LENGTH, ONE_OF_EACH, TOLERANCE, blocks, compare, make
from torch._dynamo.testing import CompileCounter

COMPILED = [*ONE_OF_EACH, "stu_full", "hcs", "hcl"]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture
def counter():
    """A backend that runs graphs as they are and counts them."""
    torch._dynamo.reset()
    yield CompileCounter()
    torch._dynamo.reset()


@pytest.mark.parametrize("name", COMPILED)
def test_a_few_graphs_serve_every_length(name, counter):
    module = make(name)
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    for length in (5, 7, 12, 21, 34, 47):
        x = inputs(module, length)
        assert error(compiled(x), module(x)) < TOLERANCE
    # The first length, then any.
    assert counter.frame_count <= 2


@pytest.mark.parametrize("name", COMPILED)
def test_export_with_a_dynamic_length(name):
    module = make(name)
    x = inputs(module, 46)
    length = torch.export.Dim("length", min=4, max=46)
    shapes = {"x": {1: length}}
    exported = torch.export.export(module, (x[:, :30].contiguous(),), dynamic_shapes=shapes).module()
    for t in (4, 5, 33, 46):
        assert error(exported(x[:, :t]), module(x[:, :t])) < TOLERANCE


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_compiled_step(name, counter):
    """Few graphs for all positions."""
    module = make(name)
    x = inputs(module, LENGTH)
    y, cache = module.prefill(x[:, :5], LENGTH - 5)
    step = torch.compile(module.step, backend=counter)
    steps, graphs = [], []
    for t in range(5, LENGTH):
        steps.append(step(x[:, t], cache))
        graphs.append(counter.frame_count)
    assert error(torch.cat([y, torch.stack(steps, 1)], 1), module(x)) < TOLERANCE
    assert graphs[0] and graphs[3] == graphs[-1]


def test_a_compiled_prefill(counter):
    """Few graphs for all prompts."""
    module = make("hyena")
    x = inputs(module, LENGTH)
    prefill = torch.compile(module.prefill, backend=counter)
    graphs = []
    for prompt in (5, 8, 11, 15, 18):
        y, cache = prefill(x[:, :prompt], LENGTH - prompt)
        assert error(torch.cat([y, module.extend(x[:, prompt:], cache)], 1), module(x)) < TOLERANCE
        graphs.append(counter.frame_count)
    assert graphs[0] and graphs[2] == graphs[-1]


@pytest.mark.parametrize("name", ["hyenadna", "flash_stu"])
def test_compiled_blocks_of_a_model(name, counter):
    module = make(name)
    before = compare(module)
    for block in blocks(module):
        block.compile(backend=counter)
    assert error(compare(module, prompts=(7,)), before) < TOLERANCE
    assert counter.frame_count


def test_plans_and_caches_in_compiled_code(counter):
    u, filters = torch.randn(4, 30), torch.randn(4, 50)

    def run(u):
        plan = ff.plan(filters, 64)
        y, cache = plan.prefill(2 * u[:, :7], 23)
        step = cache.step(2 * u[:, 7])
        return torch.cat([y, step[:, None], cache.extend(2 * u[:, 8:])], 1) / 2

    assert error(torch.compile(run, backend=counter)(u), ff.causal_conv(u, filters)) < TOLERANCE
    assert counter.frame_count
