"""What StripedHyena 1 and 2 share: their norm, their MLP, and the two kinds of blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from futurefill_rs.nn.attention import CausalSelfAttention
from futurefill_rs.nn.operators.precision import at_least_float32
from futurefill_rs.nn.protocol import Time, whole

Config = Mapping[str, Any]


class RMSNorm(nn.Module):
    """`scale * x / (rms(x) + eps)`, computed in float32 at least: upstream adds eps outside the root."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least_float32(x)
        rms = wide.norm(dim=-1, keepdim=True) * x.shape[-1] ** -0.5
        y: Tensor = (self.scale * (wide / (rms + self.eps))).to(self.scale.dtype)
        return y


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "silu": F.silu,
    "identity": lambda x: x,
}


class GatedMLP(nn.Module):
    """`l3(activation(l1(x)) * l2(x))`."""

    def __init__(self, width: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.l1 = nn.Linear(width, hidden, bias=False)
        self.l2 = nn.Linear(width, hidden, bias=False)
        self.l3 = nn.Linear(hidden, width, bias=False)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.l3(ACTIVATIONS[self.activation](self.l1(x)) * self.l2(x))
        return y


def inner_size(config: Config) -> int:
    """The width inside of the MLPs."""
    multiple = config.get("inner_size_multiple_of", 64)
    size: int = config.get("inner_mlp_size") or -(-int(8 * config["hidden_size"] / 3) // multiple) * multiple
    return size


class _Block(nn.Module):
    """`x + mixer(pre_norm(x))`, then `x + mlp(post_norm(x))`, x in float32 at least for any weights."""

    def __init__(self, config: Config, mlp: GatedMLP) -> None:
        super().__init__()
        width, eps = config["hidden_size"], config["eps"]
        self.pre_norm = RMSNorm(width, eps)
        self.post_norm = RMSNorm(width, eps)
        self.mlp = mlp

    def mixer(self, x: Tensor, time: Time) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, *, time: Time = whole) -> Tensor:
        x = x + self.mixer(self.pre_norm(x), time)
        y: Tensor = x + self.mlp(self.post_norm(x))
        return y


class ConvolutionBlock(_Block):
    """The mixer is `out_filter_dense(filter(projections(x)))`."""

    def __init__(
        self,
        config: Config,
        filters: nn.Module,
        mlp: GatedMLP,
        *,
        projections_bias: bool = True,
        out_bias: bool = True,
    ) -> None:
        super().__init__(config, mlp)
        width = config["hidden_size"]
        self.projections = nn.Linear(width, 3 * width, bias=projections_bias)
        self.filter = filters
        self.out_filter_dense = nn.Linear(width, width, bias=out_bias)

    def mixer(self, x: Tensor, time: Time) -> Tensor:
        y: Tensor = self.out_filter_dense(self.filter(self.projections(x), time=time))
        return y


class AttentionBlock(_Block):
    """The mixer is `inner_mha_cls`, in upstream the `MHA` of flash-attn, with queries, keys and values in one
    projection.
    """

    def __init__(self, config: Config, mlp: GatedMLP) -> None:
        super().__init__(config, mlp)
        width, heads = config["hidden_size"], config["num_attention_heads"]
        scaled = config.get("use_interpolated_rotary_pos_emb", False)
        self.inner_mha_cls = CausalSelfAttention(
            width,
            heads,
            n_kv_heads=heads // config.get("proj_groups", 1),
            rotary_base=config.get("rotary_emb_base", 10000),
            rotary_scaling_factor=config.get("rotary_emb_scaling_factor", 1.0) if scaled else 1.0,
            qkv_bias=config.get("qkv_proj_bias", True),
            out_bias=config.get("mha_out_proj_bias", True),
        )

    def mixer(self, x: Tensor, time: Time) -> Tensor:
        y: Tensor = self.inner_mha_cls(x, time=time)
        return y
