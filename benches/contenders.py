"""What the figures are made of: the core's benchmark, ourselves through Python, torch's offline FFT."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import futurefill_rs as ff
import rivals
from futurefill_rs import bench
from rivals import Absent

HERE = Path(__file__).parent
Figure = dict[str, Any]


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def figure(
    id: str,
    what: str,
    value: float | None,
    target: float | None = None,
    *,
    least: float | None = None,
    more_is_better: bool = False,
    note: str = "",
) -> Figure:
    """One line of the table; `least` is the least acceptable value where that differs from the target."""
    return {
        "id": id,
        "what": what,
        "value": None if value is None else float(f"{value:.4g}"),
        "target": target,
        "least": least,
        "more_is_better": more_is_better,
        "note": note,
    }


@cache
def core_program() -> str:
    """The core's benchmark, built once."""
    command = ["cargo", "bench", "-q", "-p", "futurefill", "--bench", "online", "--no-run"]
    try:
        done = subprocess.run(
            [*command, "--message-format=json"], cwd=HERE.parent, capture_output=True, text=True
        )
    except FileNotFoundError:
        raise Absent("cargo is not installed") from None
    programs = [
        message["executable"]
        for message in map(json.loads, done.stdout.splitlines())
        if message.get("reason") == "compiler-artifact" and message.get("executable")
    ]
    if done.returncode or not programs:
        raise Absent(f"the core's benchmark does not build: {done.stderr.strip()[-200:]}")
    return str(programs[-1])


def core(
    channels: int,
    log_length: int,
    schedule: str = "auto",
    workers: int = 1,
    batch: int = 1,
    *words: str,
    isa: str = "",
) -> float:
    """Nanoseconds per position and channel of one process with several runs."""
    return core_each(channels, log_length, [schedule], workers, batch, *words, isa=isa)[0]


def core_each(
    channels: int,
    log_length: int,
    schedules: Sequence[str],
    workers: int = 1,
    batch: int = 1,
    *words: str,
    isa: str = "",
) -> list[float]:
    """The same for several schedules, whose runs are interleaved."""
    done = _core(channels, log_length, schedules, workers, batch, words, isa)
    return [float(value) for value in re.findall(r"([\d.]+) ns per position", done)]


def core_bytes(channels: int, log_length: int, *words: str) -> int:
    """Bytes of a cache."""
    done = _core(channels, log_length, ["auto"], 1, 1, words, "")
    return int(re.findall(r"state (\d+) bytes", done)[0])


def _core(
    channels: int,
    log_length: int,
    schedules: Sequence[str],
    workers: int,
    batch: int,
    words: Sequence[str],
    isa: str,
) -> str:
    arguments = [*map(str, (channels, log_length, ",".join(schedules), workers, batch)), *words]
    environment = {**os.environ, **({"FUTUREFILL_ISA": isa} if isa else {})}
    done = subprocess.run(
        [core_program(), *arguments], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.count(" ns per position") == len(schedules), done.stdout
    return done.stdout


def offline(channels: int, length: int, workers: int) -> bench.OfflineFFT:
    rivals._torch()
    filters = bench.closed_loop_filters(channels, length)
    return bench.OfflineFFT(filters, bench.Record("offline-fft", channels, length, workers))


def online(channels: int, length: int, workers: int, method: Any = "auto", **options: Any) -> bench.Online:
    filters = bench.closed_loop_filters(channels, length)
    plan = ff.plan(filters, length, method, workers=workers, **options)
    record = bench.Record(str(method), channels, length, workers, schedule=str(plan.schedule))
    return bench.Online(plan, record, limit=600.0)


def ns(contender: bench.Contender) -> float:
    value = contender.record.ns_per_position_channel
    assert value is not None
    return value
