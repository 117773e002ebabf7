"""Checks of sizes, shapes and options: the one place for each, with no array library in it."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any


def type_name(value: object) -> str:
    """Name of a type as a user knows it: `numpy.ndarray`, `int`."""
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def index(value: Any, arg: str, expected: str = "an integer") -> int:
    """An integer of any library; TypeError for anything else (booleans are none)."""
    if type(value) is int:
        # As it is: operator.index would have a compiler make a graph for each.
        return value
    if not isinstance(value, bool) and not str(getattr(value, "dtype", "")).endswith("bool"):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{arg}: expected {expected}, got {type_name(value)}")


def integer(value: Any, arg: str, least: int = 0) -> int:
    """An integer of at least `least` and below 2**63; TypeError as of `index`, ValueError out of range."""
    names = {0: "a non-negative integer", 1: "a positive integer"}
    expected = names.get(least, f"an integer of at least {least}")
    number = index(value, arg, expected)
    if not least <= number < 2**63:
        below = " below 2**63" if number >= 2**63 else ""
        raise ValueError(f"{arg}: expected {expected}{below}, got {number}")
    return number


def choice(value: Any, arg: str, *allowed: str | None) -> Any:
    """`value` where it is one of those allowed, else ValueError."""
    if value not in allowed:
        names = " or ".join(map(repr, allowed))
        raise ValueError(f"{arg}: expected {names}, got {value!r}")
    return value


def shape_of(value: Any, arg: str) -> tuple[int, ...]:
    """A shape from a sequence of sizes or from one size."""
    if isinstance(value, int):
        return (integer(value, arg),)
    if not isinstance(value, Iterable):
        raise TypeError(f"{arg}: expected a shape (tuple of integers), got {type_name(value)}")
    return tuple(integer(axis, arg) for axis in value)


def shape_text(shape: tuple[int, ...], time: str) -> str:
    """A shape with a named last axis, such as `(2, 3, m)`."""
    return "(" + ", ".join([*map(str, shape), time]) + ("," if not shape else "") + ")"


def broadcast(inputs: tuple[int, ...], filters: tuple[int, ...], arg: str) -> tuple[int, ...]:
    """numpy's broadcasting of an input shape with the filters' shape."""
    rank = max(len(inputs), len(filters))
    pairs = zip(padded(inputs, rank), padded(filters, rank), strict=True)
    out = []
    for a, b in pairs:
        if a != b and 1 not in (a, b):
            raise ValueError(f"{arg}: expected shape broadcastable to {filters}, got {inputs}")
        out.append(b if a == 1 else a)
    return tuple(out)


def padded(shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """The shape with axes of one in front, `rank` axes in all."""
    return (1,) * (rank - len(shape)) + tuple(shape)
