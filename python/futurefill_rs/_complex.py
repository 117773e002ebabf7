"""Complex signals and filters as rows of real ones: every engine serves them, none knows of them.

A complex number is a row of its own axis, right before time:

| filters | inputs | rows | result |
| --- | --- | --- | --- |
| real `h` | `u = p + iq` | ``h*p, h*q`` | ``(h*p) + i (h*q)`` |
| `h = a + ib` | real `u` | ``a*u, b*u`` | ``(a*u) + i (b*u)`` |
| `h = a + ib` | `u = p + iq` | ``x = a*p, y = b*q, z = (a+b)*(p+q)`` | ``(x - y) + i (z - x - y)`` |

The last is Karatsuba's product: three convolutions where the definition has four.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, SupportsIndex

import numpy as np

from futurefill_rs import _interface, _state
from futurefill_rs._args import broadcast, shape_of, shape_text, type_name
from futurefill_rs._arrays import is_tensor, library_of
from futurefill_rs._core import Schedule
from futurefill_rs._interface import Progress

_SINGLE = ("float32", "complex64", "float16", "bfloat16")


def name_of(array: Any) -> str:
    """Name of an array's dtype, `complex64` for both libraries; empty where it is no array."""
    return str(getattr(array, "dtype", "")).removeprefix("torch.")


def is_complex(array: Any) -> bool:
    """Whether this is an array or a tensor of complex numbers."""
    if is_tensor(array):
        return bool(array.is_complex())
    return isinstance(array, np.ndarray) and array.dtype.kind == "c"


def _checked(array: Any, arg: str) -> Any:
    """An array of real or complex numbers that the engines compute with, a tensor with its history."""
    tensor = is_tensor(array)
    allowed = ("float32", "float64", "complex64", "complex128", *(("float16", "bfloat16") if tensor else ()))
    kind = "a torch tensor" if tensor else "a numpy array"
    expected = f"{arg}: expected {kind} of {', '.join(allowed[:-1])} or {allowed[-1]}, got "
    if not tensor and (not isinstance(array, np.ndarray) or isinstance(array, np.ma.MaskedArray)):
        raise TypeError(expected + type_name(array))
    name = name_of(array) if tensor else array.dtype.newbyteorder("=").name
    if name not in allowed:
        raise TypeError(f"{expected}dtype {name}")
    if tensor and (array.layout is not library_of(array).strided or array.is_nested):
        raise TypeError(f"{arg}: expected a strided tensor, got {array.layout}")
    return array


def _cast(array: Any, dtype: str) -> Any:
    return (
        array.to(getattr(library_of(array), dtype)) if is_tensor(array) else array.astype(dtype, copy=False)
    )


def _double(array: Any) -> bool:
    return name_of(array) not in _SINGLE


def _stack(rows: list[Any], axis: int) -> Any:
    return library_of(rows[0]).stack(rows, axis)


def _pair(array: Any, axis: int) -> Any:
    """Real and imaginary part as two rows."""
    return _stack([array.real, array.imag], axis)


def _three(array: Any, axis: int) -> Any:
    """The factors of Karatsuba's product: `a, b, a + b`."""
    return _stack([array.real, array.imag, array.real + array.imag], axis)


def _joined(rows: Any, axis: int, dtype: str) -> Any:
    """The complex numbers of two or three rows of products."""
    first, second, *third = rows.unbind(axis) if is_tensor(rows) else np.moveaxis(rows, axis, 0)
    real, imag = (first - second, third[0] - first - second) if third else (first, second)
    if is_tensor(rows):
        return _cast(library_of(rows).complex(real, imag), dtype)
    out = np.empty(real.shape, dtype)
    out.real, out.imag = real, imag
    return out


def _result_dtype(u: Any) -> str:
    return "complex128" if _double(u) else "complex64"


def _outer(u: Any, filters: Any, names: tuple[str, str]) -> tuple[int, ...]:
    """Shape of the result without its time axis."""
    for array, arg in ((u, names[0]), (filters, names[1])):
        if len(_checked(array, arg).shape) == 0:
            raise ValueError(f"{arg}: expected at least one axis, got shape ()")
    return broadcast(tuple(u.shape[:-1]), tuple(filters.shape[:-1]), names[0])


def _stateless(call: Callable[[Any, Any], Any], u: Any, filters: Any, names: tuple[str, str]) -> Any:
    """A convolution of whole sequences by `call`, which convolves real ones along their last axis."""
    _outer(u, filters, names)
    if not is_complex(filters):
        rows = call(_pair(u, -2), filters[..., None, :])
    elif not is_complex(u):
        rows = call(u[..., None, :], _pair(filters, -2))
    else:
        rows = call(_three(u, -2), _three(filters, -2))
    return _joined(rows, -2, _result_dtype(u))


def _check_out(out: Any, u: Any, shape: tuple[int, ...]) -> None:
    """Refuses what cannot take the result of `shape` for the input `u`."""
    library, dtype = ("torch tensor" if is_tensor(u) else "numpy array"), _result_dtype(u)
    if is_tensor(out) != is_tensor(u) or not (is_tensor(out) or isinstance(out, np.ndarray)):
        raise TypeError(f"out: expected a {library} of {dtype}, got {type_name(out)}")
    if name_of(out) != dtype:
        raise TypeError(f"out: expected {dtype}, got {name_of(out)}")
    if is_tensor(out):
        from futurefill_rs._torch_args import check_target

        return check_target(out, u.device, shape)
    if out.shape != shape:
        raise ValueError(f"out: expected shape {shape}, got {out.shape}")
    if not out.flags.writeable:
        raise ValueError("out: expected a writable array, got a read-only one")


def _write(y: Any, out: Any) -> Any:
    """`out`, into which the result was written."""
    if is_tensor(out):
        return out.copy_(y)
    out[...] = y
    return out


def causal_conv(u: Any, filters: Any, conv: Callable[..., Any], *, out: Any = None) -> Any:
    """`futurefill_rs.causal_conv` where one of both is complex; `conv` is the same for real ones."""
    if out is None:
        return _stateless(conv, u, filters, ("u", "filters"))
    _check_out(out, _checked(u, "u"), (*_outer(u, filters, ("u", "filters")), u.shape[-1]))
    if is_tensor(u) and library_of(u).is_grad_enabled() and (u.requires_grad or filters.requires_grad):
        raise ValueError(
            "out: expected none where u or filters require grad: the result is not differentiable"
        )
    return _write(_stateless(conv, u, filters, ("u", "filters")), out)


def futurefill(v: Any, w: Any, fill: Callable[..., Any]) -> Any:
    """`futurefill_rs.futurefill` where one of both is complex; `fill` is the same for real ones."""
    return _stateless(fill, v, w, ("v", "w"))


def plan(filters: Any, dtype: str | None, make: Callable[[Any], Any]) -> Plan:
    """A plan for complex inputs; `dtype`: complex64, complex128 or None, `make`: the plan of real filters."""
    filters = _checked(filters, "filters")
    if len(filters.shape) == 0:
        raise ValueError("filters: expected at least one axis, got shape ()")
    real = {None: "float64" if _double(filters) else "float32", "complex64": "float32"}.get(dtype, "float64")
    if not is_complex(filters):
        return Plan(make(_cast(filters[..., None, :], real)))
    single = "complex64" if real == "float32" else "complex128"
    return Plan(make(_three(_cast(filters, single), -2)))


class Plan(_interface.Plan):
    """Filters prepared for complex inputs, on a plan of real ones; see `futurefill_rs.Plan`.

    Inputs are complex or real; outputs are complex, of the input's precision.
    """

    __slots__ = ("_plan",)

    def __init__(self, rows: Any) -> None:
        self._plan = rows

    @property
    def rows(self) -> Any:
        """The plan of real filters `(*F, 1, L)` or `(*F, 3, L)`."""
        return self._plan

    @property
    def schedule(self) -> Schedule:
        schedule: Schedule = self._plan.schedule
        return schedule

    @property
    def filters(self) -> Any:
        rows = self._plan.filters
        real = rows[..., 0, :]
        if rows.shape[-2] == 1:
            return _cast(real, self._name)
        return _joined(rows[..., :2, :], -2, self._name)

    @property
    def filter_length(self) -> int:
        return int(self._plan.filter_length)

    @property
    def filter_shape(self) -> tuple[int, ...]:
        return tuple(self._plan.filter_shape[:-1])

    @property
    def horizon(self) -> int | None:
        horizon: int | None = self._plan.horizon
        return horizon

    @property
    def latency(self) -> Literal["throughput", "smooth"]:
        latency: Literal["throughput", "smooth"] = self._plan.latency
        return latency

    @property
    def _of_tensors(self) -> bool:
        return hasattr(self._plan, "device")

    @property
    def _name(self) -> str:
        return "complex128" if name_of(self._plan) == "float64" else "complex64"

    @property
    def dtype(self) -> Any:
        """complex64 or complex128 of the filters' library."""
        if not self._of_tensors:
            return np.dtype(self._name)
        import torch

        return getattr(torch, self._name)

    @property
    def device(self) -> Any:
        """Where inputs are expected: of plans for tensors."""
        return self._plan.device

    @property
    def nbytes(self) -> int:
        return int(self._plan.nbytes)

    @property
    def workers(self) -> int:
        return int(self._plan.workers)

    def new_cache(self, shape: Sequence[SupportsIndex] | SupportsIndex | None = None) -> Cache:
        sizes = self.filter_shape if shape is None else shape_of(shape, "shape")
        broadcast(sizes, self.filter_shape, "shape")
        return Cache(self, self._plan.new_cache((*sizes, self._width)))

    def prefill(
        self, prompt: Any, max_new: SupportsIndex | None = None, *, progress: Progress | None = None
    ) -> tuple[Any, Cache]:
        u = self._input(prompt, "prompt")
        if len(u.shape) == 0:
            raise ValueError("prompt: expected at least one axis, got shape ()")
        broadcast(tuple(u.shape[:-1]), self.filter_shape, "prompt")
        rows, cache = self._plan.prefill(self._parts(u, -2), max_new, progress=progress)
        return _joined(rows, -2, _result_dtype(u)), Cache(self, cache)

    def load_cache(self, state: Mapping[str, Any]) -> Cache:
        return Cache(self, self._plan.load_cache(state))

    @property
    def _width(self) -> int:
        """Rows of one complex input."""
        return 3 if self._plan.filter_shape[-1] == 3 else 2

    def _input(self, value: Any, arg: str) -> Any:
        """An input of at most the plan's precision, detached."""
        if isinstance(value, complex | float) and not isinstance(value, np.generic):
            value = library_of(self._plan.filters).asarray(value, dtype=self.dtype)
        if is_tensor(value) != self._of_tensors:
            kind = "a torch tensor" if self._of_tensors else "a numpy array"
            raise TypeError(f"{arg}: expected {kind}, got {type_name(value)}")
        u = _checked(value, arg)
        if _double(u) and self._name == "complex64":
            raise TypeError(
                f"{arg}: expected complex64, the precision of this plan, or less, got {name_of(u)}: "
                f"plan with dtype=complex128, or convert {arg} to complex64"
            )
        return u.detach() if is_tensor(u) else u

    def _parts(self, u: Any, axis: int) -> Any:
        """The rows of an input in the plan's precision."""
        u = _cast(u, self._name)
        return _three(u, axis) if self._width == 3 else _pair(u, axis)

    def __copy__(self) -> Plan:
        return self

    def __deepcopy__(self, memo: Any) -> Plan:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Plan, (self._plan,)

    def __repr__(self) -> str:
        shape = shape_text(self.filter_shape, str(self.filter_length))
        horizon, schedule = self.horizon, self.schedule
        return f"Plan(filters={shape}, horizon={horizon}, schedule={schedule}, dtype={self._name})"


class Cache(_interface.Cache):
    """The memory of one run of complex inputs; see `futurefill_rs.Cache`."""

    __slots__ = ("_cache", "_plan")

    def __init__(self, plan: Plan, rows: Any) -> None:
        self._plan = plan
        self._cache = rows

    def _input(self, value: Any, time: bool) -> Any:
        u = self._plan._input(value, "u")
        got, expected = tuple(u.shape), self.shape
        if (got[:-1] if time else got) != expected or len(got) != len(expected) + time:
            text = shape_text(expected, "m") if time else str(expected)
            raise ValueError(f"u: expected shape {text}, got {got}")
        return u

    def step(self, u: Any, *, out: Any = None) -> Any:
        u = self._input(u, time=False)
        return self._run(u, -1, out, self.output_shape, self._cache.step)

    def extend(self, u: Any, *, out: Any = None, progress: Progress | None = None) -> Any:
        u = self._input(u, time=True)
        shape = (*self.output_shape, u.shape[-1])
        return self._run(u, -2, out, shape, lambda rows: self._cache.extend(rows, progress=progress))

    def _run(self, u: Any, axis: int, out: Any, shape: tuple[int, ...], call: Callable[[Any], Any]) -> Any:
        if out is not None:
            _check_out(out, u, shape)
        y = _joined(call(self._plan._parts(u, axis)), axis, _result_dtype(u))
        return y if out is None else _write(y, out)

    def pending(self, k: SupportsIndex) -> Any:
        return _joined(self._cache.pending(k), -2, self._plan._name)

    def fork(self) -> Cache:
        return Cache(self._plan, self._cache.fork())

    def reorder(self, index: Any) -> None:
        self._check_batch()
        self._cache.reorder(index)

    def reset(self, rows: Any = None) -> None:
        if rows is not None:
            self._check_batch()
        self._cache.reset(rows)

    def _check_batch(self) -> None:
        filters = self._plan.filter_shape
        if len(self.shape) <= len(filters):
            raise ValueError(
                f"cache: expected a batch axis in front of the filters' {filters}, got shape {self.shape}"
            )

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self._cache.state_dict()
        return state

    @property
    def position(self) -> int:
        return int(self._cache.position)

    @property
    def remaining(self) -> int | None:
        remaining: int | None = self._cache.remaining
        return remaining

    @property
    def nbytes(self) -> int:
        return int(self._cache.nbytes)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._cache.shape[:-1])

    @property
    def output_shape(self) -> tuple[int, ...]:
        return tuple(self._cache.output_shape[:-1])

    @property
    def plan(self) -> Plan:
        return self._plan

    def __copy__(self) -> Cache:
        return self.fork()

    def __deepcopy__(self, memo: Any) -> Cache:
        return self.fork()

    def __reduce__(self) -> tuple[Any, ...]:
        return _state.load, (self._plan, self.state_dict())

    def __repr__(self) -> str:
        return f"Cache(shape={self.shape}, position={self.position}, remaining={self.remaining})"
