"""Log-probabilities and entropies at every position of many sequences, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from futurefill_rs._args import integer
from futurefill_rs.models._long import read_pieces
from futurefill_rs.models._sequences import Given, alphabet_of, batches, begin_of, padded
from futurefill_rs.nn.operators.precision import at_least_float32

Reduce = Literal["mean", "sum"] | None
Measure = Callable[[Tensor, Tensor], Tensor]
"""From log-probabilities `(B, m, V)` and the ids `(B, m)` that came there: a number each, `(B, m)`."""
TOO_SHORT = "expected two ids or more for a mean, or one behind a beginning token"
Progress = Callable[[int, int], object]


def log_probability(log_probs: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities of the ids."""
    found: Tensor = log_probs.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    return found


def entropy(log_probs: Tensor, ids: Tensor) -> Tensor:
    """Entropies of the distributions, in nats."""
    found: Tensor = torch.special.entr(log_probs.exp()).sum(-1)
    return found


def scores(
    model: Any,
    ids: Any,
    measure: Measure,
    *,
    reduce: Reduce,
    begin: bool | int,
    reverse_complement: bool,
    chunk: int | None,
    batch_size: int,
    progress: Progress | None = None,
) -> Any:
    """See `LanguageModel.score`, with another measure of each position."""
    if reduce not in (None, "mean", "sum"):
        raise ValueError(f"reduce: expected 'mean', 'sum' or None, got {reduce!r}")
    begins = begin_of(model, begin)
    if reverse_complement and reduce is None and not begins:
        raise ValueError(
            "reverse_complement: expected a beginning token or reduce='mean' or 'sum' with it, got neither: "
            "without one each strand says nothing of the base that it begins with"
        )
    given = Given(model, ids)
    strands = [given.rows]
    if reverse_complement:
        strands.append(other_strands(model, given))
    rows = [row for strand in strands for row in strand]
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    for i, (values,) in measured(model, rows, [measure], begins, chunk, batch_size, progress):
        if reduce is not None:
            values = reduced(values, reduce, given.names[i % len(given.rows)])
        elif i >= len(given.rows):
            values = values.flip(0)
        found[i] = values
    count = len(given.rows)
    if reverse_complement:
        found = [(found[i] + found[count + i]) / 2 for i in range(count)]
    if reduce is not None and not given.single:
        return torch.stack(found) if found else torch.empty(0, dtype=torch.float64)
    if given.length is not None and not found:
        return torch.empty(0, max(0, given.length + len(begins) - 1))
    return given.shaped(found)


def other_strands(model: Any, given: Given) -> list[Tensor]:
    strand = alphabet_of(model, "reverse_complement").reverse_complement
    return [strand(row, name) for row, name in zip(given.rows, given.names, strict=True)]


def reduced(values: Tensor, reduce: Reduce, name: str) -> Tensor:
    """The mean or the sum in float64: in float32 a million positions would hide what one of them says."""
    if reduce == "mean" and not values.shape[0]:
        raise ValueError(f"{name}: {TOO_SHORT}")
    wide = values.double()
    return wide.mean() if reduce == "mean" else wide.sum()


@torch.no_grad()
def measured(
    model: Any,
    rows: Sequence[Tensor],
    measures: Sequence[Measure],
    begins: Sequence[int],
    chunk: int | None,
    batch_size: int,
    progress: Progress | None = None,
) -> Iterator[tuple[int, list[Tensor]]]:
    """The number of a row and its measures, `(T - 1,)` each, or `(T,)` where ids stand before it.

    Rows of similar length are read together. What pads the shorter ones comes behind them, where no position
    that counts sees it.
    """
    chunk = None if chunk is None else integer(chunk, "chunk", 1)
    batch_size = integer(batch_size, "batch_size", 1)
    whole = [torch.cat([row.new_tensor(begins), row]) if begins else row for row in rows]
    done, total = 0, sum(row.shape[0] for row in rows)
    for batch in batches([row.shape[0] for row in whole], batch_size):
        together = padded([whole[i] for i in batch])
        pieces: list[list[Tensor]] = [[] for _ in measures]
        for place, logits in read_pieces(model, together[:, :-1], piece=chunk):
            following = together[:, place.start + 1 : place.stop + 1]
            log_probs = at_least_float32(logits).log_softmax(-1)
            for kept, measure in zip(pieces, measures, strict=True):
                kept.append(measure(log_probs, following))
        for row, i in enumerate(batch):
            length = max(0, whole[i].shape[0] - 1)
            empty = torch.empty(0, device=together.device)
            yield i, [torch.cat([part[row] for part in kept] or [empty])[:length] for kept in pieces]
            done += rows[i].shape[0]
        if progress is not None:
            progress(done, total)
