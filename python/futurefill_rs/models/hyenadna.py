"""HyenaDNA: a language model of DNA (Nguyen et al., 2023; `standalone_hyenadna.py`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from futurefill_rs.models._alphabet import NUCLEOTIDES, Alphabet
from futurefill_rs.models._base import LanguageModel, embed
from futurefill_rs.models._io import fit, same
from futurefill_rs.models._layers import hyena_operator, refuse
from futurefill_rs.models._settings import check
from futurefill_rs.nn.operators.precision import at_least_float32
from futurefill_rs.nn.protocol import Time, whole
from futurefill_rs.nn.reading import across, apart


class _MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return y


class _Block(nn.Module):
    """`x + mixer(norm1(x))`, then `x + mlp(norm2(x))`, x in at least float32 whatever the weights are."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width, eps = config["d_model"], config.get("layer_norm_epsilon", 1e-5)
        self.mixer = hyena_operator(config["layer"], d_model=width, layout="o d", shift=0.05)
        self.norm1 = nn.LayerNorm(width, eps)
        self.mlp = _MLP(width, config.get("d_inner") or 4 * width)
        self.norm2 = nn.LayerNorm(width, eps)

    def forward(self, x: Tensor, *, time: Time = whole) -> Tensor:
        x = x + self.mixer(self.norm1(x.to(self.norm1.weight.dtype)), time=time)
        y: Tensor = x + self.mlp(self.norm2(x.to(self.norm2.weight.dtype)))
        return y


class TiedEmbedding(nn.Embedding):
    """Embeddings that are the head as well: ids `(...)` give `(..., D)`, features `(..., D)` give logits."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight) if input.is_floating_point() else super().forward(input)


class _Embeddings(nn.Module):
    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.word_embeddings = TiedEmbedding(vocab_size, width)

    def forward(self, ids: Tensor) -> Tensor:
        return embed(self.word_embeddings, ids)


class _Backbone(nn.Module):
    def __init__(self, config: Mapping[str, Any], vocab_size: int) -> None:
        super().__init__()
        self.embeddings = _Embeddings(vocab_size, config["d_model"])
        self.layers = nn.ModuleList(_Block(config) for _ in range(config["n_layer"]))
        self.ln_f = nn.LayerNorm(config["d_model"], config.get("layer_norm_epsilon", 1e-5))

    def forward(self, ids: Tensor, *, time: Time = whole) -> Tensor:
        x = apart(lambda ids: at_least_float32(self.embeddings(ids)), ids, time)
        for layer in self.layers:
            x = across(layer, x, time)
        return apart(lambda x: self.ln_f(x.to(self.ln_f.weight.dtype)), x, time)


HUB_NAMES = {
    "l_max": "max_seq_len",
    "order": "hyena_order",
    "w": "activation_freq",
    "emb_dim": "emb_dim",
    "filter_order": "filter_order",
    "num_inner_mlps": "num_inner_mlps",
    "short_filter_order": "short_filter_order",
    "use_bias": "use_bias",
}
"""Settings of the operator: where the Hugging Face checkpoints' flat configuration has them."""


def operator_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The operator's settings from `layer`, or from the flat configuration of the Hugging Face
    checkpoints.
    """
    if config.get("layer") is not None:
        return dict(config["layer"])
    if "max_seq_len" not in config:
        raise KeyError("layer")
    return {name: config[hub] for name, hub in HUB_NAMES.items() if hub in config}


class HyenaDNA(LanguageModel):
    """HyenaDNA with upstream's parameter names; the embedding is the head.

    Args:
        config: upstream's own, or that of the Hugging Face checkpoints (`max_seq_len` and so on in place of
            `layer`): `d_model`, `n_layer`, `vocab_size`, `layer` with the settings of the Hyena operator
            (`l_max` among them); optional `d_inner`, `pad_vocab_size_multiple`, `layer_norm_epsilon`. The
            vocabulary of the logits is rounded up to that multiple.
    """

    kind = "hyenadna_lm"

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        check(config, self.kind)
        refuse(config, attn_layer_idx=(None, []), max_position_embeddings=(0, None), use_head=(False,))
        # Upstream's defaults: the standalone file's, and the hub's for its flat configuration.
        multiple = 1 if config.get("layer") else 8
        config = {"pad_vocab_size_multiple": multiple, **config, "layer": operator_settings(config)}
        self.config = self.labelled(config)
        multiple = config["pad_vocab_size_multiple"]
        self.vocab_size = math.ceil(config["vocab_size"] / multiple) * multiple
        self.max_length = length = config["layer"]["l_max"]
        self.features = config["d_model"]
        self.backbone = _Backbone(config, self.vocab_size)
        operator = config["layer"]
        per_layer = (operator.get("order", 2) - 1) * (length - 1) + operator.get("short_filter_order", 3) - 1
        self.reach = 1 + config["n_layer"] * per_layer
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Upstream's initialisation: normal with 0.02, the last projections of a block scaled down by
        depth."""
        for name, parameter in self.named_parameters():
            last = name.endswith(("out_proj.weight", "fc2.weight"))
            if last:
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config["n_layer"]))
            elif name.endswith(("in_proj.weight", "fc1.weight", "word_embeddings.weight")):
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith(("_proj.bias", "fc1.bias", "fc2.bias")):
                nn.init.zeros_(parameter)

    @property
    def alphabet(self) -> Alphabet | None:
        return NUCLEOTIDES

    def hidden(self, ids: Tensor, time: Time) -> Tensor:
        y: Tensor = self.backbone(ids, time=time)
        return y

    def head(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.backbone.embeddings.word_embeddings(hidden)
        return logits


def build_hyenadna(config: Mapping[str, Any], state: dict[str, Tensor]) -> HyenaDNA:
    """HyenaDNA from upstream's tensors; a tied `lm_head.weight` beside the embedding is taken for what it
    is."""
    head, embedding = state.pop("lm_head.weight", None), "backbone.embeddings.word_embeddings.weight"
    if head is not None and not same(head, state.setdefault(embedding, head)):
        raise ValueError(f"state: expected lm_head.weight to equal the word embeddings ({embedding})")
    # What the trainer measured is saved beside the weights.
    return fit(lambda: HyenaDNA(config), state, ignored=lambda name: "torchmetrics" in name)
