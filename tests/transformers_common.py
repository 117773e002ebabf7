"""Shared by the tests of the Hugging Face classes: small random models and prompts."""

import torch
from futurefill_rs import hf
from models_common import DNA, FLASH, HYBRID, STRIPED, STRIPED_2, STRIPED_ATTENTION

ENDLESS = {"eos_token_id": None, "pad_token_id": 0, "bos_token_id": None}
NAMES = ["flash_stu", "hybrid", "hyenadna", "stripedhyena", "stripedhyena_attention", "stripedhyena2"]


def make(name):
    torch.manual_seed(0)
    classes = {
        "flash_stu": (hf.FlashSTUForCausalLM, hf.FlashSTUConfig, FLASH),
        "hybrid": (hf.FlashSTUForCausalLM, hf.FlashSTUConfig, HYBRID),
        "hyenadna": (hf.HyenaDNAForCausalLM, hf.HyenaDNAConfig, DNA),
        "stripedhyena": (hf.StripedHyenaForCausalLM, hf.StripedHyenaConfig, STRIPED),
        "stripedhyena_attention": (hf.StripedHyenaForCausalLM, hf.StripedHyenaConfig, STRIPED_ATTENTION),
        "stripedhyena2": (hf.StripedHyena2ForCausalLM, hf.StripedHyena2Config, STRIPED_2),
    }
    model_class, config_class, settings = classes[name]
    model = model_class(config_class(**settings, **ENDLESS)).eval()
    if name == "hyenadna":
        # Upstream's initialisation is so small that nothing but the last token would matter.
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.endswith(("_proj.weight", "fc1.weight", "fc2.weight", "embeddings.weight")):
                    parameter.mul_(15)
    return model


def ids_for(model, length=6, batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, model.config.vocab_size, (batch, length), generator=generator)


def returned_cache(output):
    return getattr(output, hf.CACHE_NAME)
