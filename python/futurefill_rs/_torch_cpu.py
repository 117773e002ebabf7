"""torch CPU tensors on the Rust engine: memory is shared with numpy, so a call costs little more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, SupportsIndex

import torch
from torch import Tensor

from futurefill_rs import _core
from futurefill_rs._torch_args import (
    borrowed,
    check_device,
    check_entries_apart,
    check_shape,
    checked,
    compute_dtype,
    dtype_name,
    is_fake,
    type_name,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_CPU = torch.device("cpu")
_FLOAT32, _FLOAT64 = torch.float32, torch.float64
_STRIDED = torch.strided
_from_numpy = torch.from_numpy


def serves(filters: Tensor) -> bool:
    """Whether the Rust engine can work on this tensor: it has memory that the CPU can reach."""
    return filters.device.type == "cpu" and not is_fake(filters)


def _array(value: Any, arg: str) -> NDArray[np.float32]:
    """The tensor as a numpy array, sharing memory where the dtype allows it; half precisions as float32."""
    array: NDArray[np.float32] = _tensor(value, arg).resolve_neg().numpy()
    return array


def _tensor(value: Any, arg: str) -> Tensor:
    """The tensor, checked; half precisions as float32."""
    tensor = checked(value, arg)
    check_device(tensor, arg, _CPU)
    if is_fake(tensor):
        raise TypeError(f"{arg}: expected a tensor with data, got a fake tensor")
    return tensor.to(compute_dtype(tensor.dtype))


def _indices(value: Any) -> Any:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else value


class Plan:
    """Filters prepared for generation with torch CPU tensors; see `futurefill_rs.plan`."""

    __slots__ = ("_plan",)

    def __init__(
        self,
        filters: Tensor,
        horizon: SupportsIndex | None,
        method: Any,
        *,
        workers: int,
        max_memory: SupportsIndex | None,
        latency: Any,
    ) -> None:
        self._plan = _core.plan(
            borrowed(_tensor(filters, "filters")),
            horizon,
            method,
            workers=workers,
            max_memory=max_memory,
            latency=latency,
        )

    @property
    def schedule(self) -> _core.Schedule:
        """The schedule in use."""
        return self._plan.schedule

    @property
    def filter_length(self) -> int:
        """Number of lags L."""
        return self._plan.filter_length

    @property
    def filter_shape(self) -> tuple[int, ...]:
        """Shape F of the filters without their lag axis."""
        return self._plan.filter_shape

    @property
    def horizon(self) -> int | None:
        """How many positions one cache serves; None: without bound."""
        return self._plan.horizon

    @property
    def dtype(self) -> torch.dtype:
        """Precision of caches and arithmetic."""
        return _FLOAT64 if self._plan.dtype.name == "float64" else _FLOAT32

    @property
    def device(self) -> torch.device:
        """Where inputs are expected."""
        return _CPU

    @property
    def nbytes(self) -> int:
        """Bytes held by the plan: filters and their spectra."""
        return self._plan.nbytes

    @property
    def workers(self) -> int:
        """Number of threads that work on a large tile."""
        return self._plan.workers

    def new_cache(self, shape: Any = None) -> Cache:
        """An empty cache; `shape`: shape ``C`` of one input position (default: the filters' ``F``)."""
        return Cache(self, self._plan.new_cache(shape))

    def prefill(self, prompt: Tensor, max_new: SupportsIndex | None = None) -> tuple[Tensor, Cache]:
        """Outputs at every prompt position and a cache for `max_new` more.

        ``prompt (*C, P)``, P >= 0 -> ``y (*broadcast(C, F), P)`` in the prompt's dtype, detached.
        Raises CapacityError if P + max_new exceeds the horizon.
        """
        y, cache = self._plan.prefill(_array(prompt, "prompt"), max_new)
        return _from_numpy(y).to(prompt.dtype), Cache(self, cache)

    def load_cache(self, state: Any) -> Cache:
        """A cache that continues a saved one bit for bit; ValueError if the state is damaged or unfit."""
        return Cache(self, self._plan.load_cache(state))

    def __repr__(self) -> str:
        return f"{repr(self._plan)[:-1]}, device=cpu)"


class Cache:
    """The memory of one run of generation with torch CPU tensors; made by a `Plan`.

    | method | argument | result |
    | --- | --- | --- |
    | ``step(u, out=None)`` | ``u (*C,)`` | ``y (*broadcast(C, F),)`` |
    | ``extend(u)`` | ``u (*C, m)`` | ``y (*broadcast(C, F), m)`` |

    Tensors may be of any strides and require grad; results are detached and in the input's dtype.
    """

    __slots__ = ("_cache", "_dtype", "_plan", "_step", "_step_at")

    def __init__(self, plan: Plan, cache: _core.Cache) -> None:
        self._plan = plan
        self._cache = cache
        self._dtype = plan.dtype
        # numpy() and from_numpy() cost more than a whole step: the usual case hands over addresses instead.
        self._step_at = cache._step_at
        self._step = cache.step

    def step(self, u: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Outputs of the next position.

        ``u (*C,)`` -> ``y (*broadcast(C, F),)`` in u's dtype; with ``out=`` (same dtype) stored there.
        Raises ValueError for a wrong shape or device, TypeError for a wrong dtype, CapacityError past the
        horizon.
        """
        if not (
            type(u) is Tensor
            and u.dtype is self._dtype
            and u.is_cpu
            and not u.is_neg()
            and u.layout is _STRIDED
            and u.is_contiguous()
        ):
            return self._general_step(u, out)
        try:
            if out is None:
                array = self._step_at(u.data_ptr(), u.shape)
            elif (
                type(out) is Tensor
                and out.dtype is self._dtype
                and out.is_cpu
                and not out.is_neg()
                and out.layout is _STRIDED
                and out.is_contiguous()
            ):
                self._step_at(u.data_ptr(), u.shape, out.data_ptr(), out.shape)
                return out
            else:
                return self._general_step(u, out)
        except (BufferError, RuntimeError):
            # A tensor without memory of its own, such as one inside a function transform.
            return self._general_step(u, out)
        return _from_numpy(array)

    def _general_step(self, u: Any, out: Any) -> Tensor:
        array = _array(u, "u")
        check_shape(u, "u", self._cache.shape)
        if out is None:
            return _from_numpy(self._step(array)).to(u.dtype)
        target = self._target(out, u)
        if u.dtype in (_FLOAT32, _FLOAT64) and not target.is_neg():
            self._step(array, out=target.numpy())
        else:
            target.copy_(_from_numpy(self._step(array)))
        result: Tensor = out
        return result

    def _target(self, out: Any, u: Tensor) -> Tensor:
        """`out`, detached, once it is fit to be written to."""
        if not isinstance(out, Tensor):
            raise TypeError(f"out: expected a torch tensor of {dtype_name(u.dtype)}, got {type_name(out)}")
        if out.dtype is not u.dtype:
            raise TypeError(f"out: expected {dtype_name(u.dtype)}, got {dtype_name(out.dtype)}")
        target = checked(out, "out")
        check_device(target, "out", _CPU)
        check_shape(target, "out", self._cache.output_shape)
        check_entries_apart(target, "out")
        return target

    def extend(self, u: Tensor) -> Tensor:
        """Outputs of the next m positions: ``u (*C, m)`` -> ``y (*broadcast(C, F), m)`` in u's dtype."""
        return _from_numpy(self._cache.extend(_array(u, "u"))).to(u.dtype)

    def fork(self) -> Cache:
        """An independent copy at the same position (beams, speculation)."""
        return Cache(self._plan, self._cache.fork())

    def reorder(self, index: Any) -> None:
        """Make entry i of the batch (axis 0) what entry ``index[i]`` was; any length, repeats allowed."""
        self._cache.reorder(_indices(index))

    def reset(self, rows: Any = None) -> None:
        """Start entries of the batch (axis 0) again while the others go on, or everything at position 0."""
        self._cache.reset(_indices(rows))

    def state_dict(self) -> dict[str, Any]:
        """A picklable snapshot for `Plan.load_cache`, on any device."""
        return self._cache.state_dict()

    @property
    def position(self) -> int:
        """Positions so far, the prompt included."""
        return self._cache.position

    @property
    def remaining(self) -> int | None:
        """Positions left; None: without bound."""
        return self._cache.remaining

    @property
    def nbytes(self) -> int:
        """Bytes this cache holds."""
        return self._cache.nbytes

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape C of one input position."""
        return self._cache.shape

    @property
    def plan(self) -> Plan:
        """The plan this cache belongs to."""
        return self._plan

    def __repr__(self) -> str:
        return f"{repr(self._cache)[:-1]}, device=cpu)"
