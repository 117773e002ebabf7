"""The Hugging Face class of each model, with and without a head."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from futurefill_rs import models
from futurefill_rs.hf.config import FlashSTUConfig, HyenaDNAConfig, StripedHyena2Config, StripedHyenaConfig
from futurefill_rs.hf.model import ConvolutionForCausalLM, ConvolutionModel, ConvolutionPreTrainedModel
from futurefill_rs.nn.stu import spectral_filters

TIES = dict[str, str]
"""Names of parameters, each with the name of the one that it is."""


class _FlashSTU(ConvolutionPreTrainedModel):
    config_class = FlashSTUConfig
    _embedding, _blocks, _head = "tok_emb", "layers", "lm_head"
    _no_split_modules: ClassVar[list[str]] = ["STUBlock", "WindowedAttentionBlock"]
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


class FlashSTUModel(ConvolutionModel, _FlashSTU):
    """FlashSTU without its head."""

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"\blm_head\."]


class FlashSTUForCausalLM(ConvolutionForCausalLM, _FlashSTU):
    """FlashSTU; checkpoints of flash-stu-2 load by their own names."""

    _tied_weights_keys: ClassVar[TIES] = {"model.lm_head.weight": "model.tok_emb.weight"}


class _HyenaDNA(ConvolutionPreTrainedModel):
    config_class = HyenaDNAConfig
    base_model_prefix = "hyena"
    _embedding, _blocks = "backbone.embeddings.word_embeddings", "backbone.layers"
    _padding_multiple = "pad_vocab_size_multiple"
    _no_split_modules: ClassVar[list[str]] = ["HyenaBlock"]
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = ["torchmetrics"]

    def __init__(self, config: HyenaDNAConfig) -> None:
        # The sines between the layers of a filter's network are one, under as many names.
        names = [
            f"hyena.backbone.layers.{i}.mixer.filter_fn.implicit_filter.{{}}.freq"
            for i in range(config.n_layer)
        ]
        sines = range(3, 3 + 2 * config.layer.get("num_inner_mlps", 2), 2)
        self._tied_weights_keys = {name.format(k): name.format(1) for name in names for k in sines}
        super().__init__(config)

    @staticmethod
    def _make(config: dict[str, Any]) -> models.LanguageModel:
        return models.HyenaDNA(config)


class HyenaDNAModel(ConvolutionModel, _HyenaDNA):
    """HyenaDNA without its head."""

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = ["torchmetrics", r"^lm_head\."]


class HyenaDNAForCausalLM(ConvolutionForCausalLM, _HyenaDNA):
    """HyenaDNA; checkpoints of `standalone_hyenadna.py` and of the Hugging Face hub load by their own
    names.
    """

    def _finish(self) -> None:
        # The hub's checkpoints save the head, which is the embedding; `head` of the model computes with it.
        weight = self.get_input_embeddings().weight
        self.lm_head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.lm_head.weight = weight
        self._tied_weights_keys["lm_head.weight"] = f"hyena.{self._embedding}.weight"


class _StripedHyena(ConvolutionPreTrainedModel):
    config_class = StripedHyenaConfig
    _embedding, _blocks, _head = "embedding_layer", "blocks", "unembed"
    _padding_multiple = "make_vocab_size_divisible_by"
    _no_split_modules: ClassVar[list[str]] = ["ConvolutionBlock", "AttentionBlock"]
    _keep_in_fp32_modules_strict = ("poles", "residues")
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"filter\.t$", r"rotary_emb\.inv_freq$"]

    @staticmethod
    def _make(config: dict[str, Any]) -> models.LanguageModel:
        return models.StripedHyena(config)


class StripedHyenaModel(ConvolutionModel, _StripedHyena):
    """StripedHyena 1 without its head."""

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [
        *_StripedHyena._keys_to_ignore_on_load_unexpected,
        r"\bunembed\.",
    ]


class StripedHyenaForCausalLM(ConvolutionForCausalLM, _StripedHyena):
    """StripedHyena 1; upstream's checkpoints load by their own names."""

    _tied_weights_keys: ClassVar[TIES] = {"model.unembed.weight": "model.embedding_layer.weight"}


class _StripedHyena2(ConvolutionPreTrainedModel):
    config_class = StripedHyena2Config
    _embedding, _blocks, _head = "embedding_layer", "blocks", "unembed"
    _no_split_modules: ClassVar[list[str]] = ["ConvolutionBlock", "AttentionBlock"]
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"rotary_emb\.inv_freq$", r"\._extra_state$"]

    def __init__(self, config: StripedHyena2Config) -> None:
        medium = [rf"blocks\.{i}\.filter\.h" for i in config.hcm_layer_idxs]
        self._keep_in_fp32_modules_strict = ("log_poles", "residues", *medium)
        super().__init__(config)

    @staticmethod
    def _make(config: dict[str, Any]) -> models.LanguageModel:
        return models.StripedHyena2(config)


class StripedHyena2Model(ConvolutionModel, _StripedHyena2):
    """StripedHyena 2 without its head."""

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [
        *_StripedHyena2._keys_to_ignore_on_load_unexpected,
        r"\bunembed\.",
    ]


class StripedHyena2ForCausalLM(ConvolutionForCausalLM, _StripedHyena2):
    """StripedHyena 2, the architecture of Evo 2; `models.load` reads upstream's checkpoints and saves them as
    folders that this class reads.
    """

    _tied_weights_keys: ClassVar[TIES] = {"model.unembed.weight": "model.embedding_layer.weight"}
