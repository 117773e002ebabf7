"""Write a small model in the format of the Evo 2 checkpoints: a configuration in YAML and a .pt file.

    python examples/evo2_checkpoint.py evo2_tiny

The names of the tensors, the settings and the order of the rows of queries, keys and values are those that
upstream's code (vortex) reads; the weights are random, so what the model says means nothing. `--parts 3` cuts
the file as the larger checkpoints are cut.
"""

from __future__ import annotations

import argparse
import io
import pickle
from pathlib import Path

import torch

SETTINGS = """\
model_name: evo2_tiny
vocab_size: 512
hidden_size: 64
num_filters: 64
attn_layer_idxs: [3]
hcl_layer_idxs: [2]
hcm_layer_idxs: [1]
hcs_layer_idxs: [0]
hcm_filter_length: 128
hcl_filter_groups: 64
hcm_filter_groups: 4
hcs_filter_groups: 4
hcs_filter_length: 7
num_layers: 4
short_filter_length: 3
num_attention_heads: 4
short_filter_bias: false
mlp_init_method: torch.nn.init.zeros_
eps: 0.000001
state_size: 16
rotary_emb_base: 1000000
proj_groups: 1
hyena_filter_groups: 4
column_split_hyena: false
column_split: true
interleave: true
evo2_style_activations: true
inner_mlp_size: 192
make_vocab_size_divisible_by: 8
tie_embeddings: true
mha_out_proj_bias: true
hyena_out_proj_bias: true
qkv_proj_bias: false
final_norm: true
max_seqlen: 8192
use_fp8_input_projections: {fp8}
"""
VOCABULARY, WIDTH, INNER, GROUPS, MODES = 512, 64, 192, 4, 16


def tensors() -> dict[str, object]:
    """Upstream's `state_dict`: linear layers and embeddings in bfloat16, filters in float32."""

    def linear(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns).mul(columns**-0.5).bfloat16()

    state: dict[str, object] = {"embedding_layer.weight": linear(VOCABULARY, WIDTH)}
    state["unembed.weight"] = state["embedding_layer.weight"]
    state["norm.scale"] = torch.ones(WIDTH).bfloat16()
    for i, kind in enumerate(("hcs", "hcm", "hcl", "attention")):
        block = f"blocks.{i}."
        state[block + "pre_norm.scale"] = torch.ones(WIDTH).bfloat16()
        state[block + "post_norm.scale"] = torch.ones(WIDTH).bfloat16()
        state[block + "mlp.l1.weight"] = linear(INNER, WIDTH)
        state[block + "mlp.l2.weight"] = linear(INNER, WIDTH)
        state[block + "mlp.l3.weight"] = linear(WIDTH, INNER)
        if kind == "attention":
            state[block + "inner_mha_cls.Wqkv.weight"] = linear(3 * WIDTH, WIDTH)
            state[block + "inner_mha_cls.out_proj.weight"] = linear(WIDTH, WIDTH)
            state[block + "inner_mha_cls.out_proj.bias"] = torch.zeros(WIDTH).bfloat16()
            continue
        state[block + "projections.weight"] = linear(3 * WIDTH, WIDTH)
        # What the library for 8-bit projections saves beside them.
        state[block + "projections._extra_state"] = io.BytesIO(pickle.dumps({}))
        state[block + "out_filter_dense.weight"] = linear(WIDTH, WIDTH)
        state[block + "out_filter_dense.bias"] = torch.zeros(WIDTH).bfloat16()
        state[block + "filter.short_filter_weight"] = torch.randn(3 * WIDTH, 1, 3).mul(0.5).bfloat16()
        if kind == "hcs":
            state[block + "filter.h"] = torch.randn(GROUPS, 1, 7).mul(0.4).bfloat16()
        else:
            state[block + "filter.D"] = torch.randn(WIDTH).bfloat16()
        if kind == "hcm":
            state[block + "filter.h"] = torch.randn(GROUPS, 1, 128) * 0.1
        if kind == "hcl":
            decays = -(10 ** torch.linspace(-3, 0, MODES))
            state[block + "filter.log_poles"] = decays.repeat(WIDTH, 1).unsqueeze(-1)
            state[block + "filter.residues"] = torch.randn(WIDTH, MODES) / MODES
    return state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parts", type=int, default=1, help="files that the checkpoint is cut into")
    parser.add_argument("--fp8", action="store_true", help="say that it was trained with 8-bit projections")
    options = parser.parse_args()
    torch.manual_seed(0)
    options.folder.mkdir(parents=True, exist_ok=True)
    settings = SETTINGS.format(fp8="true" if options.fp8 else "false")
    (options.folder / "config.yml").write_text(settings, encoding="utf-8")
    file = options.folder / "evo2_tiny.pt"
    torch.save(tensors(), file)
    if options.parts > 1:
        content = file.read_bytes()
        size = -(-len(content) // options.parts)
        for i in range(options.parts):
            file.with_name(f"{file.name}.part{i}").write_bytes(content[i * size : (i + 1) * size])
        file.unlink()
    print(f"wrote {', '.join(sorted(path.name for path in options.folder.iterdir()))} to {options.folder}")


if __name__ == "__main__":
    main()
