"""The streaming engine in plain torch: the same schedules as the compiled engine, on any torch device.

| file | |
| --- | --- |
| `plan` | the public face of filters made ready, and of saved states |
| `tables` | filters, twists and spectra: what a plan holds |
| `cache` | one stream: its clock, its rows, its copies |
| `step`, `block` | the sums of one position, and of a known block |
| `tile` | the memory of a stream and the tiles that work on it, as the compiled engine's schedule has them |
| `conv`, `autograd`, `fft`, `dtensor` | whole sequences |
| `streams`, `triton` | what only a GPU has |
"""

from __future__ import annotations

from futurefill_rs.torch_engine.cache import TorchCache
from futurefill_rs.torch_engine.plan import TorchPlan

__all__ = ["TorchCache", "TorchPlan"]
