"""What one `step` costs beside its arithmetic: the shortest filters, one channel, called from Python.

    python benches/overhead.py [--json]

The price of an empty Python call stands beside it; shown is the minimum of several repetitions in
nanoseconds.
"""

from __future__ import annotations

import argparse
import json
import timeit
from collections.abc import Callable
from functools import partial
from typing import Any

import futurefill_rs as ff
import numpy as np


def nanoseconds(call: Callable[[], object], number: int = 500, repeat: int = 200) -> float:
    return min(timeit.repeat(call, number=number, repeat=repeat)) / number * 1e9


def libraries() -> dict[str, Any]:
    found = {"numpy": np.ones}
    try:
        import torch
    except ImportError:
        return found
    return {**found, "torch CPU": lambda shape, dtype: torch.ones(shape)}


def measure() -> dict[str, float]:
    results = {"empty call": nanoseconds(lambda: None)}
    for library, ones in libraries().items():
        for lags, horizon, name in [(1, None, "L = 1"), (4096, 2**20, "L = 4096, auto")]:
            step = ff.plan(ones((1, lags), np.float32), horizon).new_cache().step
            u, out = ones(1, np.float32), ones(1, np.float32)
            results[f"{library} step(u, out=buf), {name}"] = nanoseconds(partial(step, u, out=out))
            results[f"{library} step(u), {name}"] = nanoseconds(partial(step, u))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description="What one step costs beside its arithmetic.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    results = measure()
    if arguments.json:
        print(json.dumps(results, indent=2))
        return
    for name, value in results.items():
        print(f"{name:42}{value:8.0f} ns")


if __name__ == "__main__":
    main()
