"""The memory of one stream, and the tiles that work on it.

The invariant: the effect of every past input on the future is either in `pending` (or, where a tile has a
block's time, in `early`, or in the prompt's `seed`), or its block is still in `history`; never both.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from futurefill_rs._args import broadcast, padded
from futurefill_rs._core import Execution, TileIndex
from futurefill_rs._torch_args import is_fake
from futurefill_rs.torch_engine.streams import Graph, Side, check_recordable, record
from futurefill_rs.torch_engine.tables import Tables
from futurefill_rs.torch_engine.transform import ifft

# Elements of temporary memory one operation may take, on CPU (cache) and elsewhere.
_CPU_TEMPORARY = 1 << 18
_DEVICE_TEMPORARY = 1 << 24


def pairs(values: Tensor) -> Tensor:
    """A complex tensor as real pairs."""
    return torch.view_as_real(values)


class _TileGraph:
    """The recorded tile of a level, and the numbers that it reads on the device."""

    def __init__(self, graph: Graph, index: Tensor) -> None:
        self.graph, self.index = graph, index
        self._numbers = (0, 0, 0, 0)

    def replay(self, tile: TileIndex) -> None:
        numbers = (tile.newest, tile.count, tile.source, tile.target)
        # An interrupt leaves them unknown.
        held, self._numbers = self._numbers, (-1, -1, -1, -1)
        for place, (new, old) in enumerate(zip(numbers, held, strict=True)):
            # Each is a launch.
            if new != old:
                self.index[place].fill_(new)
        self._numbers = numbers
        self.graph.replay()


class Memory:
    """All arrays of a stream for positions of `shape`, zero at first; every array has the rows in front.

    | array | shape behind the rows | |
    | --- | --- | --- |
    | `seed` | `(K',)` | what a prompt adds to the first K' outputs |
    | `history` | `(ring,)` | inputs, clock time s at column s % ring |
    | `pending` | `(ring,)` | what tiles have added to the outputs to come |
    | `ahead` | `(base,)` | what all before the present base block adds to its outputs |
    | `kept` | `(P_k, n_k)` | spectra of the newest blocks of level k |
    | `early` | `(2 n_k,)` | outputs of the levels that have a block's time |
    """

    def __init__(
        self, tables: Tables, shape: tuple[int, ...], execution: Execution, seed: Tensor | None = None
    ) -> None:
        self.tables = tables
        self._execute(execution)
        self._shape_to(shape)
        self.seed = self.zeros(self.out_shape, 0)
        if seed is not None:
            self.seed = seed.reshape(*self.out_shape, seed.shape[-1])
        self.history = self.zeros(self.in_shape, self.ring)
        self.pending = self.zeros(self.out_shape, 0 if self.base is None else self.ring)
        self.ahead = self.zeros(self.out_shape, self.base or 0)
        self.kept = tuple(
            self.zeros(self.in_shape, level.kept, level.block, complex_=True) for level in self.levels
        )
        self.early = tuple(self.zeros(self.out_shape, 2 * level.block) for level in self.delayed)
        self._attach()

    def _execute(self, execution: Execution) -> None:
        self.execution = execution
        self.base, self.ring, self.levels = execution.base, execution.ring, execution.levels
        self.delayed = tuple(level for level in self.levels if level.delayed)

    def _shape_to(self, shape: tuple[int, ...]) -> None:
        filters = self.tables.filter_shape
        self.shape = shape
        self.output_shape = broadcast(shape, filters, "shape")
        rank = len(self.output_shape)
        # Axes of one in front let every array of the cache broadcast with every other.
        self.in_shape = padded(shape, rank)
        self.out_shape = padded(self.output_shape, rank)
        self._filter_rank = padded(filters, rank)
        self.rows = math.prod(self.output_shape)

    def _attach(self) -> None:
        """What belongs to the memory and the rows as they are now."""
        device = self.tables.device
        self.lags = self.aligned(self.tables.reversed)
        # The recorded tile of each level.
        self.tile_graphs: tuple[_TileGraph, ...] = ()
        # The outputs of the tile that is due: what is left to do is to write them.
        self.result: Tensor | None = None
        real = not is_fake(self.history)
        self.sides = tuple(Side(device, f"level {k + 1}", real) for k in range(len(self.early)))

    def zeros(self, *sizes: tuple[int, ...] | int, complex_: bool = False) -> Tensor:
        shape: list[int] = []
        for part in sizes:
            shape.extend(part if isinstance(part, tuple) else (part,))
        dtype = self.tables.dtype
        if complex_:
            dtype = dtype.to_complex()
        try:
            return torch.zeros(shape, dtype=dtype, device=self.tables.device)
        except RuntimeError as error:
            if self.tables.device.type != "cpu":
                raise
            raise MemoryError(f"cannot allocate a cache for positions of shape {self.shape}") from error

    def aligned(self, values: Tensor, lead: int = 0) -> Tensor:
        """Filter data with its F axes padded to the output's rank; `lead` axes stand in front of F."""
        axes = len(self.tables.filter_shape)
        return values.reshape(*values.shape[:lead], *self._filter_rank, *values.shape[lead + axes :])

    def row_numbers(self) -> tuple[Tensor, Tensor]:
        """For every output row its input row and its filter row."""
        inputs, filters = (
            torch.arange(math.prod(shape), device=self.tables.device).reshape(shape).expand(self.out_shape)
            for shape in (self.in_shape, self._filter_rank)
        )
        return inputs.reshape(-1), filters.reshape(-1)

    def arrays(self) -> list[Tensor]:
        """Every array of the state; all have the rows in front."""
        return [self.seed, self.history, self.pending, self.ahead, *self.kept, *self.early]

    def with_arrays(self, arrays: list[Tensor]) -> Memory:
        """A memory of these arrays, which may have another number of entries in axis 0."""
        other = Memory.__new__(Memory)
        other.tables = self.tables
        other._execute(self.execution)
        other.seed, other.history, other.pending, other.ahead = arrays[:4]
        levels = len(self.kept)
        other.kept, other.early = tuple(arrays[4 : 4 + levels]), tuple(arrays[4 + levels :])
        batched = self.shape and len(self.shape) == len(self.in_shape)
        first = (other.history.shape[0],) if batched else ()
        other._shape_to((*first, *self.shape[len(first) :]))
        other._attach()
        return other

    @property
    def temporary(self) -> int:
        """Elements that one operation may take for itself."""
        return _CPU_TEMPORARY if self.tables.device.type == "cpu" else _DEVICE_TEMPORARY

    # Tiles

    def settle(self) -> None:
        """Nothing is under way that the current stream would not wait for."""
        for side in self.sides:
            side.wait()

    def given(self, t: int, length: int) -> Tensor:
        """What earlier inputs give the outputs from time t on, `length` of a block: new memory."""
        column = t % self.ring
        given = self.pending[..., column : column + length].clone()
        for early in self.early:
            column = t % early.shape[-1]
            given += early[..., column : column + length]
        return self.seeded(given, t)

    def seeded(self, y: Tensor, t: int) -> Tensor:
        """Add the prompt's effect on the outputs from time t on."""
        seed = self.seed[..., t : t + y.shape[-1]]
        if seed.shape[-1]:
            y[..., : seed.shape[-1]].add_(seed)
        return y

    def run(self, t: int, spectrum: Tensor | None) -> None:
        """Run the tiles due at time t and begin those that have a block's time; after an error, again.

        `spectrum`: that of the newest inputs, as many as it has bins, where known.
        """
        for tile in self.execution.tiles(t) if self.rows else ():
            if tile.delayed:
                self.begin(tile)
            else:
                self._tile_or_graph(tile, spectrum)

    def begin(self, tile: TileIndex) -> None:
        """Begin a tile that has a block's time; the one before it in its level is due."""
        side, n = self.sides[tile.level - 1], self.levels[tile.level].block
        side.wait()
        uses = [self.history, self.kept[tile.level], self.early[tile.level - 1]]
        uses += [graph.index for graph in self.tile_graphs[tile.level : tile.level + 1]]
        uses += [self.tables.spectra[n], self.tables.twist(n), *self.tables.untwist(n)]
        side.start(functools.partial(self._tile_or_graph, tile, None), uses)

    def _tile_or_graph(self, tile: TileIndex, spectrum: Tensor | None) -> None:
        """The tile, by its level's graph where one has been recorded."""
        if self.tile_graphs:
            self.tile_graphs[tile.level].replay(tile)
        else:
            self._tile(tile, spectrum)

    def _tile(self, tile: TileIndex, spectrum: Tensor | None) -> None:
        """Run a tile; a `spectrum` of as many inputs as its own spares the transform."""
        n = self.levels[tile.level].block
        out = self._target(tile)[..., tile.target : tile.target + n]
        if not tile.add:
            self._join(self._products(tile, spectrum), out)
            return
        # Added to what it is known to be added to, however often this is interrupted and called again.
        if self.result is None:
            self.result = self._join(self._products(tile, spectrum), torch.empty_like(out)).add_(out)
        out.copy_(self.result)

    def _target(self, tile: TileIndex) -> Tensor:
        """Where a tile puts its outputs."""
        return self.early[tile.level - 1] if tile.delayed else self.pending

    def _products(self, tile: TileIndex, spectrum: Tensor | None) -> Tensor:
        """The sum of products of spectra of a tile."""
        level, newest, count = self.levels[tile.level], tile.newest, tile.count
        n = level.block
        if spectrum is None or spectrum.shape[-1] != n:
            spectrum = self.tables.transform(self.history[..., tile.source : tile.source + n], n)
        kept = self.kept[tile.level]
        if level.kept:
            kept[..., newest, :].copy_(spectrum)
        else:
            kept = spectrum.unsqueeze(-2)
        # Filter partitions stand last to first, so that they run alongside the slots.
        weights = self.aligned(self.tables.spectra[n])
        end = weights.shape[-2] - tile.delayed
        newer = min(newest + 1, count)
        acc = self._accumulate(
            kept[..., newest + 1 - newer : newest + 1, :], weights[..., end - newer : end, :], None
        )
        if newer < count:
            older = level.parts - (count - newer)
            acc = self._accumulate(kept[..., older:, :], weights[..., end - count : end - newer, :], acc)
        return acc

    def _join(self, acc: Tensor, out: Tensor) -> Tensor:
        """The outputs of a sum of products of spectra, written to `out`."""
        y = ifft(acc)
        cosine, minus_sine = self.tables.untwist(acc.shape[-1])
        torch.mul(y.imag, cosine, out=out)
        return out.addcmul_(y.real, minus_sine)

    def _accumulate(self, kept: Tensor, weights: Tensor, acc: Tensor | None) -> Tensor:
        """Sum over partitions of kept (*C, i, n) times weights (*F, i, n)."""
        count, n = kept.shape[-2:]
        piece = max(self.temporary // max(self.rows * n, 1), 1)
        for a in range(0, count, piece):
            if piece == 1 or count == 1:
                if acc is None:
                    acc = kept[..., a, :] * weights[..., a, :]
                else:
                    acc = acc.addcmul_(kept[..., a, :], weights[..., a, :])
            else:
                part = (kept[..., a : a + piece, :] * weights[..., a : a + piece, :]).sum(-2)
                acc = part if acc is None else acc.add_(part)
        assert acc is not None
        return acc

    # Recorded tiles

    def static_tile(self, tile: TileIndex, index: Tensor) -> None:
        """A tile of this one's level whose numbers only the device knows: the same operators for each.

        `index`: newest, count, source and target, `(4,)` of int64.
        """
        level, (newest, count, source, target) = self.levels[tile.level], index.view(4, 1).unbind()
        n = level.block
        positions = torch.arange(n, device=self.tables.device)
        x = self.history.index_select(-1, source + positions)
        kept = self.tables.transform(x, n).unsqueeze(-2)
        weights = self.aligned(self.tables.spectra[n])
        if level.kept:
            kept = self.kept[tile.level].index_copy_(-2, newest, kept)
            acc = torch.zeros((*self.out_shape, n), dtype=kept.dtype, device=kept.device)
            for a in range(level.parts):
                age = (newest - a) % level.parts
                weight = weights.index_select(-2, (weights.shape[-2] - 1 - tile.delayed - age).clamp(min=0))
                # No product with what is in a slot of before: it may not be finite.
                acc.addcmul_(torch.where(age < count, kept[..., a, :], 0), weight.squeeze(-2))
        else:
            acc = self._accumulate(kept, weights[..., -1:, :], None)
        ring, columns = self._target(tile), target + positions
        out = self._join(acc, torch.empty_like(ring[..., :n]))
        ring.index_copy_(-1, columns, out.add_(ring.index_select(-1, columns)) if tile.add else out)

    def capture(self) -> int:
        """Record the tile of every level as a CUDA graph and use it from now on; the number of graphs.

        `ValueError` on any device but CUDA.
        """
        device = self.tables.device
        check_recordable(device, not is_fake(self.history))
        # Transforms make their plans when they first run, which a graph must not see.
        scratch = self.with_arrays([values.clone() for values in self.arrays()])
        recorded: list[_TileGraph] = []
        pool: Graph | None = None
        for tile in self.first_tiles() if self.rows else ():
            index = torch.zeros(4, dtype=torch.int64, device=device)
            scratch.static_tile(tile, index)
            work = functools.partial(self.static_tile, tile, index)
            graph = record(work, device, None if tile.delayed else pool)
            recorded.append(_TileGraph(graph, index))
            pool = pool if tile.delayed else graph
        self.tile_graphs = tuple(recorded)
        return len(recorded)

    def first_tiles(self) -> list[TileIndex]:
        """The first tile of every level, the lowest first."""
        blocks = enumerate(level.block for level in self.levels)
        return [tile for k, n in blocks for tile in self.execution.tiles(n) if tile.level == k]
