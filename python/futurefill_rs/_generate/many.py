"""Generation for many prompts: rows begin and end at their own times."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from futurefill_rs._generate.sampling import Sampler, Sampling, Seed, row_randoms
from futurefill_rs._generate.stops import Decode, GrowingText

Prompt = Tensor | Sequence[int] | np.ndarray[Any, Any]
Reason = Literal["length", "end", "stop"]

ROOM = 64
"""Positions that the first cache of prompts without a bound has, at least."""

PADDING = 1024
"""Ids of padding that prompts read together may always have; beyond it, as many as they have ids."""


@dataclass(eq=False)
class Continuation:
    """What one prompt became.

    Attributes:
        ids: `(P + new,)`, the prompt first.
        log_probs: `(new,)` natural logarithms of the probabilities the model itself gave to the new ids,
            whatever temperature or cut they were drawn with.
        reason: why it ended: "length", "end" (an end token) or "stop" (a stop string).
        text: the decoded new ids up to a stop string; None without `decode`.
    """

    ids: Tensor
    log_probs: Tensor
    reason: Reason
    text: str | None = None


# Where users and pickles look for it.
Continuation.__module__ = "futurefill_rs"


@dataclass
class _Row:
    """A prompt on its way."""

    number: int
    prompt: list[int]
    random: torch.Generator | None
    growing: GrowingText | None
    new: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)


class _Group:
    """Rows that were read together and share a cache, until each has ended.

    A cache of their own has room for what they add and no more, and holds nothing of earlier rows.
    """

    def __init__(self, model: Any, rows: list[_Row], task: _Task) -> None:
        self.rows = rows
        self._model, self._max_new, self._method = model, task.max_new, task.method
        held = [row.prompt for row in rows]
        randoms = [row.random for row in rows if row.random is not None]
        self._sampler = Sampler(task.sampling, held, randoms or None, task.vocabulary)
        self.read()

    @torch.inference_mode()
    def read(self) -> None:
        """Read all ids so far, padded on the left, into a new cache."""
        device = next(self._model.parameters()).device
        sequences = [row.prompt + row.new for row in self.rows]
        longest = max(map(len, sequences))
        starts = [longest - len(ids) for ids in sequences]
        ids = torch.tensor([[0] * start + ids for start, ids in zip(starts, sequences, strict=True)])
        self.logits, self.cache = self._model.read_prompt(
            ids.to(device),
            self._room(longest),
            method=self._method,
            starts=torch.tensor(starts, device=device) if any(starts) else None,
        )

    def _room(self, length: int) -> int | None:
        """Without a bound as much as was read: reading again when it is used up costs little in all.

        A cache without a bound is as large as the model is long; where that has no end, it is small.
        """
        end = self._model.max_length
        if self._max_new is not None or end is None:
            return self._max_new
        room = max(ROOM, length)
        return room if room < end else None

    @torch.inference_mode()
    def draw(self) -> None:
        """Give each row its next id."""
        new = self._sampler.draw(self.logits)
        log_probs = self.logits.float().log_softmax(-1).gather(-1, new.unsqueeze(-1)).squeeze(-1)
        for row, id, log_prob in zip(self.rows, new.tolist(), log_probs.tolist(), strict=True):
            row.new.append(id)
            row.log_probs.append(log_prob)

    @torch.inference_mode()
    def keep(self, going: list[int]) -> None:
        """Drop all rows but these."""
        if len(going) < len(self.rows):
            self.rows = [self.rows[i] for i in going]
            if going:
                self._sampler.keep(going)
                self.cache.reorder(going)


@dataclass(frozen=True)
class _Task:
    """What holds for every prompt; see `generate`."""

    max_new: int | None
    sampling: Sampling
    vocabulary: int | None
    ends: frozenset[int]
    method: Any
    stop: Sequence[str]
    decode: Decode | None

    def ended(self, row: _Row) -> tuple[Reason | None, str | None]:
        """Why the row ends with its last id, if it does, and its text."""
        reason: Reason | None = None
        if row.new[-1] in self.ends:
            reason = "end"
        elif self.max_new is not None and len(row.new) >= self.max_new:
            reason = "length"
        if row.growing is not None:
            place = row.growing.add(row.new[-1])
            return (reason, row.growing.text) if place is None else ("stop", row.growing.text[:place])
        return reason, None if reason is None or self.decode is None else self.decode(row.new)


def generate_many(
    model: Any,
    prompts: Sequence[Prompt],
    max_new: int | None,
    *,
    sampling: Sampling,
    vocabulary: int | None,
    ends: frozenset[int],
    seed: Seed,
    callback: Callable[[int, int], object] | None,
    method: Any,
    batch_size: int,
    stop: Sequence[str],
    decode: Decode | None,
) -> list[Continuation]:
    """See `generate`. Prompts are read as soon as there are places for them and join the rows under way."""
    task = _Task(max_new, sampling, vocabulary, ends, method, stop, decode)
    waiting = deque(_rows(model, prompts, seed, task))
    if max_new == 0:
        text = None if decode is None else ""
        return [Continuation(torch.tensor(row.prompt), torch.empty(0), "length", text) for row in waiting]

    results: dict[int, Continuation] = {}
    groups: list[_Group] = []
    while waiting or groups:
        places = batch_size - sum(len(group.rows) for group in groups)
        groups += [_Group(model, rows, task) for rows in _following(waiting, places)]
        for group in groups:
            group.draw()
            going = []
            for i, row in enumerate(group.rows):
                if callback is not None:
                    callback(row.number, row.new[-1])
                reason, text = task.ended(row)
                if reason is None:
                    going.append(i)
                    continue
                ids, log_probs = torch.tensor(row.prompt + row.new), torch.tensor(row.log_probs)
                results[row.number] = Continuation(ids, log_probs, reason, text)
            group.keep(going)
        groups = [group for group in groups if group.rows]
        _step(model, groups)
    return [results[number] for number in range(len(prompts))]


def _rows(model: Any, prompts: Sequence[Prompt], seed: Seed, task: _Task) -> list[_Row]:
    device = next(model.parameters()).device
    randoms = row_randoms(seed, len(prompts), device)
    rows = []
    for number, prompt in enumerate(prompts):
        ids = _checked(prompt, number, model.vocab_size)
        growing = GrowingText(task.decode, task.stop) if task.stop and task.decode is not None else None
        rows.append(_Row(number, ids, None if randoms is None else randoms[number], growing))
    return rows


def _following(waiting: deque[_Row], places: int) -> Iterator[list[_Row]]:
    """Take prompts for the places that are free; those of about the same length are read together."""
    taken = [waiting.popleft() for _ in range(min(places, len(waiting)))]
    rows: list[_Row] = []
    count = 0
    for row in sorted(taken, key=lambda row: len(row.prompt)):
        length = len(row.prompt)
        count += length
        if rows and (len(rows) + 1) * length - count > max(PADDING, count):
            yield rows
            rows, count = [], length
        rows.append(row)
    if rows:
        yield rows


@torch.inference_mode()
def _step(model: Any, groups: list[_Group]) -> None:
    """Feed each row the id it was given; groups whose room is used up read theirs again."""
    going = []
    for group in groups:
        if group.cache.remaining == 0:
            group.read()
        else:
            going.append(group)
    if not going:
        return
    ids = torch.tensor([row.new[-1] for group in going for row in group.rows])
    logits = model.step_all(ids.to(next(model.parameters()).device), [group.cache for group in going])
    sizes = [len(group.rows) for group in going]
    for group, rows in zip(going, torch.split(logits, sizes), strict=True):
        group.logits = rows


def _checked(prompt: Prompt, number: int, vocab_size: int) -> list[int]:
    """The ids of a prompt, each one of the vocabulary."""
    values = prompt.tolist() if isinstance(prompt, Tensor | np.ndarray) else list(prompt)
    try:
        if any(isinstance(value, bool | np.bool_) for value in values):
            raise TypeError
        ids = [operator.index(value) for value in values]
    except TypeError:
        raise ValueError(f"input_ids: expected integer ids in prompt {number}, got {prompt!r}") from None
    if not ids:
        raise ValueError(f"input_ids: expected one or more integer ids in prompt {number}, got none")
    for id in (min(ids), max(ids)):
        if not 0 <= id < vocab_size:
            raise ValueError(
                f"input_ids: expected ids from 0 to {vocab_size - 1} in prompt {number}, got {id}"
            )
    return ids
