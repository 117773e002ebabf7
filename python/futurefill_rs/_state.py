"""The saved state of a cache: one plain dict for every engine, sealed and checked with a checksum.

Layout of ``state["arrays"]`` (``rows_in`` input and ``rows_out`` output rows in C order, blocks ``n_k``):

| array | shape | content |
| --- | --- | --- |
| ``history`` | ``(rows_in, ring)`` | raw inputs, clock time s at column ``s % ring`` |
| ``pending`` | ``(rows_out, ring)`` | effects pushed to output time s, without the unfinished base block |
|  |  | (smooth: then two blocks of each level above the first, ``2 n_k`` columns each) |
| ``seed`` | ``(rows_out, K')`` | effect of a prefilled prompt on the first K' outputs |
| ``spectra_k`` | ``(rows_in, P_k, N_k, 2)`` | kept block spectra of level k (none if used once), modulo |
|  |  | ``z^N_k - i``; ``N_k`` is ``n_k`` or the next length that has a fast transform |
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

FORMAT = 2
_FIELDS = (
    "format",
    "dtype",
    "shape",
    "filter_shape",
    "filter_length",
    "filter_digest",
    "base",
    "fans",
    "capacity",
    "clock",
    "position",
)
_KEYS = frozenset((*_FIELDS, "arrays", "checksum"))


def digest(filters: np.ndarray[Any, Any]) -> int:
    """Fingerprint of filters in the plan's dtype: a state only fits the filters it came from."""
    return zlib.crc32(_bytes(filters))


def checksum(state: Mapping[str, Any]) -> int:
    """crc32 over every field and array of a state, in a fixed order."""
    crc = zlib.crc32(repr([(name, state[name]) for name in _FIELDS]).encode())
    for name, array in sorted(state["arrays"].items()):
        crc = zlib.crc32(repr((name, array.dtype.name, array.shape)).encode(), crc)
        crc = zlib.crc32(_bytes(array), crc)
    return crc


def seal(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Complete a state: `fields` holds everything but ``format`` and ``checksum``."""
    state = {"format": FORMAT, **fields}
    state["checksum"] = checksum(state)
    return state


def unseal(
    state: Any, *, dtype: str, filter_shape: tuple[int, ...], filter_length: int, filter_digest: int
) -> dict[str, Any]:
    """Check a state against its checksum and the plan that is to continue it.

    Returns a fresh dict of the same fields with ``arrays`` C-contiguous, aligned and in native byte order.
    Raises ValueError for anything that is damaged or belongs to other filters.
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"state: expected a dict from cache.state_dict(), got {type(state).__name__}")
    if set(state) != _KEYS:
        missing, unknown = sorted(_KEYS - set(state)), sorted(map(str, set(state) - _KEYS))
        raise ValueError(f"state: damaged: missing {missing}, unexpected {unknown}")
    if type(state["format"]) is not int or state["format"] != FORMAT:
        raise ValueError(f"state: expected format {FORMAT}, got {state['format']!r}")
    _check_fields(state)
    arrays = _check_arrays(state["arrays"], state["dtype"])
    checked = {**{name: state[name] for name in _FIELDS}, "arrays": arrays}
    if checksum(checked) != state["checksum"]:
        raise ValueError("state: damaged: the checksum does not match")
    for name, ours in (
        ("dtype", dtype),
        ("filter_shape", filter_shape),
        ("filter_length", filter_length),
        ("filter_digest", filter_digest),
    ):
        if state[name] != ours:
            raise ValueError(f"state: expected {name} {ours!r} of this plan, got {state[name]!r}")
    return checked


def rebin(spectra: np.ndarray[Any, Any], block: int) -> np.ndarray[Any, Any]:
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


def _bytes(array: np.ndarray[Any, Any]) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_shape(value: object) -> bool:
    return type(value) is tuple and all(_is_size(n) for n in value)


def _check_fields(state: Mapping[str, Any]) -> None:
    valid = {
        "dtype": type(state["dtype"]) is str and state["dtype"] in ("float32", "float64"),
        "shape": _is_shape(state["shape"]),
        "filter_shape": _is_shape(state["filter_shape"]),
        "filter_length": _is_size(state["filter_length"]) and state["filter_length"] > 0,
        "filter_digest": _is_size(state["filter_digest"]),
        "base": state["base"] is None or (_is_size(state["base"]) and state["base"] > 0),
        "fans": _is_shape(state["fans"]) and all(fan >= 2 for fan in state["fans"]),
        "capacity": state["capacity"] is None or _is_size(state["capacity"]),
        "clock": _is_size(state["clock"]),
        "position": _is_size(state["position"]),
        "checksum": _is_size(state["checksum"]),
    }
    for name, good in valid.items():
        if not good:
            raise ValueError(f"state: damaged: {name} is {state[name]!r}")
    if state["capacity"] is not None and state["clock"] > state["capacity"]:
        raise ValueError(f"state: damaged: clock {state['clock']} is past the capacity {state['capacity']}")
    if state["position"] < state["clock"]:
        raise ValueError(f"state: damaged: position {state['position']} is before the clock {state['clock']}")


def _check_arrays(arrays: Any, dtype: str) -> dict[str, np.ndarray[Any, Any]]:
    if not isinstance(arrays, Mapping):
        raise ValueError(f"state: damaged: arrays is {type(arrays).__name__}")
    levels = sum(1 for name in arrays if str(name).startswith("spectra_"))
    expected = {"history": 2, "pending": 2, "seed": 2} | {f"spectra_{k}": 4 for k in range(levels)}
    if set(arrays) != set(expected):
        raise ValueError(
            f"state: damaged: expected arrays {sorted(expected)}, got {sorted(map(str, arrays))}"
        )
    checked = {}
    for name, ndim in expected.items():
        array = arrays[name]
        if not isinstance(array, np.ndarray) or array.dtype.name != dtype or array.ndim != ndim:
            got = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
            raise ValueError(
                f"state: damaged: arrays[{name!r}]: expected {dtype} with {ndim} axes, got {got}"
            )
        checked[name] = np.require(array, dtype=dtype, requirements=["C", "A"])
    return checked
