"""The models' blocks as transformers' gradient checkpointing knows them.

A block of a Hugging Face model is one of these: all that it is otherwise, and recomputed in the backward pass
where that is asked for.
"""

from __future__ import annotations

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from futurefill_rs.models import _striped, flash_stu, hyenadna


class STUBlock(GradientCheckpointingLayer, flash_stu.STUBlock):  # type: ignore[misc]
    """That of FlashSTU."""


class WindowedAttentionBlock(GradientCheckpointingLayer, flash_stu.AttentionBlock):  # type: ignore[misc]
    """That of FlashSTU with attention."""


class HyenaBlock(GradientCheckpointingLayer, hyenadna._Block):  # type: ignore[misc]
    """That of HyenaDNA."""


class ConvolutionBlock(GradientCheckpointingLayer, _striped.ConvolutionBlock):  # type: ignore[misc]
    """That of StripedHyena 1 and 2."""


class AttentionBlock(GradientCheckpointingLayer, _striped.AttentionBlock):  # type: ignore[misc]
    """That of StripedHyena 1 and 2 with attention."""


RECOMPUTED: dict[type[nn.Module], type[nn.Module]] = {
    block.__mro__[2]: block
    for block in (STUBlock, WindowedAttentionBlock, HyenaBlock, ConvolutionBlock, AttentionBlock)
}
