"""The saved state of a cache: one flat dict of numpy arrays for every engine, sealed with a checksum.

It survives pickle, `numpy.savez` and safetensors. Scalars are arrays without axes; -1 stands for no bound.

| key | shape | content |
| --- | --- | --- |
| ``version`` | ``()`` | of this layout |
| ``shape``, ``filter_shape`` | ``(n,)`` | of one input position, of the filters without their lags |
| ``filter_length``, ``filter_digest`` | ``()`` | lags of every filter, and what their numbers hash to |
| ``base``, ``fans`` | ``()``, ``(m,)`` | the schedule the arrays belong to; base 0: the direct sum |
| ``smooth`` | ``()`` | 1 for ``latency="smooth"`` |
| ``horizon``, ``capacity`` | ``()`` | of the plan; positions this cache serves, counted by ``clock`` |
| ``clock``, ``position`` | ``()`` | positions since the prompt, and with it |
| ``history`` | ``(rows_in, ring)`` | raw inputs, clock time s at column ``s % ring`` |
| ``pending`` | ``(rows_out, ring)`` | effects pushed to output time s, without the unfinished base block |
|  |  | (smooth: then two blocks of each level above the first, ``2 n_k`` columns each) |
| ``seed`` | ``(rows_out, K')`` | effect of a prefilled prompt on the first K' outputs |
| ``spectra_k`` | ``(rows_in, P_k, N_k, 2)`` | kept block spectra of level k (none if used once), modulo |
|  |  | ``z^N_k - i``; ``N_k`` is ``n_k`` or the next length that has a fast transform |
| ``checksum`` | ``()`` | crc32 of all of it |

``rows_in`` and ``rows_out`` are the input and the output rows in C order, ``n_k`` the blocks.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from futurefill_rs import _core
from futurefill_rs._args import broadcast, type_name
from futurefill_rs._arrays import is_tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

VERSION = 3
_SCALARS = (
    "version",
    "filter_length",
    "filter_digest",
    "base",
    "smooth",
    "horizon",
    "capacity",
    "clock",
    "position",
    "checksum",
)
_SHAPES = ("shape", "filter_shape", "fans")
_ARRAYS = {"history": 2, "pending": 2, "seed": 2}
# What the scalars that may be missing are then stored as.
_NONE = {"base": 0, "horizon": -1, "capacity": -1}


def plan(filters: Any, horizon: int | None, schedule: Any, workers: int, latency: Any) -> Any:
    """A pickled plan of arrays again."""
    return _core.plan(filters, horizon, schedule, workers=workers, latency=latency)


def load(plan: Any, state: Any) -> Any:
    """A pickled cache again."""
    return plan.load_cache(state)


def digest(filters: NDArray[Any]) -> int:
    """Fingerprint of filters in the plan's dtype: a state only fits the filters it came from."""
    return zlib.crc32(_bytes(filters))


def seal(fields: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """Complete a state: `fields` holds plain values and arrays, all but ``version`` and ``checksum``."""
    state: dict[str, NDArray[Any]] = {"version": np.array(VERSION, np.int64)}
    for name, value in fields.items():
        value = _NONE.get(name) if value is None else value
        state[name] = value if isinstance(value, np.ndarray) else np.array(value, np.int64)
    state["checksum"] = np.array(_checksum(state), np.int64)
    return state


def unseal(
    state: Any,
    *,
    dtype: str,
    filter_shape: tuple[int, ...],
    filter_length: int,
    filter_digest: int,
    base: int | None,
    fans: tuple[int, ...],
    smooth: bool,
    horizon: int | None,
) -> dict[str, Any]:
    """Check a state against its checksum and the plan that is to continue it.

    Returns its fields as plain values and C-contiguous arrays, with ``levels`` (how many spectra there are),
    ``same`` (whether schedule and latency are the plan's own and its horizon suffices: bits go on) and
    ``remaining``: how many positions a cache of this plan serves from here on.
    Raises ValueError for anything that is damaged or belongs to other filters.
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"state: expected a dict from cache.state_dict(), got {type_name(state)}")
    version = state.get("version", state.get("format"))
    if not _is_version(version):
        raise ValueError(f"state: expected version {VERSION}, got {version!r}")
    levels = sum(1 for name in state if re.fullmatch(r"spectra_\d+", str(name)))
    dims = {**_ARRAYS, **{f"spectra_{k}": 4 for k in range(levels)}}
    expected = {*_SCALARS, *_SHAPES, *dims}
    if set(state) != expected:
        missing, unknown = sorted(expected - set(state)), sorted(map(str, set(state) - expected))
        raise ValueError(f"state: damaged: missing {missing}, unexpected {unknown}")
    fields: dict[str, Any] = {name: _integers(state, name, 0)[0] for name in _SCALARS}
    fields |= {name: _integers(state, name, 1) for name in _SHAPES}
    fields |= {name: _numbers(state, name, ndim) for name, ndim in dims.items()}
    _check_ranges(fields)
    if _checksum({name: _array(state[name]) for name in expected}) != fields["checksum"]:
        raise ValueError("state: damaged: the checksum does not match")
    for name in _NONE:
        fields[name] = None if fields[name] == _NONE[name] else fields[name]
    for name, theirs, ours in (
        ("dtype", fields["history"].dtype.name, dtype),
        ("filter_shape", fields["filter_shape"], filter_shape),
        ("filter_length", fields["filter_length"], filter_length),
        ("filter_digest", fields["filter_digest"], filter_digest),
    ):
        if theirs != ours:
            raise ValueError(f"state: expected {name} {ours!r} of this plan, got {theirs!r}")
    _check_rows(fields, dims)
    capacity, clock, position = fields["capacity"], fields["clock"], fields["position"]
    alike = (fields["base"], fields["fans"], bool(fields["smooth"])) == (base, fans, smooth)
    within = horizon is None or (capacity is not None and position - clock + capacity <= horizon)
    left = [] if capacity is None else [capacity - clock]
    left += [] if horizon is None else [horizon - position]
    if left and left[-1] < 0:
        raise ValueError(
            f"state: expected at most the {horizon} positions of this plan, got {position}: "
            f"plan with a longer horizon"
        )
    fields |= {"levels": levels, "same": alike and within, "remaining": min(left, default=None)}
    return fields


def _checksum(state: Mapping[str, NDArray[Any]]) -> int:
    """crc32 over every name and array but the checksum, in a fixed order."""
    crc = 0
    for name in sorted(state):
        if name != "checksum":
            array = state[name]
            crc = zlib.crc32(repr((name, array.dtype.name, array.shape)).encode(), crc)
            crc = zlib.crc32(_bytes(array), crc)
    return crc


def rebin(spectra: NDArray[Any], block: int) -> NDArray[Any]:
    """Kept spectra ``(rows, kept, N, 2)`` of blocks of `block` reals, modulo ``z^N - i``, for ``N = block``.

    Some engines transform a block of any length at the next length that has a fast transform.
    """
    bins = spectra.shape[2]
    if bins == block or not spectra.size:
        return spectra
    values = np.fft.ifft(spectra[..., 0] + 1j * spectra[..., 1].astype(np.float64))
    real = (values * np.exp(-0.5j * np.pi * np.arange(bins) / bins)).real[..., :block]
    other = np.fft.fft(real * np.exp(0.5j * np.pi * np.arange(block) / block))
    return np.stack([other.real, other.imag], axis=-1).astype(spectra.dtype)


def _bytes(array: NDArray[Any]) -> memoryview:
    native = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
    return native.reshape(-1).view(np.uint8).data


def _is_version(value: Any) -> bool:
    try:
        return _array(value).shape == () and int(_array(value)) == VERSION
    except (ValueError, TypeError, OverflowError):
        return False


def _array(value: Any) -> NDArray[Any]:
    """A value of a state as a numpy array: integers and tensors become one, anything else is damage."""
    if is_tensor(value):
        value = value.detach().cpu().resolve_neg().numpy()
    if type(value) is int and -1 <= value < 2**63:
        return np.array(value, np.int64)
    if isinstance(value, (np.ndarray, np.generic)):
        return np.asarray(value)
    raise ValueError(f"got {type_name(value)}")


def _integers(state: Mapping[str, Any], name: str, ndim: int) -> tuple[int, ...]:
    try:
        array = _array(state[name])
        if array.dtype.kind not in "iu" or array.dtype.itemsize != 8 or array.ndim != ndim or array.size > 64:
            raise ValueError(f"got {array.dtype} {array.shape}")
    except (ValueError, TypeError, RuntimeError) as error:
        expected = "an integer" if ndim == 0 else "integers of one axis"
        raise ValueError(f"state: damaged: {name}: expected {expected}, {error}") from None
    return tuple(int(entry) for entry in array.reshape(-1))


def _numbers(state: Mapping[str, Any], name: str, ndim: int) -> NDArray[Any]:
    try:
        array = _array(state[name])
        if array.dtype.name not in ("float32", "float64") or array.ndim != ndim:
            raise ValueError(f"got {array.dtype} {array.shape}")
    except (ValueError, TypeError, RuntimeError) as error:
        expected = f"float32 or float64 with {ndim} axes"
        raise ValueError(f"state: damaged: {name}: expected {expected}, {error}") from None
    return np.require(array, dtype=array.dtype.newbyteorder("="), requirements=["C", "A"])


def _check_ranges(fields: Mapping[str, Any]) -> None:
    """`ValueError` for numbers that no cache can have."""
    least = {"filter_length": 1, "horizon": -1, "capacity": -1}
    for name in _SCALARS:
        if fields[name] < least.get(name, 0) or fields["smooth"] > 1:
            raise ValueError(f"state: damaged: {name} is {fields[name]}")
    for name in _SHAPES:
        if any(entry < (2 if name == "fans" else 0) for entry in fields[name]):
            raise ValueError(f"state: damaged: {name} is {fields[name]}")
    capacity, clock, position = fields["capacity"], fields["clock"], fields["position"]
    if 0 <= capacity < clock:
        raise ValueError(f"state: damaged: clock {clock} is past the capacity {capacity}")
    if position < clock:
        raise ValueError(f"state: damaged: position {position} is before the clock {clock}")
    if fields["base"] == 0 and fields["fans"]:
        raise ValueError("state: damaged: fans without a base")


def _check_rows(fields: Mapping[str, Any], dims: Mapping[str, int]) -> None:
    """`ValueError` unless every array has the rows that the shapes say and the precision of the others."""
    shape = fields["shape"]
    outputs = broadcast(shape, fields["filter_shape"], "state")
    rows = {"pending": math.prod(outputs), "seed": math.prod(outputs)}
    for name in dims:
        array, expected = fields[name], rows.get(name, math.prod(shape))
        if array.shape[0] != expected:
            raise ValueError(f"state: damaged: expected {expected} rows of {name}, got {array.shape[0]}")
        if array.dtype != fields["history"].dtype:
            raise ValueError(f"state: damaged: {name} is {array.dtype}, history {fields['history'].dtype}")
    if fields["history"].shape[1] == 0:
        raise ValueError("state: damaged: a history of no positions")
