"""Attention masks: which positions of a block hold tokens, for rows of a batch that share one clock."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from futurefill_rs._torch_args import is_fake


@dataclass(frozen=True)
class Alignment:
    """A block of positions, brought into the order in which a model can read it: padding first.

    A convolution cannot pass over a position in between, but it need not see one at all.

    Attributes:
        order: for each row the positions of the block, `(B, T)`, padding before tokens; None: as they are.
        skipped: the first positions in that order, which hold padding in every row.
        starts: where the tokens of each row begin among the others, `(B,)`; None: with the first.
    """

    order: Tensor | None = None
    skipped: int = 0
    starts: Tensor | None = None

    def gather(self, x: Tensor) -> Tensor:
        """What the model reads of `x` `(B, T, ..)`."""
        if self.order is not None:
            x = x[torch.arange(x.shape[0], device=x.device).unsqueeze(-1), self.order.to(x.device)]
        return x[:, self.skipped :]

    def scatter(self, y: Tensor) -> Tensor:
        """Outputs `(B, T, D)` in the block's own order; zeros where nothing was read."""
        if self.skipped:
            y = torch.cat([y.new_zeros(y.shape[0], self.skipped, *y.shape[2:]), y], 1)
        if self.order is not None:
            y = y[torch.arange(y.shape[0], device=y.device).unsqueeze(-1), self.order.argsort(1).to(y.device)]
        return y


def aligned(mask: Tensor | None, begun: Tensor) -> Alignment:
    """How to read a block with the mask `(B, T)`, None where all positions hold tokens.

    Args:
        begun: `(B,)`, the rows that tokens were read of before this block.

    Raises:
        ValueError: a row that has begun pauses where others go on: their common clock cannot.
    """
    if mask is None:
        return Alignment()
    length = mask.shape[1]
    late = length - mask.sum(1)
    order = mask.long().argsort(dim=1, stable=True)
    if is_fake(mask) or mask.is_meta:
        return Alignment(order, 0, late)
    # A model reads one position at least.
    skipped = min(int((late[begun] if bool(begun.any()) else late).min()), length - 1)
    starts = late - skipped
    paused = (starts != 0) & (begun | (starts < 0))
    if bool(paused.any()):
        raise ValueError(
            "attention_mask: expected rows that have begun to pause together, got "
            f"{late.tolist()} positions without a token in the rows of one block"
        )
    moved = bool((order != torch.arange(length, device=mask.device)).any())
    return Alignment(order if moved else None, skipped, starts if bool(starts.any()) else None)


def without_end(mask: Tensor | None) -> Tensor | None:
    """The mask with tokens for the padding at the end of each row, which no earlier position sees."""
    if mask is None:
        return None
    return mask | (mask.flip(1).cumsum(1).flip(1) == 0)
