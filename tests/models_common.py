"""Shared by the tests of layers and models: golden files, small random modules, comparisons."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from futurefill_rs import models
from futurefill_rs import nn as ffnn
from safetensors import safe_open
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(path.stem for path in GOLDEN.glob("*.safetensors"))
KEYS = dict[str, Tensor]


@functools.cache
def golden(name: str) -> tuple[dict[str, Any], KEYS, Tensor, Tensor]:
    """config, state, input and output of one golden file."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    state = {key.removeprefix("param."): t for key, t in tensors.items() if key.startswith("param.")}
    x = tensors.get("input", tensors.get("input_ids"))
    y = tensors.get("output", tensors.get("logits"))
    assert x is not None and y is not None
    return config, state, x, y


def build(name: str) -> nn.Module:
    config, state, _, _ = golden(name)
    return models.build(config, state)


def error(got: Tensor, want: Tensor) -> float:
    """Relative L2 error of the whole."""
    want = want.detach().double()
    return float((got.detach().double() - want).norm() / want.norm())


FLASH = dict(n_embd=16, n_layers=2, seq_len=48, vocab_size=19, mlp_scale=2, num_eigh=8)
HYBRID = dict(FLASH, n_layers=4, use_attn=True, n_heads=2, window_size=5)
DNA = dict(
    d_model=16,
    n_layer=2,
    d_inner=32,
    vocab_size=12,
    pad_vocab_size_multiple=8,
    layer=dict(emb_dim=5, filter_order=16, l_max=48, w=10, order=3),
)
STRIPED = dict(
    vocab_size=16,
    hidden_size=16,
    inner_mlp_size=24,
    num_layers=2,
    short_filter_length=3,
    short_filter_bias=True,
    num_attention_heads=2,
    state_size=4,
    eps=1e-5,
    hyena_filter_groups=1,
    column_split_hyena=True,
)
STRIPED_ATTENTION = dict(
    STRIPED,
    num_layers=4,
    num_attention_heads=4,
    proj_groups=2,
    attn_layer_idxs=[1, 3],
    hyena_layer_idxs=[0, 2],
    rotary_emb_base=500,
    use_interpolated_rotary_pos_emb=True,
    rotary_emb_scaling_factor=2.0,
    qkv_proj_bias=False,
    tie_embeddings=False,
)
STRIPED_2 = dict(
    vocab_size=40,
    hidden_size=16,
    inner_mlp_size=24,
    num_layers=4,
    num_attention_heads=4,
    attn_layer_idxs=[3],
    hcs_layer_idxs=[0],
    hcm_layer_idxs=[1],
    hcl_layer_idxs=[2],
    hcs_filter_length=7,
    hcm_filter_length=128,
    hcs_filter_groups=4,
    hcm_filter_groups=4,
    short_filter_length=3,
    state_size=16,
    eps=1e-6,
    column_split_hyena=False,
    interleave=True,
    evo2_style_activations=True,
    tie_embeddings=True,
    qkv_proj_bias=False,
    hyena_out_proj_bias=True,
)


def layer(name: str, seed: int = 0) -> Any:
    """A small random layer or model; the longest sequence any of them takes is 48."""
    torch.manual_seed(seed)
    makers: dict[str, Any] = {
        "causal_conv": lambda: ffnn.CausalConv(6, 20, bias=True),
        "stu": lambda: ffnn.STU(6, 5, 48),
        "stu_hankel_l": lambda: ffnn.STU(6, 5, 48, use_hankel_L=True),
        "stu_full": lambda: ffnn.STU(6, 5, 47, use_approx=False),
        "stu_full_hankel_l": lambda: ffnn.STU(6, 5, 48, use_hankel_L=True, use_approx=False),
        "hyena": lambda: ffnn.HyenaOperator(6, 48, order=3, filter_order=8),
        "hyena_dna": lambda: ffnn.HyenaOperator(6, 48, layout="o d", modulation_shift=0.05, filter_order=8),
        "long_conv": lambda: ffnn.LongConv(6, 48, lam=0.001, channels=2),
        "h3": lambda: ffnn.H3(6, 8, 48),
        "h3_heads": lambda: ffnn.H3(6, 8, 48, head_dim=3),
        "monarch_mixer": lambda: ffnn.MonarchMixer(6, 48, residual_long_conv=True),
        "hcs": lambda: ffnn.HyenaCascade(6, "hcs", filter_groups=2, interleave=True),
        "hcm": lambda: ffnn.HyenaCascade(6, "hcm", filter_groups=3, filter_length=24),
        "hcl": lambda: ffnn.HyenaCascade(6, "hcl", state_size=4, flip=True),
        "modal": lambda: ffnn.HyenaCascade(6, "modal", state_size=4, column_split=True, num_heads=2),
        "attention": lambda: ffnn.SlidingWindowAttention(6, 2, 7),
        "causal_attention": lambda: ffnn.CausalSelfAttention(16, 4, n_kv_heads=2),
        "flash_stu": lambda: models.FlashSTU(FLASH),
        "hybrid": lambda: models.FlashSTU(HYBRID),
        "hyenadna": lambda: models.HyenaDNA(DNA),
        "striped_hyena": lambda: models.StripedHyena(STRIPED),
        "striped_hyena_attention": lambda: models.StripedHyena(STRIPED_ATTENTION),
        "striped_hyena_2": lambda: models.StripedHyena2(STRIPED_2),
    }
    module = makers[name]()
    if name in ("hcm", "hcl", "modal", "striped_hyena", "striped_hyena_attention", "striped_hyena_2"):
        for key, parameter in module.named_parameters():
            if key.endswith("D"):
                nn.init.normal_(parameter)
    return module.eval()


LAYERS = [
    "causal_conv",
    "stu",
    "stu_hankel_l",
    "stu_full",
    "stu_full_hankel_l",
    "hyena",
    "hyena_dna",
    "long_conv",
    "h3",
    "h3_heads",
    "monarch_mixer",
    "hcs",
    "hcm",
    "hcl",
    "modal",
    "attention",
    "causal_attention",
]
MODELS = ["flash_stu", "hybrid", "hyenadna", "striped_hyena", "striped_hyena_attention", "striped_hyena_2"]


def inputs(
    module: Any, length: int, batch: int = 2, seed: int = 1, dtype: torch.dtype | None = None
) -> Tensor:
    """Random features or ids for a module."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(module, models.LanguageModel):
        return torch.randint(0, module.vocab_size, (batch, length), generator=generator)
    x = torch.randn(batch, length, module.width, generator=generator)
    return x if dtype is None else x.to(dtype)


def stepped(module: Any, x: Tensor, cache: Any, start: int = 0) -> Tensor:
    """Outputs of steps over positions start.. of x."""
    outputs = [module.step(x[:, t], cache) for t in range(start, x.shape[1])]
    return torch.stack(outputs, 1)
