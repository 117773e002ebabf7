"""What a schedule comes to for one filter length and one capacity: the plan and the cache agree on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

# Longest base block that is pushed position by position. A longer one is summed anew at each position:
# pushing would add that many terms one after the other, and their rounding errors with them.
LONGEST_PUSH = 256


class Level(NamedTuple):
    """One level as a cache runs it."""

    n: int
    """Positions of a block."""
    partitions: int
    """Kept blocks that take part at most."""
    blocks: int | None
    """Blocks of a super-block; None at the top, where blocks are counted without end."""

    @property
    def kept(self) -> int:
        """Blocks whose spectra are kept: none where each block takes part in one tile only."""
        return 0 if self.partitions == 1 else self.partitions


class Layout(NamedTuple):
    """What a schedule comes to for one filter length and one capacity."""

    base: int | None
    fans: tuple[int, ...]
    levels: tuple[Level, ...]
    ring: int
    """Positions the history holds."""


def layout_of(base: int | None, fans: Sequence[int], filter_length: int, capacity: int | None) -> Layout:
    """Drop what no position of such a cache reaches."""
    reach = filter_length if capacity is None else max(min(capacity, filter_length), 1)
    if base is None:
        return Layout(None, (), (), reach)
    n = min(base, reach)
    lengths, kept = [n], []
    for fan in fans:
        n *= fan
        if n >= reach:
            break
        lengths.append(n)
        kept.append(fan)
    if capacity is not None and capacity <= lengths[0]:
        return Layout(lengths[0], (), (), lengths[0])
    levels = []
    for k, n in enumerate(lengths):
        partitions = -(-filter_length // n)
        if k < len(kept):
            levels.append(Level(n, min(partitions, kept[k] - 1), kept[k]))
        else:
            if capacity is not None:
                partitions = min(partitions, -(-capacity // n) - 1)
            levels.append(Level(n, partitions, None))
    return Layout(lengths[0], tuple(kept), tuple(levels), lengths[-1])
