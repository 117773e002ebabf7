"""What a user could take instead of this package, each measured in the same closed loop.

Every function returns nanoseconds per position and channel and a remark, or raises `Absent` with the reason
why the rival could not be run here.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
from futurefill_rs import bench

HERE = Path(__file__).parent


class Absent(Exception):
    """This rival is not on this machine."""


def torch_dot(channels: int, length: int, workers: int, seconds: float) -> tuple[float, str]:
    """Torch's direct sum: inputs so far times filters, which lie reversed, at evenly spread positions."""
    torch = _torch()
    reversed_filters = torch.from_numpy(bench.closed_loop_filters(channels, length)).flip(-1).contiguous()
    inputs = torch.rand(channels, length)
    times = []
    with bench._torch_threads(workers), torch.inference_mode():
        deadline = time.perf_counter() + seconds
        for start in _middles(length, 16, 4):
            best = np.full(4, np.inf)
            for _ in range(2):
                for i in range(4):
                    t = start + i
                    begin = time.perf_counter_ns()
                    # The product is fused into the sum by the batched product of vectors.
                    past, lags = inputs[:, None, : t + 1], reversed_filters[:, length - 1 - t :, None]
                    inputs[:, min(t + 1, length - 1)] = torch.bmm(past, lags)[:, 0, 0]
                    best[i] = min(best[i], time.perf_counter_ns() - begin)
            times.append(best.mean())
            if time.perf_counter() > deadline:
                raise Absent(f"torch cached dot: took longer than {seconds} s")
    return float(np.mean(times)) / channels, f"{4 * len(times)} positions, evenly spread"


def scipy_oaconvolve(channels: int, length: int) -> tuple[float, str]:
    """The whole input known in advance, by overlap and add."""
    try:
        from scipy.signal import oaconvolve
    except ImportError:
        raise Absent("scipy is not installed") from None
    filters = bench.closed_loop_filters(channels, length)
    u = np.random.default_rng(1).standard_normal((channels, length), np.float32)
    times = []
    for _ in range(2):
        start = time.perf_counter()
        oaconvolve(u, filters, axes=-1)[:, :length]
        times.append(time.perf_counter() - start)
    return min(times) * 1e9 / (channels * length), "the whole input known in advance"


def public_futurefill(
    path: Path | None, channels: int, length: int, workers: int, epochs: int
) -> tuple[float, str]:
    """`EpochedFutureFill` of SpectraLDS, whole epochs from evenly spread positions.

    Each step appends to a tensor of all inputs so far, so its cost grows with the position; an epoch is K
    steps and one FutureFill.
    """
    torch = _torch()
    if path is None:
        raise Absent("give a checkout of SpectraLDS as --spectralds PATH")
    file = path / "flash_stu" / "utils" / "future_fill.py"
    if not file.is_file():
        raise Absent(f"no flash_stu/utils/future_fill.py in {path}")
    # Imported by that file, used on CUDA only.
    stub: Any = types.ModuleType("flashfftconv")
    stub.FlashFFTConv = None
    sys.modules.setdefault("flashfftconv", stub)
    spec = importlib.util.spec_from_file_location("future_fill", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    filters = torch.from_numpy(bench.closed_loop_filters(channels, length))
    with bench._torch_threads(workers), torch.inference_mode():
        rival = module.EpochedFutureFill(filters, bsz=channels, device=torch.device("cpu"))
        steps = rival.K
        starts = [int((i + 0.5) * length / epochs) - steps // 2 for i in range(epochs)]
        elapsed = 0.0
        for start in starts:
            rival.reset_cache()
            rival.buffer = torch.rand(channels, max(start, 0))
            u = torch.rand(channels)
            begin = time.perf_counter()
            for _ in range(steps):
                u = rival.process(u, rival.filter)
            elapsed += time.perf_counter() - begin
    ns = elapsed * 1e9 / (epochs * steps * channels)
    return ns, f"{epochs} epochs of {steps} positions, evenly spread"


def crate_fft_convolver(channels: int, length: int, runs: int) -> tuple[float, str]:
    """The Rust crate `fft-convolver`, two-stage, one sample at a time, at its best head block size."""
    if shutil.which("cargo") is None:
        raise Absent("cargo is not installed")
    target = HERE / "out" / "rivals"
    build = ["cargo", "build", "--release", "--quiet", "--manifest-path", str(HERE / "rivals" / "Cargo.toml")]
    built = subprocess.run([*build, "--target-dir", str(target)], capture_output=True, text=True)
    if built.returncode:
        raise Absent(f"cargo could not build it: {built.stderr.strip().splitlines()[-1]}")
    return _best_head([str(target / "release" / "rivals")], channels, length, runs)


def cpp_fftconvolver(path: Path | None, channels: int, length: int, runs: int) -> tuple[float, str]:
    """HiFi-LoFi's FFTConvolver, two-stage, one sample at a time, at its best head block size."""
    if path is None:
        raise Absent("give a checkout of HiFi-LoFi/FFTConvolver as --fftconvolver PATH")
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise Absent("no C++ compiler is installed")
    program = HERE / "out" / "fftconvolver"
    program.parent.mkdir(exist_ok=True)
    names = ("AudioFFT.cpp", "FFTConvolver.cpp", "TwoStageFFTConvolver.cpp", "Utilities.cpp")
    sources = [str(HERE / "rivals" / "fftconvolver.cpp"), *(str(path / name) for name in names)]
    flags = ["-O3", "-march=native", "-ffast-math", "-std=c++17", f"-I{path}", "-o", str(program)]
    built = subprocess.run([compiler, *flags, *sources], capture_output=True, text=True)
    if built.returncode:
        raise Absent(f"it does not compile: {built.stderr.strip().splitlines()[0]}")
    return _best_head([str(program)], channels, length, runs)


def _best_head(program: list[str], channels: int, length: int, runs: int) -> tuple[float, str]:
    done = subprocess.run(
        [*program, *map(str, (channels, length, runs))], capture_output=True, text=True, check=True
    )
    results = [json.loads(line) for line in done.stdout.splitlines()]
    best = min(results, key=lambda result: result["ns_per_position_channel"])
    return float(best["ns_per_position_channel"]), f"head block {best['head']}"


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        raise Absent("torch is not installed") from None
    return torch


def _middles(length: int, windows: int, count: int) -> list[int]:
    return [max(0, int((i + 0.5) * length / windows) - count // 2) for i in range(windows)]
