"""The streaming engine in plain torch: the same schedules as the compiled engine, on any torch device.

| file | |
| --- | --- |
| `plan` | the public face of filters made ready, and of saved states |
| `tables` | filters, twists and spectra: what a plan holds |
| `layout` | which blocks a schedule comes to, and where their tiles read and write |
| `cache` | one stream: steps, blocks, rows |
| `tile` | the memory of a stream and the tiles that work on it |
| `conv`, `autograd`, `fft`, `dtensor` | whole sequences |
| `streams`, `triton` | what only a GPU has |
"""

from __future__ import annotations

from futurefill_rs.torch_engine.cache import TorchCache
from futurefill_rs.torch_engine.plan import TorchPlan

__all__ = ["TorchCache", "TorchPlan"]
