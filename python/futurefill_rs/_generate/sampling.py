"""From logits to ids: the one place where ids are drawn, and with which probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from futurefill_rs._args import index, integer
from futurefill_rs._torch_args import is_fake

COLDEST, HOTTEST = 1e-30, 1e30
"""Temperatures beyond these are no float32; they are taken for these, and draw the same."""


@dataclass(frozen=True)
class Sampling:
    """How ids are drawn: what is left out, and how sharp the rest is.

    Attributes:
        temperature: 0 takes the likeliest id; otherwise logits are divided by it and an id is drawn.
        top_k: only the k likeliest ids, and those that are as likely as the last of them.
        top_p: only the smallest set of likeliest ids whose probabilities sum to at least `top_p`.
        min_p: only ids at least `min_p` times as likely as the likeliest.
        repetition_penalty: logits of ids that the row holds, prompt included, are divided by it where they
            are positive and multiplied where they are negative (Keskar et al., 2019); 1 has no effect.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        _number(self.temperature, "temperature", "a finite number, 0 or more", lambda x: 0 <= x < math.inf)
        if self.top_k is not None:
            object.__setattr__(self, "top_k", integer(self.top_k, "top_k", 1))
        if self.top_p is not None:
            _number(self.top_p, "top_p", "a number in (0, 1]", lambda x: 0 < x <= 1)
        if self.min_p is not None:
            _number(self.min_p, "min_p", "a number in [0, 1]", lambda x: 0 <= x <= 1)
        expected = "a finite number above 0"
        _number(self.repetition_penalty, "repetition_penalty", expected, lambda x: 0 < x < math.inf)

    @property
    def penalises(self) -> bool:
        return self.repetition_penalty != 1


def _number(value: Any, name: str, expected: str, fits: Callable[[Any], object]) -> None:
    try:
        good = bool(fits(value))
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}: expected {expected}, got {value!r}") from None
    if not good:
        raise ValueError(f"{name}: expected {expected}, got {value}")


def log_weights(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """The logarithms of what ids are drawn in proportion to, `(B, V)` in at least float32.

    0 for the likeliest id, minus infinity for those left out.

    In the order transformers has: repetition penalty, temperature, top-k, top-p, min-p. At temperature 0
    only the penalty.

    Args:
        logits: `(B, V)`; minus infinity for ids that must not come.
        seen: `(B, V)`, true for the ids that each row holds; for a repetition penalty only.
    """
    scores = logits if logits.dtype == torch.float64 else logits.float()
    if seen is not None and sampling.penalises:
        penalty = sampling.repetition_penalty
        scores = torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)
    top = scores.amax(-1, keepdim=True)
    if top.device.type == "cpu" and not is_fake(top) and not bool(top.isfinite().all()):
        got = top[~top.isfinite()][0].item()
        raise ValueError(f"logits: expected a largest one that is finite, got {got}")
    # The largest becomes 0 and stays it: quotients that overflow are no NaN then.
    scores = scores - top
    if sampling.temperature == 0:
        return scores
    scores = scores / min(max(sampling.temperature, COLDEST), HOTTEST)
    if sampling.top_k is not None and sampling.top_k < scores.shape[-1]:
        least = scores.topk(sampling.top_k, -1).values[..., -1:]
        scores = scores.masked_fill(scores < least, -math.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, order = scores.log_softmax(-1).sort(dim=-1, descending=True, stable=True)
        # What the likelier ones sum to: nothing before the first, which is never left out.
        before = ordered.logcumsumexp(-1).roll(1, -1)
        before[..., 0] = -math.inf
        late = before >= math.log(sampling.top_p)
        scores = scores.masked_fill(late.scatter(-1, order, late), -math.inf)
    if sampling.min_p:
        scores = scores.masked_fill(scores < math.log(sampling.min_p), -math.inf)
    return scores


class Sampler:
    """Draws the next id of each row of a batch.

    Args:
        sampling: how.
        held: the ids that each row holds, its prompt; for a repetition penalty only.
        randoms: a source of randomness for each row, whose draws then depend on its logits alone; None:
            torch's global one.
        vocabulary: the ids that may come: those below a number, or those with true in a mask `(V,)`.
    """

    def __init__(
        self,
        sampling: Sampling,
        held: Sequence[Sequence[int]],
        randoms: Sequence[torch.Generator] | None,
        vocabulary: int | Tensor | None = None,
    ) -> None:
        self._sampling, self._randoms, self._vocabulary = sampling, randoms, vocabulary
        self._held = held if sampling.penalises else ()
        self._ready = False
        self._barred: Tensor | None = None
        self._seen: Tensor | None = None

    def draw(self, logits: Tensor) -> Tensor:
        """Ids `(B,)` int64 after logits `(B, V)`."""
        if not self._ready:
            self._prepare(logits)
        if self._barred is not None:
            logits = logits.masked_fill(self._barred, -math.inf)
        scores = log_weights(logits, self._sampling, self._seen)
        if self._sampling.temperature:
            # The largest of log-weights with Gumbel noise is an id drawn with these weights.
            scores = scores - self._noise(scores).log_()
        ids = scores.argmax(-1)
        if self._seen is not None:
            self._seen.scatter_(-1, ids.unsqueeze(-1), True)
        return ids

    def _prepare(self, logits: Tensor) -> None:
        size, device = logits.shape[-1], logits.device
        if isinstance(self._vocabulary, Tensor):
            self._barred = ~self._vocabulary.to(device)
        elif self._vocabulary is not None and self._vocabulary < size:
            self._barred = torch.arange(size, device=device) >= self._vocabulary
        if self._sampling.penalises:
            self._seen = torch.zeros(logits.shape, dtype=torch.bool, device=device)
            for row, ids in zip(self._seen, self._held, strict=True):
                row[torch.tensor(ids, dtype=torch.int64, device=device)] = True
        self._ready = True

    def _noise(self, like: Tensor) -> Tensor:
        noise = torch.empty_like(like)
        if self._randoms is None:
            noise.exponential_()
        else:
            for row, random in zip(noise, self._randoms, strict=True):
                row.exponential_(generator=random)
        # Zero would raise even an id that is left out.
        return noise.clamp_min_(torch.finfo(noise.dtype).tiny)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, in this order."""
        if self._randoms is not None:
            self._randoms = [self._randoms[row] for row in rows]
        if self._seen is not None:
            self._seen = self._seen[list(rows)]


Seed = int | Sequence[int] | None
"""One for all rows, or one for each."""


def row_randoms(seed: Seed, count: int, device: torch.device) -> list[torch.Generator] | None:
    """A source of randomness for each of `count` rows, whatever their neighbours: of a seed of its own, or of
    one made from a common seed and the row's number."""
    if seed is None:
        return None
    given: Any = seed
    expected = "an integer or one for each row"
    if isinstance(given, Sequence) or getattr(given, "ndim", 0) > 0:
        seeds = [index(each, "seed", expected) for each in given]
        if len(seeds) != count:
            raise ValueError(f"seed: expected an integer or one for each of {count} rows, got {len(seeds)}")
        for each in seeds:
            if not -(2**63) <= each < 2**63:
                raise ValueError(f"seed: expected integers of 64 bits for the rows, got {each}")
    else:
        common = index(given, "seed", expected)
        seeds = [(common * 1_000_003 + number) % 2**63 for number in range(count)]
    return [torch.Generator(device).manual_seed(each) for each in seeds]


def vocabulary_of(model: Any) -> int | None:
    """The ids a model's configuration knows, which may be padded to more; None where it does not say."""
    config = getattr(model, "config", None)
    known = config.get("vocab_size") if isinstance(config, Mapping) else getattr(config, "vocab_size", None)
    return known if isinstance(known, int) and known > 0 else None
