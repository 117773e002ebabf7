"""(a) Online convolution of one sequence: seconds for L positions, by method, and the exponents in L.

    python benches/paper/online.py [--preset small] [--docs]

A closed loop of one channel in float32: each input is the output before it. The filter is as long as the
sequence; beyond 2^17 the direct sum is timed at positions spread evenly. The theory: naive L^2;
Epoched-FutureFill L^1.5 sqrt(log L) at its best epoch, sqrt(L log L); Continuous-FutureFill L log(L)^2.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import common
import futurefill_rs as ff
from futurefill_rs import bench

LENGTHS = {"small": range(8, 12), "full": range(10, 21)}
# Epochs in units of the optimal one; the methods of the paper under their own names.
EPOCHS = (0.25, 1.0, 4.0)
SAMPLED_ABOVE = 17
FIT_FROM = {"small": 8, "full": 14}
THEORY = {"naive": "2", "continuous": "1 and log² L", "auto": "1 and log² L"}


def cells(preset: str) -> list[common.Cell]:
    names = ["naive", *(f"epoched, {share:g} K*" for share in EPOCHS), "continuous", "auto"]
    return [
        {"method": name, "log_length": log, "preset": preset} for log in LENGTHS[preset] for name in names
    ]


def method(name: str, length: int) -> str:
    """In the words of `futurefill bench`."""
    if not name.startswith("epoched"):
        return name
    share = float(name.split()[1])
    return str(max(1, round(share * math.sqrt(length * math.log2(length)))))


def measure(cell: common.Cell) -> dict[str, Any]:
    length = 2 ** cell["log_length"]
    filters = bench.closed_loop_filters(1, length)
    record = bench.Record(cell["method"], 1, length, 1)
    plan = ff.plan(filters, length, bench.parse_method(method(cell["method"], length)), workers=1)
    # A direct sum costs the same more at each position, so positions spread evenly tell what all would cost.
    sampled = cell["method"] == "naive" and cell["log_length"] > SAMPLED_ABOVE
    contender = (bench.SampledSum if sampled else bench.Online)(plan, record, limit=600)
    for _ in range(3):
        contender.measure()
    assert record.ns_per_position_channel is not None, record.note
    return {
        "seconds": record.ns_per_position_channel * length / 1e9,
        "us_per_step": record.ns_per_position_channel / 1e3,
        "worst_step_ms": record.worst_step_ms,
        "state_bytes": record.state_bytes,
        "schedule": str(plan.schedule),
    }


def report(rows: list[common.Cell], folder: Path) -> str:
    names = list(dict.fromkeys(row["method"] for row in rows))
    logs = sorted({row["log_length"] for row in rows})
    at = {(row["method"], row["log_length"]): row for row in rows}
    head = ["microseconds a step", *(f"2^{log}" for log in logs), "exponent of the total", "theory"]
    lines = [head]
    start = FIT_FROM[rows[0]["preset"]]
    for name in names:
        fitted = [log for log in logs if log >= start]
        slope, half = common.exponent(
            [2.0**log for log in fitted], [at[name, log]["seconds"] for log in fitted]
        )
        values = [common.number(at[name, log]["us_per_step"]) for log in logs]
        theory = THEORY.get(name, "1.5 and √log L" if name.endswith("1 K*") else "between 1.5 and 2")
        lines.append([name, *values, f"{slope:.2f} ± {half:.2f}", theory])
    curves = {
        name: ([2.0**log for log in logs], [at[name, log]["seconds"] for log in logs]) for name in names
    }
    shown = common.picture(folder / "paper_online.png", curves, "L", "seconds for L positions")
    last = logs[-1]
    gain = at["naive", last]["seconds"] / at["auto", last]["seconds"]
    close = f"At 2^{last}, `auto` takes {gain:.0f} times less than the direct sum. K* = √(L log₂ L)."
    note = f"Exponents are fitted from 2^{start} on, with 95 % confidence intervals. {close}"
    return "\n\n".join([common.table(lines), note, shown])


if __name__ == "__main__":
    sys.exit(common.main(common.Experiment("online", cells, measure, report)))
