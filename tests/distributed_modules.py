"""Run by two processes: sharded and replicated modules train as one does and step as they forward."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from models_common import error, inputs
from plugins_common import MODELS, ONE_OF_EACH, TOLERANCE, blocks, compare, make
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel


def whole(tensor: Any) -> Any:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded(module: Any) -> Any:
    mesh = dist.init_device_mesh("cpu", (2,))
    for block in blocks(module):
        if block is not module:
            fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in module.parameters())
    return module


def check(name: str, wrap: Callable[[Any], Any]) -> None:
    plain, module = make(name).train(), make(name).train()
    x = inputs(module, 30, batch=4)
    module.prefill(x[:, :7], 23)
    wrapped = wrap(module)
    part = x[dist.get_rank() :: 2]
    y = wrapped(part)
    assert error(y, plain(part)) < TOLERANCE
    plain(x).square().mean().backward()
    y.square().mean().backward()
    for (key, ours), theirs in zip(module.named_parameters(), plain.parameters(), strict=True):
        assert error(whole(ours.grad), theirs.grad) < TOLERANCE, key
    for model in (plain, module):
        torch.optim.SGD(model.parameters(), lr=0.01).step()
    got = compare(module.eval(), x, forward=wrapped.eval(), prompts=(1, 7))
    assert error(got, plain.eval()(x)) < TOLERANCE
    for key, value in module.state_dict().items():
        assert torch.allclose(whole(value), plain.state_dict()[key], atol=1e-5), key


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name in [*ONE_OF_EACH, *MODELS]:
        for wrap in (sharded, DistributedDataParallel):
            check(name, wrap)
            if dist.get_rank() == 0:
                print(name, wrap.__name__, flush=True)
    dist.barrier()
    # torch's own threads may abort a process that has communicated while it ends in the usual way.
    os._exit(0)
