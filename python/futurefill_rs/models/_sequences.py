"""What users give to be read: one text, ids, or many of them of different lengths."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from futurefill_rs._torch_args import is_fake
from futurefill_rs.models._alphabet import Alphabet
from futurefill_rs.nn.layer import kind_of

Ids = Tensor | Sequence[int] | np.ndarray[Any, Any]
Sequences = str | Ids | Sequence[str] | Sequence[Ids]

POSITIONS = 1 << 16
"""Positions, padding included, that sequences read together have at most."""


class Given:
    """The sequences that a user gave, as rows of ids.

    Attributes:
        rows: `(T,)` int64 each, on the model's device.
        single: whether it was one sequence and no list of them.
        length: T of a tensor or array `(B, T)`; None of anything else.
    """

    def __init__(self, model: Any, sequences: Any, name: str = "ids") -> None:
        self.single = False
        self.length: int | None = None
        if isinstance(sequences, np.ndarray):
            sequences = torch.as_tensor(integers(sequences, name))
        if isinstance(sequences, Tensor):
            if sequences.ndim not in (1, 2):
                raise ValueError(f"{name}: expected shape (T,) or (B, T), got {tuple(sequences.shape)}")
            self.single = sequences.ndim == 1
            self.length = None if self.single else sequences.shape[1]
            sequences = checked(sequences, model.vocab_size, name)
        elif isinstance(sequences, str | bytes):
            self.single = True
        elif isinstance(sequences, Sequence):
            self.single = bool(len(sequences)) and is_integer(sequences[0])
        else:
            raise TypeError(
                f"{name}: expected a text, ids, or a list of either, got {type(sequences).__name__}"
            )
        each = [sequences] if self.single else list(sequences)
        names = [name if self.single else f"{name}[{i}]" for i in range(len(each))]
        self.names = names
        self.rows = [row_of(model, one, at) for one, at in zip(each, names, strict=True)]

    def shaped(self, results: list[Tensor]) -> Any:
        """Results, one for each row, as the sequences came."""
        if self.single:
            return results[0]
        return results if self.length is None or not results else torch.stack(results)


def row_of(model: Any, sequence: Any, name: str) -> Tensor:
    """Ids `(T,)` of one text or one sequence of ids, checked, on the model's device."""
    device = next(model.parameters()).device
    if isinstance(sequence, str | bytes):
        return alphabet_of(model, name).encode(sequence, name).to(device)
    if not isinstance(sequence, Tensor):
        sequence = torch.as_tensor(integers(sequence, name))
    if sequence.ndim != 1:
        raise ValueError(f"{name}: expected ids of shape (T,), got {tuple(sequence.shape)}")
    return checked(sequence, model.vocab_size, name).to(device, torch.int64)


def checked(ids: Tensor, vocab_size: int, name: str) -> Tensor:
    """`ids`, if they are integers of the vocabulary; ids without values may be any."""
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"{name}: expected integer ids, got {kind_of(ids)}")
    if not (is_fake(ids) or ids.is_meta or not ids.numel()):
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= vocab_size:
            raise ValueError(f"{name}: expected ids from 0 to {vocab_size - 1}, got {low} to {high}")
    return ids


def is_integer(value: object) -> bool:
    """Whether this is a number, of any library, and no tensor or array of several."""
    return hasattr(value, "__index__") and not getattr(value, "ndim", 0)


def integers(values: Any, name: str, expected: str = "a text or integer ids") -> np.ndarray[Any, Any]:
    """Integers from a list or an array, as int64."""
    if not isinstance(values, np.ndarray):
        try:
            if any(isinstance(value, bool) for value in values):
                raise TypeError
            return np.array([operator.index(value) for value in values], np.int64)
        except TypeError:
            raise TypeError(f"{name}: expected {expected}, got {type(values).__name__}") from None
    if values.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected {expected}, got {values.dtype}")
    return values.astype(np.int64)


def alphabet_of(model: Any, name: str) -> Alphabet:
    alphabet: Alphabet | None = model.alphabet
    if alphabet is None:
        raise ValueError(
            f"{name}: expected ids for a model whose {model.vocab_size} ids have no tokenizer here, "
            "got a text"
        )
    return alphabet


def begin_of(model: Any, begin: bool | int) -> list[int]:
    """The id that `begin` puts before every sequence, if any: the alphabet's own for True."""
    if begin is False:
        return []
    if begin is True:
        own = None if model.alphabet is None else model.alphabet.begin
        if own is None:
            raise ValueError(f"begin: expected an id for {type(model).__name__}, which has none of its own")
        return [own]
    try:
        id = operator.index(begin)
    except TypeError:
        raise TypeError(f"begin: expected True, False or an id, got {begin!r}") from None
    if not 0 <= id < model.vocab_size:
        raise ValueError(f"begin: expected an id from 0 to {model.vocab_size - 1}, got {id}")
    return [id]


def batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Which rows are read together: neighbours in length, the longest at most twice as long as the others,
    no more than `batch_size` of them and, but for one alone, no more than `POSITIONS`."""
    batch: list[int] = []
    longest = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        full = len(batch) == batch_size or (len(batch) + 1) * longest > POSITIONS
        if batch and (full or 2 * lengths[i] < longest):
            yield batch
            batch = []
        if not batch:
            longest = lengths[i]
        batch.append(i)
    if batch:
        yield batch


def padded(rows: Sequence[Tensor]) -> Tensor:
    """`(B, T)` with zeros behind the shorter rows, which no position before them sees."""
    longest = max(row.shape[0] for row in rows)
    return torch.stack([F.pad(row, (0, longest - row.shape[0])) for row in rows])
