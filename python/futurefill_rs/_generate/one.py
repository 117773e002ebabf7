"""Generation for one batch whose rows have the same length: one prefill, then one exact step per position."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from futurefill_rs._generate.sampling import Sampler


def read_prompt(model: Any, ids: Tensor, max_new: int | None, method: Any) -> tuple[Tensor, Any]:
    """Logits `(B, V)` after the prompt and the cache, for any model with the protocol."""
    options = {} if method == "auto" else {"method": method}
    if hasattr(model, "read_prompt"):
        logits, cache = model.read_prompt(ids, max_new, **options)
        return logits, cache
    logits, cache = model.prefill(ids, max_new, **options)
    return logits[:, -1], cache


def new_ids(model: Any, logits: Tensor, cache: Any, max_new: int, sampler: Sampler) -> Iterator[Tensor]:
    """The `max_new` ids `(B,)` int64 that follow a prompt read (see `read_prompt`), position by position."""
    for position in range(max_new):
        with torch.no_grad():
            new = sampler.draw(logits)
        yield new
        if position + 1 < max_new:
            # The mode must not reach the caller, who runs between two positions.
            with torch.inference_mode():
                logits = model.step(new, cache)


def generate_batch(
    model: Any,
    ids: Tensor,
    max_new: int,
    *,
    sampler: Sampler,
    ends: Sequence[int] | None,
    callback: Callable[[Tensor], object] | None,
    method: Any,
) -> Tensor:
    """See `generate`: ids `(B, P + new)`; a row that ended repeats the id it ended with."""
    rows, length = ids.shape
    out = torch.cat([ids, ids.new_zeros(rows, max_new)], 1)
    if not max_new or not rows:
        return out
    with torch.inference_mode():
        logits, cache = read_prompt(model, ids, max_new, method)
    ended = torch.zeros(rows, dtype=torch.bool, device=ids.device)
    last = None if ends is None else torch.tensor(ends, dtype=torch.int64, device=ids.device)
    for position, new in enumerate(new_ids(model, logits, cache, max_new, sampler), length):
        if last is not None:
            new = torch.where(ended, out[:, position - 1], new)
            ended |= torch.isin(new, last)
        out[:, position] = new
        if callback is not None:
            callback(out[:, position])
        if last is not None and bool(ended.all()):
            return out[:, : position + 1]
    return out
