"""StripedHyena 1 (Poli et al., 2023; the package `stripedhyena`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from futurefill_rs.models._base import LanguageModel, embed
from futurefill_rs.models._io import fit
from futurefill_rs.models._layers import cascade, refuse
from futurefill_rs.nn.attention import CausalSelfAttention
from futurefill_rs.nn.protocol import Time, whole


class _RMSNorm(nn.Module):
    """`scale * x / (rms(x) + eps)`: upstream adds eps outside the root."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        rms = x.norm(dim=-1, keepdim=True) * x.shape[-1] ** -0.5
        y: Tensor = self.scale * (x / (rms + self.eps))
        return y


class _MLP(nn.Module):
    def __init__(self, width: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.l1 = nn.Linear(width, hidden, bias=False)
        self.l2 = nn.Linear(width, hidden, bias=False)
        self.l3 = nn.Linear(hidden, width, bias=False)
        activations: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "silu": F.silu}
        self.activation = activations[activation]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.l3(self.activation(self.l1(x)) * self.l2(x))
        return y


class _ConvolutionBlock(nn.Module):
    """`x + out_filter_dense(filter(projections(pre_norm(x))))`, then `x + mlp(post_norm(x))`."""

    def __init__(self, config: Mapping[str, Any], hidden: int) -> None:
        super().__init__()
        width = config["hidden_size"]
        self.pre_norm = _RMSNorm(width, config["eps"])
        self.projections = nn.Linear(width, 3 * width)
        self.filter = cascade(config, "modal")
        self.out_filter_dense = nn.Linear(width, width)
        self.post_norm = _RMSNorm(width, config["eps"])
        self.mlp = _MLP(width, hidden, config.get("mlp_activation", "silu"))

    def forward(self, x: Tensor, *, time: Time = whole) -> Tensor:
        x = x + self.out_filter_dense(self.filter(self.projections(self.pre_norm(x)), time=time))
        y: Tensor = x + self.mlp(self.post_norm(x))
        return y


class _AttentionBlock(nn.Module):
    """`x + inner_mha_cls(pre_norm(x))`, then `x + mlp(post_norm(x))`; upstream's attention is the `MHA` of
    flash-attn, with queries, keys and values in one projection.
    """

    def __init__(self, config: Mapping[str, Any], hidden: int) -> None:
        super().__init__()
        width, heads = config["hidden_size"], config["num_attention_heads"]
        scaled = config.get("use_interpolated_rotary_pos_emb", False)
        self.pre_norm = _RMSNorm(width, config["eps"])
        self.inner_mha_cls = CausalSelfAttention(
            width,
            heads,
            n_kv_heads=heads // config.get("proj_groups", 1),
            rotary_base=config.get("rotary_emb_base", 10000),
            rotary_scaling_factor=config.get("rotary_emb_scaling_factor", 1.0) if scaled else 1.0,
            qkv_bias=config.get("qkv_proj_bias", True),
            out_bias=config.get("mha_out_proj_bias", True),
        )
        self.post_norm = _RMSNorm(width, config["eps"])
        self.mlp = _MLP(width, hidden, config.get("mlp_activation", "silu"))

    def forward(self, x: Tensor, *, time: Time = whole) -> Tensor:
        x = x + self.inner_mha_cls(self.pre_norm(x), time=time)
        y: Tensor = x + self.mlp(self.post_norm(x))
        return y


DEFAULTS = {"make_vocab_size_divisible_by": 1, "short_filter_bias": False, "state_size": 16}
"""Written into every configuration, since the Hugging Face class has upstream's defaults."""


class StripedHyena(LanguageModel):
    """StripedHyena 1 with upstream's parameter names.

    The layers in `attn_layer_idxs` are rotary attention over all positions, with `num_attention_heads` heads
    of queries and that many divided by `proj_groups` of keys and values; the others are convolutions. The
    filters are sums of exponentials without an end, so an output depends on all positions before it and
    `forward` takes sequences of any length. Poles and residues stay in float32 when the other weights are of
    16 bits. The cache of an attention layer grows with the positions read; that of a convolution does not.

    Args:
        config: upstream's own.
    """

    kind = "stripedhyena1_lm"

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        refuse(config, mlp_activation=("gelu", "silu"), model_parallel_size=(1,))
        if config.get("proj_groups", 1) != 1:
            refuse(config, smeared_gqa=(False, None))
        attention = frozenset(config.get("attn_layer_idxs") or ())
        convolutions = config.get("hyena_layer_idxs")
        for i in range(config["num_layers"]):
            if convolutions is not None and i not in attention and i not in convolutions:
                raise ValueError(
                    f"config: expected layer {i} in attn_layer_idxs or hyena_layer_idxs, got {convolutions}"
                )
        config = {**DEFAULTS, **config}
        self.config = self.labelled(config)
        width = config["hidden_size"]
        multiple = config["make_vocab_size_divisible_by"]
        self.vocab_size = -(-config["vocab_size"] // multiple) * multiple
        multiple = config.get("inner_size_multiple_of", 64)
        hidden = config.get("inner_mlp_size") or -(-int(8 * width / 3) // multiple) * multiple
        self.embedding_layer = nn.Embedding(self.vocab_size, width)
        self.blocks = nn.ModuleList(
            _AttentionBlock(config, hidden) if i in attention else _ConvolutionBlock(config, hidden)
            for i in range(config["num_layers"])
        )
        self.norm = _RMSNorm(width, config["eps"]) if config.get("final_norm", True) else nn.Identity()
        self.unembed = nn.Linear(width, self.vocab_size, bias=False)
        if config.get("tie_embeddings", True):
            self.unembed.weight = self.embedding_layer.weight
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.embedding_layer.weight, std=self.config["hidden_size"] ** -0.5)

    def hidden(self, ids: Tensor, time: Time) -> Tensor:
        x = embed(self.embedding_layer, ids)
        for block in self.blocks:
            x = block(x, time=time)
        y: Tensor = self.norm(x)
        return y

    def head(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.unembed(hidden)
        return logits


def build_striped_hyena(config: Mapping[str, Any], state: dict[str, Tensor]) -> StripedHyena:
    """StripedHyena from upstream's tensors; the rotary frequencies among them follow from the base."""
    return fit(
        lambda: StripedHyena(config),
        state,
        ignored=lambda name: name.endswith(("filter.t", "rotary_emb.inv_freq")),
    )
