"""Time exact generation with long convolutions on a GPU, at the paper's sizes, against the usual ways.

    python benches/gpu.py                         # 896 and 1024 channels, 12 layers, 4096 .. 131072 positions
    python benches/gpu.py --lengths 4096 --layers 8 --json > gpu.json
    python benches/gpu.py --device cpu --quick    # only to see that the script runs

| name | what runs for every position |
| --- | --- |
| a method | `cache.step` of every layer, each layer's output the input of the next |
| `..:smooth` | the same with `latency="smooth"`: tiles begin early, on streams of their own |
| `..:graphs` | the steps of all layers captured as one CUDA graph, and every tile as one (CUDA only) |
| `direct` | multiply and sum over all past positions, fused by `torch.compile`; average of samples |
| `recompute` | one FFT convolution of the whole prefix for each new position; average of samples |
| `offline-fft` | one FFT convolution of the whole sequence, cached spectrum: if the future were known |

Times are per position for all layers together; `worst` is the longest of all positions, as the device's own
clock saw them (CUDA only). Inputs are random, so no model stands between the layers:
the table is about convolutions alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import futurefill_rs as ff
import torch
from torch import Tensor

SAMPLES = 16


def clock(work: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Seconds per call, the device's queue included."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    work()
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    wait()
    return (time.perf_counter() - start) / repeats


def stream(
    plans: list[Any], shape: tuple[int, ...], length: int, device: torch.device, graphs: bool
) -> tuple[float, float | None, int]:
    """Mean and worst seconds per position of a closed loop through every layer, and bytes of all caches."""
    x = torch.randn(shape, device=device)
    out = torch.empty_like(x)
    on_gpu = device.type == "cuda"

    def turn(caches: list[Any]) -> None:
        u = x
        for cache in caches:
            u = cache.static_step(u, out=out) if graphs else cache.step(u, out=out)

    def turn_of(caches: list[Any]) -> Callable[[], None]:
        """All layers at one position."""
        if not graphs:
            return lambda: turn(caches)
        for cache in caches:
            cache.capture_tiles()
            cache.advance()
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            turn(caches)
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            turn(caches)

        def replay() -> None:
            for cache in caches:
                cache.advance()
            graph.replay()

        return replay

    # The first positions compile kernels and fill the allocator; they are not part of the measurement.
    for plan in plans:
        cache = plan.new_cache(shape)
        cache.extend(torch.zeros(*shape, min(length, 2048), device=device))
        if cache.remaining is None or cache.remaining:
            cache.step(x)
    caches = [plan.new_cache(shape) for plan in plans]
    run = turn_of(caches)
    positions = length - caches[0].position
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(positions if on_gpu else 0)]
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    wait()
    start = time.perf_counter()
    for t in range(positions):
        run()
        if on_gpu:
            marks[t].record()
    wait()
    spent = (time.perf_counter() - start) / positions
    worst = max((a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)), default=None)
    return spent, worst, sum(cache.nbytes for cache in caches)


def direct(filters: Tensor, batch: int, length: int, fuse: bool) -> float:
    """Seconds per position and layer of the sum over all past inputs, averaged over the stream."""
    device = filters.device
    history = torch.randn(batch, *filters.shape[:-1], length, device=device)
    backwards = filters.flip(-1).contiguous()

    def dot(window: Tensor, taps: Tensor) -> Tensor:
        return (window * taps).sum(-1)

    fused = torch.compile(dot, dynamic=True) if fuse else dot
    spent = 0.0
    for k in range(SAMPLES):
        n = max(length * (2 * k + 1) // (2 * SAMPLES), 1)
        window, taps = history[..., :n], backwards[..., -n:]
        spent += clock(lambda window=window, taps=taps: fused(window, taps), device, 5)
    return spent / SAMPLES


def recompute(filters: Tensor, batch: int, length: int) -> float:
    """Seconds per position and layer of convolving the whole prefix anew, averaged over the stream."""
    device = filters.device
    u = torch.randn(batch, *filters.shape[:-1], length, device=device)
    spent = 0.0
    for k in range(SAMPLES):
        n = max(length * (2 * k + 1) // (2 * SAMPLES), 1)
        spent += clock(lambda n=n: ff.causal_conv(u[..., :n], filters[..., :n])[..., -1], device, 2)
    return spent / SAMPLES


def offline(filters: Tensor, batch: int, length: int) -> float:
    """Seconds per position and layer of one transform of the whole, known sequence."""
    u = torch.randn(batch, *filters.shape[:-1], length, device=filters.device)
    spectrum = torch.fft.rfft(filters, 2 * length)

    def run() -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(u, 2 * length) * spectrum, 2 * length)[..., :length]

    return clock(run, filters.device, 3) / length


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    device = torch.device(options.device)
    for channels in options.channels:
        for length in options.lengths:
            torch.manual_seed(0)
            bank = [torch.randn(channels, length, device=device) / length for _ in range(options.layers)]
            common = dict(channels=channels, length=length, layers=options.layers, batch=options.batch)
            for name in options.methods:
                method, _, variant = name.partition(":")
                if variant == "graphs" and device.type != "cuda":
                    continue
                latency = "smooth" if variant == "smooth" else "throughput"
                plans = [
                    ff.plan(filters, length, method, engine="torch", latency=latency) for filters in bank
                ]
                spent, worst, state = stream(
                    plans, (options.batch, channels), length, device, variant == "graphs"
                )
                yield dict(
                    common,
                    name=name,
                    schedule=str(plans[0].schedule),
                    us=spent * 1e6,
                    worst_us=None if worst is None else worst * 1e6,
                    state_bytes=state,
                )
            for name, other in {
                "direct": lambda f, b, n: direct(f, b, n, options.fuse),
                "recompute": recompute,
                "offline-fft": offline,
            }.items():
                spent = other(bank[0], options.batch, length) * options.layers
                yield dict(common, name=name, schedule=None, us=spent * 1e6, worst_us=None, state_bytes=None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--channels", type=int, nargs="+", default=[896, 1024])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2**k for k in range(12, 18)])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batch", type=int, default=1)
    methods = ["auto", "auto:smooth", "auto:graphs", "continuous", "epoched"]
    parser.add_argument("--methods", nargs="+", default=methods)
    parser.add_argument(
        "--no-fuse", dest="fuse", action="store_false", help="direct sum without torch.compile"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that the script runs")
    parser.add_argument("--json", action="store_true", help="one JSON record a line")
    options = parser.parse_args()
    if options.quick:
        options.channels, options.lengths, options.layers, options.fuse = [16], [512], 2, False
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit(
            "no CUDA device: this benchmark measures GPUs (--device cpu --quick only tries the script)"
        )
    device = torch.device(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not options.json:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, not a GPU measurement"
        print(f"{name}; torch {torch.__version__}; float32, batch {options.batch}, {options.layers} layers\n")
        print("    D  length name          us/position    worst  state MiB  schedule")
    for record in measure(options):
        if options.json:
            print(json.dumps(record), flush=True)
            continue
        state = "" if record["state_bytes"] is None else f"{record['state_bytes'] / 2**20:.1f}"
        sizes = f"{record['channels']:>5} {record['length']:>7} {record['name']:<12}"
        worst = "" if record["worst_us"] is None else f"{record['worst_us']:.0f}"
        times = f"{record['us']:>12.1f} {worst:>8}"
        print(f"{sizes} {times} {state:>10}  {record['schedule'] or ''}", flush=True)


if __name__ == "__main__":
    main()
