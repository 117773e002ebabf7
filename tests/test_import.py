"""The package itself: what importing costs, what it shows, what its examples print."""

import doctest
import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import futurefill_rs as ff
import numpy as np
import pytest


def run_python(program):
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)


def test_numpy_users_never_import_torch():
    result = run_python(
        "import sys, numpy as np, futurefill_rs as ff\n"
        "cache = ff.plan(np.ones((2, 3)), 10).new_cache()\n"
        "cache.step(np.ones(2)); cache.reset()\n"
        "ff.causal_conv(np.ones(3), np.ones(3)); ff.futurefill(np.ones(3), np.ones(3))\n"
        "ff.plan(np.ones((2, 3)), 10).load_cache(cache.state_dict())\n"
        "dir(ff)\n"
        "assert 'torch' not in sys.modules"
    )
    assert result.returncode == 0, result.stderr


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
import numpy as np, futurefill_rs as ff
ff.plan(np.ones((2, 3)), 10).new_cache().step(np.ones(2))
ff.show_config()
for name in ("nn", "models", "generate"):
    for statement in (f"ff.{name}", f"from futurefill_rs import {name}", f"import futurefill_rs.{name}"):
        if statement == "import futurefill_rs.generate":
            continue
        try:
            exec(statement)
        except ImportError as error:
            assert "pip install 'futurefill_rs[torch]'" in str(error), (name, error)
        else:
            raise AssertionError(name)
"""


def test_without_torch():
    result = run_python(WITHOUT_TORCH)
    assert result.returncode == 0, result.stderr
    assert "not installed" in result.stdout


def test_public_names():
    for name in ff.__all__:
        assert getattr(ff, name) is not None
    assert callable(ff.generate)
    importlib.import_module("futurefill_rs._generate")
    assert callable(ff.generate)
    assert dir(ff) == sorted(ff.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ff.nothing


def test_version():
    from importlib.metadata import version

    assert ff.__version__ == version("futurefill_rs")


def test_show_config(capsys):
    assert ff.show_config() is None
    text = capsys.readouterr().out
    for word in (ff.__version__, "instruction set", "FFT", "workers", "numpy", "torch", "CUDA"):
        assert word in text


def test_capacity_error_is_a_value_error():
    assert issubclass(ff.CapacityError, ValueError)
    assert ff.CapacityError.__module__ == "futurefill_rs"


def test_typed():
    folder = Path(ff.__file__).parent
    assert (folder / "py.typed").exists() and (folder / "_core.pyi").exists()


@pytest.mark.parametrize("module", ["futurefill_rs", "futurefill_rs._api", "futurefill_rs._threads"])
def test_examples(module):
    before = ff.get_workers()
    results = doctest.testmod(importlib.import_module(module))
    ff.set_workers(before)
    assert results.attempted > 0 and results.failed == 0


def test_every_public_method_says_what_it_does():
    from futurefill_rs import _core, _torch_cpu, torch_engine

    kinds = [ff.Plan, ff.Cache, _core.Plan, _core.Cache, _core.Schedule, _torch_cpu.Plan, _torch_cpu.Cache]
    for kind in (*kinds, torch_engine.TorchPlan, torch_engine.TorchCache):
        assert kind.__doc__
        for name in dir(kind):
            if not name.startswith("_"):
                assert inspect.getdoc(getattr(kind, name)), f"{kind.__name__}.{name}"


def test_public_types(lib):
    plan = lib.plan(np.ones((2, 5), np.float32))
    assert isinstance(plan, ff.Plan) and isinstance(plan.new_cache(), ff.Cache)
    assert not isinstance(plan, ff.Cache)
    for kind in (ff.Plan, ff.Cache):
        missing = {name for name in dir(kind) if not name.startswith("_")} - set(
            dir(plan if kind is ff.Plan else plan.new_cache())
        )
        assert not missing


def test_reprs(lib):
    plan = lib.plan(np.ones((2, 5), np.float32), 7, ff.Schedule(4))
    assert "horizon=7" in repr(plan) and "Schedule(base=4, fans=())" in repr(plan)
    assert "position=0" in repr(plan.new_cache()) and "remaining=7" in repr(plan.new_cache())


def test_an_instruction_set_that_is_not_there_is_named():
    environment = {**os.environ, "FUTUREFILL_ISA": "sse9"}
    command = [sys.executable, "-W", "error", "-c", "import futurefill_rs"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 1
    assert "FUTUREFILL_ISA: expected one of baseline" in result.stderr and "got 'sse9'" in result.stderr
