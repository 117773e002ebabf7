"""What a configuration may say: for every kind the keys that count, and the values they may have.

Every size is bounded by what the tensors hold before anything is made from it.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

INTEGERS = (1 << 31) - 1


class Held(NamedTuple):
    """What a checkpoint holds: its longest axis, and how many tensors."""

    axis: int = INTEGERS
    tensors: int = INTEGERS

    @classmethod
    def by(cls, state: Mapping[str, Tensor]) -> Held:
        axes = [size for tensor in state.values() for size in tensor.shape]
        return cls(max(axes, default=0), len(state))


ANYTHING = Held()

Rule = Callable[[Any, Held], str]
"""What a value should have been, or nothing if it will do."""


def brief(value: object) -> str:
    """A value on one line of moderate length, without control characters."""
    return reprlib.repr(value)


def is_integer(value: object, least: int, most: int = INTEGERS) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def count(value: Any, held: Held) -> str:
    return "" if is_integer(value, 1) else f"an integer from 1 to {INTEGERS}"


def whole(value: Any, held: Held) -> str:
    return "" if is_integer(value, 0) else f"an integer from 0 to {INTEGERS}"


def size(value: Any, held: Held) -> str:
    """The length of an axis of some tensor, or of a part of one."""
    bound = "" if held == ANYTHING else f" to {held.axis}, the longest axis"
    return "" if is_integer(value, 1, held.axis) else f"an integer from 1{bound}"


def layers(value: Any, held: Held) -> str:
    """Something that has a tensor of its own at least."""
    bound = "" if held == ANYTHING else f" to {held.tensors}, the tensors"
    return "" if is_integer(value, 0, held.tensors) else f"an integer from 0{bound}"


def flag(value: Any, held: Held) -> str:
    return "" if value is None or isinstance(value, bool) else "true or false"


def number(value: Any, held: Held) -> str:
    real = isinstance(value, int | float) and not isinstance(value, bool)
    return "" if real and abs(value) < 1e300 else "a finite number"


def positive(value: Any, held: Held) -> str:
    return "" if not number(value, held) and value > 0 else "a number above 0"


def word(value: Any, held: Held) -> str:
    return "" if value is None or (isinstance(value, str) and len(value) < 100) else "a name"


def indices(value: Any, held: Held) -> str:
    listed = isinstance(value, list | tuple) and all(is_integer(i, 0) for i in value)
    return "" if listed else "a list of integers from 0"


def window(value: Any, held: Held) -> str:
    listed = list(value) if isinstance(value, list | tuple) else [value]
    pair = len(listed) < 9 and all(is_integer(v, -INTEGERS) for v in listed)
    return "" if pair else "an integer or a pair of them"


def optional(rule: Rule) -> Rule:
    def either(value: Any, held: Held) -> str:
        wanted = "" if value is None else rule(value, held)
        return wanted and f"{wanted}, or null"

    return either


STU = {
    "n_embd": size,
    "num_eigh": size,
    "seq_len": count,
    "use_hankel_L": flag,
    "use_approx": flag,
    "d_in_tile": optional(count),
    "d_out_tile": optional(count),
}

OPERATOR = {
    "d_model": size,
    "l_max": size,
    "order": size,
    "emb_dim": size,
    "filter_order": size,
    "num_inner_mlps": layers,
    "short_filter_order": size,
    "w": number,
    "modulate": flag,
    "normalized": flag,
    "modulation_shift": number,
    "shift": number,
    "lr_pos_emb": number,
    "layout": word,
}

CASCADE = {
    "hidden_size": size,
    "num_attention_heads": size,
    "hyena_filter_groups": count,
    "fir_inner_filter_length": size,
    "state_size": count,
    "short_filter_length": size,
    "short_filter_bias": flag,
    "column_split_hyena": flag,
    "interleave": flag,
    "hyena_flip_x1x2": flag,
}

STRIPED = {
    **CASCADE,
    "vocab_size": size,
    "num_layers": layers,
    "attn_layer_idxs": optional(indices),
    "hyena_layer_idxs": optional(indices),
    "proj_groups": count,
    "eps": positive,
    "make_vocab_size_divisible_by": count,
    "inner_size_multiple_of": count,
    "inner_mlp_size": optional(size),
    "final_norm": flag,
    "tie_embeddings": flag,
    "qkv_proj_bias": flag,
    "mha_out_proj_bias": flag,
    "rotary_emb_base": positive,
    "rotary_emb_scaling_factor": positive,
    "use_interpolated_rotary_pos_emb": flag,
    "mlp_activation": word,
}

STRIPED_2 = {
    "vocab_size": size,
    "hidden_size": size,
    "num_layers": layers,
    "num_attention_heads": size,
    "attn_layer_idxs": indices,
    "hcs_layer_idxs": indices,
    "hcm_layer_idxs": indices,
    "hcl_layer_idxs": indices,
    "hcs_filter_length": size,
    "hcm_filter_length": size,
    "hcs_filter_groups": size,
    "hcm_filter_groups": size,
    "state_size": count,
    "short_filter_length": size,
    "short_filter_bias": flag,
    "proj_groups": count,
    "eps": positive,
    "inner_size_multiple_of": count,
    "inner_mlp_size": optional(size),
    "column_split_hyena": flag,
    "column_split": flag,
    "interleave": flag,
    "hyena_flip_x1x2": flag,
    "evo2_style_activations": flag,
    "mlp_activation": word,
    "final_norm": flag,
    "tie_embeddings": flag,
    "qkv_proj_bias": flag,
    "mha_out_proj_bias": flag,
    "hyena_out_proj_bias": flag,
    "rotary_emb_base": positive,
    "rotary_emb_scaling_factor": positive,
    "use_interpolated_rotary_pos_emb": flag,
    "use_fp8_input_projections": flag,
}

SETTINGS: dict[str, Mapping[str, Any]] = {
    "flash_stu_lm": {
        **STU,
        "n_layers": layers,
        "vocab_size": size,
        "mlp_scale": size,
        "bias": flag,
        "use_attn": flag,
        "n_heads": size,
        "window_size": window,
        "softcap": number,
        "tie_word_embeddings": flag,
        "stu_enable_mlp_sandwich": flag,
    },
    "h3": {"d_model": size, "d_state": size, "l_max": optional(count), "head_dim": size, "disc": word},
    "hyena": OPERATOR,
    "hyenadna_lm": {
        "d_model": size,
        "n_layer": layers,
        "vocab_size": size,
        "d_inner": optional(size),
        "pad_vocab_size_multiple": size,
        "layer_norm_epsilon": positive,
        "layer": OPERATOR,
        # The flat configuration of the hub.
        "max_seq_len": size,
        "hyena_order": size,
        "activation_freq": number,
        "emb_dim": size,
        "filter_order": size,
        "num_inner_mlps": layers,
        "short_filter_order": size,
    },
    "long_conv": {
        "d_model": size,
        "l_max": size,
        "lam": number,
        "activation": word,
        "postact": word,
        "channels": size,
    },
    "monarch_mixer": {
        "d_model": size,
        "l_max": size,
        "hyena_emb_dim": size,
        "hyena_filter_order": size,
        "hyena_w": number,
        "hyena_w_mod": number,
        "residual_long_conv": flag,
    },
    "stripedhyena1_lm": STRIPED,
    "stripedhyena2_hcl": CASCADE,
    "stripedhyena2_hcm": CASCADE,
    "stripedhyena2_hcs": CASCADE,
    "stripedhyena2_lm": STRIPED_2,
    "stu": STU,
}
"""Keys that are missing are told by whoever needs them."""


def check(config: Mapping[str, Any], kind: str, held: Held = ANYTHING) -> None:
    """Raise unless the settings of `kind` that the configuration has are of the type and size they must be.

    Raises:
        ValueError: `config: expected n_layers to be an integer from 0 to 30, the tensors, got 1000000000`.
    """
    _check(config, SETTINGS[kind], held, "")


def _check(config: Mapping[str, Any], rules: Mapping[str, Any], held: Held, path: str) -> None:
    for key, rule in rules.items():
        if key not in config:
            continue
        value = config[key]
        if isinstance(rule, Mapping):
            if isinstance(value, Mapping):
                _check(value, rule, held, f"{path}{key}.")
                continue
            wanted = "" if value is None else "a mapping"
        else:
            wanted = rule(value, held)
        if wanted:
            raise ValueError(f"config: expected {path}{key} to be {wanted}, got {brief(value)}")
