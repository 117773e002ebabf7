"""Evo 1 is StripedHyena 1: upstream's configurations of 8k and 131k in small, their tokenizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from futurefill_rs import models
from futurefill_rs.models._long import read_pieces
from models_common import error, inputs, stepped
from torch.nn import functional as F

EVO_1: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 32,
    "num_filters": 32,
    "max_sequence_len": 8192,
    "attn_layer_idxs": [1],
    "hyena_layer_idxs": [0, 2, 3],
    "num_layers": 4,
    "short_filter_length": 3,
    "num_attention_heads": 4,
    "short_filter_bias": True,
    "eps": 1.0e-6,
    "state_size": 8,
    "inner_size_multiple_of": 16,
    "smeared_gqa": False,
    "make_vocab_size_divisible_by": 8,
    "log_intermediate_values": False,
    "proj_groups": 1,
    "hyena_filter_groups": 1,
    "split_k0": True,
    "model_parallel_size": 1,
    "pile_parallel_size": 1,
    "tie_embeddings": True,
    "inner_mlp_size": None,
    "mha_out_proj_bias": True,
    "qkv_proj_bias": True,
    "final_norm": True,
    "use_flash_attn": True,
    "column_split": True,
    "inference_mode": True,
    "tokenizer_type": "CharLevelTokenizer",
    "prefill_style": "fft",
    "mlp_activation": "gelu",
}
LONG = {**EVO_1, "use_interpolated_rotary_pos_emb": True, "rotary_emb_scaling_factor": 16}


def saved(folder, config: dict[str, Any]) -> models.StripedHyena:
    """A folder as upstream has it: YAML without a kind, tensors with rotary frequencies and times."""
    yaml = pytest.importorskip("yaml")
    torch.manual_seed(0)
    model = models.StripedHyena(config).eval()
    state = dict(model.state_dict())
    state["blocks.1.inner_mha_cls.rotary_emb.inv_freq"] = torch.zeros(4)
    state["blocks.0.filter.t"] = torch.zeros(1, 1, 100)
    (folder / "evo-1.yml").write_text(yaml.safe_dump(config))
    torch.save(state, folder / "evo-1.pt")
    return model


@pytest.mark.parametrize("config", [EVO_1, LONG], ids=["8k", "131k"])
def test_a_folder_of_upstream_loads_reads_scores_and_generates(tmp_path, config):
    made = saved(tmp_path, config)
    model = models.load(tmp_path).eval()
    assert isinstance(model, models.StripedHyena)
    assert model.max_length is None
    ids = inputs(model, 60)
    want = made(ids).detach()
    assert error(model(ids), want) < 1e-6
    assert error(torch.cat([y for _, y in read_pieces(model, ids, piece=16)], 1), want) < 1e-5
    for prompt in (1, 2, 40):
        y, cache = model.prefill(ids[:, :prompt], 60 - prompt)
        assert error(torch.cat([y, stepped(model, ids, cache, prompt)], 1), want) < 1e-5


def test_131k_turns_by_positions_divided_by_16(tmp_path):
    """The attention as its definition, with every position a sixteenth."""
    attention = saved(tmp_path, LONG).blocks[1].inner_mha_cls
    x = torch.randn(2, 30, 32)
    q, k, v = attention.Wqkv(x).view(2, 30, 3, 4, 8).permute(2, 0, 3, 1, 4)
    angle = torch.arange(30.0)[:, None] / 16 * 10000.0 ** (-torch.arange(0, 8, 2) / 8)

    def turned(u):
        a, b = u.chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)

    y = F.scaled_dot_product_attention(turned(q), turned(k), v, is_causal=True)
    assert error(attention(x), attention.out_proj(y.transpose(1, 2).flatten(2))) < 1e-5


def test_sizes_of_the_published_models():
    config = {**LONG, "hidden_size": 4096, "num_layers": 32, "num_attention_heads": 32}
    config |= {"attn_layer_idxs": [8, 16, 24], "hyena_layer_idxs": None}
    with torch.device("meta"):
        model = models.StripedHyena(config)
    assert sum(p.numel() for p in model.parameters()) // 10**8 == 64
    assert model.blocks[0].mlp.l1.weight.shape == (10928, 4096)
    assert model.blocks[0].filter.poles.shape == (4096, 8, 1, 2)


def test_the_tokenizer_is_that_of_evo_2():
    hf = pytest.importorskip("futurefill_rs.hf")
    tokenizer = hf.Evo2Tokenizer()
    assert tokenizer("ACGT|`~é").input_ids == list("ACGT|`~é".encode())
    assert (tokenizer.vocab_size, tokenizer.eos_token_id, tokenizer.pad_token_id) == (512, 0, 1)
