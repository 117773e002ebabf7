"""torch.compile and torch.export: the same numbers, and no new graph for each length or position."""

from __future__ import annotations

import io

import futurefill_rs as ff
import pytest
import torch
import torch._dynamo
from models_common import MODELS, error, inputs, layer, stepped
from plugins_common import ALL, LENGTH, ONE_OF_EACH, TOLERANCE, blocks, compare, make
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

# torch's own, while it compiles.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is deprecated.*:DeprecationWarning", "ignore:.*is deprecated.*:FutureWarning"
)


@pytest.fixture(autouse=True)
def _no_graph_of_another_test():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", [*ONE_OF_EACH, *MODELS])
def test_many_lengths_share_a_few_graphs(name):
    module, counter = make(name), CompileCounter()
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    with torch.no_grad():
        for length in (5, 7, 9, 12, 14, 20, 21, 33, 34, 40, 47, 2, 1):
            x = inputs(module, length)
            assert error(compiled(x), module(x)) < TOLERANCE
    assert counter.frame_count <= 4


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_compiled_training(name):
    module = make(name).train()
    x = inputs(module, LENGTH)
    module(x).square().mean().backward()
    want = {key: parameter.grad for key, parameter in module.named_parameters()}
    module.zero_grad()
    torch.compile(module, backend="aot_eager", fullgraph=True)(x).square().mean().backward()
    for key, parameter in module.named_parameters():
        assert error(parameter.grad, want[key]) < TOLERANCE, key


@pytest.mark.parametrize("name", MODELS)
def test_one_compiled_block(name):
    """Every way goes through the compiled block; what was compiled serves all later prompts and positions."""
    model, counter = make(name), CompileCounterWithBackend("aot_eager")
    want = compare(model)
    blocks(model)[1].compile(backend=counter)
    assert error(compare(model), want) < TOLERANCE
    graphs = counter.frame_count
    assert graphs
    compare(model, inputs(model, 26, seed=3), prompts=(5, 14))
    assert counter.frame_count == graphs


@pytest.mark.parametrize("name", [*ONE_OF_EACH, *MODELS])
def test_a_compiled_step(name):
    """The layer's own `step`, compiled: right at every position, and no new graph after the first few."""
    module, counter = make(name), CompileCounter()
    x = inputs(module, LENGTH)
    with torch.no_grad():
        whole = module(x)
    step = torch.compile(module.step, backend=counter)
    _, cache = module.prefill(x[:, :4], LENGTH - 4)
    graphs = []
    for t in range(4, LENGTH):
        assert error(step(x[:, t], cache), whole[:, t]) < TOLERANCE
        graphs.append(counter.frame_count)
    assert graphs[-1] == graphs[3]
    _, cache = module.prefill(x[:, :9], None)
    assert error(step(x[:, 9], cache), whole[:, 9]) < TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_a_compiled_model_generates(name):
    model = layer(name)
    ids = inputs(model, 5)
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(ff.generate(compiled, ids, 9), ff.generate(model, ids, 9))
    with torch.no_grad():
        assert error(compiled(ids), model(ids)) < TOLERANCE


@pytest.mark.parametrize("name", [*ONE_OF_EACH, *MODELS])
def test_export_with_a_dynamic_length(name):
    module = make(name)
    length = torch.export.Dim("length", min=2, max=40)
    shapes = {"x": {1: length}}
    program = torch.export.export(module, (inputs(module, 16),), dynamic_shapes=shapes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    exported = torch.export.load(file).module()
    with torch.no_grad():
        for count in (2, 3, 15, 16, 17, 39, 40):
            x = inputs(module, count)
            assert error(exported(x), module(x)) < TOLERANCE
    # Nothing of the tracing stays behind.
    compare(module)


@pytest.mark.parametrize("name", ALL)
def test_tracing_leaves_nothing_behind(name):
    """A fixed length, fake tensors: afterwards real numbers are what they were."""
    module = make(name)
    x = inputs(module, 16)
    program = torch.export.export(module, (x,))
    with torch.no_grad():
        assert error(program.module()(x), module(x)) < TOLERANCE
        _, cache = module.prefill(x[:, :3], 13)
        assert error(stepped(module, x, cache, 3), module(x)[:, 3:]) < TOLERANCE
