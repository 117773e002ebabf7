"""Figures E: few channels, shared filters, batches, the planner, other blocks, instruction sets."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from contenders import Figure, core, core_bytes, core_each, figure, say
from futurefill_rs import _core

FIGURES = ("E1", "E2", "E3", "E4", "E5", "E6", "E7", "E7b", "E8", "E9", "E10")
FEW = {1: 40.0, 2: 22.0, 4: 12.0, 8: 7.5, 12: 7.0, 17: 7.0, 24: 6.5}
"""Channels, and the nanoseconds that issue 12 asks for on its machine."""
FANS = ((2,), (4, 2), (8, 2), (16, 2), (4, 4, 2), (8, 8, 2), (8, 4, 2))
"""Fans of the schedules that the planner's are compared with; the last is repeated up to the horizon."""


def shared_filter(options: argparse.Namespace) -> list[Figure]:
    """one filter for all channels / a copy of it for each"""
    found = []
    log_length = 12 if options.quick else 15
    for channels in (1, 16, 64, 256):
        shared, copied = _in_turn(
            3,
            partial(core, channels, log_length, "auto", 1, 1, "shared"),
            partial(core, channels, log_length),
        )
        what = f"one filter / a filter for each channel, D = {channels}, L = 2^{log_length}"
        note = f"{shared:.1f} / {copied:.1f} ns, core"
        found.append(figure("E1", what, shared / copied, 1.0, note=note))
    held, copies = core_bytes(256, log_length, "shared"), core_bytes(256, log_length)
    what = f"the same: bytes of cache, D = 256, L = 2^{log_length}"
    found.append(figure("E1", what, held / copies, 1.0, note=f"{held} / {copies}"))
    return found


def few_channels(options: argparse.Namespace) -> list[Figure]:
    """nanoseconds per position and channel of few channels"""
    log_length = 12 if options.quick else 14
    best = _least(3, {channels: partial(core, channels, log_length) for channels in FEW})
    return [
        figure(
            "E2", f"ns per position and channel, D = {channels}, T = 2^{log_length}", best[channels], target
        )
        for channels, target in FEW.items()
    ]


def batches(options: argparse.Namespace) -> list[Figure]:
    """B = 16, and B = 16 / 16 runs of B = 1"""
    found = []
    log_length = 12 if options.quick else 14
    for channels, target in ((64, 4.2), (256, 4.1)):
        many, one = _in_turn(
            2, partial(core, channels, log_length, batch=16), partial(core, channels, log_length)
        )
        size = f"D = {channels}, T = 2^{log_length}"
        found.append(figure("E3", f"ns per position and channel, B = 16, {size}", many, target))
        what = f"B = 16 / 16 times B = 1, {size}"
        found.append(figure("E3", what, many / one, 0.8, note=f"{many:.1f} / {one:.1f} ns, core"))
    return found


def planner(options: argparse.Namespace) -> list[Figure]:
    """what the planner chose / the best of an exhaustive search"""
    found = []
    length = 11 if options.quick else 12
    cells: list[tuple[int, int, tuple[str, ...]]]
    cells = [(d, b, ()) for d, b in ((2, 1), (4, 1), (16, 1), (64, 1), (256, 1), (16, 4), (16, 16), (4, 64))]
    cells += [(64, 1, ("endless",)), (64, 1, ("shared",)), (16, 16, ("shared",))]
    for channels, batch, words in cells:
        reach = 2 ** (length - ("endless" in words))
        names = ["auto", *_schedules(reach)]
        # A few at a time, each time beside the planner's own: all caches are in memory at once.
        ratios: dict[str, float] = {}
        for start in range(1, len(names), 7):
            some = ["auto", *names[start : start + 7]]
            rounds = 1 if options.quick else 2
            times = np.min(
                [core_each(channels, length, some, 1, batch, *words) for _ in range(rounds)], axis=0
            )
            ratios |= dict(zip(some[1:], times[0] / times[1:], strict=True))
        # The least of many measurements flatters the winner: the best few once more, beside the chosen one.
        finals = ["auto", *sorted(ratios, key=ratios.__getitem__, reverse=True)[:3]]
        times = np.min([core_each(channels, length, finals, 1, batch, *words) for _ in range(3)], axis=0)
        best = int(np.argmin(times))
        size = f"D = {channels}, B = {batch}, T = 2^{length}" + "".join(f", {word}" for word in words)
        what = f"planned / best of {len(names) - 1} schedules, {size}"
        note = f"{times[0]:.2f} ns; {finals[best]}: {times[best]:.2f} ns, core"
        found.append(figure("E7", what, times[0] / times[best], 1.05, note=note))
    return found


def _schedules(reach: int) -> Iterator[str]:
    """From every base by every pattern of fans, as far as the horizon."""
    for base in (32, 64, 128, 256):
        seen = set()
        for pattern in FANS:
            fans: list[int] = []
            top = base
            while top * (fan := pattern[min(len(fans), len(pattern) - 1)]) < reach:
                fans.append(fan)
                top *= fan
            # A ring of many top blocks is slow, also to measure.
            if reach / top <= 16 and tuple(fans) not in seen:
                seen.add(tuple(fans))
                yield ":".join(map(str, (base, *fans)))


def endless(options: argparse.Namespace) -> list[Figure]:
    """an endless stream"""
    length = 13 if options.quick else 15
    planned, doubled = np.min(
        [core_each(256, length, ["auto", "continuous"], 1, 1, "endless") for _ in range(2)], axis=0
    )
    note = f"fans all 2: {doubled:.1f} ns, core"
    what = f"ns per position and channel, endless, D = 256, L = 2^{length - 1}"
    return [figure("E7b", what, planned, 7.3, note=note)]


def any_block(options: argparse.Namespace) -> list[Figure]:
    """base 100 and fans 3, 7 / base 64 and fans 2, 8"""
    length = 12 if options.quick else 14
    runs = [core_each(64, length, ["100:3:7", "64:2:8"]) for _ in range(3)]
    odd, even = np.min(runs, axis=0)
    what = f"base 100, fans (3, 7) / base 64, fans (2, 8), D = 64, T = 2^{length}"
    return [figure("E9", what, odd / even, 1.3, note=f"{odd:.1f} / {even:.1f} ns, core")]


def narrower(options: argparse.Namespace) -> list[Figure]:
    """AVX2 / AVX-512 on the same machine"""
    if _core.instruction_set() != "avx512":
        return [figure("E10", "AVX2 / AVX-512", None, note="skipped: this machine has no AVX-512")]
    found = []
    short, long = (11, 12) if options.quick else (14, 17)
    cells = [(d, short, 1) for d in FEW] + [(64, short, 16), (256, short, 16), (64, long, 1)]
    for channels, log_length, batch in cells:
        run = partial(core, channels, log_length, "auto", 1, batch)
        avx2, avx512 = _in_turn(2, partial(run, isa="avx2"), run)
        what = f"AVX2 / AVX-512, D = {channels}, B = {batch}, T = 2^{log_length}"
        found.append(figure("E10", what, avx2 / avx512, note=f"{avx2:.1f} / {avx512:.1f} ns, core"))
    return found


def _in_turn(rounds: int, *runs: Callable[[], float]) -> list[float]:
    """The least of several runs of each, one after another."""
    return list(_least(rounds, dict(enumerate(runs))).values())


def _least(rounds: int, runs: dict[int, Callable[[], float]]) -> dict[int, float]:
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for key, run in runs.items():
            best[key] = min(best[key], run())
    say("  " + ", ".join(f"{value:.1f}" for value in best.values()))
    return best


PARTS: dict[str, Callable[[argparse.Namespace], list[Figure]]] = {
    "E1": shared_filter,
    "E2": few_channels,
    "E3": batches,
    "E7": planner,
    "E7b": endless,
    "E9": any_block,
    "E10": narrower,
}
"""Beside these, E4 and E5 are measured with P1, E6 with P5, E8 with P10."""
