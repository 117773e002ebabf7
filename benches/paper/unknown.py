"""(e) The length of the generation is not known, and (f) memory, batch and the worst step by method.

    python benches/paper/unknown.py [--preset small] [--docs]

64 channels, filters of L lags, L positions run, float32. `horizon=None` is an endless stream: memory is
bounded by the filters, and the planner knows nothing of the end.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import common
import futurefill_rs as ff
from futurefill_rs import bench

CHANNELS = 64
LENGTHS = {"small": (9, 10), "full": (12, 14, 16)}
BATCHES = {"small": (1, 2), "full": (1, 4, 16)}
WAYS = {
    "horizon known": {},
    "horizon unknown": {"horizon": None},
    "continuous, unknown": {"horizon": None, "method": "continuous"},
    "epoched, known": {"method": "epoched"},
    "smooth, known": {"latency": "smooth"},
}


def cells(preset: str) -> list[common.Cell]:
    return [
        {"way": way, "log_length": log, "batch": batch}
        for log in LENGTHS[preset]
        for batch in BATCHES[preset]
        for way in WAYS
    ]


class Batched(bench.Online):
    """A closed loop of several sequences."""

    def __init__(self, plan: Any, record: bench.Record, batch: int) -> None:
        super().__init__(plan, record, limit=600)
        self._batch = batch
        self._cache = plan.new_cache((batch, CHANNELS))
        record.state_bytes = self._cache.nbytes

    def _fresh(self) -> bench.Floats:
        self._cache.reset()
        return bench.np.ones((self._batch, CHANNELS), bench.np.float32)


def measure(cell: common.Cell) -> dict[str, Any]:
    length = 2 ** cell["log_length"]
    options: dict[str, Any] = {"horizon": length, **WAYS[cell["way"]]}
    plan = ff.plan(bench.closed_loop_filters(CHANNELS, length), workers=1, **options)
    record = bench.Record(cell["way"], CHANNELS, length, 1)
    contender = Batched(plan, record, cell["batch"])
    for _ in range(2):
        contender.measure()
    assert record.ns_per_position_channel is not None and record.state_bytes is not None
    steps = sorted(contender.step_ns)
    return {
        "ns_per_position_channel": record.ns_per_position_channel / cell["batch"],
        "worst_step_ms": record.worst_step_ms,
        "p99_step_us": steps[int(len(steps) * 0.99)] / 1e3,
        "state_bytes_per_channel": record.state_bytes / cell["batch"] / CHANNELS,
        "schedule": str(plan.schedule),
    }


def report(rows: list[common.Cell], folder: Path) -> str:
    lines = [
        ["", "L", "batch", "ns / position, channel", "99 % of steps, us", "worst step, ms", "bytes / channel"]
    ]
    for row in rows:
        figures = (
            row["ns_per_position_channel"],
            row["p99_step_us"],
            row["worst_step_ms"],
            row["state_bytes_per_channel"],
        )
        lines.append([row["way"], f"2^{row['log_length']}", row["batch"], *map(common.number, figures)])
    at = {(row["way"], row["log_length"], row["batch"]): row["ns_per_position_channel"] for row in rows}
    ratios = [
        value / at["horizon known", log, batch]
        for (way, log, batch), value in at.items()
        if way == "horizon unknown"
    ]
    note = (
        f"Not knowing the end costs {min(ratios):.2f} to {max(ratios):.2f} times the time of knowing it, "
        "over all lengths and batches."
    )
    return "\n\n".join([common.table(lines), note])


if __name__ == "__main__":
    sys.exit(common.main(common.Experiment("unknown", cells, measure, report)))
