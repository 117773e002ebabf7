"""The three entry points: each sends its arrays to the engine they belong to."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex, TypeVar, overload

import numpy as np

from futurefill_rs import _complex, _core, _interface, _threads
from futurefill_rs._args import choice, type_name
from futurefill_rs._arrays import is_tensor

if TYPE_CHECKING:
    import numpy.typing as npt
    from numpy.typing import NDArray

    from futurefill_rs._core import Schedule
    from futurefill_rs._interface import DTypeLike, Progress, Tensor, TensorLike
    from futurefill_rs._torch_cpu import Plan as CpuPlan
    from futurefill_rs.torch_engine import TorchPlan

    Method = Literal["auto", "naive", "epoched", "continuous"] | Schedule
    RealNumber = TypeVar("RealNumber", np.float32, np.float64)
    ComplexNumber = TypeVar("ComplexNumber", np.complex64, np.complex128)
    Real = np.float32 | np.float64
    Complex = np.complex64 | np.complex128
    Latency = Literal["throughput", "smooth"]

_interface.Plan.register(_core.Plan)
_interface.Cache.register(_core.Cache)


def _same_library(first: str, second: str, a: Any, b: Any) -> None:
    """Arrays of one call are all of one library; what is neither is named by the engine itself."""
    if is_tensor(a) != is_tensor(b):
        tensor = first if is_tensor(a) else second
        other, kind = (second, type(b)) if is_tensor(a) else (first, type(a))
        raise TypeError(f"{other}: expected a torch tensor like {tensor}, got {kind.__name__}")


def _given(**options: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}


@overload
def futurefill(
    v: NDArray[RealNumber], w: NDArray[Real], *, progress: Progress | None = None
) -> NDArray[RealNumber]: ...
@overload
def futurefill(
    v: NDArray[ComplexNumber], w: NDArray[Real | Complex], *, progress: Progress | None = None
) -> NDArray[ComplexNumber]: ...
@overload
def futurefill(  # type: ignore[overload-overlap]  # numpy lets a float32 pass for a float64
    v: NDArray[np.float32], w: NDArray[Complex], *, progress: Progress | None = None
) -> NDArray[np.complex64]: ...
@overload
def futurefill(
    v: NDArray[np.float64], w: NDArray[Complex], *, progress: Progress | None = None
) -> NDArray[np.complex128]: ...
@overload
def futurefill(
    v: TensorLike[Tensor], w: TensorLike[Tensor], *, progress: Progress | None = None
) -> Tensor: ...
def futurefill(v: Any, w: Any, *, progress: Progress | None = None) -> Any:
    """FutureFill, the paper's operator: what past inputs `v` add to the next outputs under the filter `w`.

    ``[FutureFill(v, w)]_s = sum_{i=1}^{t2-s} v_{t1-i+1} w_{s+i}`` for s = 1 .. t2-1 (v zero outside 1 .. t1).

    | argument | shape | |
    | --- | --- | --- |
    | v | ``(*B, t1)`` | t1 >= 0; float32, float64 or complex, torch: also float16 and bfloat16 |
    | w | ``(*B, t2)`` | t2 >= 1; leading axes broadcast with v's |
    | result | ``(*B, t2 - 1)`` | in v's dtype; for torch differentiable in both |

    Under a complex `w` the result of a real `v` is complex, of v's precision.
    numpy arrays are computed in float64. progress: called with the work done and all of it.
    Raises TypeError for other dtypes, ValueError for shapes that do not broadcast.
    Source: Agarwal et al., arXiv 2410.03766, Definition 2.

    >>> import numpy as np, futurefill_rs as ff
    >>> ff.futurefill(np.array([1.0, 2.0]), np.array([1.0, 10.0, 100.0]))
    array([120., 200.])
    """
    _same_library("v", "w", v, w)
    if _complex.is_complex(v) or _complex.is_complex(w):
        return _complex.futurefill(v, w, lambda v, w: futurefill(v, w, progress=progress))
    if is_tensor(v):
        from futurefill_rs.torch_engine import conv

        return conv.futurefill(v, w, progress=progress)
    return _core.futurefill(v, w, **_given(progress=progress))


@overload
def causal_conv(
    u: NDArray[RealNumber],
    filters: NDArray[Real],
    *,
    workers: SupportsIndex | None = None,
    out: NDArray[RealNumber] | None = None,
    progress: Progress | None = None,
) -> NDArray[RealNumber]: ...
@overload
def causal_conv(
    u: NDArray[ComplexNumber],
    filters: NDArray[Real | Complex],
    *,
    workers: SupportsIndex | None = None,
    out: NDArray[ComplexNumber] | None = None,
    progress: Progress | None = None,
) -> NDArray[ComplexNumber]: ...
@overload
def causal_conv(  # type: ignore[overload-overlap]
    u: NDArray[np.float32],
    filters: NDArray[Complex],
    *,
    workers: SupportsIndex | None = None,
    out: NDArray[np.complex64] | None = None,
    progress: Progress | None = None,
) -> NDArray[np.complex64]: ...
@overload
def causal_conv(
    u: NDArray[np.float64],
    filters: NDArray[Complex],
    *,
    workers: SupportsIndex | None = None,
    out: NDArray[np.complex128] | None = None,
    progress: Progress | None = None,
) -> NDArray[np.complex128]: ...
@overload
def causal_conv(
    u: TensorLike[Tensor],
    filters: TensorLike[Tensor],
    *,
    workers: SupportsIndex | None = None,
    out: TensorLike[Tensor] | None = None,
    progress: Progress | None = None,
) -> Tensor: ...
def causal_conv(
    u: Any,
    filters: Any,
    *,
    workers: SupportsIndex | None = None,
    out: Any = None,
    progress: Progress | None = None,
) -> Any:
    """Causal convolution of a whole sequence: ``y[..., t] = sum_j filters[..., j] u[..., t-j]``.

    | argument | shape | |
    | --- | --- | --- |
    | u | ``(*C, T)`` | T >= 0; float32, float64 or complex, torch: also float16 and bfloat16 |
    | filters | ``(*F, L)`` | L >= 1, lag 0 first; F broadcasts with C |
    | result | ``(*broadcast(C, F), T)`` | in u's dtype, computed in the higher of both precisions |

    Under complex filters the result of a real `u` is complex, of u's precision. For torch the result is
    differentiable in both arguments, on every device. A NaN or an infinity spoils the whole row it stands in,
    earlier positions too: all of a row goes through one transform.

    workers: number of threads (None: `get_workers()`, -1: all cores). out: where to put the result, which is
    then not differentiable. progress: called with the work done and all of it.
    Raises TypeError for other dtypes, ValueError for shapes that do not broadcast or different devices.

    >>> import numpy as np, futurefill_rs as ff
    >>> ff.causal_conv(np.array([1.0, 0.0, 2.0]), np.array([1.0, 0.5])).round(12) + 0.0
    array([1. , 0.5, 2. ])
    """
    _same_library("u", "filters", u, filters)
    count = _threads.resolve(workers)
    if _complex.is_complex(u) or _complex.is_complex(filters):
        real = partial(causal_conv, workers=count, progress=progress)
        return _complex.causal_conv(u, filters, real, out=out)
    if is_tensor(u):
        from futurefill_rs.torch_engine import conv

        return conv.causal_conv(u, filters, count, out=out, progress=progress)
    return _core.causal_conv(u, filters, workers=count, **_given(out=out, progress=progress))


def _precision(filters: Any, dtype: Any) -> str:
    """Name of the precision that `dtype` of the filters' library asks for."""
    tensor = is_tensor(filters)
    try:
        name = str(dtype).removeprefix("torch.") if tensor else np.dtype(dtype).name
    except TypeError:
        name = type_name(dtype)
    if name not in ("float32", "float64", "complex64", "complex128"):
        library = "torch" if tensor else "numpy"
        raise TypeError(f"dtype: expected float32, float64, complex64 or complex128 of {library}, got {name}")
    return name


def _in_precision(filters: Any, name: str) -> Any:
    """The filters in a real precision; what cannot be cast stays as it is, for the engine to refuse."""
    if is_tensor(filters):
        import torch

        return filters.to(getattr(torch, name)) if filters.is_floating_point() else filters
    if isinstance(filters, np.ndarray) and filters.dtype.name in ("float32", "float64"):
        with np.errstate(over="ignore"):
            return filters.astype(name)
    return filters


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
    dtype: npt.DTypeLike | None = None,
    progress: Progress | None = None,
) -> _core.Plan: ...
@overload
def plan(
    filters: NDArray[Complex],
    horizon: SupportsIndex | None = None,
    method: Method = "auto",
    *,
    workers: SupportsIndex | None = None,
    max_memory: SupportsIndex | None = None,
    latency: Latency = "throughput",
    engine: None = None,
    dtype: npt.DTypeLike | None = None,
    progress: Progress | None = None,
) -> _interface.Plan: ...
@overload
def plan(
    filters: TensorLike[Any],
    horizon: SupportsIndex | None = None,
    method: Method = "auto",
    *,
    workers: SupportsIndex | None = None,
    max_memory: SupportsIndex | None = None,
    latency: Latency = "throughput",
    engine: Literal["torch"] | None = None,
    dtype: DTypeLike | Literal["float32", "float64", "complex64", "complex128"] | None = None,
    progress: Progress | None = None,
) -> CpuPlan | TorchPlan: ...
def plan(
    filters: Any,
    horizon: Any = None,
    method: Any = "auto",
    *,
    workers: SupportsIndex | None = None,
    max_memory: Any = None,
    latency: str = "throughput",
    engine: str | None = None,
    dtype: Any = None,
    progress: Progress | None = None,
) -> Any:
    """Prepare filters for generation: an immutable plan, to be shared by any number of caches and threads.

    | argument | | |
    | --- | --- | --- |
    | filters | ``(*F, L)``, lag 0 first, L >= 1 | float32, float64, complex64, complex128 |
    | | | torch: float16 and bfloat16 as float32 |
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
    | dtype | float32, float64, complex64, complex128 or None | what to compute in; None: as the filters |
    | progress | callable or None | called with the work done and all of it |

    Returns a `Plan`. numpy filters serve numpy arrays, torch filters serve torch tensors of the same device.
    Inputs of more precision than the plan's are refused, and complex ones unless filters or `dtype` are.
    Raises TypeError for other dtypes or libraries, ValueError for everything else out of range.

    >>> import numpy as np, futurefill_rs as ff
    >>> plan = ff.plan(np.ones((2, 8), np.float32), horizon=100, method=ff.Schedule(4, (2,)))
    >>> plan.schedule
    Schedule(base=4, fans=(2,))
    """
    count = _threads.resolve(workers)
    choice(engine, "engine", None, "torch")
    choice(latency, "latency", "throughput", "smooth")
    options: dict[str, Any] = {"max_memory": max_memory, "latency": latency}
    name = None if dtype is None else _precision(filters, dtype)
    if _complex.is_complex(filters) or (name or "").startswith("complex"):
        if name in ("float32", "float64"):
            raise TypeError(f"dtype: expected complex64 or complex128 for complex filters, got {name}")
        make = partial(plan, horizon=horizon, method=method, workers=count, engine=engine, progress=progress)
        return _complex.plan(filters, name, partial(make, **options))
    if name is not None:
        filters = _in_precision(filters, name)
    if is_tensor(filters):
        from futurefill_rs import _torch_cpu

        if engine is None and _torch_cpu.serves(filters):
            return _torch_cpu.Plan.of(
                filters, horizon, method, workers=count, **options, **_given(progress=progress)
            )
        from futurefill_rs.torch_engine import TorchPlan

        return TorchPlan(filters, horizon, method, **options)
    if engine == "torch":
        raise TypeError(f"filters: expected a torch tensor for engine='torch', got {type(filters).__name__}")
    return _core.plan(filters, horizon, method, workers=count, **options, **_given(progress=progress))
