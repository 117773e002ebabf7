"""Generate from a full-size configuration with random weights: what it takes in memory and time.

    python examples/full_size.py hyenadna-large-1m --prompt 32768 --new 500

A checkpoint costs the same as random weights: `ff.models.load(folder)` in place of the line that makes the
    model.
"""

from __future__ import annotations

import argparse
import resource
import time

import futurefill_rs as ff
import torch


def hyenadna(width: int, layers: int, l_max: int) -> dict[str, object]:
    layer = {"emb_dim": 5, "filter_order": 64, "l_max": l_max + 2, "w": 10}
    return {
        "kind": "hyenadna_lm",
        "d_model": width,
        "n_layer": layers,
        "d_inner": 4 * width,
        "vocab_size": 12,
        "pad_vocab_size_multiple": 8,
        "layer": layer,
    }


CONFIGURATIONS = {
    "hyenadna-tiny-1k": hyenadna(128, 2, 1024),
    "hyenadna-small-32k": hyenadna(256, 4, 32768),
    "hyenadna-medium-160k": hyenadna(256, 8, 160000),
    "hyenadna-large-1m": hyenadna(256, 8, 1_000_000),
}


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("name", choices=CONFIGURATIONS)
    parser.add_argument("--prompt", type=int, default=32768)
    parser.add_argument("--new", type=int, default=500)
    parser.add_argument("--method", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    start = time.perf_counter()
    model = ff.models.HyenaDNA(CONFIGURATIONS[options.name]).eval()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{options.name}: {parameters / 1e6:.1f} M parameters, made in {time.perf_counter() - start:.1f} s")
    print(f"  peak memory {peak_megabytes():.0f} MB")

    prompt = torch.randint(7, 11, (1, options.prompt))
    with torch.inference_mode():
        start = time.perf_counter()
        logits, cache = model.read_prompt(prompt, options.new, method=options.method)
        print(f"prompt of {options.prompt} read in {time.perf_counter() - start:.1f} s")
        print(f"  cache {cache.nbytes / 1e6:.1f} MB, peak memory {peak_megabytes():.0f} MB")
        seconds = []
        for _ in range(options.new):
            start = time.perf_counter()
            logits = model.step(logits[:, 7:11].argmax(-1) + 7, cache)
            seconds.append(time.perf_counter() - start)
    seconds.sort()
    print(
        f"{options.new} bases: median {1e3 * seconds[len(seconds) // 2]:.2f} ms, "
        f"worst {1e3 * seconds[-1]:.1f} ms, {sum(seconds):.1f} s in all"
    )


if __name__ == "__main__":
    main()
