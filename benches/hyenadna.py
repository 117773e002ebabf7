"""Time per token of a HyenaDNA with random weights, where it goes, and what recomputing every token would
cost.

    python benches/hyenadna.py --layers 8 --width 256 --lengths 1024,16384,131072

"recompute" is what a model without a cache does for one more token: its forward pass over the whole
sequence, with convolutions through torch.fft at twice the length, as in upstream's `standalone_hyenadna.py`.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from typing import Any

import futurefill_rs as ff
import torch
from futurefill_rs import models
from futurefill_rs.nn import _linear, _operators


def upstream_convolution(u: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
    length = u.shape[-1]
    spectrum = torch.fft.rfft(u, n=2 * length) * torch.fft.rfft(filters, n=2 * length)
    return torch.fft.irfft(spectrum, n=2 * length)[..., :length]


def recompute_seconds(model: Any, length: int) -> float:
    ids = torch.randint(7, 11, (1, length))
    ours, ff.causal_conv = ff.causal_conv, upstream_convolution
    try:
        start = time.perf_counter()
        with torch.inference_mode():
            model(ids)
        return time.perf_counter() - start
    finally:
        ff.causal_conv = ours


class Shares:
    """Seconds spent in the convolutions and in the projections of steps."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def timed(self, name: str, function: Any) -> Any:
        def run(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments)
            self.seconds[name] += time.perf_counter() - start
            return result

        return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--lengths", default="1024,16384")
    parser.add_argument("--tokens", type=int, default=512, help="tokens measured for each length")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-recompute", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(
        f"HyenaDNA {options.layers} x {options.width}, {options.threads} thread(s), torch {torch.__version__}"
    )
    columns = ("length", "prefill s", "ms per token: median, mean", "convolution", "projections", "rest")
    print(" | ".join([*columns, "cache MB", "recompute ms"]))
    for length in map(int, options.lengths.split(",")):
        layer = {"emb_dim": 5, "filter_order": 64, "l_max": length, "w": 10}
        model = models.HyenaDNA(
            {
                "d_model": options.width,
                "n_layer": options.layers,
                "vocab_size": 12,
                "pad_vocab_size_multiple": 8,
                "layer": layer,
            }
        ).eval()
        prompt = torch.randint(7, 11, (1, 16))
        shares = Shares()
        with torch.inference_mode():
            start = time.perf_counter()
            logits, cache = model.read_prompt(prompt, length - 16)
            prefill = time.perf_counter() - start
            for state in cache._states:
                if isinstance(state, _operators.ConvolutionState):
                    state.step = shares.timed("convolution", state.step)
            plain = _linear.Linear.forward
            _linear.Linear.forward = shares.timed("projections", plain)  # type: ignore[method-assign]
            tokens = min(options.tokens, length - 16)
            seconds = []
            for _ in range(tokens):
                start = time.perf_counter()
                logits = model.step(logits[:, 7:11].argmax(-1) + 7, cache)
                seconds.append(time.perf_counter() - start)
            _linear.Linear.forward = plain  # type: ignore[method-assign]
        mean = sum(seconds) / tokens
        parts = {name: spent / tokens for name, spent in shares.seconds.items()}
        rest = mean - sum(parts.values())
        size, median = cache.nbytes / 1e6, sorted(seconds)[tokens // 2]
        del cache
        again = "" if options.no_recompute else f"{1e3 * recompute_seconds(model, length):.0f}"
        times = [1e3 * parts["convolution"], 1e3 * parts["projections"], 1e3 * rest]
        shown = [f"{length}", f"{prefill:.2f}", f"{1e3 * median:.2f}, {1e3 * mean:.2f}"]
        shown += [f"{part:.2f}" for part in times]
        print(" | ".join([*shown, f"{size:.0f}", again]), flush=True)


if __name__ == "__main__":
    main()
