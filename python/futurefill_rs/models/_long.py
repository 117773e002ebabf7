"""Logits of long sequences in pieces of positions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from futurefill_rs.nn.protocol import checked_starts, padded, whole
from futurefill_rs.nn.reading import Reading, piece_for

if TYPE_CHECKING:
    from futurefill_rs.models._base import LanguageModel


def read_pieces(
    model: LanguageModel, ids: Tensor, *, starts: Tensor | None = None, piece: int | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Logits of `ids` `(B, T)` piece after piece: slices of positions, in order, and `(B, n, V)` at them.

    They are those of `forward`, without a gradient; T may exceed the model's length (what lies beyond the
    filters' reach drops out). The sequence goes through the model layer by layer, `piece` positions at a
    time, which takes the memory of two or three arrays `(B, T, D)`. With `starts` `(B,)` row i begins at
    position `starts[i]`; logits before it mean nothing.
    """
    length = ids.shape[1]
    if not length:
        return
    piece = piece or piece_for(ids.shape[0], model.features, ids.device)
    starts = None if starts is None else checked_starts(starts, ids)
    with torch.no_grad():
        one = length <= piece
        time = padded(whole, ids, starts) if one else Reading(length, piece, kept=False, starts=starts)
        hidden = model(ids, time=time, features=True)
        del time
    for start in range(0, length, piece):
        part = slice(start, min(start + piece, length))
        with torch.no_grad():
            logits = model.head(hidden[:, part])
        yield part, logits
