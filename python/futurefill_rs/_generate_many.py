"""Generation for many prompts: rows of one batch begin and end at their own times."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Prompt = Tensor | Sequence[int]
Decode = Callable[[list[int]], str]


@dataclass
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
    reason: Literal["length", "end", "stop"]
    text: str | None = None


@dataclass
class _Row:
    """A prompt on its way through one row of the batch."""

    number: int
    prompt: list[int]
    random: torch.Generator | None
    read: int = 0
    new: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)


def generate_many(
    model: Any,
    prompts: Iterable[Prompt],
    max_new: int | None,
    *,
    draw: Callable[[Tensor, torch.Generator | None], Tensor],
    ends: frozenset[int],
    seed: int | None,
    callback: Callable[[int, int], object] | None,
    method: Any,
    batch_size: int,
    stop: Sequence[str],
    decode: Decode | None,
) -> list[Continuation]:
    """See `generate`. A row that ends is reset and reads the next prompt, one id a step, beside the
    others.
    """
    device = next(model.parameters()).device
    waiting = deque(
        _Row(number, _as_list(prompt, number), _random(seed, number, device))
        for number, prompt in enumerate(prompts)
    )
    results: list[Continuation | None] = [None] * len(waiting)
    rows: list[_Row | None] = [waiting.popleft() for _ in range(min(batch_size, len(waiting)))]
    if not rows or max_new == 0:
        return [
            Continuation(torch.tensor(r.prompt), torch.empty(0), "length") for r in [*rows, *waiting] if r
        ]

    with torch.inference_mode():
        logits, cache = _read_first(model, rows, None if waiting else max_new, method, device)
        while True:
            fed = []
            for i, row in enumerate(rows):
                if row is None:
                    fed.append(0)
                    continue
                if row.read < len(row.prompt):
                    fed.append(row.prompt[row.read])
                    row.read += 1
                    continue
                new = int(draw(logits[i : i + 1], row.random))
                row.new.append(new)
                row.log_probs.append(float(logits[i].float().log_softmax(-1)[new]))
                if callback is not None:
                    callback(row.number, new)
                reason, text = _ended(row, max_new, ends, stop, decode)
                if reason is None:
                    fed.append(new)
                    continue
                results[row.number] = Continuation(
                    torch.tensor(row.prompt + row.new), torch.tensor(row.log_probs), reason, text
                )
                rows[i] = following = waiting.popleft() if waiting else None
                if following is None:
                    fed.append(0)
                else:
                    cache.reset([i])
                    fed.append(following.prompt[0])
                    following.read = 1
            if all(row is None for row in rows):
                return [result for result in results if result is not None]
            logits = model.step(torch.tensor(fed, device=device), cache)


def _read_first(
    model: Any, rows: list[_Row | None], max_new: int | None, method: Any, device: torch.device
) -> tuple[Tensor, Any]:
    """Logits after the first prompts, read together with padding on the left, and the cache."""
    first = [row for row in rows if row is not None]
    length = max(len(row.prompt) for row in first)
    ids = torch.tensor([[0] * (length - len(row.prompt)) + row.prompt for row in first], device=device)
    starts = torch.tensor([length - len(row.prompt) for row in first], device=device)
    for row in first:
        row.read = len(row.prompt)
    logits, cache = model.read_prompt(ids, max_new, method=method, starts=starts)
    return logits, cache


def _ended(
    row: _Row, max_new: int | None, ends: frozenset[int], stop: Sequence[str], decode: Decode | None
) -> tuple[Literal["length", "end", "stop"] | None, str | None]:
    text = None if decode is None else decode(row.new)
    if text is not None and stop:
        places = [place for place in (text.find(s) for s in stop) if place >= 0]
        if places:
            return "stop", text[: min(places)]
    if row.new[-1] in ends:
        return "end", text
    if max_new is not None and len(row.new) >= max_new:
        return "length", text
    return None, None


def _as_list(prompt: Prompt, number: int) -> list[int]:
    ids = prompt.tolist() if isinstance(prompt, Tensor) else list(prompt)
    if not ids or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise ValueError(f"input_ids: expected one or more integer ids in prompt {number}, got {prompt!r}")
    return ids


def _random(seed: int | None, number: int, device: torch.device) -> torch.Generator | None:
    """A source for each prompt: what it draws does not depend on its neighbours in the batch."""
    if seed is None:
        return None
    return torch.Generator(device).manual_seed((seed * 1_000_003 + number) % 2**63)
