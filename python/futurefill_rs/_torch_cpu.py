"""torch CPU tensors on the Rust engine: memory is shared with numpy, so a call costs little more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from futurefill_rs import _core, _interface, _state
from futurefill_rs._interface import Progress
from futurefill_rs._torch_args import (
    borrowed,
    check_out,
    check_sequence,
    check_shape,
    checked,
    checked_input,
    compute_dtype,
    is_fake,
    outside_graphs,
    wrote,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_CPU = torch.device("cpu")
_FLOAT32, _FLOAT64 = torch.float32, torch.float64
_from_numpy = torch.from_numpy
_core.read_tensors(Tensor)


def serves(filters: Tensor) -> bool:
    """Whether the Rust engine can work on this tensor: it has memory that the CPU can reach."""
    return filters.device.type == "cpu" and not is_fake(filters)


def _array(tensor: Tensor, arg: str) -> NDArray[np.float32]:
    """The tensor as a numpy array, sharing memory where the dtype allows it; half precisions as float32."""
    if is_fake(tensor):
        raise TypeError(f"{arg}: expected a tensor with data, got a fake tensor")
    return borrowed(tensor.to(compute_dtype(tensor.dtype)))


def _indices(value: Any) -> Any:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else value


def _told(progress: Progress | None) -> dict[str, Any]:
    return {} if progress is None else {"progress": progress}


class Plan(_interface.Plan):
    """Filters prepared for generation with torch CPU tensors; see `futurefill_rs.Plan`."""

    __slots__ = ("_plan",)

    def __init__(self, plan: _core.Plan) -> None:
        self._plan = plan

    @classmethod
    @outside_graphs
    def of(cls, filters: Tensor, *arguments: Any, **options: Any) -> Plan:
        """`_core.plan` of tensors."""
        return cls(_core.plan(_array(checked(filters, "filters"), "filters"), *arguments, **options))

    @property
    def schedule(self) -> _core.Schedule:
        return self._plan.schedule

    @property
    def filters(self) -> Tensor:
        return _from_numpy(self._plan.filters)

    @property
    def filter_length(self) -> int:
        return self._plan.filter_length

    @property
    def filter_shape(self) -> tuple[int, ...]:
        return self._plan.filter_shape

    @property
    def horizon(self) -> int | None:
        return self._plan.horizon

    @property
    def latency(self) -> Literal["throughput", "smooth"]:
        return self._plan.latency

    @property
    def dtype(self) -> torch.dtype:
        return _FLOAT64 if self._plan.dtype.name == "float64" else _FLOAT32

    @property
    def device(self) -> torch.device:
        """Where inputs are expected."""
        return _CPU

    @property
    def nbytes(self) -> int:
        return self._plan.nbytes

    @property
    def workers(self) -> int:
        return self._plan.workers

    @outside_graphs
    def new_cache(self, shape: Sequence[SupportsIndex] | SupportsIndex | None = None) -> Cache:
        return Cache(self, self._plan.new_cache(shape))

    @outside_graphs
    def prefill(  # type: ignore[override]
        self, prompt: Tensor, max_new: SupportsIndex | None = None, *, progress: Progress | None = None
    ) -> tuple[Tensor, Cache]:
        x = checked_input(prompt, "prompt", self.dtype, _CPU)
        y, cache = self._plan.prefill(_array(x, "prompt"), max_new, **_told(progress))
        return _from_numpy(y).to(x.dtype), Cache(self, cache)

    @outside_graphs
    def load_cache(self, state: Mapping[str, Any]) -> Cache:
        return Cache(self, self._plan.load_cache(state))

    def __copy__(self) -> Plan:
        return self

    def __deepcopy__(self, memo: Any) -> Plan:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Plan, (self._plan,)

    def __repr__(self) -> str:
        return f"{repr(self._plan)[:-1]}, device=cpu)"


class Cache(_interface.Cache):
    """The memory of one run of generation with torch CPU tensors; see `futurefill_rs.Cache`.

    Tensors may be of any strides and require grad; results are detached and in the input's dtype.
    """

    __slots__ = ("_cache", "_dtype", "_plan", "_step", "_step_tensor")

    def __init__(self, plan: Plan, cache: _core.Cache) -> None:
        self._plan = plan
        self._cache = cache
        self._dtype = plan.dtype
        # numpy() and from_numpy() cost more than a whole step: the usual case is read without them.
        self._step_tensor = cache._step_tensor
        self._step = cache.step

    def step(self, u: Tensor | float, *, out: Tensor | None = None) -> Tensor:  # type: ignore[override]
        if type(u) is not Tensor or u.is_neg():
            return self._general_step(u, out)
        if out is None:
            array = self._step_tensor(u)
            return self._general_step(u, None) if array is None else _from_numpy(array)
        if (
            type(out) is Tensor
            and not (out.requires_grad or out.is_neg())
            and self._step_tensor(u, out) is out
        ):
            increment_version(out)
            written: Tensor = out
            return written
        return self._general_step(u, out)

    @outside_graphs
    def _general_step(self, u: Any, out: Any) -> Tensor:
        u = torch.tensor(u, dtype=self._dtype) if type(u) is float else u
        x = checked_input(u, "u", self._dtype, _CPU)
        array = _array(x, "u")
        check_shape(x, "u", self._cache.shape)
        if out is None:
            return _from_numpy(self._step(array)).to(x.dtype)
        target = check_out(out, x, self._cache.output_shape)
        if x.dtype in (_FLOAT32, _FLOAT64) and not target.is_neg():
            self._step(array, out=target.numpy())
        else:
            target.copy_(_from_numpy(self._step(array)))
        return wrote(out, target)

    @outside_graphs
    def extend(  # type: ignore[override]
        self, u: Tensor, *, out: Tensor | None = None, progress: Progress | None = None
    ) -> Tensor:
        x = checked_input(u, "u", self._dtype, _CPU)
        check_sequence(x, "u", self._cache.shape)
        shape = (*self._cache.output_shape, x.shape[-1])
        target = None if out is None else check_out(out, x, shape)
        y = _from_numpy(self._cache.extend(_array(x, "u"), **_told(progress)))
        return y.to(x.dtype) if target is None or out is None else wrote(out, target.copy_(y))

    @outside_graphs
    def pending(self, k: SupportsIndex) -> Tensor:
        return _from_numpy(self._cache.pending(k))

    @outside_graphs
    def fork(self) -> Cache:
        return Cache(self._plan, self._cache.fork())

    @outside_graphs
    def reorder(self, index: Any) -> None:
        self._cache.reorder(_indices(index))

    @outside_graphs
    def reset(self, rows: Any = None) -> None:
        self._cache.reset(_indices(rows))

    @outside_graphs
    def state_dict(self) -> dict[str, NDArray[Any]]:
        return self._cache.state_dict()

    @property
    def position(self) -> int:
        return self._cache.position

    @property
    def remaining(self) -> int | None:
        return self._cache.remaining

    @property
    def nbytes(self) -> int:
        return self._cache.nbytes

    @property
    def shape(self) -> tuple[int, ...]:
        return self._cache.shape

    @property
    def output_shape(self) -> tuple[int, ...]:
        return self._cache.output_shape

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
        return f"{repr(self._cache)[:-1]}, device=cpu)"
