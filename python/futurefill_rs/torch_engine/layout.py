"""What a schedule comes to for one filter length and one capacity: the plan and the cache agree on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class Level(NamedTuple):
    """One level as a cache runs it."""

    n: int
    """Positions of a block."""
    partitions: int
    """Kept blocks that take part at most."""
    blocks: int | None
    """Blocks of a super-block; None at the top, where blocks are counted without end."""
    smooth: bool = False
    """The level looks back over two super-blocks, and all but the lowest begin a block early."""
    delay: int = 0
    """Blocks between the inputs of a tile and its outputs: 1 where a tile has a whole block's time."""

    @property
    def kept(self) -> int:
        """Blocks whose spectra are kept: none where each block takes part in one tile only."""
        return 0 if self.partitions == 1 else self.partitions

    def window(self, t: Any) -> tuple[Any, Any]:
        """Of the tile that begins at time t: the slot of its newest block, and how many blocks it may use.

        For an integer or for a tensor of them. At most `partitions - delay` blocks take part.
        """
        tile = t // self.n
        if self.blocks is None:
            return (tile - 1) % self.partitions, tile
        if not self.smooth:
            count = tile % self.blocks
            return (count - 1) % self.partitions, count
        # Up to the end of the super-block before the last one, the level above has taken all.
        done = (tile + self.delay) // self.blocks
        return (tile - 1) % self.partitions, tile - self.blocks * (done - 1 * (done > 0))


class Layout(NamedTuple):
    """What a schedule comes to for one filter length and one capacity."""

    base: int | None
    fans: tuple[int, ...]
    levels: tuple[Level, ...]
    ring: int
    """Positions the history holds."""

    @property
    def delayed(self) -> tuple[Level, ...]:
        """The levels whose tiles begin a block early."""
        return tuple(level for level in self.levels if level.delay)


def layout_of(
    base: int | None, fans: Sequence[int], filter_length: int, capacity: int | None, smooth: bool = False
) -> Layout:
    """Drop what no position of such a cache reaches."""
    reach = filter_length if capacity is None else max(min(capacity, filter_length), 1)
    if base is None:
        return Layout(None, (), (), reach)
    n = min(base, reach)
    lengths, kept = [n], []
    for fan in fans:
        n *= fan
        if n >= reach or (smooth and capacity is not None and n >= -(-capacity // 2)):
            break
        lengths.append(n)
        kept.append(fan)
    if capacity is not None and capacity <= lengths[0]:
        return Layout(lengths[0], (), (), lengths[0])
    smooth = smooth and len(lengths) > 1
    levels = []
    for k, n in enumerate(lengths):
        partitions, blocks = -(-filter_length // n), None
        if k < len(kept):
            blocks = kept[k]
            partitions = min(partitions, 2 * blocks - 1 if smooth else blocks - 1)
        elif capacity is not None:
            partitions = min(partitions, -(-capacity // n) - 1)
        levels.append(Level(n, partitions, blocks, smooth, int(smooth and k > 0)))
    return Layout(lengths[0], tuple(kept), tuple(levels), lengths[-1] * (2 if smooth else 1))
