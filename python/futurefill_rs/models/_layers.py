"""Single layers from upstream's configuration and tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from futurefill_rs.models._io import fit
from futurefill_rs.models._settings import brief
from futurefill_rs.nn import H3, STU, HyenaCascade, HyenaOperator, LongConv, MonarchMixer
from futurefill_rs.nn.cascade import Variant
from futurefill_rs.nn.stu import spectral_filters

Config = Mapping[str, Any]
State = dict[str, Tensor]


def refuse(config: Config, **supported: Any) -> None:
    """Raise unless each of these settings, where the configuration has it, is one of the values supported."""
    for key, values in supported.items():
        if key in config and config[key] not in values:
            wanted = " or ".join(repr(value) for value in values)
            raise ValueError(f"config: expected {key} to be {wanted}, got {brief(config[key])}")


def chosen(config: Config, **names: str) -> dict[str, Any]:
    """The settings that the configuration has, as keyword arguments: `argument="key"`."""
    return {argument: config[key] for argument, key in names.items() if key in config}


def refuse_tiles(config: Config) -> None:
    """Raise if flash-stu-2 would replace `M_inputs` by blocks on its diagonal, which is another layer."""
    width = config["n_embd"]
    tiles = {name: config.get(name) for name in ("d_in_tile", "d_out_tile")}
    if config.get("use_approx", True) and any((tile or width) < width for tile in tiles.values()):
        got = ", ".join(f"{name}={tile}" for name, tile in tiles.items())
        raise ValueError(f"config: expected no tile narrower than n_embd = {width}, got {got}")


MOST_LAGS = 8192
"""Spectral filters of which length are computed for a checkpoint without them: minutes, growing cubically."""


def computed_filters(config: Config) -> dict[str, Callable[[], Tensor]]:
    """The tensors that a checkpoint with an STU may lack, and what computes them."""

    def phi() -> Tensor:
        if config["seq_len"] > MOST_LAGS:
            raise ValueError(
                f"state: expected phi, hours of work for {config['seq_len']} positions, got none"
            )
        return spectral_filters(config["seq_len"], config["num_eigh"], config.get("use_hankel_L", False))

    return {"phi": phi}


def build_stu(config: Config, state: State) -> STU:
    refuse_tiles(config)

    def make() -> STU:
        return STU(
            config["n_embd"],
            config["num_eigh"],
            config["seq_len"],
            config.get("use_hankel_L", False),
            config.get("use_approx", True),
            phi=torch.empty(config["seq_len"], config["num_eigh"]),
        )

    return fit(make, state, computed=computed_filters(config))


def hyena_operator(config: Config, *, d_model: int, layout: str, shift: float) -> HyenaOperator:
    """A Hyena operator from safari's or HyenaDNA's keys; what neither of them can run causally is refused."""
    refuse(
        config,
        num_heads=(1,),
        num_blocks=(1,),
        inner_factor=(1,),
        outer_mixing=(False,),
        post_order_ffn=(False,),
        bidirectional=(False,),
        activation=("id", None),
        linear_mixer=(False,),
        # No skip in safari, without effect in HyenaDNA's standalone code.
        bias=(True,),
        use_bias=(True,),
    )
    return HyenaOperator(
        d_model,
        config["l_max"],
        layout=config.get("layout", layout),
        modulation_shift=config.get("modulation_shift", config.get("shift", shift)),
        learn_embedding=config.get("lr_pos_emb", 1e-5) != 0,
        **chosen(
            config,
            order="order",
            emb_dim="emb_dim",
            filter_order="filter_order",
            num_inner_mlps="num_inner_mlps",
            short_filter_order="short_filter_order",
            w="w",
            modulate="modulate",
            normalized="normalized",
        ),
    )


def build_hyena(config: Config, state: State) -> HyenaOperator:
    return fit(
        lambda: hyena_operator(config, d_model=config["d_model"], layout="v o", shift=0.0),
        state,
    )


def build_long_conv(config: Config, state: State) -> LongConv:
    refuse(config, bidirectional=(False,), use_ma_smoothing=(False,), block_fft_conv=(False, True))
    return fit(
        lambda: LongConv(
            config["d_model"],
            config["l_max"],
            **chosen(config, lam="lam", activation="activation", postact="postact", channels="channels"),
        ),
        state,
    )


def build_h3(config: Config, state: State) -> H3:
    refuse(config, channels=(1,), real_transform=("exp",), mode=("diag",))
    return fit(
        lambda: H3(
            config["d_model"],
            l_max=config.get("l_max"),
            **chosen(config, d_state="d_state", head_dim="head_dim", disc="disc"),
        ),
        state,
    )


def build_monarch_mixer(config: Config, state: State) -> MonarchMixer:
    refuse(config, bidirectional=(False,), hyena_training_additions=(False,))
    names = ("hyena_emb_dim", "hyena_filter_order", "hyena_w", "hyena_w_mod", "residual_long_conv")
    return fit(
        lambda: MonarchMixer(
            config["d_model"], config.get("l_max", 128), **chosen(config, **{name: name for name in names})
        ),
        state,
    )


def cascade(config: Config, variant: Variant) -> HyenaCascade:
    """The gated convolution from StripedHyena's or vortex's keys."""
    return HyenaCascade(
        config["hidden_size"],
        variant,
        num_heads=config["num_attention_heads"],
        column_split=config.get("column_split_hyena", True),
        **chosen(
            config,
            filter_length="fir_inner_filter_length",
            state_size="state_size",
            short_filter_length="short_filter_length",
            short_filter_bias="short_filter_bias",
            interleave="interleave",
            flip="hyena_flip_x1x2",
        ),
        filter_groups=config["hidden_size"] // config["hyena_filter_groups"]
        if variant == "modal"
        else config.get("hyena_filter_groups"),
    )


def build_cascade(config: Config, state: State) -> HyenaCascade:
    variants: dict[str, Variant] = {
        "stripedhyena2_hcs": "hcs",
        "stripedhyena2_hcm": "hcm",
        "stripedhyena2_hcl": "hcl",
    }
    return fit(lambda: cascade(config, variants[config["kind"]]), state)
