"""StripedHyena 2 (Ku et al., 2025), the architecture of Evo 2; upstream's code is vortex."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from futurefill_rs.models._alphabet import GENOMES, Alphabet, holds_bytes
from futurefill_rs.models._base import LanguageModel, embed
from futurefill_rs.models._io import State, fit
from futurefill_rs.models._layers import refuse
from futurefill_rs.models._settings import check
from futurefill_rs.models._striped import AttentionBlock, ConvolutionBlock, GatedMLP, RMSNorm, inner_size
from futurefill_rs.nn import HyenaCascade
from futurefill_rs.nn.operators.precision import at_least_float32
from futurefill_rs.nn.protocol import Time
from futurefill_rs.nn.reading import across, apart

GATED_LENGTH = 128
"""Explicit filters from this length on begin with lag 0 and have a skip; shorter ones end with lag 0."""

DEFAULTS = {"interleave": False, "short_filter_bias": False, "rotary_emb_base": 1000000}
"""What vortex takes where its configuration says nothing."""


class StripedHyena2(LanguageModel):
    """StripedHyena 2 with upstream's parameter names: Evo 2.

    The layers in `attn_layer_idxs` are rotary attention over all positions, those in `hcs_layer_idxs` and
    `hcm_layer_idxs` gated convolutions with short and medium explicit filters, those in `hcl_layer_idxs` with
    sums of real exponentials, which have no end: an output depends on all positions before it, and `forward`
    takes sequences of any length. Filters are computed in float32 at least whatever the weights are. The
    cache of an attention layer grows with the positions read; that of a convolution does not.

    Ids are the bytes of a text; 0 begins and ends a sequence, 1 is padding.

    Args:
        config: upstream's own. With `use_fp8_input_projections` models of other sizes than 7B are refused, as
            upstream refuses to run them without FP8: `False` insists.
    """

    kind = "stripedhyena2_lm"

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        check(config, self.kind)
        refuse(config, mlp_activation=("gelu", "silu"), model_parallel_size=(1,), long_fir_threshold=(None,))
        if config.get("proj_groups", 1) != 1:
            refuse(config, smeared_gqa=(False, None))
        refuse_fp8(config)
        # The rows of Wqkv here, and so in what is saved, are in order.
        config = {**DEFAULTS, **config, "column_split": False}
        self.config = self.labelled(config)
        self.features, eps = config["hidden_size"], config["eps"]
        width = self.features
        self.vocab_size = config["vocab_size"]
        self.embedding_layer = nn.Embedding(self.vocab_size, width)
        self.blocks = nn.ModuleList(_block(config, i) for i in range(config["num_layers"]))
        self.norm = RMSNorm(width, eps) if config.get("final_norm", True) else nn.Identity()
        self.unembed = nn.Linear(width, self.vocab_size, bias=False)
        if config["tie_embeddings"]:
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


def refuse_fp8(config: Mapping[str, Any]) -> None:
    """Raise for a model that needs 8-bit projections: trained with them, it is another model without."""
    is_7b = config["hidden_size"] == 4096 and config["num_layers"] == 32
    if config.get("use_fp8_input_projections") and not is_7b:
        raise ValueError(
            "config: expected use_fp8_input_projections to be false, got true: of the models trained with "
            "8-bit input projections only those of 7B are known to work without, in bfloat16. Set it to "
            "false to compute in the precision of the weights all the same"
        )


def _block(config: Mapping[str, Any], i: int) -> nn.Module:
    activation = config.get("mlp_activation", "gelu")
    if i and config.get("evo2_style_activations"):
        activation = "identity"
    mlp = GatedMLP(config["hidden_size"], inner_size(config), activation)
    if i in config["attn_layer_idxs"]:
        return AttentionBlock(config, mlp)
    if i in config["hcl_layer_idxs"]:
        filters = _cascade(config, None, None)
    elif i in config["hcm_layer_idxs"]:
        filters = _cascade(config, config["hcm_filter_length"], config["hcm_filter_groups"])
    elif i in config["hcs_layer_idxs"]:
        filters = _cascade(config, config["hcs_filter_length"], config["hcs_filter_groups"])
    else:
        kinds = ", ".join(f"{kind}_layer_idxs" for kind in ("attn", "hcl", "hcm", "hcs"))
        raise ValueError(f"config: expected layer {i} in one of {kinds}, got it in none")
    return ConvolutionBlock(
        config,
        filters,
        mlp,
        projections_bias=config["qkv_proj_bias"],
        out_bias=config["hyena_out_proj_bias"],
    )


def _cascade(config: Mapping[str, Any], length: int | None, groups: int | None) -> HyenaCascade:
    """Explicit filters of a length, or exponentials without one."""
    explicit: dict[str, Any] = {} if length is None else {"filter_length": length, "filter_groups": groups}
    return HyenaCascade(
        config["hidden_size"],
        "hcl" if length is None else "hcm" if length >= GATED_LENGTH else "hcs",
        state_size=config["state_size"],
        short_filter_length=config["short_filter_length"],
        short_filter_bias=config["short_filter_bias"],
        num_heads=config["num_attention_heads"],
        column_split=config.get("column_split_hyena", True),
        interleave=config["interleave"],
        flip=config.get("hyena_flip_x1x2", False),
        **explicit,
    )


def build_striped_hyena_2(config: Mapping[str, Any], state: State) -> StripedHyena2:
    """StripedHyena 2 from upstream's tensors; the rotary frequencies among them follow from the base.

    The rows of `Wqkv` come as queries, keys and values, as a model of upstream's has them, or head by head,
    as its published checkpoints have them and its loader puts them in order where `column_split` is true.
    Only what the FP8 library saved beside the projections tells the two apart, which is in every published
    one; `qkv_layout` in the configuration, "heads" or "blocks", says it.
    """
    refuse(config, qkv_layout=("heads", "blocks"))
    published = config.get("column_split", True) and any(
        ".projections." in name and _is_fp8_state(value) for name, value in state.beside.items()
    )
    config = dict(config)
    layout = config.pop("qkv_layout", "heads" if published else "blocks")
    if layout == "heads":
        heads = config["num_attention_heads"]
        groups = heads // config.get("proj_groups", 1)
        if groups != heads:
            raise ValueError("config: expected proj_groups to be 1 where Wqkv comes head by head")
        for name in state:
            if ".Wqkv." in name:
                state[name] = _by_kind(state[name], heads)
    return fit(
        lambda: StripedHyena2(config),
        state,
        ignored=lambda name: name.endswith(("filter.t", "rotary_emb.inv_freq")),
    )


def _is_fp8_state(value: object) -> bool:
    """Whether this is what an FP8 library saves: a pickle or an archive, in bytes, a buffer or a tensor of
    bytes.
    """
    if isinstance(value, io.BytesIO):
        value = value.getbuffer()[:2].tobytes()
    elif isinstance(value, Tensor) and value.dtype == torch.uint8:
        value = bytes(value.flatten()[:2].tolist())
    return isinstance(value, bytes) and value.startswith((b"\x80", b"PK"))


def _by_kind(rows: Tensor, heads: int) -> Tensor:
    """Rows `(H, 3, d)` of queries, keys and values of each head as `(3, H, d)`."""
    if not rows.ndim or rows.shape[0] % (3 * heads):
        return rows
    return rows.reshape(heads, 3, -1, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)
