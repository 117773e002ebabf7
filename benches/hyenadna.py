"""Time per token of a HyenaDNA with random weights, where it goes, and what recomputing every token would
cost.

    python benches/hyenadna.py --layers 8 --width 256 --lengths 1024,16384,131072
    python benches/hyenadna.py --lengths 1024 --batch-sizes 1,8 --no-recompute
    python benches/hyenadna.py --lengths 1024,16384,131072 --upstream path/to/hyena-dna

What a model without a cache does for one more token is its forward pass over the whole sequence. With
`--upstream`, a checkout of HazyResearch/hyena-dna (which needs einops and transformers), that is upstream's
own `standalone_hyenadna.py`: its weights are loaded into ours by their names, and the largest differences
of the logits are printed, of our forward at every position and of our steps at those measured. Without it,
"recompute" is our forward with convolutions through torch.fft at twice the length, as upstream has them.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections import defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

import futurefill_rs as ff
import torch
from futurefill_rs import models
from futurefill_rs.nn.operators.convolution import ConvolutionState


def upstream_convolution(u: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
    length = u.shape[-1]
    spectrum = torch.fft.rfft(u, n=2 * length) * torch.fft.rfft(filters, n=2 * length)
    y: torch.Tensor = torch.fft.irfft(spectrum, n=2 * length)[..., :length]
    return y


def recompute_seconds(model: Any, length: int) -> float:
    ids = torch.randint(7, 11, (1, length))
    ours = ff.causal_conv
    ff.causal_conv = upstream_convolution  # type: ignore[assignment]
    try:
        start = time.perf_counter()
        with torch.inference_mode():
            model(ids)
        return time.perf_counter() - start
    finally:
        ff.causal_conv = ours


def upstream_module(checkout: str) -> ModuleType:
    """`standalone_hyenadna.py` of a checkout of HazyResearch/hyena-dna."""
    file = Path(checkout) / "standalone_hyenadna.py"
    if not file.is_file():
        sys.exit(f"--upstream: expected a checkout of HazyResearch/hyena-dna, found no {file}")
    spec = importlib.util.spec_from_file_location("standalone_hyenadna", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    stand_ins: dict[str, ModuleType] = {}
    try:
        # Before the stand-in, which it would take for the real thing.
        importlib.import_module("transformers.tokenization_utils")
        if importlib.util.find_spec("torchvision") is None:
            # Upstream imports it for its stochastic depth alone, which is the identity in evaluation.
            ops: Any = ModuleType("torchvision.ops")
            ops.StochasticDepth = lambda p, mode: torch.nn.Identity()
            stand_ins = {"torchvision": ModuleType("torchvision"), "torchvision.ops": ops}
            sys.modules.update(stand_ins)
        spec.loader.exec_module(module)
    except ImportError as error:
        sys.exit(f"--upstream: {file} cannot be imported: {error}")
    finally:
        for name in stand_ins:
            del sys.modules[name]
    return module


def upstream_logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits `(B, T, V)`: upstream's module ends at the hidden states, the embedding is the head."""
    embedding = model.get_parameter("backbone.embeddings.word_embeddings.weight")
    return torch.nn.functional.linear(model(ids), embedding)


def beside_upstream(
    upstream: torch.nn.Module, model: Any, length: int, written: torch.Tensor, steps: torch.Tensor
) -> str:
    """Milliseconds of upstream's forward at `length`, and how far its logits and ours are apart.

    Args:
        written: ids `(1, n)` that the steps read.
        steps: logits `(1, m, V)` of the steps at the last m of them.
    """
    ids = torch.cat([written, torch.randint(7, 11, (1, length - written.shape[1]))], 1)
    seconds: list[float] = []
    try:
        with torch.inference_mode():
            while len(seconds) < 3 and sum(seconds) < 60:
                start = time.perf_counter()
                theirs = upstream_logits(upstream, ids)
                seconds.append(time.perf_counter() - start)
            ours = model(ids)
    except (MemoryError, RuntimeError) as error:
        return f"skipped: {str(error).partition(chr(10))[0]}"
    stop = written.shape[1]
    stepped = (theirs[:, stop - steps.shape[1] : stop] - steps).abs().max()
    milliseconds = 1e3 * sorted(seconds)[len(seconds) // 2]
    return (
        f"{milliseconds:.0f} | forward {(theirs - ours).abs().max():.1e}, steps {stepped:.1e} "
        f"(largest logit {theirs.abs().max():.2f})"
    )


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
    parser.add_argument("--batch-sizes", default="1", help="rows of a step; recomputing is for one row")
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512, help="tokens measured for each length")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-recompute", action="store_true")
    parser.add_argument(
        "--upstream", metavar="PATH", help="checkout of HazyResearch/hyena-dna to measure beside"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(
        f"HyenaDNA {options.layers} x {options.width}, {options.threads} thread(s), torch {torch.__version__}"
    )
    upstream = None if options.upstream is None else upstream_module(options.upstream)
    columns = [
        "length",
        "rows",
        "prefill s",
        "ms per token: median, mean",
        "convolution",
        "projections",
        "rest",
    ]
    columns.append("cache MB")
    if upstream is None:
        print("upstream's own forward is not measured: give a checkout of hyena-dna with --upstream PATH")
        columns += [] if options.no_recompute else ["recompute ms"]
    else:
        columns += ["upstream forward ms", "largest difference of logits"]
    print(" | ".join(columns))
    for length in map(int, options.lengths.split(",")):
        layer = {"emb_dim": 5, "filter_order": 64, "l_max": length, "w": 10}
        config: dict[str, Any] = {
            "d_model": options.width,
            "n_layer": options.layers,
            "d_inner": 4 * options.width,
            "vocab_size": 12,
            "pad_vocab_size_multiple": 8,
            "layer": layer,
        }
        if upstream is None:
            model: Any = models.HyenaDNA(config).eval()
        else:
            # Upstream writes into the settings of the layer.
            theirs = upstream.HyenaDNAModel(**{**config, "layer": dict(layer)}).eval()
            model = models.build({"kind": "hyenadna_lm", **config}, theirs.state_dict())
        for rows in map(int, options.batch_sizes.split(",")):
            written, steps, shown = generated(model, rows, length, options)
            if upstream is not None:
                row = slice(0, 1)
                shown.append(beside_upstream(theirs, model, length, written[row], steps[row]))
            elif not options.no_recompute:
                shown.append(f"{1e3 * recompute_seconds(model, length):.0f}")
            print(" | ".join([f"{length}", f"{rows}", *shown]), flush=True)


def generated(
    model: Any, rows: int, length: int, options: argparse.Namespace
) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Ids `(rows, n)` that were read, logits `(rows, m, V)` of the m steps, and what is shown of them."""
    ids = [torch.randint(7, 11, (rows, options.prompt))]
    shares = Shares()
    with torch.inference_mode():
        start = time.perf_counter()
        logits, cache = model.read_prompt(ids[0], length - options.prompt)
        prefill = time.perf_counter() - start
        for state in cache._states:
            if isinstance(state, ConvolutionState):
                state.step = shares.timed("convolution", state.step)
        plain = torch.nn.Linear.forward
        torch.nn.Linear.forward = shares.timed("projections", plain)  # type: ignore[method-assign]
        tokens = min(options.tokens, length - options.prompt)
        seconds, steps = [], []
        for _ in range(tokens):
            start = time.perf_counter()
            new = logits[:, 7:11].argmax(-1) + 7
            logits = model.step(new, cache)
            seconds.append(time.perf_counter() - start)
            ids.append(new.unsqueeze(1))
            steps.append(logits)
        torch.nn.Linear.forward = plain  # type: ignore[method-assign]
    mean, median = sum(seconds) / tokens, sorted(seconds)[tokens // 2]
    parts = {name: shares.seconds[name] / tokens for name in ("convolution", "projections")}
    parts["rest"] = mean - sum(parts.values())
    shown = [f"{prefill:.2f}", f"{1e3 * median:.2f}, {1e3 * mean:.2f}"]
    shown += [f"{1e3 * part:.2f}" for part in parts.values()]
    return torch.cat(ids, 1), torch.stack(steps, 1), [*shown, f"{cache.nbytes / 1e6:.0f}"]


if __name__ == "__main__":
    main()
