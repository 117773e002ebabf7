"""The configurations of the Hugging Face classes: each a table of upstream's settings and their defaults."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from futurefill_rs.hf.cache import CACHE_NAME
from futurefill_rs.models._names import MODEL_TYPES
from futurefill_rs.models.hyenadna import operator_settings


class ConvolutionConfig(PreTrainedConfig):  # type: ignore[misc]
    """Base of the configurations: the settings of the model inside, under upstream's names.

    A subclass says what they are in two tables. transformers makes a data class of it and would write its
    `__init__` from annotations, which upstream's settings of several types do not fit: each subclass has its
    own.
    """

    # Class variables, not fields of that data class.
    _kind: ClassVar[str] = ""
    _fields: ClassVar[dict[str, Any]] = {}
    """Settings of the model: name and default."""
    _more: ClassVar[dict[str, Any]] = {}
    """What transformers itself reads: name and default."""
    keys_to_ignore_at_inference: ClassVar[list[str]] = [CACHE_NAME]

    def __init__(self, **settings: Any) -> None:
        for alias, name in self.attribute_map.items():
            if alias in settings:
                settings[name] = settings.pop(alias)
        defaults = {**self._fields, "use_cache": True, **self._more}
        own = {name: settings.pop(name, default) for name, default in copy.deepcopy(defaults).items()}
        super().__init__(tie_word_embeddings=settings.pop("tie_word_embeddings", True), **settings)
        for name, value in own.items():
            setattr(self, name, value)

    def model_config(self) -> dict[str, Any]:
        """The mapping that `futurefill_rs.models.build` takes: upstream's settings without a field here
        are in it too, for the model to refuse what it cannot do.
        """
        others = self.to_dict().keys() - PreTrainedConfig().to_dict().keys() - self._fields.keys()
        names = (*self._fields, *sorted(others))
        fields = {name: getattr(self, name) for name in names if getattr(self, name, None) is not None}
        return {**fields, "kind": self._kind}


class FlashSTUConfig(ConvolutionConfig):
    """Configuration of flash-stu-2, with its names and defaults, but `use_attn` False and float32."""

    model_type = MODEL_TYPES["flash_stu_lm"]
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "max_position_embeddings": "seq_len",
    }
    _kind = "flash_stu_lm"
    _fields: ClassVar[dict[str, Any]] = {
        "n_embd": 1536,
        "n_heads": 8,
        "n_layers": 26,
        "seq_len": 8192,
        "window_size": 1024,
        "vocab_size": 200064,
        "mlp_scale": 12,
        "bias": False,
        "num_eigh": 24,
        "use_hankel_L": False,
        "use_approx": True,
        "use_attn": False,
        "softcap": 50.0,
        "stu_enable_mlp_sandwich": False,
        "tie_word_embeddings": True,
    }

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)


class HyenaDNAConfig(ConvolutionConfig):
    """Configuration of HyenaDNA: `layer` holds the Hyena operator's settings (`standalone_hyenadna.py`).

    The flat form of the hub's checkpoints (`max_seq_len`, `hyena_order`, `activation_freq`, ...) is
    understood too.
    """

    model_type = MODEL_TYPES["hyenadna_lm"]
    attribute_map: ClassVar[dict[str, str]] = {"hidden_size": "d_model", "num_hidden_layers": "n_layer"}
    _kind = "hyenadna_lm"
    _fields: ClassVar[dict[str, Any]] = {
        "d_model": 128,
        "n_layer": 2,
        "d_inner": None,
        "vocab_size": 12,
        "pad_vocab_size_multiple": 8,
        "layer_norm_epsilon": 1e-5,
        "layer": {"l_max": 1026, "emb_dim": 5, "filter_order": 64, "w": 10},
    }
    _more: ClassVar[dict[str, Any]] = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 4}

    def __init__(self, **settings: Any) -> None:
        if settings.get("layer") is None:
            settings.pop("layer", None)
            if "max_seq_len" in settings:
                settings["layer"] = operator_settings(settings)
        # The model has no head but the embedding; a checkpoint with another one is refused.
        settings["tie_word_embeddings"] = True
        super().__init__(**settings)


class StripedHyena2Config(ConvolutionConfig):
    """Configuration of StripedHyena 2 (vortex), with its names and the settings of Evo 2 7B as defaults."""

    model_type = MODEL_TYPES["stripedhyena2_lm"]
    attribute_map: ClassVar[dict[str, str]] = {
        "num_hidden_layers": "num_layers",
        "max_position_embeddings": "max_seqlen",
    }
    _kind = "stripedhyena2_lm"
    _fields: ClassVar[dict[str, Any]] = {
        "vocab_size": 512,
        "hidden_size": 4096,
        "num_layers": 32,
        "attn_layer_idxs": [3, 10, 17, 24, 31],
        "hcl_layer_idxs": [2, 6, 9, 13, 16, 20, 23, 27, 30],
        "hcm_layer_idxs": [1, 5, 8, 12, 15, 19, 22, 26, 29],
        "hcs_layer_idxs": [0, 4, 7, 11, 14, 18, 21, 25, 28],
        "hcm_filter_length": 128,
        "hcm_filter_groups": 256,
        "hcs_filter_length": 7,
        "hcs_filter_groups": 256,
        "state_size": 16,
        "short_filter_length": 3,
        "short_filter_bias": False,
        "num_attention_heads": 32,
        "proj_groups": 1,
        "eps": 1e-6,
        "inner_mlp_size": 11264,
        "inner_size_multiple_of": 16,
        "column_split": False,
        "column_split_hyena": False,
        "interleave": True,
        "hyena_flip_x1x2": False,
        "evo2_style_activations": True,
        "mlp_activation": "gelu",
        "final_norm": True,
        "tie_embeddings": True,
        "qkv_proj_bias": False,
        "mha_out_proj_bias": True,
        "hyena_out_proj_bias": True,
        "rotary_emb_base": 10000,
        "use_interpolated_rotary_pos_emb": False,
        "rotary_emb_scaling_factor": 1.0,
        "use_fp8_input_projections": False,
    }
    _more: ClassVar[dict[str, Any]] = {
        "max_seqlen": 8192,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }

    def __init__(self, **settings: Any) -> None:
        # transformers knows it by another name.
        settings["tie_word_embeddings"] = settings.get("tie_embeddings", True)
        super().__init__(**settings)


class StripedHyenaConfig(ConvolutionConfig):
    """Configuration of StripedHyena 1 (the package `stripedhyena`), with its names and defaults."""

    model_type = MODEL_TYPES["stripedhyena1_lm"]
    attribute_map: ClassVar[dict[str, str]] = {
        "num_hidden_layers": "num_layers",
        "max_position_embeddings": "max_seqlen",
    }
    _kind = "stripedhyena1_lm"
    _fields: ClassVar[dict[str, Any]] = {
        "vocab_size": 512,
        "hidden_size": 4096,
        "inner_mlp_size": None,
        "inner_size_multiple_of": 64,
        "attn_layer_idxs": None,
        "hyena_layer_idxs": None,
        "num_layers": 32,
        "tie_embeddings": True,
        "short_filter_length": 3,
        "short_filter_bias": True,
        "num_attention_heads": 32,
        "eps": 1e-5,
        "state_size": 8,
        "make_vocab_size_divisible_by": 8,
        "hyena_filter_groups": 1,
        "proj_groups": 1,
        "smeared_gqa": False,
        "qkv_proj_bias": True,
        "mha_out_proj_bias": True,
        "rotary_emb_base": 10000,
        "use_interpolated_rotary_pos_emb": False,
        "rotary_emb_scaling_factor": 1.0,
        "column_split_hyena": True,
        "final_norm": True,
        "mlp_activation": "silu",
    }
    _more: ClassVar[dict[str, Any]] = {"max_seqlen": 8192}

    def __init__(self, **settings: Any) -> None:
        # transformers knows it by another name.
        settings["tie_word_embeddings"] = settings.get("tie_embeddings", True)
        super().__init__(**settings)
