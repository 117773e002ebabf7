"""(c) Generation from a prompt of P positions: bytes of cache and seconds for K new ones.

    python benches/paper/prompt.py [--preset small] [--docs]

One layer of 64 channels, float32, filters as long as prompt and continuation. The naive way keeps every
input it has seen, P + K of them, and sums over all of them at each new position: by the engine's fused direct
sum, timed at the first and at the last of the new positions.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import common
import futurefill_rs as ff
import numpy as np
from futurefill_rs import _state, bench

CHANNELS = 64
PROMPTS = {"small": (8, 10), "full": (10, 12, 14, 16, 18)}
NEW = {"small": (6, 8), "full": (8, 10, 12, 14)}


def cells(preset: str) -> list[common.Cell]:
    return [{"log_prompt": p, "log_new": k} for p in PROMPTS[preset] for k in NEW[preset]]


def measure(cell: common.Cell) -> dict[str, Any]:
    prompt, new = 2 ** cell["log_prompt"], 2 ** cell["log_new"]
    filters = bench.closed_loop_filters(CHANNELS, prompt + new)
    plan = ff.plan(filters, prompt + new, workers=1)
    u = np.random.default_rng(0).standard_normal((CHANNELS, prompt)).astype(np.float32)
    nbytes = 0

    def read() -> float:
        nonlocal nbytes
        start = time.perf_counter()
        nbytes = plan.prefill(u, new)[1].nbytes
        return time.perf_counter() - start

    def generate() -> float:
        cache = plan.prefill(u, new)[1]
        x = np.ones(CHANNELS, np.float32)
        start = time.perf_counter()
        for _ in range(new):
            x = cache.step(x, out=x)
        return time.perf_counter() - start

    return {
        "prefill_seconds": common.best(read),
        "generate_seconds": common.best(generate),
        "cache_bytes": nbytes,
        "naive_bytes": 4 * CHANNELS * (prompt + new),
        "naive_seconds": naive_seconds(ff.plan(filters, prompt + new, "naive", workers=1), prompt, new),
    }


def naive_seconds(plan: Any, prompt: int, new: int) -> float:
    """Seconds for K new positions by direct sums over all inputs before, from a sample of positions."""
    state = plan.new_cache().state_dict()
    fields = {key: state[key] for key in state if key not in ("version", "checksum")}
    fields["history"] = np.random.default_rng(1).random(state["history"].shape, np.float32)
    x = np.ones(CHANNELS, np.float32)

    def step_at(position: int) -> float:
        cache = plan.load_cache(_state.seal({**fields, "clock": position, "position": position}))

        def one() -> float:
            start = time.perf_counter()
            cache.step(x, out=x)
            return time.perf_counter() - start

        return common.best(one)

    return new * (step_at(prompt) + step_at(prompt + new - 4)) / 2


def report(rows: list[common.Cell], folder: Path) -> str:
    prompts = sorted({row["log_prompt"] for row in rows})
    news = sorted({row["log_new"] for row in rows})
    at = {(row["log_prompt"], row["log_new"]): row for row in rows}

    def block(title: str, figure: Any) -> str:
        lines = [[title, *(f"P = 2^{p}" for p in prompts)]]
        for k in news:
            lines.append([f"K = 2^{k}", *(common.number(figure(at[p, k])) for p in prompts)])
        return common.table(lines)

    def bytes_of(key: str, k: int) -> tuple[list[float], list[float]]:
        return [2.0**p for p in prompts], [at[p, k][key] / 1e6 for p in prompts]

    curves = {f"ours, K = 2^{k}": bytes_of("cache_bytes", k) for k in news}
    curves[f"naive, K = 2^{news[0]}"] = bytes_of("naive_bytes", news[0])
    return "\n\n".join(
        [
            block("cache, MB", lambda row: row["cache_bytes"] / 1e6),
            block("naive cache / ours", lambda row: row["naive_bytes"] / row["cache_bytes"]),
            block("seconds to read the prompt", lambda row: row["prefill_seconds"]),
            block("seconds for K new positions", lambda row: row["generate_seconds"]),
            block(
                "naive / ours, K new positions", lambda row: row["naive_seconds"] / row["generate_seconds"]
            ),
            common.picture(folder / "paper_prompt.png", curves, "P", "MB of cache, 64 channels"),
        ]
    )


if __name__ == "__main__":
    sys.exit(common.main(common.Experiment("prompt", cells, measure, report)))
