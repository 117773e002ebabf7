"""Stop strings in a text that grows id by id."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]

WINDOW = 16
"""Ids that are decoded again in every step, at least; twice as many before the window moves on."""


class GrowingText:
    """The text of ids that come one by one, and where a stop string begins in it.

    A step decodes the last ids only, with those before them that may still change how they read: pieces of a
    character, blanks that a tokenizer drops at the beginning of a text. What lies before these ids is kept as
    text. It moves on where the text of the later ids is the end of the text of all; with a decoder for which
    that never holds, all ids are decoded in each step.
    """

    def __init__(self, decode: Decode, stop: Sequence[str]) -> None:
        self._decode, self._stop = decode, stop
        self._longest = max(map(len, stop), default=0)
        self._ids: list[int] = []
        self._before, self._recent = "", ""
        self._room = 2 * WINDOW

    @property
    def text(self) -> str:
        return self._before + self._recent

    def add(self, id: int) -> int | None:
        """Take in the next id; the place in `text` where the first stop string begins, None without one."""
        self._ids.append(id)
        self._recent = self._decode(self._ids)
        # A stop string may begin in what is kept; whatever lies further back was searched before.
        reached = max(0, len(self._before) - self._longest)
        searched = self._before[reached:] + self._recent
        places = [place for place in (searched.find(stop) for stop in self._stop) if place >= 0]
        if places:
            return reached + min(places)
        if len(self._ids) >= self._room:
            self._move_on()
        return None

    def _move_on(self) -> None:
        for first in range(len(self._ids) - WINDOW, 0, -1):
            later = self._decode(self._ids[first:])
            if later and self._recent.endswith(later):
                self._before += self._recent[: len(self._recent) - len(later)]
                self._ids, self._recent = self._ids[first:], later
                self._room = 2 * WINDOW
                return
            if first <= len(self._ids) - 2 * WINDOW:
                break
        # Not tried again before there are twice as many: the trials together cost no more than the steps.
        self._room = 2 * len(self._ids)
