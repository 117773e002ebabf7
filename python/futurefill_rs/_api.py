"""The three entry points: each sends its arrays to the engine they belong to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, SupportsIndex, TypeVar, overload

import numpy as np

from futurefill_rs import _core, _threads
from futurefill_rs._arrays import is_tensor

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from futurefill_rs._core import Schedule
    from futurefill_rs._torch_cpu import Plan as CpuPlan
    from futurefill_rs._torch_engine import TorchPlan

    Method = Literal["auto", "naive", "epoched", "continuous"] | Schedule
    Float = TypeVar("Float", np.float32, np.float64)
    Latency = Literal["throughput", "smooth"]


def _same_library(first: str, second: str, a: Any, b: Any) -> None:
    """Arrays of one call are all of one library; what is neither is named by the engine itself."""
    if is_tensor(a) != is_tensor(b):
        tensor = first if is_tensor(a) else second
        other, kind = (second, type(b)) if is_tensor(a) else (first, type(a))
        raise TypeError(f"{other}: expected a torch tensor like {tensor}, got {kind.__name__}")


@overload
def futurefill(v: torch.Tensor, w: torch.Tensor) -> torch.Tensor: ...
@overload
def futurefill(v: NDArray[Float], w: NDArray[np.float32 | np.float64]) -> NDArray[Float]: ...
def futurefill(v: Any, w: Any) -> Any:
    """FutureFill, the paper's operator: what past inputs `v` add to the next outputs under the filter `w`.

    ``[FutureFill(v, w)]_s = sum_{i=1}^{t2-s} v_{t1-i+1} w_{s+i}`` for s = 1 .. t2-1 (v zero outside 1 .. t1).

    | argument | shape | |
    | --- | --- | --- |
    | v | ``(*B, t1)`` | t1 >= 0; float32 or float64, torch: also float16 and bfloat16 |
    | w | ``(*B, t2)`` | t2 >= 1; leading axes broadcast with v's |
    | result | ``(*B, t2 - 1)`` | in v's dtype; for torch differentiable in both |

    Raises TypeError for other dtypes, ValueError for shapes that do not broadcast.
    Source: Agarwal et al., arXiv 2410.03766, Definition 2.

    >>> import numpy as np, futurefill_rs as ff
    >>> ff.futurefill(np.array([1.0, 2.0]), np.array([1.0, 10.0, 100.0]))
    array([120., 200.])
    """
    _same_library("v", "w", v, w)
    if is_tensor(v):
        from futurefill_rs import _torch_ops

        return _torch_ops.futurefill(v, w)
    if isinstance(w, np.ndarray) and w.dtype.kind == "f" and w.dtype.itemsize == 4:
        # Of filters that die out the future has little, and the transform's rounding is that of the whole.
        w = w.astype(np.float64)
    return _core.futurefill(v, w)


@overload
def causal_conv(
    u: torch.Tensor, filters: torch.Tensor, *, workers: SupportsIndex | None = None
) -> torch.Tensor: ...
@overload
def causal_conv(
    u: NDArray[Float], filters: NDArray[np.float32 | np.float64], *, workers: SupportsIndex | None = None
) -> NDArray[Float]: ...
def causal_conv(u: Any, filters: Any, *, workers: SupportsIndex | None = None) -> Any:
    """Causal convolution of a whole sequence: ``y[..., t] = sum_j filters[..., j] u[..., t-j]``.

    | argument | shape | |
    | --- | --- | --- |
    | u | ``(*C, T)`` | T >= 0; float32 or float64, torch: also float16 and bfloat16 |
    | filters | ``(*F, L)`` | L >= 1, lag 0 first; F broadcasts with C |
    | result | ``(*broadcast(C, F), T)`` | in u's dtype; for torch differentiable in both, on every device |

    workers: number of threads (None: `get_workers()`, -1: all cores).
    Raises TypeError for other dtypes, ValueError for shapes that do not broadcast or different devices.

    >>> import numpy as np, futurefill_rs as ff
    >>> ff.causal_conv(np.array([1.0, 0.0, 2.0]), np.array([1.0, 0.5])).round(12) + 0.0
    array([1. , 0.5, 2. ])
    """
    _same_library("u", "filters", u, filters)
    count = _threads.resolve(workers)
    if is_tensor(u):
        from futurefill_rs import _torch_ops

        return _torch_ops.causal_conv(u, filters, count)
    return _core.causal_conv(u, filters, workers=count)


@overload
def plan(
    filters: torch.Tensor,
    horizon: SupportsIndex | None = None,
    method: Method = "auto",
    *,
    workers: SupportsIndex | None = None,
    max_memory: SupportsIndex | None = None,
    latency: Latency = "throughput",
    engine: Literal["torch"] | None = None,
) -> CpuPlan | TorchPlan: ...
@overload
def plan(
    filters: NDArray[np.float32 | np.float64],
    horizon: SupportsIndex | None = None,
    method: Method = "auto",
    *,
    workers: SupportsIndex | None = None,
    max_memory: SupportsIndex | None = None,
    latency: Latency = "throughput",
    engine: None = None,
) -> _core.Plan: ...
def plan(
    filters: Any,
    horizon: Any = None,
    method: Any = "auto",
    *,
    workers: SupportsIndex | None = None,
    max_memory: Any = None,
    latency: str = "throughput",
    engine: str | None = None,
) -> Any:
    """Prepare filters for generation: an immutable plan, to be shared by any number of caches and threads.

    | argument | | |
    | --- | --- | --- |
    | filters | ``(*F, L)``, lag 0 first, L >= 1 | float32, float64; torch: float16, bfloat16 as float32 |
    | horizon | int or None | positions one cache will serve; None: no bound, memory is bounded by L |
    | method | ``"auto"`` | what the cost model prefers |
    | | ``"naive"`` | the direct sum |
    | | ``"epoched"`` | the paper's Algorithm 1 |
    | | ``"continuous"`` | the paper's Algorithm 2 |
    | | a `Schedule` | exactly that |
    | workers | int or None | threads for large tiles (None: `get_workers()`, -1: all cores) |
    | max_memory | int or None | bytes of cache per sequence that the planner may use |
    | latency | ``"throughput"`` or ``"smooth"`` | smooth spreads large tiles over earlier steps |
    | engine | None or ``"torch"`` | None: Rust for CPU arrays, torch for other devices |

    Returns a plan with ``new_cache(shape=None)``, ``prefill(prompt, max_new=None)``, ``load_cache(state)``
    and ``schedule``, ``filter_length``, ``horizon``, ``dtype``, ``nbytes``. numpy filters serve numpy arrays,
    torch filters serve torch tensors of the same device.
    Raises TypeError for other dtypes or libraries, ValueError for everything else out of range.

    >>> import numpy as np, futurefill_rs as ff
    >>> plan = ff.plan(np.ones((2, 8), np.float32), horizon=100, method=ff.Schedule(4, (2,)))
    >>> plan.schedule
    Schedule(base=4, fans=(2,))
    """
    count = _threads.resolve(workers)
    if engine not in (None, "torch"):
        raise ValueError(f"engine: expected None or 'torch', got {engine!r}")
    if latency not in ("throughput", "smooth"):
        raise ValueError(f"latency: expected 'throughput' or 'smooth', got {latency!r}")
    if is_tensor(filters):
        from futurefill_rs import _torch_cpu

        if engine is None and _torch_cpu.serves(filters):
            return _torch_cpu.Plan(
                filters, horizon, method, workers=count, max_memory=max_memory, latency=latency
            )
        from futurefill_rs import _torch_engine

        return _torch_engine.TorchPlan(filters, horizon, method, max_memory=max_memory, latency=latency)
    if engine == "torch":
        raise TypeError(f"filters: expected a torch tensor for engine='torch', got {type(filters).__name__}")
    return _core.plan(filters, horizon, method, workers=count, max_memory=max_memory, latency=latency)
