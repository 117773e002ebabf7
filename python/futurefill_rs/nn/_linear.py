"""A linear layer that is quicker for the one row of a generation step."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WORTHWHILE = 1 << 17
"""Weights from which on a split product is quicker."""


class Linear(nn.Linear):
    """`torch.nn.Linear`, whose product for one row on a CPU runs as two halves of the output.

    For a single row the matrix is read once from memory, and the BLAS behind torch reads a large one at a
    half to a third of the speed that its batched kernel reaches on the same bytes (measured: 75 against 33
    microseconds for 768 x 256 in float32). For two rows the plain product is the quicker one.
    """

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        if (
            input.ndim == 2
            and input.shape[0] == 1
            and weight.numel() >= WORTHWHILE
            and weight.dtype == torch.float32
            and weight.device.type == "cpu"
            and not torch.is_grad_enabled()
            and weight.is_contiguous()
            and weight.shape[0] % 2 == 0
        ):
            column = input.t().expand(2, -1, -1)
            halves = weight.view(2, -1, weight.shape[1])
            if self.bias is None:
                y = torch.bmm(halves, column)
            else:
                y = torch.baddbmm(self.bias.view(2, -1, 1), halves, column)
            return y.view(1, -1)
        return F.linear(input, weight, self.bias)
