"""What one `step` costs beside its arithmetic: the shortest filters, one channel, called from Python.

    python benches/overhead.py [--json]

The price of an empty Python call stands beside it; the minimum over several repetitions is shown, in nanoseconds.
"""

from __future__ import annotations

import argparse
import json
import timeit
from collections.abc import Callable

import numpy as np

import futurefill_rs as ff


def nanoseconds(call: Callable[[], object], number: int = 20_000, repeat: int = 15) -> float:
    return min(timeit.repeat(call, number=number, repeat=repeat)) / number * 1e9


def measure() -> dict[str, float]:
    results = {"empty call": nanoseconds(lambda: None)}
    for lags, horizon, name in [(1, None, "L = 1"), (4096, 2**20, "L = 4096, auto")]:
        cache = ff.plan(np.ones((1, lags), np.float32), horizon).new_cache()
        u, out = np.ones(1, np.float32), np.empty(1, np.float32)
        results[f"numpy step(u, out=buf), {name}"] = nanoseconds(lambda c=cache: c.step(u, out=out))
        results[f"numpy step(u), {name}"] = nanoseconds(lambda c=cache: c.step(u))
    try:
        import torch
    except ImportError:
        return results
    for lags, horizon, name in [(1, None, "L = 1"), (4096, 2**20, "L = 4096, auto")]:
        cache = ff.plan(torch.ones(1, lags), horizon).new_cache()
        x, buffer = torch.ones(1), torch.empty(1)
        results[f"torch CPU step(u, out=buf), {name}"] = nanoseconds(lambda c=cache: c.step(x, out=buffer))
        results[f"torch CPU step(u), {name}"] = nanoseconds(lambda c=cache: c.step(x))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
