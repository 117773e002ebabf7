"""`futurefill score`: how likely a model finds the sequences of a file."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

from futurefill_rs.cli.alphabet import alphabet_of
from futurefill_rs.cli.model import counting, load
from futurefill_rs.cli.sequences import Record, SequenceFile
from futurefill_rs.cli.terminal import CommandError, Progress

COLUMNS = ("id", "length", "log_likelihood", "mean_log_likelihood", "perplexity", "mean_entropy")
BASES = 1 << 18
"""Bases, or one sequence, after which rows are written."""


class Score(NamedTuple):
    """Sums over the positions that something stands before; natural logarithms."""

    log_likelihood: float
    entropy: float
    positions: int


def run(options: argparse.Namespace) -> None:
    file = SequenceFile(options.file, "score")
    model = load("score", options.model, options.device)
    alphabet = alphabet_of(model, "score")
    if options.begin and alphabet.begin is None:
        raise CommandError(
            f"score: --begin: expected a model with a beginning token, got {type(model).__name__}"
        )
    # What is no DNA is found before hours are spent on what comes first.
    lengths = [len(record.bases) for record in file.records(alphabet.bases)]
    strands = 2 if options.reverse_complement else 1
    total, done = strands * sum(lengths), 0
    progress = Progress(f"scoring {len(lengths)} sequence{'s' * (len(lengths) != 1)}")
    _write(COLUMNS)
    try:
        for batch in _batches(file.records(alphabet.bases), 4 * options.batch_size):
            shown = partial(_show, progress, done, total)
            with counting(model, shown):
                scores = _scores(model, alphabet, batch, options)
            done += strands * sum(len(record.bases) for record in batch)
            progress.clear()
            for record, score in zip(batch, scores, strict=True):
                _write(_row(record, score))
            sys.stdout.buffer.flush()
    finally:
        progress.clear()


def _show(progress: Progress, done: int, total: int, more: float) -> None:
    progress(int(done + more), total)


def _batches(records: Iterable[Record], count: int) -> Iterator[list[Record]]:
    batch: list[Record] = []
    for record in records:
        batch.append(record)
        if len(batch) == count or sum(len(each.bases) for each in batch) >= BASES:
            yield batch
            batch = []
    if batch:
        yield batch


def _scores(model: Any, alphabet: Any, batch: list[Record], options: argparse.Namespace) -> list[Score]:
    """The score of each record, averaged over both strands where they are wanted."""
    from futurefill_rs.models._score import entropy, log_probability, measured

    device = next(model.parameters()).device
    rows = [alphabet.encode(record.bases, record.name).to(device) for record in batch]
    if options.reverse_complement:
        rows += [alphabet.reverse_complement(row, "") for row in rows]
    begins = [alphabet.begin] if options.begin else []
    found = [Score(0.0, 0.0, 0)] * len(rows)
    for i, (log_probs, entropies) in measured(
        model, rows, [log_probability, entropy], begins, None, options.batch_size
    ):
        likelihood, uncertainty = (float(values.double().sum()) for values in (log_probs, entropies))
        found[i] = Score(likelihood, uncertainty, log_probs.shape[0])
    if not options.reverse_complement:
        return found
    return [
        Score((a.log_likelihood + b.log_likelihood) / 2, (a.entropy + b.entropy) / 2, a.positions)
        for a, b in zip(found[: len(batch)], found[len(batch) :], strict=True)
    ]


def _row(record: Record, score: Score) -> list[str]:
    count = score.positions or math.nan
    mean = score.log_likelihood / count
    numbers = (score.log_likelihood, mean, math.exp(min(-mean, 700.0)), score.entropy / count)
    return [record.name, str(len(record.bases)), *(f"{number:.6f}" for number in numbers)]


def _write(cells: Iterable[str]) -> None:
    sys.stdout.buffer.write("\t".join(cells).encode("utf-8", "surrogateescape") + b"\n")
