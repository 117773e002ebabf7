"""Layers for long-convolution sequence models that train offline and generate online, exactly.

Every layer is a `torch.nn.Module` with the same entries, which agree at every position::

    y        = layer(x)                      # x (B, T, D): the whole sequence, differentiable
    y, cache = layer.prefill(x, max_new)     # the same outputs, and a cache for max_new more positions
    y        = layer.step(x, cache)          # one position, x (B, D)
    y        = layer.extend(x, cache)        # a known block, x (B, m, D)
"""

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise ImportError(
        "futurefill_rs.nn needs torch: install the extra with  pip install 'futurefill_rs[torch]'"
    ) from error

from futurefill_rs.nn.attention import CausalSelfAttention, SlidingWindowAttention
from futurefill_rs.nn.cache import Cache
from futurefill_rs.nn.cascade import HyenaCascade
from futurefill_rs.nn.conv import CausalConv, LongConv
from futurefill_rs.nn.h3 import H3
from futurefill_rs.nn.hyena import HyenaOperator, MonarchMixer
from futurefill_rs.nn.layer import Layer
from futurefill_rs.nn.stu import STU, spectral_filters

__all__ = [
    "H3",
    "STU",
    "Cache",
    "CausalConv",
    "CausalSelfAttention",
    "HyenaCascade",
    "HyenaOperator",
    "Layer",
    "LongConv",
    "MonarchMixer",
    "SlidingWindowAttention",
    "spectral_filters",
]
