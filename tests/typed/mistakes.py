"""Every line with an `error` comment is a mistake that both type checkers must find; no other line is one."""

# pyright: strict
# ruff: noqa: B018
from __future__ import annotations

import futurefill_rs as ff
import numpy as np

plan = ff.plan(np.ones((2, 8), np.float32))
cache = plan.new_cache()
integers = np.ones(3, np.int64)
declared: ff.Cache = cache

ff.plam(np.ones(3))  # error
ff.is_tensor  # error
plan.filter_lenght  # error
cache.stepp(np.ones(2, np.float32))  # error
declared.postion  # error
ff.plan(np.ones(3), method="fast")  # error
ff.plan(np.ones(3), latency="smoth")  # error
ff.plan(np.ones(3), horizon="10")  # error
ff.plan(integers)  # error
ff.plan([1.0, 2.0])  # error
ff.plan(np.ones(3), engine="torch")  # error
ff.plan(np.ones(3), max_new=3)  # error
cache.step([1.0, 2.0])  # error
cache.step(np.ones(2, np.float32), out=np.ones(2))  # error
cache.extend(integers)  # error
cache.pending("3")  # error
cache.position = 3  # error
plan.prefill(np.ones((2, 3)), 2.5)  # error
ff.causal_conv(np.ones(3), [1.0])  # error
ff.Schedule("8", (2,))  # error
ff.Schedule(8, (2,)).base = 3  # error
wrong: str = cache.step(np.ones(2, np.float32))  # error
