"""What transformers' `generate` needs to know of a cache that is not one of keys and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.generation import GenerationMode

from futurefill_rs._args import integer
from futurefill_rs.hf.cache import CACHE_NAME, ConvolutionCache


class ConvolutionGenerationMixin(GenerationMixin):  # type: ignore[misc]
    """`generate` with a `ConvolutionCache`.

    A prompt is compared with what a given cache has read, and read from there on.
    """

    # A cache can be rewound, so assisted decoding is possible.
    _is_stateful = False

    def _prepare_model_inputs(self, *args: Any, **kwargs: Any) -> tuple[Tensor, str | None, dict[str, Any]]:
        inputs, name, others = super()._prepare_model_inputs(*args, **kwargs)
        if not inputs.shape[1]:
            what = "id" if name == "input_ids" else "embedding"
            raise ValueError(f"{name}: expected a prompt of at least one {what}, got none")
        return inputs, name, others

    def _prepare_attention_mask_for_generation(
        self, inputs_tensor: Tensor, generation_config: Any, model_kwargs: dict[str, Any]
    ) -> Tensor:
        """The mask for a call that has none: ids that pad are padding, unless they were read as tokens."""
        mask: Tensor = super()._prepare_attention_mask_for_generation(
            inputs_tensor, generation_config, model_kwargs
        )
        cache = model_kwargs.get(CACHE_NAME)
        if isinstance(cache, ConvolutionCache) and cache.batch_size == mask.shape[0]:
            read = cache.memory.heard(*mask.shape[:1], mask.device)[:, : mask.shape[1]]
            following = mask[:, read.shape[1] :]
            if generation_config.is_assistant:
                following = torch.ones_like(following)
            mask = torch.cat([read.to(mask.dtype), following], 1)
        return mask

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        cache, first = kwargs.get(CACHE_NAME), bool(kwargs.get("is_first_iteration"))
        embeddings = inputs_embeds if first else None
        name, given = ("input_ids", input_ids) if embeddings is None else ("inputs_embeds", embeddings)
        held = 0
        if isinstance(cache, ConvolutionCache):
            held = cache.get_seq_length()
            if first and cache.memory.repeated:
                kwargs["next_sequence_length"] = given.shape[1] - held
                cache.memory.repeated = False
        following = kwargs.get("next_sequence_length")
        if (given.shape[1] if following is None else following) < 1:
            raise ValueError(
                f"{name}: expected more positions than the {held} in the cache, got {given.shape[1]}"
            )
        if held and first and following is not None and embeddings is None:
            cache.memory.compare(input_ids[:, :held])
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids, *args, inputs_embeds=inputs_embeds, **kwargs
        )
        # What finds stop strings comes with what the model is to read.
        inputs.pop("tokenizer", None)
        return inputs

    def _assisted_decoding(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, but for a prompt that a returned cache has read: it would be read again."""
        if kwargs.get("inputs_embeds") is not None:
            raise ValueError("inputs_embeds: expected None with assisted decoding, which reads drafts as ids")
        cache, mask = kwargs[CACHE_NAME], kwargs.get("attention_mask")
        config = kwargs["generation_config"]
        covered = getattr(config, "_mask_length", -1) if mask is None else mask.shape[1]
        # A mask of more positions than the ids means that the ids are new ones only.
        cache.memory.repeated = bool(cache.get_seq_length()) and covered == input_ids.shape[1]
        return super()._assisted_decoding(input_ids, *args, **kwargs)

    def _update_model_kwargs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        updated: dict[str, Any] = super()._update_model_kwargs_for_generation(*args, **kwargs)
        if isinstance(updated.get(CACHE_NAME), ConvolutionCache):
            # The cache knows what was padding; a mask that grows would be compared with it at every step.
            updated["attention_mask"] = None
        return updated

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        if generation_config.assistant_early_exit is not None:
            raise ValueError(
                f"assistant_early_exit: expected None, as the models have no early exits, got "
                f"{generation_config.assistant_early_exit}"
            )
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation: expected None, got {generation_config.cache_implementation!r}"
            )
        assistant = bool(generation_config.is_assistant)
        cache = model_kwargs.get(CACHE_NAME)
        if cache is not None:
            if not isinstance(cache, ConvolutionCache):
                raise TypeError(f"{CACHE_NAME}: expected a ConvolutionCache, got {type(cache).__name__}")
            cache._is_user_defined = True
        elif generation_config.use_cache is False:
            return
        else:
            # The last token is never fed. Who gets the cache may go on with it, and a draft may go beyond the
            # end: then there must not be a bound.
            assisted = assistant or generation_mode == GenerationMode.ASSISTED_GENERATION
            unbounded = generation_config.return_dict_in_generate or assisted
            cache = model_kwargs[CACHE_NAME] = ConvolutionCache(None if unbounded else max_cache_length)
            if assistant:
                cache.activate_past_recording()
        if assistant:
            cache.memory.expect(generation_config.max_new_tokens or 0)
        # Read in chunks by the model itself, which knows where padding ends; transformers' own loop would
        # read a prompt a second time that says nothing new.
        cache.chunk, generation_config.prefill_chunk_size = generation_config.prefill_chunk_size, None
        if cache.chunk is not None:
            cache.chunk = integer(cache.chunk, "prefill_chunk_size", 1)
