"""(d) STU language models, pure and hybrid: seconds for L new tokens from scratch, and where they go.

    python benches/paper/language_models.py [--preset small|full|large] [--docs]

FlashSTU with tensor-dot STU, 24 filters, mlp_scale 12, bfloat16 weights, batch 1, greedy, as in the paper's
experiments; weights and filters are random. The convolutions of one STU layer are run for all L positions and
counted for every layer. All else costs the same at every position (attention from its window on), so it is
timed over a sample of tokens. The naive way is the engine's fused direct sum, over the lags of one parity as
all others.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import common
import futurefill_rs as ff
import torch
from futurefill_rs import bench, models
from futurefill_rs.nn.attention import SlidingWindowAttention
from futurefill_rs.nn.operators.parity import ParityState

MODELS: dict[str, dict[str, Any]] = {
    "STU, 8 x 512": {"n_layers": 8, "n_embd": 512},
    "hybrid, 8 x 512": {"n_layers": 8, "n_embd": 512, "use_attn": True},
    "STU, 12 x 896": {"n_layers": 12, "n_embd": 896},
    "hybrid, 12 x 896": {"n_layers": 12, "n_embd": 896, "use_attn": True},
    "STU, 8 x 1024": {"n_layers": 8, "n_embd": 1024},
    "STU, 2 x 32": {"n_layers": 2, "n_embd": 32},
    "hybrid, 2 x 32": {"n_layers": 2, "n_embd": 32, "use_attn": True},
}
PRESETS = {
    "small": (["STU, 2 x 32", "hybrid, 2 x 32"], (8, 9)),
    "full": (["STU, 8 x 512", "hybrid, 8 x 512"], (12, 14)),
    "large": (["STU, 12 x 896", "hybrid, 12 x 896", "STU, 8 x 1024"], (12, 14, 16, 17)),
}
METHODS = ("auto", "continuous", "epoched", "naive")
NAIVE_UP_TO = 14
"""Beyond, the direct sum is run at positions spread evenly over the sequence."""
TOKENS = 24


def cells(preset: str) -> list[common.Cell]:
    names, logs = PRESETS[preset]
    return [
        {"model": name, "log_length": log, "method": way} for name in names for log in logs for way in METHODS
    ]


def built(name: str, length: int) -> Any:
    settings = MODELS[name]
    config = {
        "seq_len": length,
        "vocab_size": 32000 if settings["n_embd"] > 32 else 64,
        "mlp_scale": 12,
        "num_eigh": 24,
        "n_heads": 8,
        "window_size": min(1024, length // 2),
        **settings,
    }
    torch.manual_seed(0)
    # Filters of any values take the same time, and those of the Hankel matrix take hours for long sequences.
    phi = torch.randn(length, config["num_eigh"]) / length**0.5
    return models.FlashSTU(config, phi=phi).to(torch.bfloat16).eval()


class Clock:
    """Seconds spent inside functions, and what they were called with last."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.last: dict[str, tuple[Any, ...]] = {}
        self.started: list[float] = []

    def timed(self, name: str, function: Any) -> Any:
        def run(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments)
            self.seconds[name] += time.perf_counter() - start
            self.last[name] = arguments
            return result

        return run

    def around(self, module: torch.nn.Module, name: str) -> None:
        """Time the calls of a module, but for those inside another one that is timed."""

        def enter(*_: Any) -> None:
            self.started.append(time.perf_counter())

        def leave(*_: Any) -> None:
            start = self.started.pop()
            if not self.started:
                self.seconds[name] += time.perf_counter() - start

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)


def measure(cell: common.Cell) -> dict[str, Any]:
    torch.set_num_threads(1)
    length = 2 ** cell["log_length"]
    model = built(cell["model"], length)
    with torch.inference_mode(), model.frozen():
        start = time.perf_counter()
        logits, cache = model.read_prompt(
            torch.zeros(1, 1, dtype=torch.long), length - 1, method=cell["method"]
        )
        prepare = time.perf_counter() - start
        nbytes = cache.nbytes
        states = [state for state in cache._states if isinstance(state, ParityState)]
        alone = states[0].fork()
        clock = Clock()
        for state in states:
            state.step = clock.timed("convolution", state.step)
        for module in model.modules():
            if isinstance(module, SlidingWindowAttention):
                clock.around(module, "attention")
            elif isinstance(module, torch.nn.Linear):
                clock.around(module, "projections")
        for _ in range(2):
            logits = model.step(logits.argmax(-1), cache)
        clock.seconds.clear()
        start = time.perf_counter()
        for _ in range(TOKENS):
            logits = model.step(logits.argmax(-1), cache)
        total = (time.perf_counter() - start) / TOKENS
        parts = {name: spent / TOKENS for name, spent in clock.seconds.items()}
        u = clock.last["convolution"]
        one_layer = convolutions(alone, u, length, cell["method"])
    return {
        "convolution_seconds": one_layer * len(states),
        "other_seconds": (total - parts["convolution"]) * length,
        "projections_seconds": parts["projections"] * length,
        "attention_seconds": parts.get("attention", 0.0) * length,
        "prepare_seconds": prepare,
        "cache_bytes": nbytes,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def convolutions(state: Any, u: tuple[Any, ...], length: int, method: str) -> float:
    """Seconds of one layer's convolution for all positions; a long direct sum: from a sample of them."""
    if method == "naive" and length > 2**NAIVE_UP_TO:
        # Even and odd positions are sequences of half the length.
        channels, half = state.step(*u).numel(), length // 2
        plan = ff.plan(bench.closed_loop_filters(channels, half), half, "naive", workers=1)
        record = bench.Record(method, channels, half, 1)
        bench.SampledSum(plan, record, 600).measure()
        assert record.ns_per_position_channel is not None
        return record.ns_per_position_channel * channels * length / 1e9
    start = time.perf_counter()
    for _ in range(length - 2):
        state.step(*u)
    return time.perf_counter() - start


def report(rows: list[common.Cell], folder: Path) -> str:
    names = list(dict.fromkeys(row["model"] for row in rows))
    logs = sorted({row["log_length"] for row in rows})
    at = {(row["model"], row["method"], row["log_length"]): row for row in rows}
    # Whatever the method, all but the convolutions is the same work: the least disturbed run counts.
    least = {
        (name, log): min((at[name, method, log] for method in METHODS), key=lambda row: row["other_seconds"])
        for name in names
        for log in logs
    }
    totals = {
        key: row["convolution_seconds"] + least[key[0], key[2]]["other_seconds"] for key, row in at.items()
    }
    lines = [["seconds for L tokens", *(f"2^{log}" for log in logs)]]
    for name in names:
        size = next(row["parameters"] for row in rows if row["model"] == name) / 1e6
        for method in METHODS:
            lines.append(
                [
                    f"{name} ({size:.0f} M), {method}",
                    *(common.number(totals[name, method, log]) for log in logs),
                ]
            )
        gain = [totals[name, "naive", log] / totals[name, "auto", log] for log in logs]
        lines.append([f"{name}, naive / auto", *(f"{value:.2f}" for value in gain)])
    split = [["% of the time, auto", "L", "convolutions", "projections", "attention", "rest", "cache, MB"]]
    for name in names:
        for log in (logs[0], logs[-1]):
            row, total = at[name, "auto", log], totals[name, "auto", log]
            others = least[name, log]
            shares = [row["convolution_seconds"], others["projections_seconds"], others["attention_seconds"]]
            percents = [common.number(100 * share / total) for share in (*shares, total - sum(shares))]
            split.append([name, f"2^{log}", *percents, common.number(row["cache_bytes"] / 1e6)])
    return "\n\n".join([common.table(lines), common.table(split)])


if __name__ == "__main__":
    sys.exit(common.main(common.Experiment("language_models", cells, measure, report, tuple(PRESETS))))
