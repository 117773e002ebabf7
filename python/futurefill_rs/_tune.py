"""The planner's cost model, measured on this machine and kept in the user's cache directory."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

from futurefill_rs import _core

_FORMAT = 1


def _stored() -> Path:
    """Where the measured costs of this instruction set are kept."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "futurefill_rs" / f"costs-{_core.instruction_set()}.json"


def tune(*, store: bool = True) -> dict[str, float]:
    """Measure what the engine's parts cost on this machine, and plan with it from now on.

    Takes a few seconds of one core; run it on an idle machine. `method="auto"` then chooses schedules by the
    measured costs, in this process and, with `store=True`, in later ones (the user's cache directory).
    Results stay the same within rounding: only which schedule is chosen can change.

    Returns the costs: nanoseconds per position and channel, by what they are spent on.

    Raises OSError where `store=True` and the directory cannot be written.
    """
    costs = _core.measure_costs()
    _core.set_costs(costs)
    if store:
        path = _stored()
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{os.getpid()}.tmp")
        fresh.write_text(json.dumps({"format": _FORMAT, "costs": costs}, indent=1), encoding="utf-8")
        fresh.replace(path)
    return costs


def load_stored() -> None:
    """Plan with the costs that an earlier `tune` stored, where there are any that can be read."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RuntimeError):
        stored = json.loads(_stored().read_text(encoding="utf-8"))
        if stored["format"] == _FORMAT:
            _core.set_costs(stored["costs"])
