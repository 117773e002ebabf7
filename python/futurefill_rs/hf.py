"""The models as Hugging Face `transformers` causal language models.

>>> from futurefill_rs.hf import FlashSTUConfig, FlashSTUForCausalLM
>>> config = FlashSTUConfig(n_embd=16, n_layers=2, seq_len=64, vocab_size=50, mlp_scale=2, num_eigh=8)
>>> model = FlashSTUForCausalLM(config)
>>> import torch
>>> model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5, do_sample=False).shape
torch.Size([1, 8])

Importing this module registers the classes with `AutoConfig`, `AutoModelForCausalLM` and `AutoTokenizer`.
`generate` does greedy decoding, sampling, beams, several sequences per prompt, left-padded batches,
streamers, goes on from a returned cache, and takes drafts from an assistant or from the prompt.
"""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any, ClassVar

try:
    import torch
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoTokenizer,
        Cache,
        GenerationMixin,
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizer,
    )
    from transformers.cache_utils import CacheLayerMixin
    from transformers.generation import GenerationMode
    from transformers.modeling_outputs import CausalLMOutputWithPast
except ImportError as error:
    raise ImportError(
        "futurefill_rs.hf needs transformers 5: install the extra with"
        "  pip install 'futurefill_rs[transformers]'"
    ) from error

from torch import Tensor, nn

from futurefill_rs import models
from futurefill_rs.models._io import refuse_mismatch
from futurefill_rs.models._names import MODEL_TYPES, renames
from futurefill_rs.models.hyenadna import operator_settings
from futurefill_rs.nn import _base as protocol
from futurefill_rs.nn.stu import spectral_filters

CACHE_NAME = next(
    field.name
    for field in dataclasses.fields(CausalLMOutputWithPast)
    if field.name in ("cache", "past_key_values")
)
"""What this version of transformers calls the cache between two calls of a model."""


DRAFT = 128
"""Positions that assisted decoding may always undo at once; longer drafts announce themselves."""


class _Memory(CacheLayerMixin):  # type: ignore[misc]
    """All layers' states as the one layer that transformers sees."""

    def __init__(self) -> None:
        super().__init__()
        self.state: protocol.Cache | None = None
        self.model: models.LanguageModel | None = None
        self.record_past = False
        self.draft = DRAFT

    @property
    def is_croppable(self) -> bool:
        return self.record_past

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

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("this cache holds no keys and values: it belongs to the models of futurefill_rs.hf")

    update = lazy_initialization

    def get_seq_length(self) -> int:
        return 0 if self.state is None else self.state.position

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        return self.get_seq_length() + int(query_length), 0

    def reset(self) -> None:
        self.state = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.state is not None:
            self.state.reorder(beam_idx)

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            self.state.reorder(torch.arange(self.state.batch_size).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Undo the last `-tokens_to_remove` positions."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove: expected a negative number or 0, got {tokens_to_remove}")
        if self.state is not None and self.model is not None:
            self.model.rewind(self.state, -tokens_to_remove)

    @property
    def batch_size(self) -> int:
        return -1 if self.state is None else self.state.batch_size


class ConvolutionCache(Cache):  # type: ignore[misc]
    """The cache of the models in this module.

    Args:
        max_length: positions in all, the prompt included, that it will serve; None: no bound. `generate`
            sets the bound, which makes the cache's size depend on the number of new tokens only, unless it
            returns the cache.
    """

    def __init__(self, max_length: int | None = None) -> None:
        super().__init__(layers=[_Memory()])
        self.max_length = max_length

    @property
    def state(self) -> protocol.Cache | None:
        """The model's own cache; None before the first call."""
        state: protocol.Cache | None = self.layers[0].state
        return state

    def serve(self, model: models.LanguageModel, state: protocol.Cache) -> None:
        """Take over the state of a model after its first call."""
        layer = self.layers[0]
        layer.model, layer.state = model, state
        if layer.record_past:
            layer.activate_past_recording()

    def fork(self) -> ConvolutionCache:
        """An independent copy; `copy.deepcopy` does the same."""
        copy = ConvolutionCache(self.max_length)
        layer, copied = self.layers[0], copy.layers[0]
        copied.model, copied.record_past, copied.draft = layer.model, layer.record_past, layer.draft
        copied.state = None if layer.state is None else layer.state.fork()
        return copy

    def __deepcopy__(self, memo: dict[int, Any]) -> ConvolutionCache:
        return self.fork()


class ConvolutionForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """Base of the causal language models: everything but which model it is."""

    base_model_prefix = "model"
    main_input_name = "input_ids"
    # A cache can be rewound, so assisted decoding is possible.
    _is_stateful = False
    _supports_cache_class = True
    _no_split_modules: tuple[str, ...] = ()

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        setattr(self, self.base_model_prefix, self._make(config.model_config()))
        self._add_head()
        self.post_init()

    def _add_head(self) -> None:
        """Give the head a name outside of the model inside, if checkpoints have one there."""

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
        tied = model._tied_weights_keys if model.config.tie_word_embeddings else {}
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

    @staticmethod
    def _make(config: dict[str, Any]) -> models.LanguageModel:
        """The model of a configuration; every subclass has its own."""
        raise NotImplementedError

    def _init_weights(self, module: nn.Module) -> None:
        # transformers makes torch's initialisers skip what a checkpoint has filled.
        if isinstance(module, models.LanguageModel):
            module.reset_parameters()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: ConvolutionCache | None = None,
        past_key_values: ConvolutionCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits `(B, T, V)`, with `labels` the loss of predicting each next one.

        Args:
            input_ids: `(B, T)`: all positions, or with a cache those that follow.
            attention_mask: `(B, past + T)`: zeros on the left are padding. Zeros elsewhere have no effect:
                later positions do not matter to earlier ones, and a convolution cannot skip one in between.
            cache: what an earlier call returned.
            use_cache: whether to return a cache; by default where no gradient is asked for.
            logits_to_keep: the number of last positions to compute logits for (0: all), or their indices.
        """
        if input_ids is None:
            raise ValueError("input_ids: expected a tensor of ids, got None")
        cache = past_key_values if cache is None else cache
        if cache is not None and not isinstance(cache, ConvolutionCache):
            raise TypeError(f"cache: expected a ConvolutionCache, got {type(cache).__name__}")
        if use_cache is None:
            use_cache = bool(getattr(self.config, "use_cache", True))
        if cache is None and use_cache and not torch.is_grad_enabled():
            cache = ConvolutionCache()
        if cache is not None and isinstance(logits_to_keep, int):
            # Assisted decoding asks for the logits of the draft and of the position before it.
            cache.layers[0].expect(logits_to_keep)
        hidden = self._hidden(input_ids, attention_mask, cache)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        # Entries beyond the vocabulary only pad the embedding.
        logits = self.language_model.head(hidden[:, kept])[..., : self.config.vocab_size]
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        if return_dict is False:
            return tuple(x for x in (loss, logits, cache) if x is not None)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE_NAME: cache})

    def _hidden(self, ids: Tensor, mask: Tensor | None, cache: ConvolutionCache | None) -> Tensor:
        model, length = self.language_model, ids.shape[1]
        if cache is None or cache.state is None:
            starts = _starts(mask, length)
            if cache is None:
                if model.max_length is not None and length > model.max_length:
                    raise ValueError(
                        f"input_ids: expected at most {model.max_length} positions, got {length}"
                    )
                return model.hidden(ids, protocol.padded(protocol.whole, ids, starts))
            first = length
            if cache.layers[0].record_past:
                # A draft may come with the prompt: what may be undone is read after a copy has been taken.
                late = 0 if starts is None else int(starts.max())
                first = min(length, max(late + 1, length - cache.layers[0].draft))
            max_new = None if cache.max_length is None else max(0, cache.max_length - first)
            time = protocol._Prefilling(max_new, "auto")
            with torch.no_grad():
                hidden = model.hidden(ids[:, :first], protocol.padded(time, ids[:, :first], starts))
            cache.serve(model, protocol.Cache(time.states, ids.shape[0], first, max_new))
            if first == length:
                return hidden
            return torch.cat([hidden, self._hidden(ids[:, first:], None, cache)], 1)
        state = cache.state
        if ids.shape[0] != state.batch_size:
            raise ValueError(
                f"input_ids: expected {state.batch_size} rows as in the cache, got {ids.shape[0]}"
            )
        with torch.no_grad():
            if length == 1:
                return state._run(model.hidden, ids[:, 0], stepping=True).unsqueeze(1)
            return state._run(model.hidden, ids, stepping=False)

    def _prepare_model_inputs(self, *args: Any, **kwargs: Any) -> tuple[Tensor, str | None, dict[str, Any]]:
        inputs, name, others = super()._prepare_model_inputs(*args, **kwargs)
        if not inputs.shape[1]:
            raise ValueError("input_ids: expected a prompt of at least one id, got none")
        return inputs, name, others

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        cache = kwargs.get(CACHE_NAME)
        held = cache.get_seq_length() if isinstance(cache, ConvolutionCache) else 0
        following = kwargs.get("next_sequence_length")
        if (input_ids.shape[1] if following is None else following) < 1:
            raise ValueError(
                f"input_ids: expected more positions than the {held} in the cache, got {input_ids.shape[1]}"
            )
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        return inputs

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        assistant = getattr(generation_config, "is_assistant", False)
        draft = generation_config.max_new_tokens or 0
        given = model_kwargs.get(CACHE_NAME)
        if given is not None:
            if not isinstance(given, ConvolutionCache):
                raise TypeError(f"{CACHE_NAME}: expected a ConvolutionCache, got {type(given).__name__}")
            given._is_user_defined = True
            if assistant:
                given.layers[0].expect(draft)
            return
        if generation_config.use_cache is False:
            return
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation: expected None, got {generation_config.cache_implementation!r}"
            )
        # The last token is never fed. Who gets the cache may go on with it, and a draft may go beyond the
        # end: then there must not be a bound.
        assisted = assistant or GenerationMode.ASSISTED_GENERATION in args
        bound = (
            None
            if generation_config.return_dict_in_generate or assisted
            else generation_config.max_length - 1
        )
        model_kwargs[CACHE_NAME] = cache = ConvolutionCache(bound)
        if assistant:
            cache.activate_past_recording()
            cache.layers[0].expect(draft)


def _starts(mask: Tensor | None, length: int) -> Tensor | None:
    """The first position of each row, `(B,)`, of a mask with zeros on the left."""
    if mask is None:
        return None
    if mask.ndim != 2 or mask.shape[1] != length:
        raise ValueError(f"attention_mask: expected shape (B, {length}), got {tuple(mask.shape)}")
    starts = mask.long().argmax(-1)
    # Without padding there is nothing to hide. Not asked on a GPU, which would have to finish first.
    return starts if starts.device.type != "cpu" or bool(starts.any()) else None


class _Config(PreTrainedConfig):  # type: ignore[misc]
    """Fields of the model's own configuration, as upstream names them."""

    # Class variables, not fields of the data class that transformers makes of this.
    _kind: ClassVar[str] = ""
    _fields: ClassVar[tuple[str, ...]] = ()

    def model_config(self) -> dict[str, Any]:
        """The mapping that `futurefill_rs.models.build` takes: upstream's settings without a field here
        are in it too, for the model to refuse what it cannot do.
        """
        others = self.to_dict().keys() - PreTrainedConfig().to_dict().keys() - set(self._fields)
        names = (*self._fields, *sorted(others))
        fields = {name: getattr(self, name) for name in names if getattr(self, name, None) is not None}
        return {**fields, "kind": self._kind}


class FlashSTUConfig(_Config):
    """Configuration of flash-stu-2, with its names and defaults, but `use_attn` False and float32."""

    model_type = MODEL_TYPES["flash_stu_lm"]
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "max_position_embeddings": "seq_len",
    }
    _kind = "flash_stu_lm"
    _fields = (
        "n_embd",
        "n_heads",
        "n_layers",
        "seq_len",
        "window_size",
        "vocab_size",
        "mlp_scale",
        "bias",
        "num_eigh",
        "use_hankel_L",
        "use_approx",
        "use_attn",
        "softcap",
        "stu_enable_mlp_sandwich",
        "tie_word_embeddings",
    )

    def __init__(
        self,
        n_embd: int = 1536,
        n_heads: int = 8,
        n_layers: int = 26,
        seq_len: int = 8192,
        window_size: int | tuple[int, int] = 1024,
        vocab_size: int = 200064,
        mlp_scale: int = 12,
        bias: bool = False,
        num_eigh: int = 24,
        use_hankel_L: bool = False,
        use_approx: bool = True,
        use_attn: bool = False,
        softcap: float = 50.0,
        stu_enable_mlp_sandwich: bool = False,
        use_cache: bool = True,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        self.n_embd, self.n_heads, self.n_layers = n_embd, n_heads, n_layers
        self.seq_len, self.window_size, self.vocab_size = seq_len, window_size, vocab_size
        self.mlp_scale, self.bias, self.num_eigh = mlp_scale, bias, num_eigh
        self.use_hankel_L, self.use_approx, self.use_attn = use_hankel_L, use_approx, use_attn
        self.softcap, self.stu_enable_mlp_sandwich = softcap, stu_enable_mlp_sandwich
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
        self.use_cache = use_cache


class FlashSTUForCausalLM(ConvolutionForCausalLM):
    """FlashSTU; checkpoints of flash-stu-2 load by their own names."""

    config_class = FlashSTUConfig
    _tied_weights_keys: ClassVar[dict[str, str]] = {"model.lm_head.weight": "model.tok_emb.weight"}
    # flash-stu 1 does not save it.
    _keys_to_ignore_on_load_missing: ClassVar[list[str]] = [r"\bphi$"]

    @staticmethod
    def _make(config: dict[str, Any]) -> models.LanguageModel:
        return models.FlashSTU(config)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, models.FlashSTU) and not module.phi_is_set:
            # The checkpoint does not have it (flash-stu 1).
            if not getattr(module.phi, "_is_hf_initialized", False):
                config = self.config
                phi = spectral_filters(config.seq_len, config.num_eigh, config.use_hankel_L)
                with torch.no_grad():
                    module.phi.copy_(phi)
            module.phi_is_set = True

    def get_input_embeddings(self) -> nn.Module:
        return self.model.tok_emb  # type: ignore[return-value]

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.tok_emb = value

    def get_output_embeddings(self) -> nn.Module:
        return self.model.lm_head  # type: ignore[return-value]

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.model.lm_head = value


class HyenaDNAConfig(_Config):
    """Configuration of HyenaDNA: `layer` holds the Hyena operator's settings (`standalone_hyenadna.py`).

    The flat form of the hub's checkpoints (`max_seq_len`, `hyena_order`, `activation_freq`, ...) is
    understood too.
    """

    model_type = MODEL_TYPES["hyenadna_lm"]
    attribute_map: ClassVar[dict[str, str]] = {"hidden_size": "d_model", "num_hidden_layers": "n_layer"}
    _kind = "hyenadna_lm"
    _fields = (
        "d_model",
        "n_layer",
        "d_inner",
        "vocab_size",
        "pad_vocab_size_multiple",
        "layer_norm_epsilon",
        "layer",
    )

    def __init__(
        self,
        d_model: int = 128,
        n_layer: int = 2,
        d_inner: int | None = None,
        vocab_size: int = 12,
        pad_vocab_size_multiple: int = 8,
        layer_norm_epsilon: float = 1e-5,
        layer: dict[str, Any] | None = None,
        use_cache: bool = True,
        bos_token_id: int | None = 2,
        eos_token_id: int | None = 1,
        pad_token_id: int | None = 4,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        self.d_model, self.n_layer, self.d_inner = d_model, n_layer, d_inner
        self.vocab_size, self.pad_vocab_size_multiple = vocab_size, pad_vocab_size_multiple
        self.layer_norm_epsilon = layer_norm_epsilon
        if layer is None and "max_seq_len" in kwargs:
            layer = operator_settings(kwargs)
        self.layer = {"l_max": 1026, "emb_dim": 5, "filter_order": 64, "w": 10} if layer is None else layer
        # The model has no head but the embedding; a checkpoint with another one is refused.
        super().__init__(tie_word_embeddings=True, **kwargs)
        self.use_cache = use_cache
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos_token_id, eos_token_id, pad_token_id


class HyenaDNAForCausalLM(ConvolutionForCausalLM):
    """HyenaDNA; checkpoints of `standalone_hyenadna.py` and of the Hugging Face hub load by their own
    names.
    """

    config_class = HyenaDNAConfig
    base_model_prefix = "hyena"
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = ["torchmetrics"]

    def __init__(self, config: HyenaDNAConfig) -> None:
        # The sines between the layers of a filter's network are one, under as many names.
        names = [
            f"hyena.backbone.layers.{i}.mixer.filter_fn.implicit_filter.{{}}.freq"
            for i in range(config.n_layer)
        ]
        sines = range(3, 3 + 2 * config.layer.get("num_inner_mlps", 2), 2)
        self._tied_weights_keys = {name.format(k): name.format(1) for name in names for k in sines}
        embedding = "hyena.backbone.embeddings.word_embeddings.weight"
        self._tied_weights_keys["lm_head.weight"] = embedding
        super().__init__(config)

    def _add_head(self) -> None:
        # The hub's checkpoints save the head, which is the embedding; `head` of the model computes with it.
        weight = self.get_input_embeddings().weight
        self.lm_head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.lm_head.weight = weight

    @staticmethod
    def _make(config: dict[str, Any]) -> models.LanguageModel:
        return models.HyenaDNA(config)

    def get_input_embeddings(self) -> nn.Module:
        return self.hyena.backbone.embeddings.word_embeddings  # type: ignore[union-attr, return-value]

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.hyena.backbone.embeddings.word_embeddings = value  # type: ignore[union-attr]

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value


class StripedHyenaConfig(_Config):
    """Configuration of StripedHyena 1 (the package `stripedhyena`), with its names and defaults."""

    model_type = MODEL_TYPES["stripedhyena1_lm"]
    attribute_map: ClassVar[dict[str, str]] = {
        "num_hidden_layers": "num_layers",
        "max_position_embeddings": "max_seqlen",
    }
    _kind = "stripedhyena1_lm"
    _fields = (
        "vocab_size",
        "hidden_size",
        "inner_mlp_size",
        "inner_size_multiple_of",
        "attn_layer_idxs",
        "hyena_layer_idxs",
        "num_layers",
        "tie_embeddings",
        "short_filter_length",
        "short_filter_bias",
        "num_attention_heads",
        "eps",
        "state_size",
        "make_vocab_size_divisible_by",
        "hyena_filter_groups",
        "proj_groups",
        "smeared_gqa",
        "qkv_proj_bias",
        "mha_out_proj_bias",
        "rotary_emb_base",
        "use_interpolated_rotary_pos_emb",
        "rotary_emb_scaling_factor",
        "column_split_hyena",
        "final_norm",
        "mlp_activation",
    )

    def __init__(
        self,
        vocab_size: int = 512,
        hidden_size: int = 4096,
        inner_mlp_size: int | None = None,
        inner_size_multiple_of: int = 64,
        attn_layer_idxs: list[int] | None = None,
        hyena_layer_idxs: list[int] | None = None,
        num_layers: int = 32,
        tie_embeddings: bool = True,
        short_filter_length: int = 3,
        short_filter_bias: bool = True,
        num_attention_heads: int = 32,
        eps: float = 1e-5,
        state_size: int = 8,
        make_vocab_size_divisible_by: int = 8,
        hyena_filter_groups: int = 1,
        proj_groups: int = 1,
        smeared_gqa: bool = False,
        qkv_proj_bias: bool = True,
        mha_out_proj_bias: bool = True,
        rotary_emb_base: float = 10000,
        use_interpolated_rotary_pos_emb: bool = False,
        rotary_emb_scaling_factor: float = 1.0,
        column_split_hyena: bool = True,
        final_norm: bool = True,
        mlp_activation: str = "silu",
        max_seqlen: int = 8192,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size, self.hidden_size, self.num_layers = vocab_size, hidden_size, num_layers
        self.inner_mlp_size, self.inner_size_multiple_of = inner_mlp_size, inner_size_multiple_of
        self.attn_layer_idxs, self.hyena_layer_idxs = attn_layer_idxs, hyena_layer_idxs
        self.tie_embeddings = tie_embeddings
        self.short_filter_length, self.short_filter_bias = short_filter_length, short_filter_bias
        self.num_attention_heads, self.eps, self.state_size = num_attention_heads, eps, state_size
        self.make_vocab_size_divisible_by = make_vocab_size_divisible_by
        self.hyena_filter_groups, self.proj_groups = hyena_filter_groups, proj_groups
        self.smeared_gqa, self.qkv_proj_bias = smeared_gqa, qkv_proj_bias
        self.mha_out_proj_bias, self.rotary_emb_base = mha_out_proj_bias, rotary_emb_base
        self.use_interpolated_rotary_pos_emb = use_interpolated_rotary_pos_emb
        self.rotary_emb_scaling_factor = rotary_emb_scaling_factor
        self.column_split_hyena, self.final_norm = column_split_hyena, final_norm
        self.mlp_activation, self.max_seqlen = mlp_activation, max_seqlen
        kwargs["tie_word_embeddings"] = tie_embeddings
        super().__init__(**kwargs)
        self.use_cache = use_cache


class StripedHyenaForCausalLM(ConvolutionForCausalLM):
    """StripedHyena 1; upstream's checkpoints load by their own names."""

    config_class = StripedHyenaConfig
    _tied_weights_keys: ClassVar[dict[str, str]] = {"model.unembed.weight": "model.embedding_layer.weight"}
    _keep_in_fp32_modules_strict = ("poles", "residues")
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"filter\.t$", r"rotary_emb\.inv_freq$"]

    @staticmethod
    def _make(config: dict[str, Any]) -> models.LanguageModel:
        return models.StripedHyena(config)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding_layer  # type: ignore[return-value]

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embedding_layer = value

    def get_output_embeddings(self) -> nn.Module:
        return self.model.unembed  # type: ignore[return-value]

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.model.unembed = value


class _Unknown(int):
    """The id of `[UNK]` that remembers which character it stands for.

    transformers looks for `stop_strings` in what a tokenizer makes of tokens behind "abcdef", which it first
    turns into ids and back.
    """

    def __new__(cls, index: int, character: str) -> _Unknown:
        unknown = super().__new__(cls, index)
        unknown.character = character
        return unknown

    character: str

    def __getnewargs__(self) -> tuple[int, str]:
        return int(self), self.character


class HyenaDNATokenizer(PreTrainedTokenizer):  # type: ignore[misc]
    """One token for each character: ids 0 to 6 are special, the characters follow from 7 (A, C, G, T, N).

    Any other character is `[UNK]`. No special tokens are added to a text. Padding goes to the left.
    """

    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask"]
    SPECIAL = ("[CLS]", "[SEP]", "[BOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]")

    def __init__(self, characters: str = "ACGTN", padding_side: str = "left", **kwargs: Any) -> None:
        self.characters = characters = "".join(characters)
        self._ids = {token: i for i, token in enumerate((*self.SPECIAL, *characters))}
        self._tokens = list(self._ids)
        names = {"bos": "[BOS]", "eos": "[SEP]", "sep": "[SEP]", "cls": "[CLS]", "pad": "[PAD]"}
        names |= {"mask": "[MASK]", "unk": "[UNK]"}
        for name, token in names.items():
            kwargs.setdefault(f"{name}_token", token)
        super().__init__(characters=characters, padding_side=padding_side, **kwargs)

    @property
    def vocab_size(self) -> int:
        return len(self._tokens)

    def get_vocab(self) -> dict[str, int]:
        return {**self._ids, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        index = self._ids.get(token)
        return _Unknown(self._ids["[UNK]"], token) if index is None else index

    def _convert_id_to_token(self, index: int) -> str:
        if isinstance(index, _Unknown):
            return index.character
        return self._tokens[index] if 0 <= index < len(self._tokens) else "[UNK]"

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        return token_ids_0 + (token_ids_1 or [])

    def get_special_tokens_mask(
        self,
        token_ids_0: list[int],
        token_ids_1: list[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        return [int(i < len(self.SPECIAL)) for i in token_ids_0 + (token_ids_1 or [])]

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        name = "vocab.json" if filename_prefix is None else f"{filename_prefix}-vocab.json"
        path = os.path.join(save_directory, name)
        with open(path, "w", encoding="utf-8") as file:
            json.dump(self._ids, file, indent=2)
        return (path,)


def _register() -> None:
    for config, model in (
        (FlashSTUConfig, FlashSTUForCausalLM),
        (HyenaDNAConfig, HyenaDNAForCausalLM),
        (StripedHyenaConfig, StripedHyenaForCausalLM),
    ):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModelForCausalLM.register(config, model, exist_ok=True)
    AutoTokenizer.register(HyenaDNAConfig, HyenaDNATokenizer, exist_ok=True)


_register()

__all__ = [
    "ConvolutionCache",
    "ConvolutionForCausalLM",
    "FlashSTUConfig",
    "FlashSTUForCausalLM",
    "HyenaDNAConfig",
    "HyenaDNAForCausalLM",
    "HyenaDNATokenizer",
    "StripedHyenaConfig",
    "StripedHyenaForCausalLM",
]
