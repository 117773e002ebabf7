"""What upstream's files call things: one name for every tensor, and the kind of a configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_ANYWHERE = r"\b(?:(?:_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\.)+"
_PREFIXES = ("module", "model", "net", "_forward_module", "state_dict")
_KIND_PREFIXES = {"hyenadna_lm": ("hyena",), "stripedhyena1_lm": ("backbone",)}
"""What the Hugging Face hub's checkpoints put before every name."""

MODEL_TYPES = {
    "flash_stu_lm": "FlashSTU",
    "hyenadna_lm": "hyenadna",
    "stripedhyena1_lm": "stripedhyena",
    "stripedhyena2_lm": "stripedhyena2",
}
"""`model_type` of the configurations that transformers reads."""

_TELLING_KEYS = {
    "flash_stu_lm": ("num_eigh", "n_layers"),
    "hyenadna_lm": ("layer", "n_layer"),
    "stripedhyena2_lm": ("hcs_layer_idxs", "hcm_layer_idxs", "hcl_layer_idxs", "num_layers"),
    "stripedhyena1_lm": ("hyena_filter_groups", "num_layers"),
}

SHOWN = 200
"""Characters of a name that errors repeat."""


def shown(name: object) -> str:
    """A name from a file as it may stand in an error: one line of moderate length, no control characters."""
    text = name if isinstance(name, str) else repr(name)
    if len(text) > SHOWN:
        text = text[: SHOWN - 3] + "..."
    return text if text.isprintable() else ascii(text)[1:-1]


def renames(kind: str) -> dict[str, str]:
    """Patterns and what stands for them in the names of a kind's tensors, in order.

    They drop what training wrappers leave in a name and what upstream puts around a block whose activations
    it recomputes. transformers takes the same mapping, and applies each of its patterns once.
    """
    prefixes = "|".join((*_PREFIXES, *_KIND_PREFIXES.get(kind, ())))
    return {
        _ANYWHERE: "",
        rf"^(?:(?:{prefixes})\.)+": "",
        r"\.mixer\.layer\.": ".mixer.",
        r"\.mlp\.layer\.": ".mlp.",
        # flash-stu 1 has its filters in every layer.
        r"^layers\.\d+\.stu\.phi$": "phi",
    }


def plain_name(name: str, kind: str) -> str:
    """The name that our module has for upstream's `name`."""
    for pattern, replacement in renames(kind).items():
        name = re.sub(pattern, replacement, name)
    return name


def is_skipped(name: object) -> bool:
    """Whether a name is that of what an FP8 library saves beside the weights."""
    return isinstance(name, str) and name.endswith("._extra_state")


def kind_of(config: Mapping[str, Any]) -> object:
    """`kind` of a configuration; where it has none, the one that `model_type` or its keys tell, or None."""
    if "kind" in config:
        return config["kind"]
    model_type = str(config.get("model_type", "")).lower()
    for kind, name in MODEL_TYPES.items():
        if model_type == name.lower():
            return kind
    if model_type:
        return None
    found = [kind for kind, keys in _TELLING_KEYS.items() if all(key in config for key in keys)]
    # StripedHyena 2 has the keys of StripedHyena 1, and layers of its own.
    if found == ["stripedhyena1_lm"] and "hcl_layer_idxs" in config:
        return None
    return found[0] if found else None
