"""FlashSTU: a language model of spectral transform units (Liu et al., 2024; flash-stu-2's `model.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from futurefill_rs.models._base import LanguageModel, embed
from futurefill_rs.models._io import fit, same
from futurefill_rs.models._layers import computed_filters, refuse_tiles
from futurefill_rs.models._settings import check
from futurefill_rs.nn.attention import SlidingWindowAttention
from futurefill_rs.nn.protocol import Time, whole
from futurefill_rs.nn.reading import across, apart
from futurefill_rs.nn.stu import STU, check_phi, spectral_filters


class GatedMLP(nn.Module):
    """`down(gelu_tanh(gate(x)) * up(x))`, without biases unless asked for."""

    def __init__(self, width: int, hidden: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=bias)
        self.up_proj = nn.Linear(width, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))
        return y


def _window(config: Mapping[str, Any]) -> int:
    """Earlier positions that attention sees: `window_size`, or the first of a pair for both sides."""
    window = config.get("window_size", 1024)
    if not isinstance(window, tuple | list):
        return int(window)
    if len(window) != 2 or window[1] != 0:
        raise ValueError(f"config: expected window_size to be a number or a pair (number, 0), got {window}")
    return int(window[0])


class STUBlock(nn.Module):
    """`x + stu(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width = config["n_embd"]
        self.stu_norm = nn.RMSNorm(width)
        self.stu = STU(
            width,
            config["num_eigh"],
            config["seq_len"],
            config.get("use_hankel_L", False),
            config.get("use_approx", True),
            shared=True,
        )
        self.mlp_norm = nn.RMSNorm(width)
        self.mlp = GatedMLP(width, width * config["mlp_scale"], config.get("bias", False))

    def forward(self, x: Tensor, *, phi: Tensor, time: Time = whole) -> Tensor:
        x = x + self.stu(self.stu_norm(x), time=time, phi=phi)
        y: Tensor = x + self.mlp(self.mlp_norm(x))
        return y


class AttentionBlock(nn.Module):
    """`x + attn(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width, bias = config["n_embd"], config.get("bias", False)
        self.attn_norm = nn.RMSNorm(width)
        self.attn = SlidingWindowAttention(
            width,
            config["n_heads"],
            _window(config),
            softcap=config.get("softcap", 50.0),
            bias=bias,
        )
        self.mlp_norm = nn.RMSNorm(width)
        self.mlp = GatedMLP(width, width * config["mlp_scale"], bias)

    def forward(self, x: Tensor, *, phi: Tensor, time: Time = whole) -> Tensor:
        x = x + self.attn(self.attn_norm(x), time=time)
        y: Tensor = x + self.mlp(self.mlp_norm(x))
        return y


class FlashSTU(LanguageModel):
    """FlashSTU with upstream's parameter names.

    With `use_attn` every second layer is attention over a sliding window (flash-stu's hybrid).

    Args:
        config: `n_embd`, `n_layers`, `seq_len`, `vocab_size`, `mlp_scale`, `num_eigh`; optional
            `use_hankel_L` (False), `use_approx` (True), `bias` (False), `use_attn` (False) and with it
            `n_heads`, `window_size` (1024, or a pair with 0) and `softcap` (50); `tie_word_embeddings`
            (True).
        phi: the spectral filters `(seq_len, num_eigh)`; computed for a new model, see `spectral_filters`.

    State: `phi`, `tok_emb.weight`, `layers.i.{stu_norm,mlp_norm}.weight`, `layers.i.stu.*`, `layers.i.mlp.*`,
    `norm.weight`, and `lm_head.weight`, which is the embedding unless untied; attention layers have
    `attn_norm.weight` and `attn.{c_attn,c_proj}.weight` in place of the STU's.
    """

    kind = "flash_stu_lm"
    phi: Tensor

    def __init__(self, config: Mapping[str, Any], *, phi: Tensor | None = None) -> None:
        super().__init__()
        check(config, self.kind)
        if config.get("stu_enable_mlp_sandwich", False):
            raise ValueError("config: expected stu_enable_mlp_sandwich to be false, got true")
        refuse_tiles(config)
        self.config = self.labelled(config)
        self.features = width = config["n_embd"]
        self.vocab_size, self.max_length = config["vocab_size"], config["seq_len"]
        # Made on no device, a model waits for its tensors; phi would be minutes of work for nothing.
        self.phi_is_set = phi is not None or torch.get_default_device().type != "meta"
        if not self.phi_is_set:
            phi = torch.empty(config["seq_len"], config["num_eigh"])
        if phi is None:
            phi = spectral_filters(config["seq_len"], config["num_eigh"], config.get("use_hankel_L", False))
        check_phi(phi, config["seq_len"], config["num_eigh"])
        self.register_buffer("phi", phi.clone())
        self.tok_emb = nn.Embedding(self.vocab_size, width)
        hybrid = config.get("use_attn", False)
        self.layers = nn.ModuleList(
            AttentionBlock(config) if hybrid and i % 2 else STUBlock(config)
            for i in range(config["n_layers"])
        )
        window = _window(config)
        self.reach = 1 + sum(
            config["seq_len"] - 1 if isinstance(layer, STUBlock) else window for layer in self.layers
        )
        self.norm = nn.RMSNorm(width)
        self.lm_head = nn.Linear(width, self.vocab_size, bias=config.get("bias", False))
        if config.get("tie_word_embeddings", True):
            self.lm_head.weight = self.tok_emb.weight
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Upstream's initialisation: normal with standard deviation `n_embd**-0.5`, Xavier for the STU."""
        std = self.config["n_embd"] ** -0.5
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=std)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, STU):
                module.reset_parameters()

    def hidden(self, ids: Tensor, time: Time) -> Tensor:
        x = apart(lambda ids: embed(self.tok_emb, ids), ids, time)
        for layer in self.layers:
            x = across(layer, x, time, phi=self.phi)
        return apart(self.norm, x, time)

    def head(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(hidden)
        return logits


def build_flash_stu(config: Mapping[str, Any], state: dict[str, Tensor]) -> FlashSTU:
    """FlashSTU from upstream's tensors; phi may be missing (flash-stu 1 never saves it) and is recomputed.

    A head with values of its own unties it from the embedding, unless the configuration says that it is tied.
    """
    head, embedding = state.get("lm_head.weight"), state.get("tok_emb.weight")
    if head is not None and embedding is not None and not same(head, embedding):
        config = {"tie_word_embeddings": False, **config}
    model = fit(lambda: FlashSTU(config), state, computed=computed_filters(config))
    model.phi_is_set = True
    return model
