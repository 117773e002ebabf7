"""What this installation is made of."""

from __future__ import annotations

import os
import platform
import warnings

import numpy as np

from futurefill_rs import _core, _threads

ISA = "FUTUREFILL_ISA"


def check_environment() -> None:
    """Warn of an instruction set asked for that this machine does not have; the best one is used then."""
    wish = os.environ.get(ISA, "")
    known = _core.instruction_sets()
    if wish and wish not in known:
        warnings.warn(
            f"{ISA}: expected one of {', '.join(known)}, got {wish!r}; ignored", RuntimeWarning, stacklevel=2
        )


def show_config() -> None:
    """Print version, instruction set, FFT backend, workers, and torch and CUDA where present."""
    rows = {
        "futurefill_rs": _core.__version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "numpy": np.__version__,
        "instruction set": _core.instruction_set(),
        "FFT backend": "rustfft",
        "workers": f"{_threads.get_workers()} of {_core.available_workers()} cores",
        **_torch_rows(),
    }
    width = max(map(len, rows)) + 2
    for name, value in rows.items():
        print(f"{name + ':':<{width}}{value}")


def _torch_rows() -> dict[str, str]:
    try:
        import torch
    except ImportError:
        return {"torch": "not installed"}
    rows = {"torch": str(torch.__version__)}
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        rows["CUDA"] = f"{torch.version.cuda} ({names})"
    else:
        rows["CUDA"] = "no device"
    return rows
