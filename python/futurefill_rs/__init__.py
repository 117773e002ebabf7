"""Exact online convolution in quasilinear time, for numpy arrays and torch tensors.

A sequence has time last, ``u (*C, T)``; filters are ``(*F, L)``, lag 0 first; ``C`` and ``F`` broadcast.

| call | result |
| --- | --- |
| ``plan(filters, horizon=None, method="auto")`` | filters made ready for generation: immutable, shared |
| ``plan.new_cache()``, ``plan.prefill(prompt, max_new)`` | the memory of one run |
| ``cache.step(u)``, ``cache.extend(u)`` | the next output, the next outputs |
| ``causal_conv(u, filters)``, ``futurefill(v, w)`` | whole sequences at once |
| ``fir(b, x, zi=None, axis=-1)`` | as ``scipy.signal.lfilter(b, 1, x, axis, zi)`` |

>>> import numpy as np, futurefill_rs as ff
>>> plan = ff.plan(np.array([1.0, 0.5, 0.25]), horizon=4)
>>> cache = plan.new_cache()
>>> [float(cache.step(np.array(u))) for u in (1.0, 0.0, 0.0, 0.0)]
[1.0, 0.5, 0.25, 0.0]
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from futurefill_rs import _interrupt  # noqa: F401  (the command's Ctrl-C, before anything slow is imported)
from futurefill_rs._api import causal_conv, futurefill, plan
from futurefill_rs._config import check_environment as _check_environment
from futurefill_rs._config import show_config
from futurefill_rs._core import CapacityError, Schedule, __version__
from futurefill_rs._fir import fir
from futurefill_rs._interface import Cache, Plan
from futurefill_rs._threads import get_workers, set_workers
from futurefill_rs._tune import load_stored as _load_stored
from futurefill_rs._tune import tune

if TYPE_CHECKING:
    from futurefill_rs import models, nn
    from futurefill_rs._generate import Continuation, generate
    from futurefill_rs.models._variants import score_variants

__all__ = [
    "Cache",
    "CapacityError",
    "Continuation",
    "Plan",
    "Schedule",
    "__version__",
    "causal_conv",
    "fir",
    "futurefill",
    "generate",
    "get_workers",
    "models",
    "nn",
    "plan",
    "score_variants",
    "set_workers",
    "show_config",
    "tune",
]

_check_environment()
_load_stored()

# Type checkers would take any name for one of these.
if not TYPE_CHECKING:
    _NEED_TORCH = {
        "Continuation": "futurefill_rs._generate",
        "generate": "futurefill_rs._generate",
        "score_variants": "futurefill_rs.models._variants",
    }

    def __getattr__(name):
        # What needs torch is imported when it is first asked for: numpy users never pay for it.
        import importlib

        if name in ("models", "nn"):
            return importlib.import_module(f"futurefill_rs.{name}")
        if name in _NEED_TORCH:
            try:
                importlib.import_module("torch")
            except ImportError as error:
                message = f"futurefill_rs.{name} needs torch: pip install 'futurefill_rs[torch]'"
                raise ImportError(message) from error
            globals()[name] = getattr(importlib.import_module(_NEED_TORCH[name]), name)
            return globals()[name]
        raise AttributeError(f"module 'futurefill_rs' has no attribute {name!r}")

    def __dir__():
        return sorted(__all__)
