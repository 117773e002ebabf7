"""Autoregressive generation: one prefill, then one exact step per position."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from futurefill_rs._generate_many import Continuation, Decode, Prompt, generate_many
from futurefill_rs.nn.cache import integer

Callback = Callable[..., object]


def generate(
    model: Any,
    input_ids: Tensor | Sequence[Prompt],
    max_new: int | None,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    seed: int | None = None,
    callback: Callback | None = None,
    method: Any = "auto",
    batch_size: int = 8,
    stop: str | Sequence[str] = (),
    decode: Decode | None = None,
) -> Tensor | list[Continuation]:
    """Continue each row of `input_ids` by up to `max_new` ids.

    Args:
        model: a model of `futurefill_rs.models` or of `futurefill_rs.hf`; without a list of prompts, any
            module with `prefill` and `step`.
        input_ids: integer ids `(B, P)`, P at least 1; or a list of prompts of different lengths (below).
        max_new: ids to add; generation stops earlier when every row has ended. None, with a list of prompts:
            until each has ended.
        temperature: 0 takes the likeliest id; otherwise logits are divided by it and an id is drawn.
        top_k: draw from the k likeliest ids only.
        top_p: draw from the smallest set of likeliest ids whose probabilities sum to at least `top_p`.
        eos_token_id: the id (or ids) that ends a row; a row that ended repeats the id it ended with.
        seed: makes the draws repeatable; None draws from torch's global generator.
        callback: called with the `(B,)` ids of each new position.
        method: that of `futurefill_rs.plan`.

    Returns:
        ids `(B, P + new)`, the prompt first, on the device and in the dtype of `input_ids`.

    A list of prompts (sequences of ids, or 1-D tensors or arrays) gives a list of `Continuation`, in the
    same order. Up to `batch_size` prompts share a batch; a row that ends is given to the next prompt in line.
    With a seed, what a prompt draws does not depend on the others. `callback(number, id)` gets each new id
    of each prompt. `stop`: a prompt ends as soon as the text of its new ids, `decode(ids)`, contains one of
    these strings, none of them empty.
    """
    model = _language_model(model)
    stops = _stops(stop)
    if not isinstance(input_ids, Tensor):
        return _generate_list(
            model, input_ids, max_new, temperature, top_k, top_p, eos_token_id, seed, callback, method,
            batch_size, stops, decode,
        )  # fmt: skip
    if stops or decode is not None:
        raise ValueError("stop, decode: expected a list of prompts with them, got a tensor")
    _check_ids(input_ids)
    max_new = integer(max_new, "max_new")
    draw = sampler(temperature, top_k, top_p, seed, input_ids.device)
    ends = _ends(eos_token_id, input_ids)
    batch_size, length = input_ids.shape
    ids = torch.cat([input_ids, input_ids.new_zeros(batch_size, max_new)], 1)
    if not max_new or not batch_size:
        return ids
    # `ids` is made outside inference mode, so that it may be trained on.
    with torch.inference_mode():
        logits, cache = read_prompt(model, input_ids, max_new, method)
        ended = torch.zeros(batch_size, dtype=torch.bool, device=input_ids.device)
        for position in range(length, length + max_new):
            new = draw(logits).to(input_ids.dtype)
            if ends is not None:
                new = torch.where(ended, ids[:, position - 1], new)
                ended |= torch.isin(new.long(), ends)
            ids[:, position] = new
            if callback is not None:
                callback(ids[:, position])
            if ends is not None and bool(ended.all()):
                length, max_new = position + 1, 0
                break
            if position + 1 < length + max_new:
                logits = model.step(new, cache)
    return ids[:, : length + max_new]


def _language_model(model: Any) -> Any:
    """The model itself or the one in a model of `futurefill_rs.hf`."""
    model = model if hasattr(model, "prefill") else getattr(model, "language_model", model)
    if not hasattr(model, "prefill"):
        raise TypeError(f"model: expected a model of futurefill_rs.models, got {type(model).__name__}")
    return model


def read_prompt(model: Any, ids: Tensor, max_new: int | None, method: Any) -> tuple[Tensor, Any]:
    """Logits `(B, V)` after the prompt and the cache, for any model with the protocol."""
    options = {} if method == "auto" else {"method": method}
    if hasattr(model, "read_prompt"):
        logits, cache = model.read_prompt(ids, max_new, **options)
        return logits, cache
    logits, cache = model.prefill(ids, max_new, **options)
    return logits[:, -1], cache


def sampler(
    temperature: float, top_k: int | None, top_p: float | None, seed: int | None, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """A function from logits `(B, V)` to ids `(B,)`."""
    draw = drawer(temperature, top_k, top_p)
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    return lambda logits: draw(logits, generator)


def drawer(
    temperature: float, top_k: int | None, top_p: float | None
) -> Callable[[Tensor, torch.Generator | None], Tensor]:
    """A function from logits `(B, V)` and a source of randomness to ids `(B,)`."""
    if not temperature >= 0 or temperature == float("inf"):
        raise ValueError(f"temperature: expected a finite number, 0 or more, got {temperature}")
    if top_k is not None:
        top_k = integer(top_k, "top_k", 1)
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number in (0, 1], got {top_p}")
    if temperature == 0:
        return lambda logits, generator: logits.argmax(-1)

    def draw(logits: Tensor, generator: torch.Generator | None) -> Tensor:
        logits = logits.float()
        if temperature < 1e-6:
            # The largest becomes 0 and stays it: quotients that overflow are no NaN then.
            logits = logits - logits.amax(-1, keepdim=True)
        logits = logits / max(temperature, 1e-30)
        order = None
        if top_k is not None and top_k < logits.shape[-1]:
            logits, order = logits.topk(top_k, -1)
        elif top_p is not None and top_p < 1:
            logits, order = logits.sort(-1, descending=True)
        weights = logits.softmax(-1)
        if top_p is not None and top_p < 1:
            before = weights.cumsum(-1) - weights
            weights = weights.masked_fill(before >= top_p, 0.0)
        chosen = torch.multinomial(weights, 1, generator=generator)
        return (chosen if order is None else order.gather(-1, chosen)).squeeze(-1)

    return draw


def _generate_list(
    model: Any,
    prompts: Sequence[Prompt],
    max_new: int | None,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    eos_token_id: int | Sequence[int] | None,
    seed: int | None,
    callback: Callable[..., object] | None,
    method: Any,
    batch_size: int,
    stops: list[str],
    decode: Decode | None,
) -> list[Continuation]:
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        kind = type(prompts).__name__
        raise TypeError(f"input_ids: expected a tensor of ids or a list of prompts, got {kind}")
    if not hasattr(model, "read_prompt"):
        kind = type(model).__name__
        raise TypeError(f"model: expected a model of futurefill_rs.models with a list of prompts, got {kind}")
    for number, prompt in enumerate(prompts):
        if isinstance(prompt, str) or not isinstance(prompt, Tensor | Sequence | np.ndarray):
            kind = type(prompt).__name__
            raise TypeError(f"input_ids: expected a sequence of ids as prompt {number}, got {kind}")
    if stops and decode is None:
        raise ValueError("decode: expected a function from ids to text with stop strings, got None")
    if max_new is not None:
        max_new = integer(max_new, "max_new")
    elif eos_token_id is None and not stops:
        raise ValueError("max_new: expected a number where nothing else ends a prompt, got None")
    batch_size = integer(batch_size, "batch_size", 1)
    ends = [] if eos_token_id is None else _end_ids(eos_token_id)
    return generate_many(
        model,
        prompts,
        max_new,
        draw=drawer(temperature, top_k, top_p),
        ends=frozenset(ends),
        seed=seed,
        callback=callback,
        method=method,
        batch_size=batch_size,
        stop=stops,
        decode=decode,
    )


def _check_ids(input_ids: Tensor) -> None:
    if input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool:
        raise TypeError(f"input_ids: expected integer ids, got {input_ids.dtype}")
    if input_ids.ndim != 2 or not input_ids.shape[1]:
        raise ValueError(f"input_ids: expected shape (B, P) with P at least 1, got {tuple(input_ids.shape)}")


def _stops(stop: str | Sequence[str]) -> list[str]:
    stops = [stop] if isinstance(stop, str) else list(stop)
    for text in stops:
        if not isinstance(text, str):
            raise TypeError(f"stop: expected strings, got {text!r}")
        if not text:
            raise ValueError("stop: expected strings of one or more characters, got an empty one")
    return stops


def _ends(eos_token_id: int | Sequence[int] | None, input_ids: Tensor) -> Tensor | None:
    if eos_token_id is None:
        return None
    return torch.tensor(_end_ids(eos_token_id), dtype=torch.int64, device=input_ids.device)


def _end_ids(eos_token_id: int | Sequence[int]) -> list[int]:
    """One id, of numpy's or torch's too, or several."""
    single = hasattr(eos_token_id, "__index__") and not getattr(eos_token_id, "ndim", 0)
    ids: Any = [eos_token_id] if single else eos_token_id
    return [operator.index(id) for id in ids]
