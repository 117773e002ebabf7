"""The models as Hugging Face `transformers` models.

>>> from futurefill_rs.hf import FlashSTUConfig, FlashSTUForCausalLM
>>> config = FlashSTUConfig(n_embd=16, n_layers=2, seq_len=64, vocab_size=50, mlp_scale=2, num_eigh=8)
>>> model = FlashSTUForCausalLM(config)
>>> import torch
>>> model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5, do_sample=False).shape
torch.Size([1, 8])

Importing this module registers the classes with `AutoConfig`, `AutoModel`, `AutoModelForCausalLM` and
`AutoTokenizer`. `generate` does greedy decoding, sampling, beams, several sequences per prompt, left-padded
batches, streamers, goes on from a returned cache, and takes drafts from an assistant or from the prompt.
"""

from __future__ import annotations

try:
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoTokenizer,
        PreTrainedConfig,  # noqa: F401
    )
except ImportError as error:
    raise ImportError(
        "futurefill_rs.hf needs transformers 5: install the extra with"
        "  pip install 'futurefill_rs[transformers]'"
    ) from error

from futurefill_rs.hf.architectures import (
    FlashSTUForCausalLM,
    FlashSTUModel,
    HyenaDNAForCausalLM,
    HyenaDNAModel,
    StripedHyena2ForCausalLM,
    StripedHyena2Model,
    StripedHyenaForCausalLM,
    StripedHyenaModel,
)
from futurefill_rs.hf.cache import CACHE_NAME, ConvolutionCache
from futurefill_rs.hf.config import FlashSTUConfig, HyenaDNAConfig, StripedHyena2Config, StripedHyenaConfig
from futurefill_rs.hf.model import ConvolutionForCausalLM, ConvolutionModel
from futurefill_rs.hf.tokenizer import Evo2Tokenizer, HyenaDNATokenizer


def _register() -> None:
    for model, causal in (
        (FlashSTUModel, FlashSTUForCausalLM),
        (HyenaDNAModel, HyenaDNAForCausalLM),
        (StripedHyenaModel, StripedHyenaForCausalLM),
        (StripedHyena2Model, StripedHyena2ForCausalLM),
    ):
        config = causal.config_class
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
        AutoModelForCausalLM.register(config, causal, exist_ok=True)
    AutoTokenizer.register(HyenaDNAConfig, HyenaDNATokenizer, exist_ok=True)
    AutoTokenizer.register(StripedHyena2Config, Evo2Tokenizer, exist_ok=True)


_register()

__all__ = [
    "CACHE_NAME",
    "ConvolutionCache",
    "ConvolutionForCausalLM",
    "ConvolutionModel",
    "Evo2Tokenizer",
    "FlashSTUConfig",
    "FlashSTUForCausalLM",
    "FlashSTUModel",
    "HyenaDNAConfig",
    "HyenaDNAForCausalLM",
    "HyenaDNAModel",
    "HyenaDNATokenizer",
    "StripedHyena2Config",
    "StripedHyena2ForCausalLM",
    "StripedHyena2Model",
    "StripedHyenaConfig",
    "StripedHyenaForCausalLM",
    "StripedHyenaModel",
]
