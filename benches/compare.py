"""Ourselves beside every rival, in one run: `python benches/compare.py [--quick]`.

Writes `benches/out/compare.json` and plots, and prints the tables of docs/benchmarks.md and README.md;
`--docs` and `--readme` write them there. `--render` prints or writes the tables of the last run again.

Online figures come from closed loops: each input is the output before it. Contenders that are divided by one
another run interleaved, with the same number of threads, and each figure is the minimum of several runs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import engine
import futurefill_rs as ff
import numpy as np
import report
import rivals
from contenders import HERE, Figure, core, figure, ns, offline, online, say
from futurefill_rs import _core, bench
from rivals import Absent

OUT = HERE / "out"


def main() -> int:
    options = parse()
    OUT.mkdir(exist_ok=True)
    file = OUT / "compare.json"
    if options.render:
        results = json.loads(file.read_text(encoding="utf-8"))
    else:
        results = measure(options)
        # Whoever ends the run here keeps the last run's figures.
        new = file.with_suffix(".new")
        new.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        new.replace(file)
        say(f"wrote {file}")
    for plot in report.plots(results, OUT):
        say(f"wrote {plot}")
    targets, methods = report.targets_table(results), report.methods_table(results)
    print(targets, methods, sep="\n\n")
    head = report.heading(results)
    if options.docs:
        report.fill(HERE.parent / "docs" / "benchmarks.md", f"{head}\n\n{targets}\n\n{methods}")
    if options.readme:
        report.fill(HERE.parent / "README.md", f"{head}\n\n{methods}")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="small sizes, few runs: a check, not a result")
    parser.add_argument("--only", help="parts to run, like P1,P5,methods (default: all)")
    parser.add_argument("--spectralds", type=Path, metavar="PATH", help="checkout of dshah02/SpectraLDS")
    parser.add_argument(
        "--fftconvolver", type=Path, metavar="PATH", help="checkout of HiFi-LoFi/FFTConvolver"
    )
    parser.add_argument("--readme", action="store_true", help="write the table of methods into README.md")
    parser.add_argument("--docs", action="store_true", help="write both tables into docs/benchmarks.md")
    parser.add_argument("--render", action="store_true", help="measure nothing: take the last run's figures")
    return parser.parse_args()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    parts: dict[str, Callable[[argparse.Namespace], Any]] = {
        "P1": online_against_offline,
        "P2": direct_against_online,
        "P3": public_against_online,
        "P4": convolvers_against_online,
        "P5": growth,
        "P6": batch,
        "P7": memory,
        "P8": smoothness,
        "P9": bulk_against_offline,
        "P10": step_overhead,
        **engine.PARTS,
        "methods": methods,
        "latency": latency,
        "bytes": state_bytes,
    }
    wanted = options.only.split(",") if options.only else list(parts)
    if unknown := set(wanted) - set(parts):
        raise SystemExit(f"--only: expected some of {','.join(parts)}, got {','.join(sorted(unknown))}")
    results: dict[str, Any] = {"machine": machine(), "quick": options.quick, "figures": []}
    # Parts that were not asked for keep the last run's figures where they are of the same kind.
    previous = OUT / "compare.json"
    if options.only and previous.is_file():
        last = json.loads(previous.read_text(encoding="utf-8"))
        if last["machine"]["processor"] == results["machine"]["processor"] and last["quick"] == options.quick:
            last["figures"] = [figure for figure in last["figures"] if figure["part"] not in wanted]
            results = {**last, "machine": results["machine"]}
    for name in wanted:
        say(f"{name}: {(parts[name].__doc__ or '').splitlines()[0]}")
        try:
            found = parts[name](options)
        except Absent as reason:
            say(f"{name}: skipped: {reason}")
            found = [figure(name, str(parts[name].__doc__).splitlines()[0], None, note=f"skipped: {reason}")]
        if isinstance(found, list) and found and "id" in found[0]:
            results["figures"] += [{**each, "part": name} for each in found]
            for each in found:
                say(f"  {each['what']}: {each['value']} (target {each['target']}) {each['note']}")
        else:
            results[name] = found
    order = [*(f"P{i}" for i in range(1, 11)), *engine.FIGURES]
    results["figures"].sort(key=lambda each: order.index(each["id"]))
    return results


def machine() -> dict[str, Any]:
    processor = platform.processor() or platform.machine()
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        processor = re.search(r"^model name\s*:\s*(.*)$", text, re.M).group(1)  # type: ignore[union-attr]
    except (OSError, AttributeError):
        pass
    versions = {"futurefill_rs": ff.__version__, "python": platform.python_version(), "numpy": np.__version__}
    for name in ("torch", "scipy"):
        try:
            versions[name] = str(__import__(name).__version__)
        except ImportError:
            continue
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "instruction set": _core.instruction_set(),
        "versions": versions,
        "date": datetime.date.today().isoformat(),
        "load": [round(value, 2) for value in os.getloadavg()],
    }


# The figures.


def online_against_offline(options: argparse.Namespace) -> list[Figure]:
    """online total / torch offline FFT (cached spectrum, fastest chunk of channels)"""
    found = []
    rounds = 2 if options.quick else 4
    for workers in (1, 2):
        for length, target, least in ((14, 1.2, 1.7), (17, 0.8, 1.1)):
            for channels in (64, 256, 1024):
                if options.quick and (length, channels) != (14, 256):
                    continue
                say(f"  D = {channels}, T = 2^{length}, {workers} threads")
                other = offline(channels, 2**length, workers)
                through_python = channels == 1024
                ours = online(channels, 2**length, workers) if through_python else None
                best = np.inf
                for _ in range(rounds):
                    other.measure()
                    if ours is not None:
                        ours._total()
                        best = ns(ours)
                    else:
                        best = min(best, core(channels, length, workers=workers))
                    other.measure()
                what = f"online / torch offline FFT, D = {channels}, T = 2^{length}, {workers} thread(s)"
                note = f"{best:.1f} / {ns(other):.1f} ns, {'Python' if through_python else 'core'}"
                found.append(figure("P1", what, best / ns(other), target, least=least, note=note))
                if length == 14:
                    found.append(figure("E4", what, best / ns(other), 1.0 if workers == 1 else 1.15))
                else:
                    found.append(figure("E5", what, best / ns(other), 0.8, least=1.0))
    return found


def direct_against_online(options: argparse.Namespace) -> list[Figure]:
    """fused direct sum / online"""
    found = []
    length = 14 if options.quick else 17
    for channels in (64, 256):
        ours = online(channels, 2**length, 1)
        plan = ff.plan(bench.closed_loop_filters(channels, 2**length), 2**length, "naive")
        direct = bench.SampledSum(plan, bench.Record("direct", channels, 2**length, 1), 600.0)
        for _ in range(3):
            ours._total()
            direct.measure()
        note = f"{ns(direct):.0f} / {ns(ours):.1f} ns, Python; {direct.record.note}"
        what = f"fused direct sum / online, D = {channels}, T = 2^{length}"
        found.append(figure("P2", what, ns(direct) / ns(ours), 800, more_is_better=True, note=note))
    return found


def public_against_online(options: argparse.Namespace) -> list[Figure]:
    """the public EpochedFutureFill of SpectraLDS / online"""
    channels, length = (128, 4096) if options.quick else (128, 32768)
    epochs = 2 if options.quick else 6
    ours = online(channels, length, 1)
    ours._total()
    theirs, note = rivals.public_futurefill(options.spectralds, channels, length, 1, epochs)
    ours._total()
    note = f"{theirs:.0f} / {ns(ours):.1f} ns, Python; {note}"
    what = f"public EpochedFutureFill / online, D = {channels}, T = {length}"
    return [figure("P3", what, theirs / ns(ours), 200, more_is_better=True, note=note)]


def convolvers_against_online(options: argparse.Namespace) -> list[Figure]:
    """partitioned-convolution libraries, one sample at a time / online"""
    found = []
    channels = 8 if options.quick else 64
    for length in (14,) if options.quick else (14, 17):
        runs = 2 if length == 14 else 1
        for name, rival in (
            ("crate fft-convolver", lambda t, r: rivals.crate_fft_convolver(channels, t, r)),
            ("C++ FFTConvolver", lambda t, r: rivals.cpp_fftconvolver(options.fftconvolver, channels, t, r)),
        ):
            what = f"{name} / online, D = {channels}, T = 2^{length}"
            ours = core(channels, length)
            try:
                theirs, note = rival(2**length, runs)
            except Absent as reason:
                say(f"  {what}: skipped: {reason}")
                found.append(figure("P4", what, None, 25, more_is_better=True, note=f"skipped: {reason}"))
                continue
            ours = min(ours, core(channels, length))
            note = f"{theirs:.0f} / {ours:.1f} ns, core; {note}"
            found.append(figure("P4", what, theirs / ours, 25, more_is_better=True, note=note))
    return found


def growth(options: argparse.Namespace) -> list[Figure]:
    """log-log slope of the total time"""
    channels = 64
    lengths = (12, 13, 14) if options.quick else (14, 16, 18, 20)
    each = np.full(len(lengths), np.inf)
    for _ in range(1 if options.quick else 2):
        for i, length in enumerate(lengths):
            each[i] = min(each[i], core(channels, length))
    slope = np.polyfit(lengths, np.log2(each) + np.array(lengths), 1)[0]
    note = ", ".join(f"2^{length}: {value:.1f} ns" for length, value in zip(lengths, each, strict=True))
    what = f"slope from 2^{lengths[0]} to 2^{lengths[-1]}, D = {channels}"
    return [figure(id, what, slope, 1.12, note=f"{note}, core") for id in ("P5", "E6")]


def batch(options: argparse.Namespace) -> list[Figure]:
    """B = 16 / 16 runs of B = 1"""
    found = []
    for channels in (256,) if options.quick else (64, 256):
        length = 12 if options.quick else 14
        one = many = np.inf
        for _ in range(2):
            one = min(one, core(channels, length))
            many = min(many, core(channels, length, batch=16))
        note = f"{many:.1f} / {one:.1f} ns, core"
        what = f"B = 16 / 16 times B = 1, D = {channels}, T = 2^{length}"
        found.append(figure("P6", what, many / one, 0.6, note=note))
    return found


def memory(options: argparse.Namespace) -> list[Figure]:
    """bytes of state"""
    found = []
    channels = 32
    for log_length in (12,) if options.quick else (14, 17):
        length = 2**log_length
        plan = ff.plan(bench.closed_loop_filters(channels, length), length)
        held = plan.new_cache().nbytes
        what = f"state / (T D 4 bytes), unprompted, T = 2^{log_length}"
        found.append(figure("P7", what, held / (length * channels * 4), 2.5, note=f"{plan.schedule}"))
    filters = bench.closed_loop_filters(channels, 2**15)
    plan, new = ff.plan(filters), 1024
    sizes = {
        prompt: plan.prefill(np.ones((channels, prompt), np.float32), new)[1].nbytes
        for prompt in (1, 1000, 30000)
    }
    same = "the same" if len(set(sizes.values())) == 1 else f"NOT the same: {sizes}"
    what = f"state / (K D 4 bytes) after prefill, K = {new}"
    value = max(sizes.values()) / (new * channels * 4)
    found.append(figure("P7", what, value, 4, note=f"{same} for prompts of 1, 1000 and 30000"))
    limit = int(1.5 * 2**15 * channels * 4)
    held = ff.plan(filters, 2**15, max_memory=limit).new_cache().nbytes
    found.append(
        figure("P7", "state / max_memory, T = 2^15", held / limit, 1, note=f"{held} of {limit} bytes")
    )
    return found


def smoothness(options: argparse.Namespace) -> list[Figure]:
    """worst step / mean step with latency="smooth" """
    channels, length = 64, 2**12 if options.quick else 2**16
    plain, smooth = online(channels, length, 1), online(channels, length, 1, latency="smooth")
    for _ in range(3):
        plain.measure()
        smooth.measure()

    def worst(contender: bench.Online) -> float:
        return float(contender.step_ns.max() / contender.step_ns.mean())

    size = f"D = {channels}, T = {length}"
    note = f"plain mode: {worst(plain):.0f}; each step the least of 3 runs, Python"
    total = f"{ns(smooth):.1f} / {ns(plain):.1f} ns"
    return [
        figure("P8", f"worst / mean step, smooth, {size}", worst(smooth), 100, note=note),
        figure("P8", f"total smooth / plain, {size}", ns(smooth) / ns(plain), 2, note=total),
    ]


def bulk_against_offline(options: argparse.Namespace) -> list[Figure]:
    """causal_conv and prefill / torch offline FFT"""
    found = []
    for log_length in (12,) if options.quick else (14, 17):
        channels, length = 256, 2**log_length
        filters = bench.closed_loop_filters(channels, length)
        u = np.random.default_rng(1).standard_normal((channels, length), np.float32)
        other = offline(channels, length, 1)
        plan = ff.plan(filters)
        best = {"causal_conv": np.inf, "prefill": np.inf}
        for _ in range(4):
            other.measure()
            for name, call in (
                ("causal_conv", partial(ff.causal_conv, u, filters)),
                ("prefill", partial(plan.prefill, u, 1024)),
            ):
                start = time.perf_counter()
                call()
                best[name] = min(best[name], time.perf_counter() - start)
        for name, seconds in best.items():
            each = seconds * 1e9 / (channels * length)
            what = f"{name} / torch offline FFT, D = {channels}, T = 2^{log_length}"
            note = f"{each:.1f} / {ns(other):.1f} ns, torch's filter spectra kept"
            found.append(figure("P9", what, each / ns(other), 0.7, note=note))
    return found


def step_overhead(options: argparse.Namespace) -> list[Figure]:
    """what one call of step costs from Python"""
    found = []
    for id, library in (("P10", "numpy"), ("E8", "torch CPU")):
        filters, u, out = (np.ones(shape, np.float32) for shape in ((1, 1), 1, 1))
        arrays: list[Any] = [filters, u, out]
        if library != "numpy":
            arrays = [rivals._torch().from_numpy(array) for array in arrays]
        step = ff.plan(arrays[0]).new_cache().step
        best = np.inf
        for _ in range(15):
            start = time.perf_counter()
            for _ in range(10000):
                step(arrays[1], out=arrays[2])
            best = min(best, time.perf_counter() - start)
        what = f"step with out=, {library}, D = 1, L = 1 (microseconds, the loop included)"
        found.append(figure(id, what, best / 10000 * 1e6, 1.0))
    return found


def methods(options: argparse.Namespace) -> list[dict[str, Any]]:
    """time of each method and each rival against T"""
    found = []
    channels = 256
    contenders: dict[str, Callable[[int], tuple[float, str]]] = {
        "torch cached dot": lambda length: rivals.torch_dot(channels, length, 1, 120.0),
        "scipy oaconvolve": lambda length: rivals.scipy_oaconvolve(channels, length),
        "public FutureFill": lambda length: rivals.public_futurefill(
            options.spectralds, channels, length, 1, 2
        ),
        "fft-convolver": lambda length: rivals.crate_fft_convolver(channels, length, 1),
        "FFTConvolver (C++)": lambda length: rivals.cpp_fftconvolver(
            options.fftconvolver, channels, length, 1
        ),
    }
    lengths = (10, 12) if options.quick else (10, 12, 14, 16, 17)
    for log_length in lengths:
        length = 2**log_length
        say(f"  T = 2^{log_length}")
        records = bench.run(channels, length, ["auto", "continuous", "epoched"], limit=120)
        for record in records:
            found.append(row(record.method, log_length, record.ns_per_position_channel, record.note))
        for name, rival in contenders.items():
            try:
                value, note = rival(length)
            except Absent as reason:
                say(f"  {name}: skipped: {reason}")
                found.append(row(name, log_length, None, f"skipped: {reason}"))
            else:
                found.append(row(name, log_length, value, note))
    return found


def row(name: str, log_length: int, value: float | None, note: str | None) -> dict[str, Any]:
    return {"method": name, "log_length": log_length, "channels": 256, "ns": value, "note": note}


def latency(options: argparse.Namespace) -> dict[str, Any]:
    """how long single steps take"""
    channels, length = 64, 2**12 if options.quick else 2**16
    edges = np.geomspace(100, 1e8, 61)
    found: dict[str, Any] = {"channels": channels, "length": length, "edges_ns": edges.tolist(), "counts": {}}
    for name, method, mode in (
        ("auto", "auto", "throughput"),
        ("auto, smooth", "auto", "smooth"),
        ("continuous", "continuous", "throughput"),
        ("epoched", "epoched", "throughput"),
    ):
        contender = online(channels, length, 1, method, latency=mode)
        contender._each()
        contender._each()
        found["counts"][name] = np.histogram(contender.step_ns, edges)[0].tolist()
    return found


def state_bytes(options: argparse.Namespace) -> list[dict[str, Any]]:
    """bytes of state of each method against T, one channel"""
    found = []
    for log_length in range(8, 15 if options.quick else 19):
        length = 2**log_length
        filters = bench.closed_loop_filters(16, length)
        for method in ("auto", "continuous", "epoched", "naive"):
            held = ff.plan(filters, length, method).new_cache().nbytes / 16
            found.append({"method": method, "log_length": log_length, "bytes": held})
    return found


if __name__ == "__main__":
    sys.exit(main())
