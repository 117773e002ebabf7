"""Every layer and model on fake CUDA tensors, and under torch.compile."""

from __future__ import annotations

from typing import Any

import models_common as common
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode


def to_fake_cuda(module: torch.nn.Module) -> None:
    """Inside a FakeTensorMode: parameters and buffers that only claim to be on a GPU."""
    for part in module.modules():
        for name, values in part.named_parameters(recurse=False):
            fake = torch.empty(values.shape, dtype=values.dtype, device="cuda")
            part._parameters[name] = torch.nn.Parameter(fake, requires_grad=False)
        for name, values in part.named_buffers(recurse=False):
            part._buffers[name] = torch.empty(values.shape, dtype=values.dtype, device="cuda")


def on_cuda(y: Any) -> bool:
    return isinstance(y, torch.Tensor) and y.device.type == "cuda"


@pytest.mark.parametrize("name", common.NAMES)
def test_models_stay_on_a_fake_gpu(name):
    module, x = common.build(name), common.golden(name)[2]
    length = x.shape[1]
    with FakeTensorMode(), torch.no_grad():
        to_fake_cuda(module)
        x = torch.zeros(x.shape, dtype=x.dtype, device="cuda")
        full = module(x)
        assert on_cuda(full)
        y, cache = module.prefill(x[:, : length // 2], length - length // 2)
        assert on_cuda(y)
        for t in range(length // 2, min(length, length // 2 + 9)):
            y = module.step(x[:, t], cache)
            assert on_cuda(y) and y.shape == full[:, t].shape and y.dtype is full.dtype
        fork = cache.fork()
        fork.reorder(torch.zeros(x.shape[0], dtype=torch.int64, device="cuda"))
        fork.reset([0])
        assert on_cuda(module.step(x[:, 0], fork))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["flash_stu_lm", "stu_full", "hyena_order2", "stripedhyena1_lm"])
def test_models_compile_to_one_graph(name):
    x = common.golden(name)[2]
    plain, module = common.build(name), common.build(name)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    y, z = compiled(x), plain(x)
    assert common.error(y, z) < 1e-5
    y.float().square().sum().backward()
    z.float().square().sum().backward()
    expected = dict(plain.named_parameters())
    for key, parameter in module.named_parameters():
        if expected[key].grad is not None:
            assert torch.allclose(parameter.grad, expected[key].grad, rtol=1e-3, atol=1e-5), key
