"""Check this installation on this machine's devices: `python -m futurefill_rs.selftest --device cuda`.

Every check compares with a direct sum in float64 on the CPU and prints one line; the exit status is 0 if all
passed.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from futurefill_rs import _api, _config
from futurefill_rs._core import CapacityError, Schedule

_METHODS = ("auto", "naive", "epoched", "continuous", Schedule(7, (3, 2)), Schedule(300, (2,)))
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class _Failure(Exception):
    pass


def _expect(condition: bool, text: str) -> None:
    if not condition:
        raise _Failure(text)


def _direct(u: Tensor, filters: Tensor) -> Tensor:
    """The sum itself in float64 on the CPU."""
    u, filters = u.double().cpu(), filters.double().cpu()
    length = u.shape[-1]
    shape = torch.broadcast_shapes(tuple(u.shape[:-1]), tuple(filters.shape[:-1]))  # type: ignore[no-untyped-call]
    y = torch.zeros(*shape, length, dtype=torch.float64)
    for j in range(min(length, filters.shape[-1])):
        y[..., j:] += filters[..., j, None] * u[..., : length - j]
    return y


def _error(y: Tensor, reference: Tensor, dtype: torch.dtype, length: int) -> float:
    """Relative L2 error in units of the bound eps * log2(2 T); `_Failure` beyond it."""
    error = (y.double().cpu() - reference).norm() / reference.norm()
    share = float(error) / (torch.finfo(dtype).eps * math.log2(2 * length))
    _expect(share <= 1, f"relative error {float(error):.3g} is {share:.2f} of the bound")
    return share


@contextlib.contextmanager
def _no_synchronisation(device: torch.device) -> Iterator[None]:
    """On CUDA: any wait of the host for the device is an error."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class _Checks:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.generator = torch.Generator().manual_seed(0)

    def random(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        values = torch.randn(*shape, generator=self.generator, dtype=torch.float64)
        return values.to(dtype).to(self.device)

    def plan(self, filters: Tensor, *args: Any, latency: Any = "throughput") -> Any:
        return _api.plan(filters, *args, engine="torch", latency=latency)

    def steps(self, cache: Any, u: Tensor) -> Tensor:
        inputs = [x.contiguous() for x in u.unbind(-1)]
        with _no_synchronisation(self.device):
            outputs = [cache.step(x) for x in inputs]
        return torch.stack(outputs, -1)

    def streaming(self) -> str:
        worst = 0.0
        for dtype in _DTYPES:
            u, filters = self.random(2, 3, 600, dtype=dtype), self.random(3, 200, dtype=dtype)
            reference = _direct(u, filters)
            for method, latency in itertools.product(_METHODS, ("throughput", "smooth")):
                y = self.steps(self.plan(filters, 600, method, latency=latency).new_cache((2, 3)), u)
                _expect(y.device == u.device and y.dtype is dtype, f"got {y.dtype} on {y.device}")
                worst = max(worst, _error(y, reference, dtype, 600))
        return f"worst error {worst:.2f} of the bound"

    def blocks(self) -> str:
        worst = 0.0
        for method, latency in itertools.product(_METHODS, ("throughput", "smooth")):
            u, filters = self.random(2, 3, 900), self.random(3, 250)
            plan, reference = self.plan(filters, None, method, latency=latency), _direct(u, filters)
            y, cache = plan.prefill(u[..., :100])
            parts = [y, cache.extend(u[..., 100:517]), self.steps(cache, u[..., 517:530])]
            parts.append(cache.extend(u[..., 530:]))
            worst = max(worst, _error(torch.cat(parts, -1), reference, torch.float32, 900))
        return f"worst error {worst:.2f} of the bound"

    def broadcasting(self) -> str:
        for c, f in (((), ()), ((2, 1, 3), (4, 1)), ((5,), ()), ((1,), (6,))):
            u, filters = self.random(*c, 150), self.random(*f, 60)
            y = self.steps(self.plan(filters, None, Schedule(8, (2,))).new_cache(c), u)
            _error(y, _direct(u, filters), torch.float32, 150)
        return "4 shapes"

    def rows(self) -> str:
        u, filters = self.random(3, 2, 200), self.random(2, 80)
        plan = self.plan(filters, 200, Schedule(8, (3,)))
        cache = plan.new_cache((3, 2))
        self.steps(cache, u[..., :77])
        fork = cache.fork()
        fork.reorder(torch.tensor([2, 0, 0, 1], device=self.device))
        picked = u[[2, 0, 0, 1]]
        _error(self.steps(fork, picked[..., 77:]), _direct(picked, filters)[..., 77:], torch.float32, 200)
        cache.reset([1])
        fresh = u.clone()
        fresh[1, :, :77] = 0
        _error(self.steps(cache, fresh[..., 77:]), _direct(fresh, filters)[..., 77:], torch.float32, 200)
        try:
            cache.step(u[..., 0])
        except CapacityError:
            return "fork, reorder, reset, capacity"
        raise _Failure("no CapacityError at the end")

    def states(self) -> str:
        u, filters = self.random(2, 3, 200), self.random(3, 80)
        plan = self.plan(filters, 200, Schedule(8, (3,)))
        cache = plan.prefill(u[..., :30])[1]
        self.steps(cache, u[..., 30:99])
        state = cache.state_dict()
        rest = self.steps(cache, u[..., 99:])
        again = self.steps(plan.load_cache(state), u[..., 99:])
        _expect(torch.equal(again, rest), "a loaded state does not continue bit by bit")
        compiled = _api.plan(filters.cpu(), 200, Schedule(8, (3,))).load_cache(state)
        other = torch.stack([compiled.step(u[..., t].cpu()) for t in range(99, 200)], -1)
        _error(other, _direct(u, filters)[..., 99:], torch.float32, 200)
        return "bit by bit here, and on the compiled engine"

    def isolation(self) -> str:
        u, filters = self.random(4, 2, 150), self.random(2, 60)
        plan = self.plan(filters, None, Schedule(8, (3,)))
        y = self.steps(plan.new_cache((4, 2)), u)
        changed = u.clone()
        changed[1, :, 70:] = float("nan")
        z = self.steps(plan.new_cache((4, 2)), changed)
        _expect(torch.equal(y[[0, 2, 3]], z[[0, 2, 3]]), "rows depend on each other's values")
        _expect(torch.equal(y[1, :, :70], z[1, :, :70]), "outputs depend on later inputs")
        return "rows and causality, bit by bit"

    def training(self) -> str:
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            u = self.random(2, 3, 300, dtype=dtype).requires_grad_()
            filters = self.random(3, 120, dtype=dtype).requires_grad_()
            upper = self.random(2, 3, 300, dtype=dtype)
            y = _api.causal_conv(u, filters)
            _error(y.detach(), _direct(u.detach(), filters.detach()), dtype, 300)
            for_u, for_filters = torch.autograd.grad(y, (u, filters), upper)
            back = _direct(upper.flip(-1), filters.detach()).flip(-1)
            _error(for_u, back, dtype, 1 << 12)
            full = _direct(upper.flip(-1), u.detach()).flip(-1)[..., :120].sum(0)
            _error(for_filters, full, dtype, 1 << 16)
        small = [self.random(2, 9, dtype=torch.float64).requires_grad_() for _ in range(2)]
        _expect(torch.autograd.gradcheck(_api.causal_conv, small), "gradcheck")
        return "causal_conv and its gradients"

    def kernel(self) -> str:
        from futurefill_rs.torch_engine.step import kernel_usable

        u, filters = self.random(2, 3, 700), self.random(3, 600)
        plan = self.plan(filters, None, Schedule(300, ()))
        cache, plain = plan.new_cache((2, 3)), plan.new_cache((2, 3))
        if cache._kernel_rows is None:
            wanted = self.device.type == "cuda" and os.environ.get("FUTUREFILL_TRITON") != "0"
            _expect(not wanted, "the kernel cannot be used")
            return "not used on this device"
        plain._kernel_rows = None
        a, b = self.steps(cache, u), self.steps(plain, u)
        _expect(kernel_usable(self.device), "the kernel could not be launched")
        _error(a, _direct(u, filters), torch.float32, 700)
        _error(b, _direct(u, filters), torch.float32, 700)
        return "agrees with torch's operators"

    def graph(self) -> str:
        if self.device.type != "cuda":
            return "not possible on this device"
        worst = 0.0
        for method, latency in itertools.product(_METHODS, ("throughput", "smooth")):
            u, filters = self.random(2, 3, 600), self.random(3, 200)
            cache = self.plan(filters, 600, method, latency=latency).new_cache((2, 3))
            x, out, outputs = u[..., 0].clone(), torch.empty_like(u[..., 0]), []
            stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(stream):
                cache.advance()
                outputs.append(cache.static_step(x).clone())
            torch.cuda.current_stream(self.device).wait_stream(stream)
            recording = torch.cuda.CUDAGraph()
            with torch.cuda.graph(recording):
                cache.static_step(x, out=out)
            cache.capture_tiles()
            inputs = [x.contiguous() for x in u.unbind(-1)]
            with _no_synchronisation(self.device):
                for t in range(1, 600):
                    x.copy_(inputs[t])
                    cache.advance()
                    recording.replay()
                    outputs.append(out.clone())
            worst = max(worst, _error(torch.stack(outputs, -1), _direct(u, filters), torch.float32, 600))
        return f"captured steps and tiles: worst error {worst:.2f} of the bound"

    def latency(self) -> str:
        if self.device.type != "cuda":
            return "not possible on this device"
        channels, length, report = 896, 16384, []
        filters, u = self.random(channels, length), self.random(channels)
        for latency in ("throughput", "smooth"):
            cache = self.plan(filters, length, "continuous", latency=latency).new_cache()
            out, events = torch.empty_like(u), []
            for _ in range(length):
                cache.step(u, out=out)
                events.append(torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
                events[-1].record()
            self.wait()
            spent = [a.elapsed_time(b) for a, b in itertools.pairwise(events[length // 2 :])]
            report.append(f"{latency} {max(spent) * 1e3:.0f} / {sum(spent) / len(spent) * 1e3:.1f} us")
        return f"worst / mean step of {channels} channels: {', '.join(report)}"

    def speed(self) -> str:
        channels, length = 896, 4096
        filters, u = self.random(channels, length), self.random(channels)
        cache = self.plan(filters, length).new_cache()
        out = torch.empty_like(u)
        for _ in range(64):
            cache.step(u, out=out)
        self.wait()
        start, count = time.perf_counter(), 2048
        for _ in range(count):
            cache.step(u, out=out)
        self.wait()
        spent = time.perf_counter() - start
        return f"{spent / count * 1e6:.1f} us per step of {channels} channels, {length} lags"

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def run(device: str = "cpu") -> bool:
    """Run every check on a device, print the report, and say whether all passed."""
    target = torch.device(device)
    if target.type == "cuda" and not torch.cuda.is_available():
        print("device: cuda asked for, but torch finds no CUDA device")
        return False
    _config.show_config()
    name = torch.cuda.get_device_name(target) if target.type == "cuda" else str(target)
    print(f"device under test: {name}\n")
    checks = _Checks(target)
    tests: dict[str, Callable[[], str]] = {
        "every method, steps": checks.streaming,
        "prefill, extend, steps mixed": checks.blocks,
        "broadcasting": checks.broadcasting,
        "fork, reorder, reset": checks.rows,
        "saved states": checks.states,
        "isolation": checks.isolation,
        "training": checks.training,
        "step kernel": checks.kernel,
        "CUDA graphs": checks.graph,
        "speed": checks.speed,
        "latency": checks.latency,
    }
    passed = True
    current = torch.cuda.device(target) if target.type == "cuda" else contextlib.nullcontext()
    for title, test in tests.items():
        start = time.perf_counter()
        try:
            with current:
                verdict, text = "ok", test()
        except Exception as error:
            verdict, text = "FAILED", f"{type(error).__name__}: {error}"
            passed = False
        print(f"{verdict:<7}{title:<30}{text}  ({time.perf_counter() - start:.1f} s)")
    print("\nall checks passed" if passed else "\nsome checks failed")
    return passed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m futurefill_rs.selftest", description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    return 0 if run(parser.parse_args(arguments).device) else 1


if __name__ == "__main__":
    sys.exit(main())
