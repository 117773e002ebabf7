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
from futurefill_rs._torch_args import is_fake
from futurefill_rs.torch_engine.layout import Layout
from futurefill_rs.torch_engine.streams import Graph, Side, check_recordable, record
from futurefill_rs.torch_engine.tables import Tables
from futurefill_rs.torch_engine.transform import ifft

# Elements of temporary memory one operation may take, on CPU (cache) and elsewhere.
_CPU_TEMPORARY = 1 << 18
_DEVICE_TEMPORARY = 1 << 24


def pairs(values: Tensor) -> Tensor:
    """A complex tensor as real pairs."""
    return torch.view_as_real(values)


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
        self, tables: Tables, shape: tuple[int, ...], layout: Layout, seed: Tensor | None = None
    ) -> None:
        self.tables, self.layout = tables, layout
        self._shape_to(shape)
        self.seed = self.zeros(self.out_shape, 0)
        if seed is not None:
            self.seed = seed.reshape(*self.out_shape, seed.shape[-1])
        self.history = self.zeros(self.in_shape, layout.ring)
        self.pending = self.zeros(self.out_shape, 0 if layout.base is None else layout.ring)
        self.ahead = self.zeros(self.out_shape, layout.base or 0)
        self.kept = tuple(
            self.zeros(self.in_shape, level.kept, level.n, complex_=True) for level in layout.levels
        )
        self.early = tuple(self.zeros(self.out_shape, 2 * level.n) for level in layout.delayed)
        self._attach()

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
        # For each level, where captured: what the graph reads the time from, and the graph.
        self.tile_graphs: tuple[tuple[Tensor, Graph], ...] = ()
        # The outputs of the tile that is due, with its time: what is left to do is to write them.
        self.result: tuple[int, Tensor] | None = None
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
        other.tables, other.layout = self.tables, self.layout
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
        column = t % self.layout.ring
        given = self.pending[..., column : column + length].clone()
        for early, level in zip(self.early, self.layout.delayed, strict=True):
            column = t % (2 * level.n)
            given += early[..., column : column + length]
        return self.seeded(given, t)

    def seeded(self, y: Tensor, t: int) -> Tensor:
        """Add the prompt's effect on the outputs from time t on."""
        seed = self.seed[..., t : t + y.shape[-1]]
        if seed.shape[-1]:
            y[..., : seed.shape[-1]].add_(seed)
        return y

    def run(self, t: int, spectrum: Tensor | None) -> None:
        """Run the levels due at time t; after an error it may be called again.

        `spectrum`: that of the newest inputs, as many as it has bins, where known.
        """
        levels = self.layout.levels
        due = [k for k, level in enumerate(levels) if t % level.n == 0]
        if not due or self.rows == 0:
            return
        for k in reversed(due) if self.early else due[-1:]:
            if levels[k].delay:
                # What began a block ago is due; what begins now has a block's time.
                side = self.sides[k - 1]
                side.wait()
                side.start(functools.partial(self.tile_or_graph, k, t, None), self.used(k))
            else:
                self.tile_or_graph(k, t, spectrum)

    def used(self, k: int) -> list[Tensor]:
        """All memory that a tile of delayed level k works on."""
        n, tables = self.layout.levels[k].n, self.tables
        own = [self.history, self.kept[k], self.early[k - 1]]
        clocks = [clock for clock, _ in self.tile_graphs[k : k + 1]]
        return [*own, *clocks, tables.spectra[n], tables.twist(n), *tables.untwist(n)]

    def tile_or_graph(self, k: int, t: int, spectrum: Tensor | None) -> None:
        """The tile of level k at time t, as a graph where one has been recorded."""
        if self.tile_graphs:
            clock, graph = self.tile_graphs[k]
            clock.fill_(t)
            graph.replay()
        else:
            self._tile(k, t, spectrum)

    def _tile(self, k: int, t: int, spectrum: Tensor | None) -> None:
        """The tile of level k at time t; a `spectrum` of as many inputs as its own spares the transform."""
        target, column, add = self._target(k, t)
        out = target[..., column : column + self.layout.levels[k].n]
        if not add:
            self._join(self._products(k, t, spectrum), out)
            return
        # Added to what it is known to be added to, however often this is interrupted and called again.
        if self.result is None or self.result[0] != t:
            y = self._join(self._products(k, t, spectrum), torch.empty_like(out))
            self.result = (t, y.add_(out))
        out.copy_(self.result[1])

    def _products(self, k: int, t: int, spectrum: Tensor | None) -> Tensor:
        """The sum of products of spectra of level k's tile at time t."""
        level, ring = self.layout.levels[k], self.layout.ring
        n, partitions, skip = level.n, level.partitions, level.delay
        slot, window = level.window(t)
        if spectrum is None or spectrum.shape[-1] != n:
            column = (t - n) % ring
            spectrum = self.tables.transform(self.history[..., column : column + n], n)
        kept = self.kept[k]
        if partitions == 1:
            kept = spectrum.unsqueeze(-2)
        else:
            kept[..., slot, :].copy_(spectrum)
        # Filter partitions stand last to first, so that they run alongside the slots.
        weights = self.aligned(self.tables.spectra[n])
        end, count = weights.shape[-2] - skip, min(window, partitions - skip)
        newer = min(slot + 1, count)
        acc = self._accumulate(
            kept[..., slot + 1 - newer : slot + 1, :], weights[..., end - newer : end, :], None
        )
        if newer < count:
            older = partitions - (count - newer)
            acc = self._accumulate(kept[..., older:, :], weights[..., end - count : end - newer, :], acc)
        return acc

    def _target(self, k: int, t: int | Tensor) -> tuple[Tensor, int | Tensor, bool]:
        """Where the tile of level k at time t puts its outputs, and if it adds."""
        level = self.layout.levels[k]
        if level.delay:
            return self.early[k - 1], (t + level.n) % (2 * level.n), False
        return self.pending, t % self.layout.ring, level.blocks is not None and not level.smooth

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

    def static_tile(self, k: int, t: Tensor) -> None:
        """The tile of `_tile` at a time that only the device knows: the same operators at every time."""
        level, ring = self.layout.levels[k], self.layout.ring
        n, partitions, skip = level.n, level.partitions, level.delay
        positions = torch.arange(n, device=self.tables.device)
        x = self.history.index_select(-1, (t - n) % ring + positions)
        kept = self.tables.transform(x, n).unsqueeze(-2)
        weights = self.aligned(self.tables.spectra[n])
        if partitions == 1:
            acc = self._accumulate(kept, weights[..., -1:, :], None)
        else:
            slot, window = level.window(t)
            kept = self.kept[k].index_copy_(-2, slot, kept)
            acc = torch.zeros((*self.out_shape, n), dtype=kept.dtype, device=kept.device)
            for a in range(partitions):
                age = (slot - a) % partitions
                weight = weights.index_select(-2, (weights.shape[-2] - 1 - skip - age).clamp(min=0))
                takes_part = (age < window) & (age < partitions - skip)
                # No product with what is in a slot of before: it may not be finite.
                acc.addcmul_(torch.where(takes_part, kept[..., a, :], 0), weight.squeeze(-2))
        target, column, add = self._target(k, t)
        columns = column + positions
        out = self._join(acc, torch.empty_like(target[..., :n]))
        target.index_copy_(-1, columns, out.add_(target.index_select(-1, columns)) if add else out)

    def capture(self) -> int:
        """Record the tile of every level as a CUDA graph and use it from now on; the number of graphs.

        `ValueError` on any device but CUDA.
        """
        device = self.tables.device
        check_recordable(device, not is_fake(self.history))
        # Transforms make their plans when they first run, which a graph must not see.
        scratch = self.with_arrays([values.clone() for values in self.arrays()])
        recorded: list[tuple[Tensor, Graph]] = []
        pool: Graph | None = None
        for k, level in enumerate(self.layout.levels if self.rows else ()):
            clock = torch.zeros(1, dtype=torch.int64, device=device)
            scratch.static_tile(k, clock)
            alone = level.delay > 0
            graph = record(functools.partial(self.static_tile, k, clock), device, None if alone else pool)
            recorded.append((clock, graph))
            pool = pool if alone else graph
        self.tile_graphs = tuple(recorded)
        return len(recorded)
