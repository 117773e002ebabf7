"""StripedHyena 1 (Poli et al., 2023; the package `stripedhyena`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from futurefill_rs.models._alphabet import GENOMES, Alphabet, holds_bytes
from futurefill_rs.models._base import LanguageModel, embed
from futurefill_rs.models._io import fit
from futurefill_rs.models._layers import cascade, refuse
from futurefill_rs.models._settings import check
from futurefill_rs.models._striped import AttentionBlock, ConvolutionBlock, GatedMLP, RMSNorm, inner_size
from futurefill_rs.nn.operators.precision import at_least_float32
from futurefill_rs.nn.protocol import Time
from futurefill_rs.nn.reading import across, apart

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
        check(config, self.kind)
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
        self.features = width = config["hidden_size"]
        multiple = config["make_vocab_size_divisible_by"]
        self.vocab_size = -(-config["vocab_size"] // multiple) * multiple
        hidden, activation = inner_size(config), config.get("mlp_activation", "silu")

        def block(i: int) -> nn.Module:
            mlp = GatedMLP(width, hidden, activation)
            if i in attention:
                return AttentionBlock(config, mlp)
            return ConvolutionBlock(config, cascade(config, "modal"), mlp)

        self.embedding_layer = nn.Embedding(self.vocab_size, width)
        self.blocks = nn.ModuleList(block(i) for i in range(config["num_layers"]))
        self.norm = RMSNorm(width, config["eps"]) if config.get("final_norm", True) else nn.Identity()
        self.unembed = nn.Linear(width, self.vocab_size, bias=False)
        if config.get("tie_embeddings", True):
            self.unembed.weight = self.embedding_layer.weight
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.embedding_layer.weight, std=self.config["hidden_size"] ** -0.5)

    @property
    def alphabet(self) -> Alphabet | None:
        return GENOMES if holds_bytes(self.vocab_size) else None

    def hidden(self, ids: Tensor, time: Time) -> Tensor:
        embedded = apart(lambda ids: embed(self.embedding_layer, ids), ids, time)
        x, dtype = apart(at_least_float32, embedded, time), embedded.dtype
        del embedded
        for block in self.blocks:
            x = across(block, x, time)
        return apart(lambda x: self.norm(x).to(dtype), x, time)

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
