"""Measure methods side by side: what `futurefill bench` runs.

All online methods run in a closed loop: the output array of one step is the input array of the next, so
nothing of the future is known and nothing but `step` is timed. Runs of all contenders are interleaved where
memory allows it, and each figure is the minimum over the runs.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

import futurefill_rs as ff
from futurefill_rs import _state

Floats = NDArray[np.float32]

ROUNDS = 3
SAMPLED_ABOVE = 2.0
"""Direct sums expected to take more seconds than this are sampled instead of run from end to end."""
TOGETHER_BELOW = 2**25
"""Filters of more values than this are measured one method after the other."""
WINDOWS = 16
STEPS_PER_WINDOW = 4


@dataclasses.dataclass
class Record:
    """One contender's figures; None where a figure does not apply or was not measured.

    Attributes:
        method: as asked for; `direct` and `offline-fft` are the baselines.
        schedule: what the method came to.
        ns_per_position_channel: nanoseconds, whole run divided by `positions * channels`.
        worst_step_ms: the slowest single position.
        state_bytes: bytes of the cache.
        positions: positions that were really run; less than `length` is explained in `note`.
    """

    method: str
    channels: int
    length: int
    workers: int
    schedule: str | None = None
    ns_per_position_channel: float | None = None
    worst_step_ms: float | None = None
    state_bytes: int | None = None
    positions: int | None = None
    note: str | None = None


class Contender(Protocol):
    record: Record

    def measure(self) -> None: ...


def run(
    channels: int,
    length: int,
    methods: Sequence[str],
    *,
    workers: int = 1,
    limit: float = 60.0,
    latency: Any = "throughput",
    rounds: int = ROUNDS,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> list[Record]:
    """Records of `methods`, then of the baselines `direct` and `offline-fft`.

    Args:
        channels: independent channels D, each with its own filter.
        length: positions T, and the length of the filters.
        methods: names as in `parse_method`.
        workers: threads, also torch's.
        limit: seconds after which a run is broken off; its record then covers the positions reached.
        latency: as in `futurefill_rs.plan`.
        rounds: runs of each contender.
        progress: called with (done, total) before each plan and each run.
    """
    filters = closed_loop_filters(channels, length)
    names = [*methods, "direct", "offline-fft"]
    done = 0

    def go_on() -> None:
        nonlocal done
        progress(done, len(names) * (rounds + 1))
        done += 1

    def contend(name: str) -> Contender:
        go_on()
        record = Record(name, channels, length, workers)
        if name == "offline-fft":
            return OfflineFFT(filters, record)
        method = parse_method("naive" if name == "direct" else name)
        plan = ff.plan(filters, length, method, workers=workers, latency=latency)
        record.schedule = str(plan.schedule)
        seconds = channels * length**2 / 2 * 0.15e-9
        sampled = plan.schedule.base is None and seconds > SAMPLED_ABOVE
        return (SampledSum if sampled else Online)(plan, record, limit)

    def interleave(names: Sequence[str]) -> list[Record]:
        contenders = [contend(name) for name in names]
        for _ in range(rounds):
            for contender in contenders:
                go_on()
                contender.measure()
        return [contender.record for contender in contenders]

    # A contender holds several times the filters' memory: large ones take turns.
    groups = [names] if filters.size <= TOGETHER_BELOW else [[name] for name in names]
    return [record for group in groups for record in interleave(group)]


def parse_method(name: str) -> Any:
    """`auto`, `naive`, `epoched`, `continuous`, or a schedule like `128:8:8` (base, then fans)."""
    if name in ("auto", "naive", "epoched", "continuous"):
        return name
    parts = name.split(":")
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise ValueError(
            f"expected auto, naive, epoched, continuous or a schedule like 128:8:8, got {name!r}"
        )
    return ff.Schedule(int(parts[0]), tuple(map(int, parts[1:])))


def closed_loop_filters(channels: int, length: int, seed: int = 0) -> Floats:
    """Filters `(D, L)` whose loop through themselves neither dies out nor grows.

    They are positive and sum to 1, so the recurrence settles at a constant: without an operation between
    output and next input, the loop meets neither overflow nor denormal numbers, which distort times.
    """
    random = np.random.default_rng(seed)
    filters = random.random((channels, length), np.float32)
    filters *= np.exp(-np.arange(length, dtype=np.float32) / max(1.0, length / 8))
    filters /= filters.sum(-1, keepdims=True, dtype=np.float64)
    return filters


class Online:
    """A whole closed loop per run; every second run also times each step."""

    def __init__(self, plan: Any, record: Record, limit: float) -> None:
        self.record = record
        self._plan, self._limit = plan, limit
        self._cache = plan.new_cache()
        self._steps: NDArray[np.int64] | None = None
        record.state_bytes = self._cache.nbytes
        record.positions = record.length

    def measure(self) -> None:
        self._total()
        self._each()

    def _fresh(self) -> Floats:
        self._cache.reset()
        return np.ones(self.record.channels, np.float32)

    def _total(self) -> None:
        u = self._fresh()
        step, length, done = self._cache.step, self.record.positions or 0, 0
        start = time.perf_counter()
        while done < length:
            # A deadline in every step would be timed with it.
            stop = min(length, done + 64)
            for _ in range(done, stop):
                u = step(u, out=u)
            done = stop
            if time.perf_counter() - start > self._limit:
                break
        seconds = time.perf_counter() - start
        if done < length:
            self.record.positions = done
            self.record.ns_per_position_channel = None
            self.record.note = f"first {done} positions only: a run was broken off after {self._limit} s"
        each = seconds * 1e9 / (done * self.record.channels)
        self.record.ns_per_position_channel = least(self.record.ns_per_position_channel, each)

    def _each(self) -> None:
        u = self._fresh()
        step, clock = self._cache.step, time.perf_counter_ns
        times = [clock()]
        for _ in range(self.record.positions or 0):
            u = step(u, out=u)
            times.append(clock())
        steps = np.diff(times)
        # The same position does the same work in every run: what differs is the machine's noise.
        previous = self._steps
        self._steps = steps if previous is None else np.minimum(previous[: len(steps)], steps)
        self.record.worst_step_ms = float(self._steps.max()) / 1e6

    @property
    def step_ns(self) -> NDArray[np.int64]:
        """Nanoseconds of each position, the least over the runs."""
        assert self._steps is not None
        return self._steps


class SampledSum:
    """The direct sum at evenly spread positions: it costs the same number of operations more at each
    position, so the mean over the middles of equal stretches is the mean over the whole."""

    def __init__(self, plan: Any, record: Record, limit: float) -> None:
        self.record = record
        self._plan = plan
        cache = plan.new_cache()
        self._state = cache.state_dict()
        random = np.random.default_rng(1)
        self._state["history"] = random.random(self._state["history"].shape, np.float32)
        length, count = record.length, STEPS_PER_WINDOW
        middles = [int((i + 0.5) * length / WINDOWS) - count // 2 for i in range(WINDOWS)]
        self._starts = [*middles, length - count]
        self._best = np.full((len(self._starts), count), np.inf)
        record.state_bytes = cache.nbytes
        record.positions = WINDOWS * count
        record.note = f"{record.positions} of {length} positions measured, evenly spread"

    def measure(self) -> None:
        for row, start in zip(self._best, self._starts, strict=True):
            fields = {key: self._state[key] for key in self._state if key not in ("version", "checksum")}
            cache = self._plan.load_cache(_state.seal({**fields, "clock": start, "position": start}))
            u = np.ones(self.record.channels, np.float32)
            for i in range(len(row)):
                begin = time.perf_counter_ns()
                u = cache.step(u, out=u)
                row[i] = min(row[i], time.perf_counter_ns() - begin)
        self.record.ns_per_position_channel = float(self._best[:-1].mean()) / self.record.channels
        self.record.worst_step_ms = float(self._best.max()) / 1e6


class OfflineFFT:
    """The whole input at once with torch.fft: spectra kept, as many channels at a time as is fastest."""

    def __init__(self, filters: Floats, record: Record) -> None:
        self.record = record
        try:
            import torch
        except ImportError:
            self.measure = lambda: None  # type: ignore[method-assign]
            record.note = "torch is not installed"
            return
        self._threads = record.workers
        channels, length = filters.shape
        self._n = smooth_size(2 * length - 1)
        with _torch_threads(self._threads):
            self._spectra = torch.fft.rfft(torch.from_numpy(filters), self._n)
            generator = torch.Generator().manual_seed(1)
            self._u = torch.randn(channels, length, generator=generator)
            self._y = torch.empty(channels, length)
            sizes = [size for size in (4, 8, 16, 32, 64, 128) if size < channels] + [channels]
            self.transform(channels)
            self._chunk = min(sizes, key=lambda size: min(self.transform(size), self.transform(size)))
        record.positions = length
        record.note = f"the whole input known in advance; {self._chunk} channels at a time"

    def transform(self, chunk: int) -> float:
        """Seconds for the whole sequence, `chunk` channels at a time."""
        import torch

        length = self.record.length
        start = time.perf_counter()
        with torch.inference_mode():
            for u, spectra, y in zip(
                *(torch.split(x, chunk) for x in (self._u, self._spectra, self._y)), strict=True
            ):
                y.copy_(torch.fft.irfft(torch.fft.rfft(u, self._n) * spectra, self._n)[:, :length])
        return time.perf_counter() - start

    def measure(self) -> None:
        with _torch_threads(self._threads):
            seconds = self.transform(self._chunk)
        each = seconds * 1e9 / (self.record.length * self.record.channels)
        self.record.ns_per_position_channel = least(self.record.ns_per_position_channel, each)


class _torch_threads:
    def __init__(self, count: int) -> None:
        self._count = count

    def __enter__(self) -> None:
        import torch

        self._before = torch.get_num_threads()
        torch.set_num_threads(self._count)

    def __exit__(self, *error: object) -> None:
        import torch

        torch.set_num_threads(self._before)


def least(a: float | None, b: float) -> float:
    return b if a is None else min(a, b)


def smooth_size(least_size: int) -> int:
    """The smallest transform size of factors 2, 3 and 5 that is not below `least_size`."""
    size = least_size
    while True:
        rest = size
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return size
        size += 1


def as_json(records: Sequence[Record]) -> str:
    return json.dumps([dataclasses.asdict(record) for record in records], indent=2)


def as_table(records: Sequence[Record]) -> str:
    """A table for a terminal, notes below."""
    first = records[0]
    offline = next((r.ns_per_position_channel for r in records if r.method == "offline-fft"), None)
    rows = [("method", "schedule", "ns/position/channel", "x offline", "worst step", "state")]
    for record in records:
        ns, worst, state = record.ns_per_position_channel, record.worst_step_ms, record.state_bytes
        rows.append(
            (
                record.method,
                _short(record.schedule),
                "-" if ns is None else f"{ns:.2f}",
                "-" if ns is None or not offline else f"{ns / offline:.2f}",
                "-" if worst is None else f"{worst:.3f} ms",
                "-" if state is None else f"{state / 1e6:.2f} MB",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"{first.channels} channels, {first.length} positions, workers: {first.workers}, float32"]
    for row in rows:
        left = [cell.ljust(width) for cell, width in zip(row[:2], widths, strict=False)]
        right = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join(left + right).rstrip())
    lines += [f"{record.method}: {record.note}" for record in records if record.note]
    return "\n".join(lines)


def _short(schedule: str | None) -> str:
    return "-" if schedule is None else schedule.removeprefix("Schedule(").removesuffix(")")
