"""Generate with one FlashSTU spread over several processes: each keeps and convolves its own channels.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py --model PATH --max-new 64
    torchrun --nproc-per-node 2 examples/tensor_parallel.py            # a small random model
    python examples/tensor_parallel.py                                 # the same tokens from one process

Channels of a convolution are independent, so a spectral transform unit is cut along its channels: the
projection in front by columns, filters and caches with them, and one all-gather puts the channels together.
The MLP is cut by columns and then by rows, with one all-reduce at its end. Everything else is repeated on
every process. On GPUs use `--backend nccl`, which puts every process on its own device.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import futurefill_rs as ff
import torch
import torch.distributed as dist
from torch import Tensor, nn


def my_part(size: int) -> slice:
    """The channels of this process: as equal parts as possible, every process gets at least one."""
    rank, world = dist.get_rank(), dist.get_world_size()
    if size < world:
        raise ValueError(f"channels: expected at least one for each of {world} processes, got {size}")
    return slice(size * rank // world, size * (rank + 1) // world)


class GatheredChannels(nn.Module):
    """An STU that holds this process's channels, followed by the all-gather of all of them."""

    def __init__(self, stu: nn.Module, width: int) -> None:
        super().__init__()
        part = my_part(width)
        stu.M_inputs = nn.Parameter(stu.M_inputs.detach()[:, part].clone())
        stu.M_filters = nn.Parameter(stu.M_filters.detach()[:, part].clone())
        self.stu = stu
        self.sizes = [
            width * (r + 1) // dist.get_world_size() - width * r // dist.get_world_size()
            for r in range(dist.get_world_size())
        ]

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        y = self.stu(x, **options).contiguous()
        # Parts may differ by one channel, and a gather wants equal ones.
        most = max(self.sizes)
        padded = nn.functional.pad(y, (0, most - y.shape[-1])).contiguous()
        parts = [torch.empty_like(padded) for _ in self.sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[..., :size] for part, size in zip(parts, self.sizes, strict=True)], -1)


class ReducedMLP(nn.Module):
    """A gated MLP that holds this process's part of the hidden layer, followed by the all-reduce."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        part = my_part(mlp.down_proj.in_features)
        for layer in (mlp.gate_proj, mlp.up_proj):
            layer.weight = nn.Parameter(layer.weight.detach()[part].clone())
            if layer.bias is not None:
                layer.bias = nn.Parameter(layer.bias.detach()[part].clone())
        mlp.down_proj.weight = nn.Parameter(mlp.down_proj.weight.detach()[:, part].clone())
        if mlp.down_proj.bias is not None and dist.get_rank():
            nn.init.zeros_(mlp.down_proj.bias)
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.mlp(x)
        dist.all_reduce(y)
        return y


def shard(model: Any) -> Any:
    """Keep this process's channels of every block, in place."""
    for block in model.layers:
        if not hasattr(block, "stu") or not block.stu.use_approx:
            raise ValueError("model: expected FlashSTU with use_approx and without attention")
        block.stu = GatheredChannels(block.stu, model.config["n_embd"])
        block.mlp = ReducedMLP(block.mlp)
    return model


def small_model() -> Any:
    torch.manual_seed(0)
    config = dict(n_embd=24, n_layers=2, seq_len=128, vocab_size=64, mlp_scale=2, num_eigh=8)
    return ff.models.FlashSTU(config)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder of a saved FlashSTU; default: a small random one")
    parser.add_argument("--max-new", type=int, default=48)
    parser.add_argument("--backend", default="gloo", choices=["gloo", "nccl"])
    options = parser.parse_args()
    spread = "RANK" in os.environ
    device = "cpu"
    if spread:
        dist.init_process_group(options.backend)
        if options.backend == "nccl":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
    model = (small_model() if options.model is None else ff.models.load(options.model)).to(device).eval()
    whole = sum(p.numel() for p in model.parameters())
    if spread:
        model = shard(model)
    prompt = (torch.arange(20, device=device) * 7 % model.vocab_size).reshape(2, 10)
    with torch.inference_mode():
        ids = ff.generate(model, prompt, options.max_new)
    if not spread or dist.get_rank() == 0:
        mine = sum(p.numel() for p in model.parameters())
        print(f"this process holds {mine} of {whole} parameters")
        for row in ids.tolist():
            print(*row)
    if spread:
        # Nobody leaves while another still talks to it.
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
