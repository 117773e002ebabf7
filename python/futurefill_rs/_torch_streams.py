"""What only a CUDA device has, streams and graphs, behind two small names: elsewhere work runs at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch


class Graph(Protocol):
    """Recorded work."""

    def replay(self) -> None:
        """Run it again, on the same memory."""


class Side:
    """A place beside the current stream where work may take its time; on CUDA a stream of its own.

    Whatever was queued before `start` is done before the work begins, and whatever is queued after `wait`
    comes after the work. The host never waits. `real`: False for fake tensors, which no stream can hold.
    """

    def __init__(self, device: torch.device, real: bool) -> None:
        self._stream: Any = None
        if device.type == "cuda" and real:
            with torch.cuda.device(device):
                self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def start(self, work: Callable[[], None]) -> None:
        if self._stream is None:
            work()
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            work()

    def wait(self) -> None:
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


def record(work: Callable[[], None], device: torch.device, pool: Any) -> Graph:
    """The work as a CUDA graph, recorded and not run; `pool`: a graph whose memory for temporaries it shares.

    Only graphs that never run at the same time may share it.
    """
    if device.type != "cuda":
        raise ValueError(f"cache: expected one on a CUDA device, got {device}")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph, pool=None if pool is None else pool.pool()):
        work()
    return graph
