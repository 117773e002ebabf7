"""The Hugging Face models: `transformers` around the models of `futurefill_rs.models`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from futurefill_rs import models
from futurefill_rs.hf.blocks import RECOMPUTED
from futurefill_rs.hf.cache import CACHE_NAME, ConvolutionCache, Memory
from futurefill_rs.hf.generation import ConvolutionGenerationMixin
from futurefill_rs.hf.mask import aligned, without_end
from futurefill_rs.models._base import embed
from futurefill_rs.models._io import refuse_mismatch
from futurefill_rs.models._names import renames
from futurefill_rs.nn import protocol

LOSS_SETTINGS = ("num_items_in_batch", "shift_labels", "ignore_index")
"""What transformers' loss takes beside logits and labels."""


class ConvolutionPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """What the models with and without a head share: everything but what they make of the features.

    Where the model inside keeps its parts is said by name: a subclass for each model has `_embedding`,
    `_blocks`, and `_head` where the head is a layer of its own.
    """

    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _embedding: ClassVar[str]
    _blocks: ClassVar[str]
    _head: ClassVar[str | None] = None
    _padding_multiple: ClassVar[str | None] = None
    """The setting whose multiples the rows of the embedding come in."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        setattr(self, self.base_model_prefix, self._make(config.model_config()))
        for block in self.language_model.get_submodule(self._blocks).children():
            block.__class__ = RECOMPUTED[type(block)]
        self._finish()
        self.post_init()

    @staticmethod
    def _make(config: dict[str, Any]) -> models.LanguageModel:
        """The model of a configuration; every subclass has its own."""
        raise NotImplementedError

    def _finish(self) -> None:
        """Change what the model inside has and this one has not, or the reverse."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, for checkpoints under upstream's names too, and only for whole ones.

        Raises:
            ValueError: tensors that are missing, unexpected or of another shape, or that are one tensor in
                the model and come with different values, by name.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs.setdefault("key_mapping", renames(cls.config_class._kind))
        # Shapes are judged below, by name; transformers would only say that some are wrong.
        kwargs["ignore_mismatched_sizes"] = True
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        # transformers would undo the renaming in a checkpoint it writes.
        model._weight_conversions = None
        tied = (model._tied_weights_keys or {}) if model.config.tie_word_embeddings else {}
        misshaped = {
            name: f"{name} (expected {tuple(expected)}, got {tuple(got)})"
            for name, got, expected in info["mismatched_keys"]
        }
        problems = {
            "missing": sorted(set(info["missing_keys"]) - set(misshaped)),
            "unexpected": sorted(info["unexpected_keys"]),
            "misshaped": [misshaped[name] for name in sorted(misshaped)],
            "different values for the one tensor": [
                f"{name} and {other}"
                for name, other in tied.items()
                if model.get_parameter(name) is not model.get_parameter(other)
            ],
        }
        refuse_mismatch(cls.__name__, problems)
        return (model, info) if wants_info else model

    @property
    def language_model(self) -> models.LanguageModel:
        """The model of `futurefill_rs.models` inside."""
        model: models.LanguageModel = getattr(self, self.base_model_prefix)
        return model

    def _init_weights(self, module: nn.Module) -> None:
        # transformers makes torch's initialisers skip what a checkpoint has filled.
        if isinstance(module, models.LanguageModel):
            module.reset_parameters()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_submodule(self._embedding)

    def set_input_embeddings(self, value: nn.Module) -> None:
        owner, _, name = self._embedding.rpartition(".")
        setattr(self.language_model.get_submodule(owner), name, value)

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Module:
        """transformers' own; the rows that only pad the embedding to its multiple are padded anew."""
        if new_num_tokens is None and pad_to_multiple_of is None:
            return self.get_input_embeddings()
        old = self.config.vocab_size
        tokens = old if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            tokens = _rounded_up(tokens, pad_to_multiple_of)
        multiple = 1 if self._padding_multiple is None else getattr(self.config, self._padding_multiple)
        # A new token must not begin as a row of padding, which nobody has trained.
        super().resize_token_embeddings(min(old, tokens))
        super().resize_token_embeddings(_rounded_up(tokens, multiple), mean_resizing=mean_resizing)
        self.language_model.vocab_size = self.vocab_size
        self.language_model.config["vocab_size"] = self.config.vocab_size = tokens
        return self.get_input_embeddings()

    def _features(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        cache: ConvolutionCache | None,
        inputs_embeds: Tensor | None,
        wants_states: bool,
    ) -> list[Tensor]:
        """Features at the given positions, each `(B, T, D)`: the last; with `wants_states` those after the
        embedding and after every block before it.
        """
        if (input_ids is None) == (inputs_embeds is None):
            got = "neither" if input_ids is None else "both"
            raise ValueError(f"input_ids: expected a tensor of ids or else inputs_embeds, got {got}")
        memory = Memory() if cache is None else cache.memory
        if inputs_embeds is None:
            x = _of_ids(input_ids)
        else:
            x = _of_embeddings(inputs_embeds, self.config.hidden_size)
        rows, length = x.shape[:2]
        if memory.state is not None and rows != memory.batch_size:
            raise ValueError(f"input_ids: expected {memory.batch_size} rows as in the cache, got {rows}")
        mask = memory.unread(attention_mask, rows, length)
        if cache is None:
            # Most of what is trained on has its padding there.
            mask = without_end(mask)
        alignment = aligned(mask, memory.begun(rows, x.device if mask is None else mask.device))
        read = alignment.gather(x)
        if inputs_embeds is None and memory.record_past:
            # What is undone is read again, ids and embeddings in one block.
            read = embed(self.get_input_embeddings(), read)
        parts = list(self.language_model.get_submodule(self._blocks).children())
        if not read.is_floating_point():
            parts.insert(0, self.get_input_embeddings())
        with recorded(parts if wants_states else []) as record:
            if cache is None:
                most = self.language_model.max_length
                if most is not None and read.shape[1] > most:
                    raise ValueError(f"input_ids: expected at most {most} positions, got {read.shape[1]}")
                time = protocol.padded(protocol.whole, read, alignment.starts)
                features = record(self.language_model(read, time=time, features=True))
            else:
                with torch.no_grad():
                    features = self._read(read, alignment.starts, alignment.skipped, cache, record)
        if cache is not None:
            memory.note(input_ids, mask, rows, length)
        if wants_states:
            # transformers has the last norm in the place of what goes into it.
            del features[-2]
            if read.is_floating_point():
                features.insert(0, read)
        return [alignment.scatter(y) for y in features]

    def _read(
        self,
        x: Tensor,
        starts: Tensor | None,
        skipped: int,
        cache: ConvolutionCache,
        record: Callable[[Tensor], list[Tensor]],
    ) -> list[Tensor]:
        """`record` of the features at positions that follow those in the cache, `x` `(B, T, D)`."""
        model, memory, length = self.language_model, cache.memory, x.shape[1]
        chunk = length if cache.chunk is None else cache.chunk
        cuts = {0, length, *range(0, length, chunk)}
        if memory.state is None:
            first = min(chunk, length)
            if memory.record_past:
                # A draft may come with the prompt: what may be undone is read after a copy has been taken.
                late = 0 if starts is None else int(starts.max())
                first = min(first, max(late + 1, length - memory.draft))
            cuts = {0, first, *(cut for cut in cuts if cut > first)}
        else:
            first = 0
        if starts is not None and first < length:
            cuts.update(start for start in starts.tolist() if start > first)
        edges = sorted(cuts)
        pieces = []
        for begin, end in itertools.pairwise(edges):
            piece = x[:, begin:end]
            if memory.state is None:
                max_new = None if cache.max_length is None else max(0, cache.max_length - skipped - end)
                late = None if starts is None else starts.clamp_max(end)
                y, state = model._read(piece, max_new, starts=late, features=True)
                pieces.append(record(y))
                memory.serve(model, state)
            elif end - begin == 1:
                y = memory.state._run(model, piece[:, 0], stepping=True, features=True)
                pieces.append([part.unsqueeze(1) for part in record(y)])
            else:
                pieces.append(record(memory.state._run(model, piece, stepping=False, features=True)))
            memory.model = model
            if starts is not None and begin >= first:
                # Rows whose tokens are still to come have read padding.
                memory.state.reset(starts >= end)
        return [torch.cat(parts, 1) for parts in zip(*pieces, strict=True)]

    def _settled(
        self,
        cache: ConvolutionCache | None,
        use_cache: bool | None,
        output_attentions: bool | None,
        unknown: dict[str, Any],
    ) -> ConvolutionCache | None:
        """The cache to read into, or None, once everything that would be ignored is refused."""
        for name, value in unknown.items():
            if value is not None:
                raise TypeError(f"{name}: expected None, which is all that {type(self).__name__} takes")
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise ValueError("output_attentions: expected False, as convolutions have no weights to show")
        if cache is not None:
            if not isinstance(cache, ConvolutionCache):
                raise TypeError(f"cache: expected a ConvolutionCache, got {type(cache).__name__}")
            return cache
        if use_cache is None:
            use_cache = bool(getattr(self.config, "use_cache", True))
        return ConvolutionCache() if use_cache and not torch.is_grad_enabled() else None

    def _as_dict(self, return_dict: bool | None) -> bool:
        return bool(self.config.return_dict if return_dict is None else return_dict)


@contextmanager
def recorded(modules: Iterable[nn.Module]) -> Iterator[Callable[[Tensor], list[Tensor]]]:
    """A function that returns its argument behind what the modules have given since it was called last.

    A long sequence goes through them in pieces of positions.
    """
    modules = list(modules)
    seen: list[list[Tensor]] = [[] for _ in modules]

    def record(y: Tensor) -> list[Tensor]:
        found = [parts[0] if len(parts) == 1 else torch.cat(parts, 1) for parts in seen]
        for parts in seen:
            parts.clear()
        return [*found, y]

    def note(parts: list[Tensor]) -> Callable[..., None]:
        return lambda _module, _inputs, y: parts.append(y)

    hooks = [module.register_forward_hook(note(parts)) for module, parts in zip(modules, seen, strict=True)]
    try:
        yield record
    finally:
        for hook in hooks:
            hook.remove()


def _of_ids(ids: object) -> Tensor:
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"input_ids: expected integers of shape (B, T), got {_described(ids)}")
    return ids


def _of_embeddings(x: object, width: int) -> Tensor:
    if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[2] != width or not x.is_floating_point():
        raise ValueError(f"inputs_embeds: expected numbers of shape (B, T, {width}), got {_described(x)}")
    return x


def _described(x: object) -> str:
    return f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def _rounded_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


class ConvolutionModel(ConvolutionPreTrainedModel):
    """Base of the models without a head: features at every position."""

    def _finish(self) -> None:
        if self._head is not None:
            owner, _, name = self._head.rpartition(".")
            setattr(self.language_model.get_submodule(owner), name, nn.Identity())

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: ConvolutionCache | None = None,
        past_key_values: ConvolutionCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Features `(B, T, D)` after the last norm; the arguments are those of `ConvolutionForCausalLM`."""
        cache = past_key_values if cache is None else cache
        cache = self._settled(cache, use_cache, output_attentions, kwargs)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        features = self._features(input_ids, attention_mask, cache, inputs_embeds, bool(wanted))
        states = tuple(features) if wanted else None
        output = BaseModelOutputWithPast(
            last_hidden_state=features[-1], hidden_states=states, **{CACHE_NAME: cache}
        )
        return output if self._as_dict(return_dict) else output.to_tuple()


class ConvolutionForCausalLM(ConvolutionPreTrainedModel, ConvolutionGenerationMixin):
    """Base of the causal language models: logits, loss and `generate`."""

    def get_output_embeddings(self) -> nn.Module:
        """The head, which has a name outside of the model inside where the embedding is all it has there."""
        owner = self if self._head is None else self.language_model
        return owner.get_submodule(self._head or "lm_head")

    def set_output_embeddings(self, value: nn.Module) -> None:
        owner = self if self._head is None else self.language_model
        setattr(owner, self._head or "lm_head", value)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: ConvolutionCache | None = None,
        past_key_values: ConvolutionCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits `(B, T, V)`, with `labels` the loss of predicting each next one.

        Args:
            input_ids: `(B, T)`: all positions, or with a cache those that follow.
            attention_mask: `(B, past + T)`: zeros are padding, wherever they stand: a row's tokens are read
                as if nothing stood between them, and outputs at padding mean nothing. Rows share a clock:
                once its tokens have begun, a row can only pause in a later call where all others do.
            cache: what an earlier call returned.
            inputs_embeds: `(B, T, D)`, in place of `input_ids`.
            labels: `(B, T)`, -100 where no loss is asked for.
            use_cache: whether to return a cache; by default where neither a gradient nor a loss is asked for.
            logits_to_keep: the number of last positions to compute logits for (0: all), or their indices.
            output_hidden_states: whether to return the features `(B, T, D)` after the embedding and after
                every block, the last of them after the last norm.
        """
        loss_settings = {name: kwargs.pop(name) for name in LOSS_SETTINGS if name in kwargs}
        cache = past_key_values if cache is None else cache
        if use_cache is None and labels is not None:
            use_cache = False
        cache = self._settled(cache, use_cache, output_attentions, kwargs)
        if cache is not None and isinstance(logits_to_keep, int):
            # Assisted decoding asks for the logits of the draft and of the position before it.
            cache.memory.expect(logits_to_keep)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        features = self._features(input_ids, attention_mask, cache, inputs_embeds, bool(wanted))
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        # Entries beyond the vocabulary only pad the embedding.
        logits = self.get_output_embeddings()(features[-1][:, kept])[..., : self.config.vocab_size]
        loss = None
        if labels is not None:
            if attention_mask is not None and attention_mask.shape[1] >= labels.shape[1]:
                # Padding predicts nothing.
                silent = attention_mask[:, -labels.shape[1] : -1] == 0
                labels = labels.clone()
                labels[:, 1:][silent.to(labels.device)] = -100
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **loss_settings
            )
        states = tuple(features) if wanted else None
        output = CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=states, **{CACHE_NAME: cache})
        return output if self._as_dict(return_dict) else output.to_tuple()
