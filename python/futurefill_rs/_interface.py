"""What plans and caches of every engine are: the public types, for `isinstance` and for annotations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, SupportsIndex, TypeVar, overload

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

    from futurefill_rs._core import Schedule

    Float = TypeVar("Float", np.float32, np.float64, np.complex64, np.complex128)

Tensor = TypeVar("Tensor")
Tensor_co = TypeVar("Tensor_co", covariant=True)


class TensorLike(Protocol[Tensor_co]):
    """A `torch.Tensor` without the word: a name that is not installed would be any type to type checkers."""

    def clone(self) -> Tensor_co: ...
    def is_floating_point(self) -> bool: ...


class DTypeLike(Protocol):
    """A `torch.dtype`, likewise."""

    @property
    def is_floating_point(self) -> bool: ...
    def to_complex(self) -> Any: ...


Progress = Callable[[int, int], object]
"""What long calls tell how far they are: called with the work done and all of it, in units of its own."""


class Plan(ABC):
    """Filters prepared for generation: immutable, shared by any number of caches and threads. Made by `plan`.

    | method | argument | result |
    | --- | --- | --- |
    | ``new_cache(shape=None)`` | ``C`` of one input position, default the filters' ``F`` | an empty cache |
    | ``prefill(prompt, max_new)`` | ``(*C, P)`` | ``y (*broadcast(C, F), P)``, a cache for `max_new` more |
    | ``load_cache(state)`` | of `Cache.state_dict` | a cache that goes on where it was taken |

    Inputs are of the filters' library and device and of at most the plan's precision, in which everything is
    computed; results are detached from autograd and have the input's dtype. A plan pickles as filters,
    options and schedule, and is its own copy.
    """

    __slots__ = ()

    @property
    @abstractmethod
    def schedule(self) -> Schedule:
        """The schedule in use."""

    @property
    @abstractmethod
    def filters(self) -> Any:
        """The filters ``(*F, L)`` in the plan's precision: a copy."""

    @property
    @abstractmethod
    def filter_length(self) -> int:
        """Number of lags L."""

    @property
    @abstractmethod
    def filter_shape(self) -> tuple[int, ...]:
        """Shape F of the filters without their lag axis."""

    @property
    @abstractmethod
    def horizon(self) -> int | None:
        """How many positions one cache serves; None: without bound."""

    @property
    @abstractmethod
    def latency(self) -> Literal["throughput", "smooth"]:
        """How the work of large tiles is spread over the steps."""

    @property
    @abstractmethod
    def dtype(self) -> Any:
        """Precision of caches and arithmetic, a dtype of the filters' library: float32 or float64."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the filters and of everything prepared from them."""

    @property
    @abstractmethod
    def workers(self) -> int:
        """Number of threads that work on a large tile."""

    @abstractmethod
    def new_cache(self, shape: Sequence[SupportsIndex] | SupportsIndex | None = None) -> Cache:
        """An empty cache at position 0.

        `shape`: shape ``C`` of one input position (default: the filters' ``F``); it broadcasts with ``F``.
        Raises ValueError for a shape that does not, MemoryError where the machine has not enough memory.
        """

    @overload
    def prefill(
        self,
        prompt: NDArray[Float],
        max_new: SupportsIndex | None = None,
        *,
        progress: Progress | None = None,
    ) -> tuple[NDArray[Float], Cache]: ...
    @overload
    def prefill(
        self,
        prompt: TensorLike[Tensor],
        max_new: SupportsIndex | None = None,
        *,
        progress: Progress | None = None,
    ) -> tuple[Tensor, Cache]: ...
    @abstractmethod
    def prefill(
        self, prompt: Any, max_new: SupportsIndex | None = None, *, progress: Progress | None = None
    ) -> tuple[Any, Cache]:
        """Outputs at every position of a prompt, and a cache for what follows.

        ``prompt (*C, P)``, P >= 0 -> ``y (*broadcast(C, F), P)`` in the prompt's dtype, and a cache that
        serves `max_new` more positions (None: the rest of the horizon). The cache's size depends on
        `max_new`, not on P. `progress` is called with done and total.
        Raises CapacityError if P + max_new exceeds the horizon.
        """

    @abstractmethod
    def load_cache(self, state: Mapping[str, Any]) -> Cache:
        """A cache that goes on where `state` was taken; `state`: of `Cache.state_dict`, of any engine.

        Bits go on where schedule, latency and horizon are the plan's own. A state of other ones starts a new
        cache behind what its past adds to the outputs to come, and then agrees within rounding.
        Raises ValueError for a state that is damaged, of other filters, or that knows less of the future than
        this plan's horizon needs; it says what to do.
        """


class Cache(ABC):
    """The memory of one run of generation: made by a `Plan`, mutable, safe to use from several threads.

    | method | argument | result |
    | --- | --- | --- |
    | ``step(u, out=None)`` | ``u (*C,)`` | ``y (*broadcast(C, F),)``: the next position |
    | ``extend(u, out=None)`` | ``u (*C, m)`` | ``y (*broadcast(C, F), m)``: the next m positions |
    | ``pending(k)`` | k >= 0 | ``(*broadcast(C, F), k)``: what the past adds to the next k outputs |
    | ``fork()`` | | an independent copy |
    | ``reorder(index)`` | indices into axis 0 | gathers the batch in place |
    | ``reset(rows=None)`` | rows of axis 0 | starts these, or everything, again |
    | ``state_dict()`` | | a picklable snapshot for `Plan.load_cache` |

    After any error a cache is exactly what it was before the call. Calls from several threads take turns.
    A cache pickles as its plan and its state; ``copy.copy`` and ``copy.deepcopy`` fork it.
    """

    __slots__ = ()

    @overload
    def step(self, u: NDArray[Float], *, out: NDArray[Float] | None = None) -> NDArray[Float]: ...
    @overload
    def step(self, u: TensorLike[Tensor], *, out: TensorLike[Tensor] | None = None) -> Tensor: ...
    @overload
    def step(self, u: float) -> Any: ...
    @abstractmethod
    def step(self, u: Any, *, out: Any = None) -> Any:
        """Output of the next position.

        ``u (*C,)``, any strides -> ``y (*broadcast(C, F),)`` in u's dtype; where C is (), u may be a Python
        float. With ``out=`` (u's dtype, the output's shape, may overlap u) the result is stored there and
        `out` is returned: nothing is allocated.
        Raises ValueError for a wrong shape or device, TypeError for a wrong dtype, CapacityError past the
        capacity.
        """

    @overload
    def extend(
        self, u: NDArray[Float], *, out: NDArray[Float] | None = None, progress: Progress | None = None
    ) -> NDArray[Float]: ...
    @overload
    def extend(
        self,
        u: TensorLike[Tensor],
        *,
        out: TensorLike[Tensor] | None = None,
        progress: Progress | None = None,
    ) -> Tensor: ...
    @abstractmethod
    def extend(self, u: Any, *, out: Any = None, progress: Progress | None = None) -> Any:
        """A known block: ``u (*C, m)``, m >= 0 -> ``y (*broadcast(C, F), m)``, what m steps would give.

        `out`, `progress` and errors as for `step` and `Plan.prefill`.
        """

    @abstractmethod
    def pending(self, k: SupportsIndex) -> Any:
        """What the past adds to the next k outputs before their inputs are known: ``(*broadcast(C, F), k)``.

        In the plan's dtype; the cache stays as it is. Raises CapacityError for k beyond what remains.
        """

    @abstractmethod
    def fork(self) -> Cache:
        """An independent copy at the same position (beams, speculation)."""

    @abstractmethod
    def reorder(self, index: ArrayLike | TensorLike[Any]) -> None:
        """Make entry i of the batch (axis 0) what entry ``index[i]`` was; any length, repeats allowed.

        `index`: integers as in numpy indexing (sequence, array or tensor; no booleans). Raises IndexError
        out of range, ValueError for a cache without a batch axis in front of the filters' axes.
        """

    @abstractmethod
    def reset(self, rows: ArrayLike | TensorLike[Any] | None = None) -> None:
        """Start entries of the batch (axis 0) again while the others go on, or everything at position 0.

        `rows`: integers as in numpy indexing, or a boolean mask. The clock and the remaining capacity stay;
        ``reset()`` also gives back the whole capacity. Raises as `reorder` does.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, NDArray[Any]]:
        """A snapshot for `Plan.load_cache`: flat numpy arrays, for pickle, np.savez or safetensors."""

    @property
    @abstractmethod
    def position(self) -> int:
        """Positions so far, the prompt included."""

    @property
    @abstractmethod
    def remaining(self) -> int | None:
        """Positions left; None: without bound."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes this cache holds."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape C of one input position."""

    @property
    @abstractmethod
    def output_shape(self) -> tuple[int, ...]:
        """Shape broadcast(C, F) of one output position."""

    @property
    @abstractmethod
    def plan(self) -> Plan:
        """The plan this cache belongs to."""
