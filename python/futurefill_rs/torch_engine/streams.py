"""What only a CUDA device has, streams and graphs, behind a few small names: elsewhere work runs at once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor


class Graph(Protocol):
    """Recorded work."""

    def replay(self) -> None:
        """Run it again, on the same memory."""


@functools.cache
def _stream(device: torch.device, name: str) -> Any:
    """One stream for one purpose: torch's allocator keeps memory for every stream that was ever used."""
    with torch.cuda.device(device):
        return torch.cuda.Stream()  # type: ignore[no-untyped-call]


class Side:
    """A place beside the current stream where work may take its time; on CUDA a stream of its own.

    Whatever was queued before `start` is done before the work begins, and whatever is queued after `wait`
    comes after the work. The host never waits. Sides of one name share a stream. `real`: False for fake
    tensors, which no stream can hold.
    """

    def __init__(self, device: torch.device, name: str, real: bool) -> None:
        self._stream: Any = _stream(device, name) if device.type == "cuda" and real else None
        self._done: Any = None

    def start(self, work: Callable[[], None], uses: Iterable[Tensor]) -> None:
        """Begin some work on memory `uses`, which must not be given to others before the work is done."""
        if self._stream is None:
            work()
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        for tensor in uses:
            tensor.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            work()
            self._done = self._stream.record_event()

    def wait(self) -> None:
        if self._done is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(self._done)


def check_recordable(device: torch.device, real: bool) -> None:
    """`ValueError` for a device without graphs."""
    if device.type != "cuda" or not real:
        got = device if real else f"fake tensors on {device}"
        raise ValueError(f"cache: expected one on a CUDA device, got {got}")


def record(work: Callable[[], None], device: torch.device, pool: Any) -> Graph:
    """The work as a CUDA graph, recorded and not run; `pool`: a graph whose memory for temporaries it shares.

    Only graphs that never run at the same time may share it.
    """
    graph = torch.cuda.CUDAGraph()
    memory, stream = None if pool is None else pool.pool(), _stream(device, "capture")
    with torch.cuda.device(device), torch.cuda.graph(graph, pool=memory, stream=stream):
        work()
    return graph
