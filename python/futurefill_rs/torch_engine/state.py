"""The arrays of a stream as a saved state holds them, and back: the layout is `_state`'s."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from futurefill_rs import _state
from futurefill_rs._torch_args import to_host
from futurefill_rs.torch_engine.tile import Memory, pairs


def save(
    memory: Memory, horizon: int | None, capacity: int | None, clock: int, prompt: int
) -> dict[str, NDArray[Any]]:
    """The state of a settled memory at a clock behind `prompt` positions."""
    tables = memory.tables
    pending = memory.pending
    if memory.early:
        pending = torch.cat((pending, *memory.early), -1)
    elif memory.base is not None:
        # Columns of times gone by belong to nobody: at a capacity's end, all of them.
        gone = (clock - 1) % memory.ring + 1 if clock and clock == capacity else clock % memory.ring
        pending = pending.clone()
        pending[..., :gone] = 0
    arrays = {"history": memory.history, "pending": pending, "seed": memory.seed}
    arrays |= {f"spectra_{k}": pairs(kept) for k, kept in enumerate(memory.kept)}
    return _state.seal(
        {
            "shape": memory.shape,
            "filter_shape": tables.filter_shape,
            "filter_length": tables.filter_length,
            "filter_digest": tables.digest(),
            "base": tables.schedule.base,
            "fans": tables.schedule.fans,
            "smooth": tables.smooth,
            "horizon": horizon,
            "capacity": capacity,
            "clock": clock,
            "position": prompt + clock,
            **{name: _rows(values, len(memory.output_shape)) for name, values in arrays.items()},
        }
    )


def _rows(values: Tensor, rank: int) -> NDArray[Any]:
    """The array with its row axes as one."""
    array = to_host(values)
    return np.ascontiguousarray(array.reshape(math.prod(array.shape[:rank]), *array.shape[rank:]))


def load(memory: Memory, fields: Mapping[str, Any]) -> None:
    """Fill a new memory from the fields of a state of its own schedule; ValueError where they do not fit."""
    clock, early = fields["clock"], memory.early
    ahead = sum(part.shape[-1] for part in (memory.pending, *early))
    memory.seed = memory.zeros(memory.out_shape, fields["seed"].shape[-1])
    wanted = {"history": memory.history, "seed": memory.seed}
    wanted["pending"] = memory.zeros(memory.out_shape, ahead)
    wanted |= {f"spectra_{k}": pairs(kept) for k, kept in enumerate(memory.kept)}
    if fields["levels"] != len(memory.kept):
        raise ValueError(f"state: damaged: expected {len(memory.kept)} spectra, got {fields['levels']}")
    for k, level in enumerate(memory.levels):
        fields = {**fields, f"spectra_{k}": _state.rebin(fields[f"spectra_{k}"], level.block)}
    for name, buffer in wanted.items():
        expected = buffer.shape[len(memory.output_shape) :]
        # Without rows there are no values, and the compiled engine cannot say how wide they would be.
        if len(fields[name]) and fields[name].shape[1:] != expected:
            got = fields[name].shape[1:]
            raise ValueError(f"state: damaged: expected {name} of shape (.., {tuple(expected)}), got {got}")
    for name, buffer in wanted.items():
        buffer.copy_(torch.tensor(fields[name], device="cpu").reshape(buffer.shape))
    at = 0
    for part in (memory.pending, *early):
        part.copy_(wanted["pending"][..., at : at + part.shape[-1]])
        at += part.shape[-1]
    if memory.rows and clock and clock != fields["capacity"]:
        for tile in memory.execution.tiles(clock):
            # The compiled engine begins a tile with the step that follows.
            if tile.delayed:
                memory.begin(tile)
