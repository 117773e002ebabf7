"""Autoregressive generation: `futurefill_rs.generate` for a batch or for many prompts, with one sampler."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from futurefill_rs._args import integer
from futurefill_rs._generate.many import Continuation, Prompt, generate_many
from futurefill_rs._generate.one import generate_batch
from futurefill_rs._generate.sampling import Sampler, Sampling, Seed, row_randoms, vocabulary_of
from futurefill_rs._generate.stops import Decode

__all__ = ["Continuation", "generate"]

Callback = Callable[..., object]


@overload
def generate(
    model: Any,
    input_ids: Tensor,
    max_new: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    seed: Seed = None,
    callback: Callback | None = None,
    method: Any = "auto",
) -> Tensor: ...
@overload
def generate(
    model: Any,
    input_ids: Sequence[Prompt],
    max_new: int | None,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    seed: Seed = None,
    callback: Callback | None = None,
    method: Any = "auto",
    batch_size: int = 8,
    stop: str | Sequence[str] = (),
    decode: Decode | None = None,
) -> list[Continuation]: ...
def generate(
    model: Any,
    input_ids: Tensor | Sequence[Prompt],
    max_new: int | None,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    seed: Seed = None,
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
        top_k: draw from the k likeliest ids only, and those as likely as the last of them.
        top_p: draw from the smallest set of likeliest ids whose probabilities sum to at least `top_p`.
        min_p: draw from the ids only that are at least `min_p` times as likely as the likeliest.
        repetition_penalty: above 1, ids that a row holds already, prompt included, become less likely: their
            logits are divided by it where positive, multiplied where negative.
        eos_token_id: the id (or ids) that ends a row; a row that ended repeats the id it ended with.
        seed: makes the draws repeatable: those of row or prompt number i depend on the seed and on i alone.
            A list gives each its own seed. None draws from torch's global generator.
        callback: called with the `(B,)` ids of each new position.
        method: that of `futurefill_rs.plan`.

    Returns:
        ids `(B, P + new)`, the prompt first, on the device and in the dtype of `input_ids`.

    Raises:
        ValueError: logits whose largest one is infinite or no number (on a CPU), beside bad arguments.

    Ids that only pad a model's vocabulary never come. Cuts apply in the order of transformers: penalty,
    temperature, top-k, top-p, min-p.

    A list of prompts (sequences of ids, or 1-D tensors or arrays) gives a list of `Continuation`, in the
    same order. Up to `batch_size` prompts share a batch; a row that ends is given to the next prompt in line.
    `callback(number, id)` gets each new id of each prompt. `stop`: a prompt ends as soon as the text of its
    new ids contains one of these strings, none of them empty; `decode(ids)` gives the text of some ids in a
    row, and is asked for that of the last few only while a text grows.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    vocabulary, model = vocabulary_of(model), _language_model(model)
    ends = None if eos_token_id is None else _end_ids(eos_token_id)
    stops = _stops(stop)
    if not isinstance(input_ids, Tensor):
        _check_prompts(model, input_ids)
        if stops and decode is None:
            raise ValueError("decode: expected a function from ids to text with stop strings, got None")
        if max_new is None and ends is None and not stops:
            raise ValueError("max_new: expected a number where nothing else ends a prompt, got None")
        return generate_many(
            model,
            input_ids,
            None if max_new is None else integer(max_new, "max_new"),
            sampling=sampling,
            vocabulary=vocabulary,
            ends=frozenset(ends or ()),
            seed=seed,
            callback=callback,
            method=method,
            batch_size=integer(batch_size, "batch_size", 1),
            stop=stops,
            decode=decode,
        )
    if stops or decode is not None:
        raise ValueError("stop, decode: expected a list of prompts with them, got a tensor")
    _check_ids(input_ids)
    randoms = row_randoms(seed, len(input_ids), input_ids.device)
    held = input_ids.tolist() if sampling.penalises else ()
    return generate_batch(
        model,
        input_ids,
        integer(max_new, "max_new"),
        sampler=Sampler(sampling, held, randoms, vocabulary),
        ends=ends,
        callback=callback,
        method=method,
    )


def _language_model(model: Any) -> Any:
    """The model itself or the one in a model of `futurefill_rs.hf`."""
    model = model if hasattr(model, "prefill") else getattr(model, "language_model", model)
    if not hasattr(model, "prefill"):
        raise TypeError(f"model: expected a model of futurefill_rs.models, got {type(model).__name__}")
    return model


def _check_prompts(model: Any, prompts: Any) -> None:
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


def _end_ids(eos_token_id: int | Sequence[int]) -> list[int]:
    """One id, of numpy's or torch's too, or several."""
    single = hasattr(eos_token_id, "__index__") and not getattr(eos_token_id, "ndim", 0)
    ids: Any = [eos_token_id] if single else eos_token_id
    return [operator.index(id) for id in ids]


# torch.load with weights_only takes what torch.save wrote of results.
torch.serialization.add_safe_globals([Continuation])
