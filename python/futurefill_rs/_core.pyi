from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, SupportsIndex, TypeVar, final, overload

import numpy as np
from numpy.typing import NDArray

from futurefill_rs import _interface
from futurefill_rs._interface import Progress

__all__ = [
    "Cache",
    "CapacityError",
    "Cost",
    "Execution",
    "Level",
    "Plan",
    "Schedule",
    "TileIndex",
    "__version__",
    "available_workers",
    "causal_conv",
    "futurefill",
    "instruction_set",
    "instruction_sets",
    "measure_costs",
    "plan",
    "read_tensors",
    "set_costs",
]
__version__: str

_Float = TypeVar("_Float", np.float32, np.float64)
_AnyFloat = np.float32 | np.float64
_Shape = Sequence[SupportsIndex] | SupportsIndex

class CapacityError(ValueError):
    """More positions were asked for than the cache or the plan's horizon has left."""

@final
class Schedule:
    """How the triangle (input time, output time) is tiled: a base block and the factors that multiply it.

    `base` positions wait in the base block and are summed directly (None: no tiles at all, the direct sum);
    `fans` multiply it level by level up to the top block. Immutable, hashable, picklable, comparable.
    Any base of at least 1 and any fans of at least 2 give the exact result.
    """

    def __new__(cls, base: SupportsIndex | None, fans: Iterable[SupportsIndex] | None = None) -> Schedule: ...
    @staticmethod
    def naive() -> Schedule:
        """No tiles: the direct sum over all lags."""

    @staticmethod
    def epoched(horizon: SupportsIndex, epoch: SupportsIndex | None = None) -> Schedule:
        """The paper's Algorithm 1: one level of blocks of `epoch` positions."""

    @staticmethod
    def continuous(horizon: SupportsIndex) -> Schedule:
        """The paper's Algorithm 2: block lengths double from a small base up to the horizon."""

    @staticmethod
    def auto(
        horizon: SupportsIndex | None,
        filter_len: SupportsIndex,
        *,
        rows: SupportsIndex | None = None,
        itemsize: SupportsIndex | None = None,
        max_memory: SupportsIndex | None = None,
        device: Literal["cpu", "gpu"] = "cpu",
        latency: Literal["throughput", "smooth"] = "throughput",
    ) -> Schedule:
        """The schedule the cost model prefers; `rows` counts the channels of all sequences."""

    @property
    def base(self) -> int | None:
        """Length of the base block, None for the direct sum."""

    @property
    def fans(self) -> tuple[int, ...]:
        """Factors from one block length to the next."""

    def cost(self, horizon: SupportsIndex | None, filter_len: SupportsIndex) -> Cost:
        """What this schedule costs over `horizon` positions (None: without end) with `filter_len` lags."""

    def __eq__(self, other: object, /) -> bool: ...
    def __ne__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...
    def __reduce__(self) -> tuple[type[Schedule], tuple[int | None, tuple[int, ...]]]: ...

@final
class Cost:
    """Analytic cost of a schedule in float32."""

    @property
    def flops(self) -> float:
        """Floating-point operations per position and channel."""

    @property
    def bytes_moved(self) -> float:
        """Bytes moved per position and channel."""

    @property
    def state_bytes(self) -> float:
        """Bytes of cache per channel."""

@final
class Execution:
    """A schedule cut to a capacity and a filter length: what a cache of any engine executes."""

    def __new__(
        cls,
        schedule: Schedule,
        capacity: SupportsIndex | None,
        filter_length: SupportsIndex,
        latency: Literal["throughput", "smooth"],
    ) -> Execution: ...
    @property
    def base(self) -> int | None:
        """Length of the base block, None for the direct sum without tiles."""

    @property
    def ring(self) -> int:
        """Positions of inputs and pending outputs that are kept."""

    @property
    def levels(self) -> tuple[Level, ...]:
        """The levels, the lowest first."""

    def tiles(self, clock: int) -> list[TileIndex]:
        """The tiles whose newest block of inputs ends at `clock`, the highest level's first."""

@final
class Level:
    """One level of tiles as it will run."""

    @property
    def block(self) -> int:
        """Positions of a block: inputs and outputs of one tile."""

    @property
    def parts(self) -> int:
        """Blocks that take part in one tile at most, and filter partitions."""

    @property
    def kept(self) -> int:
        """Blocks whose spectra are kept."""

    @property
    def delayed(self) -> bool:
        """Whether its tiles begin a block early and give the outputs of the next block but one."""

@final
class TileIndex:
    """A tile: which blocks take part, and the columns of the rings that it reads and writes."""

    @property
    def level(self) -> int:
        """Place of its level in `Execution.levels`."""

    @property
    def delayed(self) -> bool:
        """Whether it is a delayed level's: its filter partitions begin with the second."""

    @property
    def newest(self) -> int:
        """Slot of the newest block."""

    @property
    def count(self) -> int:
        """Kept blocks that take part, the newest included."""

    @property
    def source(self) -> int:
        """First column of the newest block of inputs."""

    @property
    def target(self) -> int:
        """First column of its outputs: of the pending ones, or of the two blocks of a delayed level."""

    @property
    def add(self) -> bool:
        """Whether other tiles have added to these outputs already."""

# Methods that take arrays are narrower than those of the public types: a numpy plan serves numpy arrays.
@final
class Plan(_interface.Plan):
    """A `futurefill_rs.Plan` of numpy arrays."""

    @property
    def schedule(self) -> Schedule: ...
    @property
    def filters(self) -> NDArray[Any]: ...
    @property
    def filter_length(self) -> int: ...
    @property
    def filter_shape(self) -> tuple[int, ...]: ...
    @property
    def horizon(self) -> int | None: ...
    @property
    def latency(self) -> Literal["throughput", "smooth"]: ...
    @property
    def dtype(self) -> np.dtype[_AnyFloat]: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def workers(self) -> int: ...
    def new_cache(self, shape: _Shape | None = None) -> Cache: ...
    def prefill(  # type: ignore[override]
        self,
        prompt: NDArray[_Float],
        max_new: SupportsIndex | None = None,
        *,
        progress: Progress | None = None,
    ) -> tuple[NDArray[_Float], Cache]: ...
    def load_cache(self, state: Mapping[str, Any]) -> Cache: ...
    def __copy__(self) -> Plan: ...
    def __deepcopy__(self, _memo: Any) -> Plan: ...
    def __reduce__(self) -> tuple[Any, ...]: ...

@final
class Cache(_interface.Cache):
    """A `futurefill_rs.Cache` of numpy arrays."""

    @overload  # type: ignore[override]
    def step(self, u: NDArray[_Float], *, out: NDArray[_Float] | None = None) -> NDArray[_Float]: ...
    @overload
    def step(self, u: float) -> NDArray[Any]: ...
    def _step_tensor(self, u: Any, out: Any = None, /) -> Any: ...
    def extend(  # type: ignore[override]
        self, u: NDArray[_Float], *, out: NDArray[_Float] | None = None, progress: Progress | None = None
    ) -> NDArray[_Float]: ...
    def pending(self, k: SupportsIndex) -> NDArray[Any]: ...
    def fork(self) -> Cache: ...
    def reorder(self, index: Any) -> None: ...
    def reset(self, rows: Any = None) -> None: ...
    def state_dict(self) -> dict[str, NDArray[Any]]: ...
    @property
    def position(self) -> int: ...
    @property
    def remaining(self) -> int | None: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def output_shape(self) -> tuple[int, ...]: ...
    @property
    def plan(self) -> Plan: ...
    def __copy__(self) -> Cache: ...
    def __deepcopy__(self, _memo: Any) -> Cache: ...
    def __reduce__(self) -> tuple[Any, ...]: ...

def plan(
    filters: NDArray[_AnyFloat],
    horizon: SupportsIndex | None = None,
    method: str | Schedule | None = None,
    *,
    workers: int = 1,
    max_memory: SupportsIndex | None = None,
    latency: str = "throughput",
    progress: Progress | None = None,
) -> Plan:
    """`futurefill_rs.plan` of numpy arrays; `workers` is a number of threads."""

def causal_conv(
    u: NDArray[_Float],
    filters: NDArray[_AnyFloat],
    *,
    workers: int = 1,
    out: NDArray[_Float] | None = None,
    progress: Progress | None = None,
) -> NDArray[_Float]:
    """`futurefill_rs.causal_conv` of numpy arrays."""

def futurefill(
    v: NDArray[_Float], w: NDArray[_AnyFloat], *, progress: Progress | None = None
) -> NDArray[_Float]:
    """`futurefill_rs.futurefill` of numpy arrays."""

def read_tensors(kind: type) -> bool:
    """Make tensors of this type, `torch.Tensor`, known to `Cache._step_tensor`; whether they can be read."""

def instruction_sets() -> list[str]:
    """Names of the vector instruction sets this machine has, weakest first."""

def instruction_set() -> str:
    """Name of the vector instruction set the kernels use on this machine."""

def available_workers() -> int:
    """Number of processor cores a plan may use (`workers=-1`)."""

def measure_costs() -> dict[str, float]:
    """Measure the planner's cost model on this machine: about a second of one core."""

def set_costs(costs: dict[str, float] | None) -> None:
    """Plan from now on with these costs, or with the shipped ones where `costs` is None."""
