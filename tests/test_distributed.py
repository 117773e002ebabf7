"""Two processes do what one does: generation cut along the channels, training cut along the batch."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import futurefill_rs as ff
import torch
from plugins_common import MODELS, ONE_OF_EACH

EXAMPLE = Path(__file__).parents[1] / "examples" / "tensor_parallel.py"
# torch's own threads may abort a process that has communicated while it ends in the usual way.
ENDING = """
dist.barrier()
os._exit(0)
"""
TRAINING = """
import os
import sys
import torch
import torch.distributed as dist
import futurefill_rs as ff

dist.init_process_group("gloo")
torch.manual_seed(0)
layer = ff.nn.CausalConv(4, 9)
model = torch.nn.parallel.DistributedDataParallel(layer)
x = torch.randn(6, 20, 4)
optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(3):
    optimiser.zero_grad()
    model(x[dist.get_rank() :: 2]).square().mean().backward()
    optimiser.step()
if dist.get_rank() == 0:
    torch.save(layer.state_dict(), sys.argv[1])
"""


SHARDS = """
import itertools
import os
import torch
import torch.distributed as dist
import futurefill_rs as ff
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(0)
for c, f in (((2, 5), (5,)), ((2, 1, 3), (4, 1)), ((4,), ()), ((3,), (2, 3))):
    u = torch.randn(*c, 20, dtype=torch.float64, requires_grad=True)
    w = torch.randn(*f, 12, dtype=torch.float64, requires_grad=True)
    expected = ff.causal_conv(u, w)
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    spread = lambda values: [None, Replicate(), *(Shard(axis) for axis in range(values.dim()))]
    for left, right in itertools.product(spread(u), spread(w)):
        if left is None and right is None:
            continue
        parts = []
        for values, placement in ((u, left), (w, right)):
            part = values.detach().clone()
            if placement is not None:
                part = distribute_tensor(part, mesh, [placement])
            parts.append(part.requires_grad_())
        y = ff.causal_conv(*parts)
        assert isinstance(y, DTensor) and y.shape == expected.shape
        assert torch.allclose(y.full_tensor(), expected), (c, f, left, right)
        if isinstance(left, Shard) and left.dim < u.dim() - 1 and u.shape[left.dim] > 1:
            assert y.placements == (Shard(left.dim + y.dim() - u.dim()),)
        (y * distribute_tensor(weight, mesh, y.placements)).sum().backward()
        for part, values in zip(parts, (u, w)):
            # A plain tensor's gradient is that of this process's part of the result.
            if isinstance(part, DTensor):
                assert torch.allclose(part.grad.full_tensor(), values.grad), (c, f, left, right)
"""


def run_twice(*program: str | Path) -> str:
    """The output of a program run by two processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *program], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_data_parallel_training(tmp_path):
    program, result = tmp_path / "training.py", tmp_path / "weights.pt"
    program.write_text(TRAINING + ENDING)
    run_twice(program, result)
    torch.manual_seed(0)
    layer = ff.nn.CausalConv(4, 9)
    x = torch.randn(6, 20, 4)
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        layer(x).square().mean().backward()
        optimiser.step()
    for key, weight in torch.load(result, weights_only=True).items():
        assert torch.allclose(weight, layer.state_dict()[key], atol=1e-6)


def test_sharded_and_replicated_modules():
    ran = run_twice(Path(__file__).parent / "distributed_modules.py").split("\n")
    assert len([line for line in ran if line]) == 2 * len([*ONE_OF_EACH, *MODELS])


def test_shards_are_convolved_where_they_are(tmp_path):
    program = tmp_path / "shards.py"
    program.write_text(SHARDS + ENDING)
    run_twice(program)


def test_tensor_parallel_generation():
    spec = importlib.util.spec_from_file_location("tensor_parallel", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    model = example.small_model().eval()
    prompt = (torch.arange(20) * 7 % model.vocab_size).reshape(2, 10)
    with torch.inference_mode():
        expected = ff.generate(model, prompt, 48)
    first, *rows = run_twice(EXAMPLE).splitlines()
    assert [[int(word) for word in row.split()] for row in rows] == expected.tolist()
    mine, whole = (int(word) for word in first.split() if word.isdigit())
    assert mine < whole
