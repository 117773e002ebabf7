"""The Triton step kernel without a GPU: run in Triton's interpreter, and compiled for several GPUs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import pickle
import torch
import futurefill_rs as ff
from futurefill_rs import torch_engine
from futurefill_rs.torch_engine import triton

assert triton.usable(torch.device("cpu"))
# Short runs, so that a small block has several of them.
triton._TIMES = 4
launches = 0
launch = triton.step

def counted(*args):
    global launches
    launches += 1
    return launch(*args)

triton.step = counted
torch.manual_seed(0)
shapes = [((0, 3), (3,)), ((), ()), ((2, 20), (20,)), ((2, 1, 3), (4, 1))]
schedules = [ff.Schedule(6, ()), ff.Schedule(2, (2,)), ff.Schedule(300, ()), "naive"]
for c, f in shapes:
    for dtype in (torch.float32,) if c else (torch.float32, torch.float64, torch.float16):
        for method in schedules:
            filters, u = torch.randn(*f, 12).to(dtype), torch.randn(*c, 24).to(dtype)
            plan = torch_engine.TorchPlan(filters, None, method, latency="smooth")
            cache, plain = plan.prefill(u[..., :3])[1], plan.prefill(u[..., :3])[1]
            static = cache.fork()
            assert cache._kernel_rows is not None
            plain._kernel_rows = None
            before = launches
            for t in range(3, 20):
                if t % 3 == 0:
                    y = cache.step(u[..., t])
                elif t % 3 == 1 and plain.output_shape == c:
                    y = u[..., t].clone()
                    assert cache.step(y, out=y) is y
                else:
                    y = torch.empty((*plain.output_shape, 2), dtype=dtype)[..., 0]
                    cache.step(u[..., t], out=y)
                z = plain.step(u[..., t])
                assert y.dtype is dtype
                torch.testing.assert_close(y, z)
                static.advance()
                assert torch.equal(static.static_step(u[..., t]), y)
                if t == 12:
                    again = plan.load_cache(pickle.loads(pickle.dumps(cache.state_dict())))
                elif t > 12:
                    assert torch.equal(again.step(u[..., t]), y)
            assert launches - before >= 2 * 17
            torch.testing.assert_close(cache.extend(u[..., 20:]), plain.extend(u[..., 20:]))

# A kernel that cannot be launched is replaced by torch's operators, with one warning.
def broken(*args, **kwargs):
    raise RuntimeError("no compiler")

class Broken:
    def __getitem__(self, grid):
        return broken

import warnings
triton._step = Broken()
cache, plain = plan.new_cache(c), plan.new_cache(c)
plain._kernel_rows = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for t in range(3):
        assert torch.equal(cache.step(u[..., t]), plain.step(u[..., t]))
assert [w.category for w in caught] == [RuntimeWarning] and not triton.usable(torch.device("cpu"))
print("ok")
"""


COMPILATION = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from futurefill_rs.torch_engine.triton import _step

sizes = ["block", "ring", "filter_length", "given_length"]
for inner, outer, capability in (("fp32", "fp16", 75), ("fp64", "fp32", 80), ("fp32", "bf16", 90)):
    for clock in ("i32", "i64", "*i64"):
        for tiles in (True, False):
            pointers = dict(u=outer, history=inner, filters=inner, given=inner, y=outer)
            pointers |= dict(input_row="i64", filter_row="i64")
            signature = {name: "*" + kind for name, kind in pointers.items()} | {"clock": clock}
            signature |= {name: "i32" for name in sizes}
            constants = {"TILES": tiles, "STATIC": clock == "*i64", "TIMES": 256}
            signature |= {name: "constexpr" for name in constants}
            source = ASTSource(_step, signature, constexprs=constants)
            options = {"enable_fp_fusion": True}
            compiled = triton.compile(source, GPUTarget("cuda", capability, 32), options=options)
            assert "st.global" in compiled.asm["ptx"]
print("ok")
"""


def run(program: str, **variables: str) -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.strip() == "ok", done.stderr


def test_kernel_in_the_interpreter():
    run(PROGRAM, TRITON_INTERPRET="1")


def test_kernel_compiles_for_gpus(tmp_path):
    run(COMPILATION, TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
