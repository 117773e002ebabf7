"""(b) Numerical error of every method against float64, for filters of every temper.

    python benches/paper/error.py [--preset small] [--docs]

Relative L2 error of all outputs of an open loop of L positions against float64. The truth is the direct sum
in float64 up to 2^13 and the float64 engine beyond, whose own error against the direct sum stands in the
table's last rows. The published remark that Continuous-FutureFill "suffers from numerical instability"
(SpectraLDS, section 3) is about the same figure.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import common
import futurefill_rs as ff
import numpy as np
import torch

LENGTHS = {"small": (9, 11), "full": (10, 12, 14, 16, 18, 20)}
METHODS = ("naive", "epoched", "continuous", "auto")
TEMPERS = ("decaying", "oscillating", "growing", "adversarial")
DTYPES = ("float32", "bfloat16", "float64")
DIRECT_UP_TO = 13
# A direct sum of 2^20 positions takes minutes; its error is shown where it takes seconds.
NAIVE_UP_TO = 16
# Computed in float32: rounding inputs and outputs is all that it adds.
BFLOAT16_UP_TO = 14


def cells(preset: str) -> list[common.Cell]:
    rows = [
        {"dtype": dtype, "method": method, "filter": temper, "log_length": log}
        for dtype in DTYPES
        for method in METHODS
        for temper in TEMPERS
        for log in LENGTHS[preset]
    ]
    return [row for row in rows if possible(row)]


def possible(row: common.Cell) -> bool:
    if row["dtype"] == "float64" and row["log_length"] > DIRECT_UP_TO:
        return False
    if row["dtype"] == "bfloat16" and row["log_length"] > BFLOAT16_UP_TO:
        return False
    return row["method"] != "naive" or row["log_length"] <= NAIVE_UP_TO


def filters(temper: str, length: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """One filter of `length` lags."""
    at = np.arange(length)
    noise = rng.standard_normal(length)
    if temper == "decaying":
        return noise * np.exp(-8 * at / length)
    if temper == "oscillating":
        return np.cos(2 * math.pi * at * 0.237 + 1) * (1 + 0.1 * noise)
    if temper == "growing":
        return noise * np.exp(8 * at / length)
    # Large lags in the middle of small ones, signs that alternate, one huge lag at the end of a block.
    values = noise * 1e-4 * (-1.0) ** at
    values[length // 3 :: 97] = 1.0
    values[length // 2 - 1] = 100.0
    return values


def direct(u: np.ndarray[Any, Any], h: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.convolve(u, h)[: len(u)]


def measure(cell: common.Cell) -> dict[str, Any]:
    length = 2 ** cell["log_length"]
    rng = np.random.default_rng(cell["log_length"])
    kind = getattr(torch, cell["dtype"])
    u = torch.from_numpy(rng.standard_normal(length)).to(kind)
    h = torch.from_numpy(filters(cell["filter"], length, rng)).to(kind)
    exact_u, exact_h = u.double(), h.double()
    if cell["log_length"] <= DIRECT_UP_TO:
        truth = torch.from_numpy(direct(exact_u.numpy(), exact_h.numpy()))
    else:
        truth = ff.causal_conv(exact_u, exact_h)
    cache = ff.plan(h, length, cell["method"]).new_cache()
    y = torch.empty_like(u)
    for t in range(length):
        y[t] = cache.step(u[t])
    error = (y.double() - truth).norm() / truth.norm()
    tenth = length // 10
    early = (y.double() - truth)[:tenth].norm() / truth[:tenth].norm()
    late = (y.double() - truth)[-tenth:].norm() / truth[-tenth:].norm()
    return {"error": float(error), "first_tenth": float(early), "last_tenth": float(late)}


def report(rows: list[common.Cell], folder: Path) -> str:
    eps = {"float32": 2.0**-23, "bfloat16": 2.0**-7, "float64": 2.0**-52}
    logs = sorted({row["log_length"] for row in rows})
    lines = [["error / (eps log₂ 2L), the worst of all filters", *(f"2^{log}" for log in logs)]]
    for dtype in DTYPES:
        for method in METHODS:
            cells = []
            for log in logs:
                found = [
                    row["error"] / (eps[dtype] * math.log2(2 * 2**log))
                    for row in rows
                    if (row["dtype"], row["method"], row["log_length"]) == (dtype, method, log)
                ]
                cells.append(common.number(max(found)) if found else "-")
            lines.append([f"{dtype}, {method}", *cells])
    worst = max(rows, key=lambda row: row["error"] / eps[row["dtype"]])
    last = [row for row in rows if row["log_length"] == logs[-1] and row["dtype"] == "float32"]
    continuous = max((row["error"] for row in last if row["method"] == "continuous"), default=math.nan)
    drawn = {}
    for method in ("continuous", "epoched"):
        for temper in TEMPERS:
            key = ("float32", method, temper)
            found = [row for row in rows if (row["dtype"], row["method"], row["filter"]) == key]
            at = [2.0 ** row["log_length"] for row in found]
            drawn[f"{method}, {temper}"] = (at, [row["error"] for row in found])
    shown = common.picture(folder / "paper_error.png", drawn, "L", "relative error, float32")
    note = (
        f"Below 1: the promised bound holds. The largest: {worst['error'] / eps[worst['dtype']]:.2g} eps "
        f"({worst['method']}, {worst['filter']}, {worst['dtype']}, 2^{worst['log_length']}). "
        f"Continuous-FutureFill in float32 at 2^{logs[-1]}: at most {continuous:.1e} for any of the filters."
    )
    return "\n\n".join([common.table(lines), note, shown])


if __name__ == "__main__":
    sys.exit(common.main(common.Experiment("error", cells, measure, report)))
