"""Scores of many variants of one sequence: what they share is read once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from futurefill_rs._args import integer
from futurefill_rs.models._base import LanguageModel
from futurefill_rs.models._score import TOO_SHORT, Progress, log_probability, measured, reduced
from futurefill_rs.models._sequences import Ids, alphabet_of, begin_of, is_integer, padded, row_of
from futurefill_rs.nn.cache import Cache
from futurefill_rs.nn.operators.precision import at_least_float32

Variant = str | Ids | tuple[int, str | Ids, str | Ids]

PIECE = 1 << 14
"""Positions, of all rows together, that the model is given at once."""
CACHE_BYTES = 1 << 30
"""Rows are read together as long as their caches take no more."""
SLACK = 32
"""Positions of padding for each row that cost less than another call of the model."""


@dataclass(frozen=True)
class _Edit:
    """The reference's ids from `start` to `end`, replaced by `ids`: a variant without what it shares."""

    number: int
    start: int
    end: int
    ids: Tensor

    def length(self, reference: Tensor) -> int:
        return reference.shape[0] - (self.end - self.start) + self.ids.shape[0]

    def tail(self, reference: Tensor, first: int) -> Tensor:
        """The variant's ids from `first` on, at most `start`."""
        return torch.cat([reference[first : self.start], self.ids, reference[self.end :]])


def score_variants(
    model: Any,
    reference: str | Ids,
    variants: Sequence[Variant],
    *,
    reduce: Literal["sum", "mean"] = "sum",
    relative: bool = False,
    begin: bool | int = False,
    reverse_complement: bool = False,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Tensor:
    """Scores `(N,)` float64 of N variants of a sequence, as `model.score` gives them for each alone.

    The reference is read once; where a variant begins to differ, the cache is forked and goes on with what
    differs and what follows. Variants at neighbouring places go on together, `batch_size` at most, fewer
    where their caches would take more than 1 GiB.

    >>> import futurefill_rs as ff
    >>> layer = {"emb_dim": 5, "filter_order": 16, "l_max": 64, "w": 10}
    >>> model = ff.models.HyenaDNA({"d_model": 8, "n_layer": 1, "vocab_size": 12, "layer": layer}).eval()
    >>> ff.score_variants(model, "GATTACA", [(1, "A", "C"), (3, "", "G"), (0, "GA", ""), "GATTACC"]).shape
    torch.Size([4])

    Args:
        model: a model of `futurefill_rs.models` or of `futurefill_rs.hf`.
        reference: a text or ids `(T,)`.
        variants: each `(position, ref, alt)`: the ids `ref` from `position` on, 0 for the first, become
            `alt`; either may be empty. Or a whole sequence. Texts or ids, as the reference may be.
        reduce: the sum or the mean of the log-probabilities of a whole variant.
        relative: whether the reference's own score is taken off.
        begin: whether a beginning token stands in front: True for the model's own, or an id.
        reverse_complement: average with the scores of the other strand.
        progress: called with the variants done and all of them.

    Raises:
        ValueError: a `ref` that the reference does not have at its position; ids beyond the vocabulary;
            letters that the model has no ids for; a mean of nothing.
    """
    model = model if isinstance(model, LanguageModel) else getattr(model, "language_model", model)
    if not isinstance(model, LanguageModel):
        raise TypeError(f"model: expected a model of futurefill_rs.models, got {type(model).__name__}")
    if reduce not in ("sum", "mean"):
        raise ValueError(f"reduce: expected 'sum' or 'mean', got {reduce!r}")
    if isinstance(variants, str) or not isinstance(variants, Sequence):
        raise TypeError(f"variants: expected a list of variants, got {type(variants).__name__}")
    batch_size = integer(batch_size, "batch_size", 1)
    ids = row_of(model, reference, "reference")
    edits = [_edit(model, ids, variant, number) for number, variant in enumerate(variants)]
    strands = [(ids, edits)]
    if reverse_complement:
        strands.append(_other_strand(model, ids, edits))
    begins, done, total = begin_of(model, begin), 0, len(strands) * len(edits)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    found = []
    for ids, edits in strands:
        whole = torch.cat([ids.new_tensor(begins), ids])
        moved = [replace(e, start=e.start + len(begins), end=e.end + len(begins)) for e in edits]
        found.append(_Strand(model, whole, batch_size, advance).scores(moved, reduce, relative))
    return torch.stack(found).mean(0)


def _edit(model: LanguageModel, reference: Tensor, variant: Any, number: int) -> _Edit:
    name = f"variants[{number}]"
    if not _is_change(variant):
        whole = row_of(model, variant, name)
        return _trimmed(_Edit(number, 0, reference.shape[0], whole), reference)
    place, old, new = variant
    length = reference.shape[0]
    start = integer(place, f"{name}: position")
    ref, alt = row_of(model, old, f"{name}: ref"), row_of(model, new, f"{name}: alt")
    end = start + ref.shape[0]
    if end > length:
        raise ValueError(
            f"{name}: expected a ref that ends with the reference of {length} ids at the latest, "
            f"got {ref.shape[0]} ids from position {start} on"
        )
    if not torch.equal(reference[start:end], ref):
        got = _shown(model, reference[start:end])
        raise ValueError(
            f"{name}: expected ref to be what the reference has at position {start}, {got}, "
            f"got {_shown(model, ref)}"
        )
    return _trimmed(_Edit(number, start, end, alt), reference)


def _is_change(variant: Any) -> bool:
    """Whether this is `(position, ref, alt)` and no sequence of ids."""
    return isinstance(variant, tuple) and len(variant) == 3 and not is_integer(variant[1])


def _trimmed(edit: _Edit, reference: Tensor) -> _Edit:
    """The edit without what it begins with in common with the reference."""
    count = min(edit.ids.shape[0], edit.end - edit.start)
    differ = (edit.ids[:count] != reference[edit.start : edit.start + count]).nonzero()
    same = int(differ[0]) if differ.shape[0] else count
    return _Edit(edit.number, edit.start + same, edit.end, edit.ids[same:])


def _shown(model: LanguageModel, ids: Tensor) -> str:
    few = ids[:20].tolist()
    more = ", .." if ids.shape[0] > len(few) else ""
    known = {} if model.alphabet is None else model.alphabet.bytes_of
    if few and all(id in known for id in few):
        return repr(bytes(known[id] for id in few).decode("latin1")) + more
    return f"{few}{more}"


def _other_strand(
    model: LanguageModel, reference: Tensor, edits: Sequence[_Edit]
) -> tuple[Tensor, list[_Edit]]:
    """The reverse complement of the reference and the same variants of it."""
    across = alphabet_of(model, "reverse_complement").reverse_complement
    length, other = reference.shape[0], across(reference, "reference")
    turned = [
        _Edit(
            edit.number, length - edit.end, length - edit.start, across(edit.ids, f"variants[{edit.number}]")
        )
        for edit in edits
    ]
    return other, [_trimmed(edit, other) for edit in turned]


class _Strand:
    """A sequence whose variants are scored.

    Args:
        ids: the reference `(T,)`, a beginning token included.
    """

    def __init__(
        self, model: LanguageModel, ids: Tensor, batch_size: int, progress: Callable[[int], object]
    ) -> None:
        self.model, self.ids, self.batch_size, self.progress = model, ids, batch_size, progress

    @torch.no_grad()
    def scores(self, edits: Sequence[_Edit], reduce: Literal["sum", "mean"], relative: bool) -> Tensor:
        """`(N,)`, those of `edits` in the order of their numbers."""
        ((_, (own,)),) = measured(self.model, [self.ids], [log_probability], [], PIECE, 1)
        # What the ids before each place add up to; nothing is said of the first.
        sums = torch.cat([own.new_zeros(2).double(), own.double().cumsum(0)])
        found = sums.new_zeros(len(edits))
        for group, values in self._read(sorted(edits, key=lambda edit: edit.start)):
            for edit, value in zip(group, values, strict=True):
                count = edit.length(self.ids) - 1
                if reduce == "mean" and count < 1:
                    raise ValueError(f"variants[{edit.number}]: {TOO_SHORT}")
                total = sums[group[0].start] + value
                found[edit.number] = total / count if reduce == "mean" else total
            self.progress(len(group))
        return found - reduced(own, reduce, "reference") if relative else found

    def _read(self, edits: Sequence[_Edit]) -> Iterator[tuple[Sequence[_Edit], Tensor]]:
        """Groups of variants, by where they begin to differ, and what the ids of each from the group's first
        place on add up to.
        """
        at = sum(edit.start == 0 for edit in edits)
        if at:
            # They share nothing.
            rows = [edit.tail(self.ids, 0) for edit in edits[:at]]
            values = self.ids.new_zeros(at, dtype=torch.float64)
            for i, (found,) in measured(self.model, rows, [log_probability], [], PIECE, self.batch_size):
                values[i] = found.double().sum()
            yield edits[:at], values
        longest = max((edit.length(self.ids) for edit in edits), default=0)
        walk = _Walk(self.model, self.ids, longest)
        while at < len(edits):
            first = edits[at].start
            logits, cache = walk.to(first)
            most = min(self.batch_size, max(1, CACHE_BYTES // max(1, cache.nbytes)))
            group = edits[at : at + self._count(edits[at : at + most])]
            yield group, self._continued([edit.tail(self.ids, first) for edit in group], logits, cache)
            at += len(group)

    def _count(self, edits: Sequence[_Edit]) -> int:
        """How many of the edits are worth reading together from where the first one begins."""
        first, longest, useful = edits[0].start, 0, 0
        for count, edit in enumerate(edits, 1):
            end = edit.length(self.ids)
            longest, useful = max(longest, end - first), useful + end - edit.start
            if count * longest - useful > max(useful // 8, SLACK * count):
                return max(1, count - 1)
        return len(edits)

    def _continued(self, tails: Sequence[Tensor], logits: Tensor, cache: Cache) -> Tensor:
        """`(B,)` float64, the sums over tails after a prefix: `logits` `(1, V)` and `cache` are after it."""
        rows, ids = len(tails), padded(tails)
        lengths = torch.tensor([tail.shape[0] for tail in tails], device=ids.device)
        total = torch.zeros(rows, dtype=torch.float64, device=ids.device)
        if not ids.shape[1]:
            return total
        cache = cache.fork()
        cache.reorder([0] * rows)
        total += _log_probs(logits.expand(rows, -1), ids[:, 0]) * (lengths > 0)
        place = 1
        for block in torch.split(ids[:, :-1], max(1, PIECE // rows), 1) if ids.shape[1] > 1 else ():
            following = ids[:, place : place + block.shape[1]]
            counts = torch.arange(place, place + block.shape[1], device=ids.device) < lengths.unsqueeze(-1)
            found = _log_probs(self.model.extend(block, cache), following).double()
            total += torch.where(counts, found, 0.0).sum(-1)
            place += block.shape[1]
        return total


class _Walk:
    """The reference, read from one place to the next."""

    def __init__(self, model: LanguageModel, ids: Tensor, longest: int) -> None:
        self._model, self._ids, self._longest = model, ids.unsqueeze(0), longest
        self._place = 0
        self._logits = ids.new_zeros(0)
        self._cache: Cache | None = None

    def to(self, place: int) -> tuple[Tensor, Cache]:
        """Logits `(1, V)` and the cache after the ids before `place`, 1 at least and never further back."""
        if self._cache is None:
            # Filters without an end run as a recurrence where there is no bound.
            room = self._longest - place if self._model.max_length else None
            self._logits, self._cache = self._model.read_prompt(self._ids[:, :place], room)
        elif place > self._place:
            for block in torch.split(self._ids[:, self._place : place], PIECE, 1):
                self._logits = self._model.extend(block, self._cache)[:, -1]
        self._place = place
        return self._logits, self._cache


def _log_probs(logits: Tensor, ids: Tensor) -> Tensor:
    return log_probability(at_least_float32(logits).log_softmax(-1), ids)
