"""What all language models share: integer ids in, logits out, saving."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from futurefill_rs._args import integer
from futurefill_rs.models._alphabet import BYTES, Alphabet, holds_bytes
from futurefill_rs.models._embeddings import Out, Positions, embeddings
from futurefill_rs.models._names import MODEL_TYPES
from futurefill_rs.models._score import Progress, Reduce, entropy, log_probability, scores
from futurefill_rs.models._sequences import Sequences, checked
from futurefill_rs.nn.cache import Cache
from futurefill_rs.nn.layer import Layer, kind_of
from futurefill_rs.nn.protocol import Packed, Prefilling, Time, checked_starts
from futurefill_rs.nn.reading import Reading, piece_for


class LanguageModel(Layer):
    """A model over token ids: `x (B, T)` integers give logits `(B, T, V)`; in a step `(B,)` gives `(B, V)`.

    Attributes:
        kind: what `build` calls such models.
        config: the mapping the model was built from, upstream's own keys, `kind` and `model_type`.
        vocab_size: V of the logits.
        features: D of what `hidden` gives.
        max_length: positions `forward` accepts.
        reach: an output depends on this many positions at most, its own included; None where on all of them.
    """

    kind: ClassVar[str]
    config: dict[str, Any]
    vocab_size: int
    features: int
    reach: int | None = None
    _sequence_ndim = 2

    def labelled(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The configuration with what `load` and transformers know the model by."""
        return {"kind": self.kind, "model_type": MODEL_TYPES[self.kind], **config}

    def reset_parameters(self) -> None:
        """Draw the parameters of an untrained model."""

    def hidden(self, ids: Tensor, time: Time) -> Tensor:
        """Features `(..., D)` that the head turns into logits; part of `mix`."""
        raise NotImplementedError

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of features; part of `mix`."""
        raise NotImplementedError

    def mix(self, x: Tensor, time: Time, *, keep: Any = None, features: bool = False) -> Tensor:
        """Logits, or the features that the head makes them from.

        Args:
            keep: an index of the positions of a sequence that are wanted, such as -1, a slice or a tensor.
        """
        hidden = self.hidden(x, time)
        if keep is not None:
            hidden = hidden[:, keep]
        return hidden if features else self.head(hidden)

    def _check(self, x: Tensor, ndim: int, batch_size: int | None = None) -> None:
        if not isinstance(x, Tensor) or x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
            raise TypeError(f"x: expected a tensor of integer ids, got {kind_of(x)}")
        if x.ndim != ndim or (batch_size is not None and x.shape[0] != batch_size):
            batch = "B" if batch_size is None else str(batch_size)
            expected = f"({batch}, T)" if ndim == 2 else f"({batch},)"
            raise ValueError(f"x: expected shape {expected}, got {tuple(x.shape)}")

    def _read(
        self,
        x: Tensor,
        max_new: int | None,
        method: Any = "auto",
        starts: Tensor | None = None,
        *,
        piece: int | None = None,
        **options: Any,
    ) -> tuple[Tensor, Cache]:
        """`prefill` with options of `mix`; more than `piece` positions go layer by layer, in pieces."""
        piece = piece or piece_for(x.shape[0], self.features, x.device)
        if x.shape[1] <= piece:
            return super()._read(x, max_new, method, starts, **options)
        max_new = None if max_new is None else integer(max_new, "max_new")
        starts = None if starts is None else checked_starts(starts, x)
        time = Reading(x.shape[1], piece, max_new, method, starts=starts)
        y = self(x, time=time, **options)
        return y, Cache(time.states, x.shape[0], x.shape[1], max_new)

    @torch.no_grad()
    def read_prompt(
        self,
        ids: Tensor,
        max_new: int | None = None,
        *,
        method: Any = "auto",
        chunk: int | None = None,
        starts: Tensor | None = None,
    ) -> tuple[Tensor, Cache]:
        """Logits `(B, V)` after the prompt `ids` `(B, P)`, P at least 1, and a cache for `max_new` more
        positions.

        Like `prefill`, without the logits nobody asked for. What lies beyond the model's reach is left out. A
        prompt of more than `chunk` positions (by default some millions of features) goes layer by layer in
        chunks: two or three arrays of the prompt's features are the memory it takes. With `starts` `(B,)` row
        i begins at position `starts[i]`; padding before it is not computed in prompts of up to `chunk`.
        """
        self._check(ids, 2)
        if not ids.shape[1]:
            raise ValueError("ids: expected a prompt of at least one id, got none")
        max_new = None if max_new is None else integer(max_new, "max_new")
        piece = None if chunk is None else integer(chunk, "chunk", 1)
        piece = piece or piece_for(ids.shape[0], self.features, ids.device)
        skipped = 0
        if self.reach is not None and self.reach < ids.shape[1]:
            skipped = ids.shape[1] - self.reach
            ids = ids[:, skipped:]
            starts = None if starts is None else (starts - skipped).clamp_min(0)
        if starts is not None and ids.shape[1] <= piece:
            time = Prefilling(max_new, method)
            packed = Packed(time, ids, starts)
            logits = self(packed.pack(ids), time=packed, keep=packed.last)[0]
            cache = Cache(time.states, ids.shape[0], ids.shape[1], max_new)
        else:
            logits, cache = self._read(ids, max_new, method, starts, piece=piece, keep=-1)
        cache.position += skipped
        return logits, cache

    @property
    def alphabet(self) -> Alphabet | None:
        """What the ids stand for; None where no tokenizer is known here."""
        return BYTES if holds_bytes(self.vocab_size) else None

    def score(
        self,
        ids: Sequences,
        *,
        reduce: Reduce = None,
        begin: bool | int = False,
        reverse_complement: bool = False,
        chunk: int | None = None,
        batch_size: int = 8,
        progress: Progress | None = None,
    ) -> Any:
        """Log-probabilities, natural logarithm, of each id after the ones before it.

        | ids | result | with `reduce` |
        | --- | --- | --- |
        | `(B, T)` | `(B, T - 1)` | `(B,)` |
        | one text, or ids `(T,)` | `(T - 1,)` | `()` |
        | a list of N texts or ids | a list of N such tensors | `(N,)` |

        Sequences of a list may differ in length: each is scored as if it were alone. They are read
        `batch_size` at a time, in chunks: memory does not grow with T times the vocabulary, and T may exceed
        the model's length (what lies beyond the filters' reach drops out). Perplexity is
        `model.score(ids, reduce="mean").neg().exp()`.

        Args:
            ids: a text is taken as `model.alphabet` has it: bytes, or the letters of DNA.
            reduce: "mean" or "sum" over the positions, in float64.
            begin: whether a beginning token stands before each sequence: True for the model's own, or an
                id. The first id then has a log-probability too: T of them.
            reverse_complement: average with the score of the other strand; without `reduce` base by base,
                which needs a beginning token.
            progress: called with the ids done and all of them.
        """
        return scores(
            self,
            ids,
            log_probability,
            reduce=reduce,
            begin=begin,
            reverse_complement=reverse_complement,
            chunk=chunk,
            batch_size=batch_size,
            progress=progress,
        )

    def entropies(
        self,
        ids: Sequences,
        *,
        reduce: Reduce = None,
        begin: bool | int = False,
        reverse_complement: bool = False,
        chunk: int | None = None,
        batch_size: int = 8,
        progress: Progress | None = None,
    ) -> Any:
        """Entropies, in nats, of the model's distributions over each id, before it is seen.

        Arguments and shapes are those of `score`.
        """
        return scores(
            self,
            ids,
            entropy,
            reduce=reduce,
            begin=begin,
            reverse_complement=reverse_complement,
            chunk=chunk,
            batch_size=batch_size,
            progress=progress,
        )

    def embeddings(
        self,
        ids: Sequences,
        layers: str | Iterable[str],
        *,
        positions: Positions = None,
        pool: Literal["mean"] | None = None,
        out: Out | Mapping[str, Out] | None = None,
        chunk: int | None = None,
        batch_size: int = 8,
    ) -> Any:
        """What named layers give, as forward hooks on them see it.

        | ids | result | one integer as `positions`, or `pool` |
        | --- | --- | --- |
        | one text, or ids `(T,)` | `(P, D)` | `(D,)` |
        | `(B, T)` | `(B, P, D)` | `(B, D)` |
        | a list of N texts or ids | a list of N such tensors | a list of N, or `(N, D)` with `pool` |

        Nothing is computed behind the last of the layers. A long sequence goes through the model in pieces.

        Args:
            layers: a name of `model.named_modules()`, such as "blocks.28.mlp.l3", or several: the result is
                then a dictionary of them.
            positions: which of a sequence's ids, negative ones from its end; None: all of them.
            pool: "mean" over the positions, summed in float64.
            out: where one sequence's outputs go as they come, for more than the memory holds: a path, where
                a file of numpy's (`.npy`) is made and mapped into memory, or an array `(P, D)`; for several
                layers a dictionary of them. It is what is returned.
            chunk: positions read at a time.
        """
        return embeddings(
            self,
            ids,
            layers,
            positions=positions,
            pool=pool,
            out=out,
            chunk=chunk,
            batch_size=batch_size,
        )


def embed(table: nn.Module, ids: Tensor) -> Tensor:
    """Rows of the table for ids of any integer dtype; embeddings in their place stay as they are."""
    if ids.is_floating_point():
        return ids
    if ids.dtype not in (torch.int64, torch.int32):
        ids = ids.long()
    try:
        x: Tensor = table(ids)
        return x
    except IndexError:
        checked(ids, int(getattr(table, "num_embeddings", 1 << 62)), "x")
        raise
