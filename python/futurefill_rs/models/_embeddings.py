"""Outputs of named layers at the positions of a sequence, as they come, in memory or in a file."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from futurefill_rs._args import integer
from futurefill_rs.models._long import read_pieces
from futurefill_rs.models._sequences import Given, batches, integers, is_integer, padded
from futurefill_rs.nn.operators.precision import at_least_float32

Positions = int | slice | Sequence[int] | np.ndarray[Any, Any] | Tensor | None
Out = str | os.PathLike[str] | np.ndarray[Any, Any] | Tensor
Array = np.ndarray[Any, Any] | Tensor


class _Complete(Exception):
    """Every layer has seen every position: what the model would do next is of no interest."""


@torch.no_grad()
def embeddings(
    model: Any,
    ids: Any,
    layers: str | Iterable[str],
    *,
    positions: Positions,
    pool: Literal["mean"] | None,
    out: Out | Mapping[str, Out] | None,
    chunk: int | None,
    batch_size: int,
) -> Any:
    """See `LanguageModel.embeddings`."""
    names = [layers] if isinstance(layers, str) else list(layers)
    modules = _named(model, names)
    if pool not in (None, "mean"):
        raise ValueError(f"pool: expected 'mean' or None, got {pool!r}")
    chunk = None if chunk is None else integer(chunk, "chunk", 1)
    batch_size = integer(batch_size, "batch_size", 1)
    given = Given(model, ids)
    for row, name in zip(given.rows, given.names, strict=True):
        if not row.shape[0]:
            raise ValueError(f"{name}: expected one id or more, got none")
    outs = _outs(out, names, isinstance(layers, str), given.single and pool is None)
    wanted = [
        _places(positions, row.shape[0], name, row.device)
        for row, name in zip(given.rows, given.names, strict=True)
    ]
    found: dict[str, list[Any]] = {name: [None] * len(given.rows) for name in names}
    for batch in batches([row.shape[0] for row in given.rows], batch_size):
        rows = [given.rows[i] for i in batch]
        sinks = {
            name: [
                _Mean(wanted[i]) if pool else _Kept(wanted[i], outs.get(name), f"out[{name!r}]")
                for i in batch
            ]
            for name in names
        }
        _read(model, rows, modules, sinks, chunk)
        for name in names:
            for i, sink in zip(batch, sinks[name], strict=True):
                found[name][i] = sink.result()
    single_place = positions is not None and is_integer(positions) and pool is None
    results = {name: _shaped(given, rows, bool(pool), single_place) for name, rows in found.items()}
    return results[names[0]] if isinstance(layers, str) else results


def _shaped(given: Given, rows: list[Any], pooled: bool, single_place: bool) -> Any:
    if single_place:
        rows = [row[0] for row in rows]
    if given.single or not rows:
        return rows[0] if given.single else rows
    return torch.stack(rows) if pooled or given.length is not None else rows


def _named(model: Any, names: Sequence[str]) -> dict[str, Any]:
    known = dict(model.named_modules())
    for name in names:
        if not isinstance(name, str) or not name or name not in known:
            close = difflib.get_close_matches(str(name), known, 1)
            hint = f"; close to it is {close[0]!r}" if close and close[0] else ""
            raise ValueError(f"layers: expected names of model.named_modules(), got {name!r}{hint}")
    if not names:
        raise ValueError("layers: expected one or more names, got none")
    return {name: known[name] for name in names}


def _outs(out: Any, names: Sequence[str], alone: bool, fits: bool) -> Mapping[str, Any]:
    """What each layer's outputs are written to."""
    if out is None:
        return {}
    if not fits:
        raise ValueError("out: expected one sequence and no pool with it, got several or pool='mean'")
    if alone:
        return {names[0]: out}
    if not isinstance(out, Mapping) or set(out) != set(names):
        raise ValueError("out: expected a path or an array for each of several layers, by its name")
    return out


def _places(positions: Positions, length: int, name: str, device: torch.device) -> Tensor | int:
    """The positions that are wanted, `(P,)`; all of them as their number."""
    if positions is None:
        return length
    if isinstance(positions, slice):
        return torch.arange(*positions.indices(length), device=device)
    if is_integer(positions):
        positions = [positions]  # type: ignore[list-item]
    if isinstance(positions, Tensor):
        positions = positions.cpu().numpy()
    places = torch.from_numpy(integers(positions, "positions", "integers")).to(device)
    if places.ndim != 1:
        raise ValueError(f"positions: expected shape (P,), got {tuple(places.shape)}")
    if places.numel() and not (-length <= int(places.min()) and int(places.max()) < length):
        raise ValueError(
            f"positions: expected those of {name} with {length} ids, "
            f"got {int(places.min())} to {int(places.max())}"
        )
    return torch.where(places < 0, places + length, places)


class _Mean:
    """The mean over the positions wanted, summed in float64."""

    def __init__(self, places: Tensor | int) -> None:
        self._places = places
        self._count = places if isinstance(places, int) else places.shape[0]
        self._sum: Tensor | None = None
        self._dtype = torch.float32

    def take(self, first: int, y: Tensor) -> None:
        found = y if isinstance(self._places, int) else y[_within(self._places, first, y.shape[0])[1]]
        self._dtype = at_least_float32(y[:0]).dtype
        total = found.double().sum(0)
        self._sum = total if self._sum is None else self._sum + total

    def result(self) -> Tensor:
        if self._sum is None or not self._count:
            raise ValueError("positions: expected one or more for a mean, got none")
        return (self._sum / self._count).to(self._dtype)


class _Kept:
    """The outputs at the positions wanted, in their order, in an array made with the first of them."""

    def __init__(self, places: Tensor | int, out: Any, name: str) -> None:
        self._places, self._out, self._name = places, out, name
        self._array: Array | None = None

    def take(self, first: int, y: Tensor) -> None:
        count = self._places if isinstance(self._places, int) else self._places.shape[0]
        if self._array is None:
            self._array = _array(self._out, (count, y.shape[-1]), y, self._name)
        if isinstance(self._places, int):
            _put(self._array, slice(first, first + y.shape[0]), y)
        else:
            at, within = _within(self._places, first, y.shape[0])
            if at.numel():
                _put(self._array, at, y[within])

    def result(self) -> Array:
        assert self._array is not None
        if isinstance(self._array, np.memmap):
            self._array.flush()
        return self._array


def _within(places: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Which of the places lie in `count` positions from `first` on, and where there."""
    at = ((places >= first) & (places < first + count)).nonzero().flatten()
    return at, places[at] - first


def _array(out: Any, shape: tuple[int, int], y: Tensor, name: str) -> Array:
    """An array for outputs like y: a new one, one in a new file, or the one that was given."""
    if out is None:
        return y.new_empty(shape)
    if isinstance(out, str | os.PathLike):
        dtype = np.float64 if y.dtype == torch.float64 else np.float32
        return np.lib.format.open_memmap(out, mode="w+", dtype=dtype, shape=shape)
    if not isinstance(out, Tensor | np.ndarray):
        raise TypeError(f"{name}: expected a path, an array or a tensor, got {type(out).__name__}")
    if tuple(out.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(out.shape)}")
    kind = out.dtype.is_floating_point if isinstance(out, Tensor) else out.dtype.kind == "f"
    if not kind:
        raise TypeError(f"{name}: expected floating-point numbers, got {out.dtype}")
    return out


def _put(array: Array, at: Any, y: Tensor) -> None:
    if isinstance(array, Tensor):
        array[at] = y.to(array.device, array.dtype)
    else:
        # numpy has no bfloat16.
        array[at.cpu().numpy() if isinstance(at, Tensor) else at] = at_least_float32(y).cpu().numpy()


class _Hook:
    """Hands a layer's outputs on, row by row, as they come: piece after piece, in order.

    Attributes:
        seen: positions that came.
    """

    def __init__(self, name: str, sinks: Sequence[_Mean | _Kept], lengths: Sequence[int]) -> None:
        self.name, self._sinks, self._lengths = name, sinks, lengths
        self._shape = len(lengths), max(lengths)
        self.seen = 0
        self._width: int | None = None

    def __call__(self, module: Any, args: Any, y: Any) -> None:
        rows, length = self._shape
        if self.seen == length:
            return
        fits = isinstance(y, Tensor) and y.ndim == 3 and y.shape[0] == rows
        if not fits or self.seen + y.shape[1] > length or self._width not in (None, y.shape[2]):
            got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(
                f"layers: expected layers with features at every position, got {self.name!r} with {got} "
                f"for ids {self._shape}"
            )
        self._width = y.shape[2]
        for row, sink in enumerate(self._sinks):
            count = min(y.shape[1], self._lengths[row] - self.seen)
            if count > 0:
                sink.take(self.seen, y[row, :count])
        self.seen += y.shape[1]


def _read(
    model: Any,
    rows: Sequence[Tensor],
    modules: Mapping[str, Any],
    sinks: Mapping[str, Sequence[_Mean | _Kept]],
    chunk: int | None,
) -> None:
    """Run the model over rows of ids until every layer has seen every position."""
    lengths = [row.shape[0] for row in rows]
    longest = max(lengths)
    hooks = [_Hook(name, sinks[name], lengths) for name in modules]

    def complete(*arguments: Any) -> None:
        if all(hook.seen == longest for hook in hooks):
            raise _Complete

    handles = []
    try:
        for hook, module in zip(hooks, modules.values(), strict=True):
            handles.append(module.register_forward_hook(hook))
            handles.append(module.register_forward_hook(complete))
        for _ in read_pieces(model, padded(rows), piece=chunk):
            pass
    except _Complete:
        pass
    finally:
        for handle in handles:
            handle.remove()
    for hook in hooks:
        if hook.seen != longest:
            raise ValueError(
                f"layers: expected layers that see every position, got {hook.name!r}, which saw {hook.seen} "
                f"of {longest}"
            )
