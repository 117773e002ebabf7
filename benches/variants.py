"""All single-base variants of a window: `score_variants` beside `model.score` of each variant alone.

    python benches/variants.py --model hyenadna --window 1024

Random weights, one thread, side by side. Groups of neighbouring variants are timed at the middles of equal
parts of the window, so that their mean is that of all; the reference, which is read once for all variants of
a window, is counted in each group's time in full, so that the ratio for the whole window is larger.
"""

from __future__ import annotations

import argparse
import time

import futurefill_rs as ff
import torch


def hyenadna(window: int) -> ff.models.LanguageModel:
    layer = {"emb_dim": 5, "filter_order": 64, "l_max": window + 2, "w": 10}
    config = {"d_model": 256, "n_layer": 4, "vocab_size": 12, "pad_vocab_size_multiple": 8, "layer": layer}
    return ff.models.HyenaDNA(config)


def evo2(window: int) -> ff.models.LanguageModel:
    config = {"hcs_layer_idxs": [0], "hcm_layer_idxs": [1], "hcl_layer_idxs": [2], "attn_layer_idxs": [3]}
    config |= {"vocab_size": 512, "hidden_size": 256, "inner_mlp_size": 688, "num_layers": 4}
    config |= {"num_attention_heads": 4, "short_filter_length": 3, "state_size": 16, "eps": 1e-6}
    config |= {"hcs_filter_length": 7, "hcm_filter_length": 128, "hcs_filter_groups": 16}
    config |= {"hcm_filter_groups": 16, "interleave": True, "column_split_hyena": False}
    config |= {"evo2_style_activations": True, "tie_embeddings": True}
    config |= {"qkv_proj_bias": False, "hyena_out_proj_bias": True}
    return ff.models.StripedHyena2(config)


MODELS = {"hyenadna": hyenadna, "evo2": evo2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="hyenadna")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--groups", type=int, default=3)
    parser.add_argument("--size", type=int, default=32, help="variants in a group")
    parser.add_argument("--batch-size", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = MODELS[options.model](options.window).eval()
    text = "".join("ACGT"[i] for i in torch.randint(0, 4, (options.window,)).tolist())
    variants = [(i, text[i], base) for i in range(len(text)) for base in "ACGT" if base != text[i]]
    model.score(text)
    together = alone = worst = 0.0
    for i in range(options.groups):
        place = (2 * i + 1) * len(variants) // (2 * options.groups) - options.size // 2
        group = variants[max(0, place) : place + options.size]
        start = time.perf_counter()
        found = ff.score_variants(model, text, group, batch_size=options.batch_size)
        between = time.perf_counter()
        whole = [text[:at] + base + text[at + 1 :] for at, _, base in group]
        # A quarter of them, evenly spread: each takes the same time alone.
        want = torch.stack([model.score(each, reduce="sum") for each in whole[::4]])
        alone += (time.perf_counter() - between) / len(want)
        together += (between - start) / len(group)
        worst = max(worst, float((found[::4] - want).abs().max()))
    print(
        f"{options.model}, window of {options.window}: {1e3 * alone / options.groups:.1f} ms a variant "
        f"alone, {1e3 * together / options.groups:.1f} ms together, ratio {alone / together:.2f}, "
        f"largest difference {worst:.1e}"
    )


if __name__ == "__main__":
    main()
