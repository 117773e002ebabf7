"""The cache that transformers hands from call to call."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from futurefill_rs import models, nn
from futurefill_rs._torch_args import is_fake

CACHE_NAME = next(
    field.name
    for field in dataclasses.fields(CausalLMOutputWithPast)
    if field.name in ("cache", "past_key_values")
)
"""What this version of transformers calls the cache between two calls of a model."""

DRAFT = 128
"""Positions that assisted decoding may always undo at once; longer drafts announce themselves."""

UNKNOWN = -1
"""Stands for the id of a position that came as an embedding."""


class Memory(CacheLayerMixin):  # type: ignore[misc]
    """All layers' states as the one layer that transformers sees, and a record of what was read.

    Attributes:
        state: the model's own cache; None before the first call.
        model: the model it belongs to, which undoing needs; not a part of what is saved.
        length: positions as transformers counts them, padding included.
        record_past: whether positions can be undone.
        draft: as many as that.
        repeated: whether the ids of the next call begin with those that were read.
    """

    def __init__(self) -> None:
        super().__init__()
        self.record_past = False
        self.draft = DRAFT
        self.repeated = False
        self.model: models.LanguageModel | None = None
        self.reset()

    def reset(self) -> None:
        self.state: nn.Cache | None = None
        self.length = 0
        self._ids: list[Tensor] = []
        # Positions beyond its end hold tokens in every row.
        self._heard: Tensor | None = None

    @property
    def batch_size(self) -> int:
        return -1 if self.state is None else self.state.batch_size

    @property
    def ids(self) -> Tensor:
        """What was read, `(B, length)`, `UNKNOWN` where it came as embeddings."""
        if len(self._ids) > 1:
            self._ids = [torch.cat(self._ids, 1)]
        return self._ids[0]

    def heard(self, rows: int, device: torch.device) -> Tensor:
        """Which of the positions read hold tokens, `(rows, length)`."""
        heard = self._heard
        if heard is None:
            return torch.ones(rows, self.length, dtype=torch.bool, device=device)
        rest = self.length - heard.shape[1]
        return torch.nn.functional.pad(heard, (0, rest), value=True).to(device)

    def begun(self, rows: int, device: torch.device) -> Tensor:
        """The rows of which tokens were read, `(rows,)`."""
        if self._heard is None or self.length > self._heard.shape[1]:
            return torch.full((rows,), self.length > 0, device=device)
        return self._heard.any(1).to(device)

    def unread(self, mask: Tensor | None, rows: int, count: int) -> Tensor | None:
        """The part of an attention mask `(rows, length + count)` for the next `count` positions, as booleans;
        None where all of them hold tokens.

        Raises:
            ValueError: a mask of another shape, or one that contradicts what was read.
        """
        if mask is None:
            return None
        expected = (rows, self.length + count)
        if mask.shape != expected:
            raise ValueError(f"attention_mask: expected shape {expected}, got {tuple(mask.shape)}")
        past, new = torch.split(mask != 0, [self.length, count], 1)
        if is_fake(mask) or mask.is_meta:
            return new
        changed = past != self.heard(rows, mask.device)
        if bool(changed.any()):
            row, position = changed.nonzero()[0].tolist()
            was, now = ("padding", "a token") if past[row, position] else ("a token", "padding")
            raise ValueError(
                f"attention_mask: expected {was} at position {position} of row {row}, as the cache has read "
                f"it, got {now}"
            )
        return None if bool(new.all()) else new

    def note(self, ids: Tensor | None, mask: Tensor | None, rows: int, count: int) -> None:
        """Record that `count` positions were read: `ids` `(rows, count)` or embeddings, under the mask."""
        device = torch.device("cpu") if ids is None else ids.device
        if mask is not None:
            self._heard = torch.cat([self.heard(rows, mask.device), mask], 1)
        if ids is None:
            device = self._ids[0].device if self._ids else device
            ids = torch.full((rows, count), UNKNOWN, device=device)
        self._ids.append(ids.long().clone())
        self.length += count

    def compare(self, ids: Tensor) -> None:
        """Raise a `ValueError` unless `ids` `(B, length)` are what was read."""
        if is_fake(ids) or ids.is_meta or not self.length:
            return
        if ids.shape[0] != self.batch_size:
            raise ValueError(
                f"input_ids: expected {self.batch_size} rows as in the cache, got {ids.shape[0]}"
            )
        read = self.ids.to(ids.device)
        other = (read != ids) & (read != UNKNOWN) & self.heard(ids.shape[0], ids.device)
        if bool(other.any()):
            row, position = other.nonzero()[0].tolist()
            expected, got = int(read[row, position]), int(ids[row, position])
            raise ValueError(
                f"input_ids: expected the {self.length} ids that the cache has read to come first, "
                f"with {expected} at position {position} of row {row}, got {got}"
            )

    def activate_past_recording(self) -> None:
        """From now on the cache can be cut back, by up to `draft` positions."""
        self.record_past = True
        if self.state is not None and self.state._journal is None:
            self.state.keep(self.draft)

    def expect(self, count: int) -> None:
        """The next `count` positions are a draft, all of which may be cut off again."""
        if self.record_past and count > self.draft:
            self.draft = count
            if self.state is not None:
                self.state.keep(count)

    def serve(self, model: models.LanguageModel, state: nn.Cache) -> None:
        """Take over the state of a model after its first call."""
        self.model, self.state = model, state
        if self.record_past:
            self.activate_past_recording()

    @property
    def is_croppable(self) -> bool:
        return self.record_past

    def crop(self, tokens_to_remove: int) -> None:
        """Undo the last `-tokens_to_remove` positions."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove: expected a negative number or 0, got {tokens_to_remove}")
        if self.state is None or not tokens_to_remove:
            return
        if self.model is None:
            raise ValueError(
                "cache: expected one that a model has read into since it was loaded, got a new one"
            )
        count, heard = -tokens_to_remove, self._heard
        kept = self.length - count
        # Positions that some rows passed over are not undone one by one.
        if heard is not None and 0 <= kept < heard.shape[1]:
            if not bool(heard[:, kept:].all()):
                raise ValueError(
                    f"tokens_to_remove: expected positions without padding, got {count} with some"
                )
        self.model.rewind(self.state, count)
        self.length = kept
        self._ids = [self.ids[:, :kept]]
        self._heard = None if heard is None else heard[:, :kept]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.state is None:
            return
        self.state.reorder(beam_idx)
        self._ids = [self.ids.index_select(0, beam_idx.to(self._ids[0].device))]
        if self._heard is not None:
            self._heard = self._heard.index_select(0, beam_idx.to(self._heard.device))

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.reorder_cache(torch.arange(self.batch_size).repeat_interleave(repeats))

    def fork(self) -> Memory:
        """An independent copy."""
        twin: Memory = object.__new__(Memory)
        twin.__dict__ = {**self.__dict__, "_ids": list(self._ids)}
        twin.state = None if self.state is None else self.state.fork()
        return twin

    __copy__ = fork

    def __deepcopy__(self, memo: dict[int, Any]) -> Memory:
        return self.fork()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "model": None}

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("this cache holds no keys and values: it belongs to the models of futurefill_rs.hf")

    update = lazy_initialization

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        return self.length + int(query_length), 0


class ConvolutionCache(Cache):  # type: ignore[misc]
    """The cache of the models in this module.

    It can be copied, pickled and saved with `torch.save`; a copy is independent.

    Args:
        max_length: positions in all, the prompt included, that it will serve; None: no bound. `generate`
            sets the bound, which makes the cache's size depend on the number of new tokens only, unless it
            returns the cache.
        chunk: positions of a prompt to read at a time, which bounds the memory for it; None: all at once.
    """

    def __init__(self, max_length: int | None = None, *, chunk: int | None = None) -> None:
        super().__init__(layers=[Memory()])
        self.max_length = max_length
        self.chunk = chunk

    @property
    def memory(self) -> Memory:
        memory: Memory = self.layers[0]
        return memory

    @property
    def state(self) -> nn.Cache | None:
        """The model's own cache; None before the first call."""
        return self.memory.state

    def fork(self) -> ConvolutionCache:
        """An independent copy; `copy.copy` and `copy.deepcopy` do the same."""
        twin: ConvolutionCache = object.__new__(type(self))
        twin.__dict__ = {**self.__dict__, "layers": [copy.copy(layer) for layer in self.layers]}
        return twin

    __copy__ = fork

    def __deepcopy__(self, memo: dict[int, Any]) -> ConvolutionCache:
        return self.fork()
