"""Undoing steps: copies of a cache's states from time to time, and the inputs since."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from futurefill_rs.nn.protocol import State


class Journal:
    """What it takes to go back up to `limit` positions.

    A convolution's past cannot be subtracted without loss, so going back means taking a copy from before and
    reading again what came between. Two copies are held at most, `limit` or more positions apart: one copy
    for every `limit` positions is the cost of being able to go back.
    """

    def __init__(self, limit: int, used: int, states: list[State]) -> None:
        self.limit = limit
        self._copies = [(used, [state.fork() for state in states])]
        self._blocks: list[Tensor] = []

    def record(self, block: Tensor, used: int, states: list[State]) -> None:
        """Note inputs `(B, m, ..)` after which the cache has used `used` positions."""
        self._blocks.append(block.clone())
        if used - self._copies[-1][0] >= self.limit:
            self._copies.append((used, [state.fork() for state in states]))
        if len(self._copies) > 1 and self._copies[1][0] <= used - self.limit:
            first, second = self._copies[0][0], self._copies[1][0]
            inputs = torch.cat(self._blocks, 1)
            self._blocks = [inputs[:, second - first :]]
            del self._copies[0]

    def reach(self, used: int) -> int:
        """Positions that can be undone now."""
        return min(self.limit, used - self._copies[0][0])

    def back_to(self, target: int) -> tuple[int, list[State], Tensor | None]:
        """A copy from `target` or before, when it was, and the inputs from then to `target`."""
        while self._copies[-1][0] > target:
            del self._copies[-1]
        first = self._copies[0][0]
        used, states = self._copies[-1]
        inputs = torch.cat(self._blocks, 1)[:, : target - first] if self._blocks else None
        self._blocks = [] if inputs is None else [inputs]
        return used, [state.fork() for state in states], None if inputs is None else inputs[:, used - first :]

    def fork(self) -> Journal:
        copy: Any = object.__new__(Journal)
        copy.limit = self.limit
        copy._copies = [(used, [state.fork() for state in states]) for used, states in self._copies]
        copy._blocks = list(self._blocks)
        forked: Journal = copy
        return forked

    def reorder(self, index: Tensor) -> None:
        for _, states in self._copies:
            for state in states:
                state.reorder(index)
        self._blocks = [block.index_select(0, index.to(block.device)) for block in self._blocks]

    @property
    def nbytes(self) -> int:
        copies = sum(state.nbytes for _, states in self._copies for state in states)
        return copies + sum(block.nbytes for block in self._blocks)
