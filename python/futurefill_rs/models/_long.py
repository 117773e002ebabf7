"""Long sequences through a model in pieces of positions, with memory that the pieces bound."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from futurefill_rs.models._base import LanguageModel
    from futurefill_rs.nn.cache import Cache

PIECE = 4096
"""Positions at a time."""


def read_pieces(
    model: LanguageModel, ids: Tensor, *, starts: Tensor | None = None, piece: int | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Logits of `ids` `(B, T)` piece after piece: slices of positions, in order, and `(B, n, V)` at them.

    They are those of `forward` without a gradient; T may exceed the model's length (what lies beyond the
    filters' reach drops out). With `starts` `(B,)` row i begins at position `starts[i]`; logits before it
    mean nothing.
    """
    piece, length = piece or PIECE, ids.shape[1]
    cache: Cache | None = None
    for start in range(0, length, piece):
        part = slice(start, min(start + piece, length))
        with torch.no_grad():
            if cache is None:
                rest = length - part.stop
                # Filters without an end run as a recurrence where there is no bound.
                room = rest if model.max_length or not rest else None
                logits, cache = model.prefill(ids[:, part], room, starts=starts)
            else:
                logits = model.extend(ids[:, part], cache)
        yield part, logits
