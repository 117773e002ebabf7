"""The cache state both engines write and read: one plain dictionary, sealed by a checksum."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

FORMAT = 1
_SCALARS = (
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


def digest(chunks: Iterable[np.ndarray[Any, Any]]) -> int:
    """crc32 of the arrays' bytes in C order, one after the other."""
    crc = 0
    for chunk in chunks:
        crc = zlib.crc32(np.ascontiguousarray(chunk).tobytes(), crc)
    return crc


def _checksum(state: Mapping[str, Any]) -> int:
    crc = zlib.crc32(repr([state[name] for name in _SCALARS]).encode())
    for name in sorted(state["arrays"]):
        array = state["arrays"][name]
        crc = zlib.crc32(f"{name} {array.dtype.name} {array.shape}".encode(), crc)
        crc = zlib.crc32(np.ascontiguousarray(array).tobytes(), crc)
    return crc


def seal(state: dict[str, Any]) -> dict[str, Any]:
    """Add the checksum over every other entry and return the same dictionary."""
    state["checksum"] = _checksum(state)
    return state


def opened(state: Any) -> dict[str, Any]:
    """The state, checked to be complete, of this format and undamaged; `ValueError` otherwise."""
    if not isinstance(state, Mapping):
        raise ValueError(f"state: expected the mapping that state_dict() returns, got {type(state).__name__}")
    missing = [name for name in (*_SCALARS, "arrays", "checksum") if name not in state]
    if missing:
        raise ValueError(f"state: expected the entries of state_dict(), got none named {', '.join(missing)}")
    if state["format"] != FORMAT:
        raise ValueError(f"state: expected format {FORMAT}, got {state['format']!r}")
    arrays = state["arrays"]
    if not isinstance(arrays, Mapping) or not all(isinstance(a, np.ndarray) for a in arrays.values()):
        raise ValueError("state: expected arrays to map names to numpy arrays")
    if _checksum(state) != state["checksum"]:
        raise ValueError("state: expected contents that match the checksum, got a damaged state")
    return dict(state)
