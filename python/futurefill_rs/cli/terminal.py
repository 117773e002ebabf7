"""What the command writes: text as it comes, notes and progress on standard error."""

from __future__ import annotations

import codecs
import sys
import time
from collections.abc import Sequence
from typing import BinaryIO

from futurefill_rs import _interrupt

CLEAR = "\r\x1b[K"
PATIENCE = 1.0
"""Seconds before a progress bar appears."""
PAUSE = 0.1
"""Seconds between two looks of it."""
WIDTH = 30


class CommandError(Exception):
    """A message for the user: one line, exit status 2."""


def printable(text: str) -> str:
    """Text as one line without anything that a terminal would obey."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def note(text: str) -> None:
    """A line on standard error."""
    if sys.stderr is not None:
        print(f"futurefill: {printable(text)}", file=sys.stderr, flush=True)


class Progress:
    """A bar on standard error for what takes longer than a second, where that is a terminal.

    Called with `(done, total)` as progress goes on. `clear` removes the bar; so does Ctrl-C.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._started = time.monotonic()
        self._next = self._started + PATIENCE
        self._live = sys.stderr is not None and sys.stderr.isatty()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if not self._live or now < self._next:
            return
        self._next = now + PAUSE
        share = min(1.0, done / max(1, total))
        filled = round(WIDTH * share)
        left = f", {(now - self._started) * (1 / share - 1):.0f} s left" if share else ""
        bar = "#" * filled + "." * (WIDTH - filled)
        _interrupt.clear = CLEAR.encode()
        sys.stderr.write(f"{CLEAR}{self.what} [{bar}] {share:.0%}{left}")
        sys.stderr.flush()

    def clear(self) -> None:
        if _interrupt.clear:
            _interrupt.clear = b""
            sys.stderr.write(CLEAR)
            sys.stderr.flush()


class Text:
    """Bytes on their way out, at once but in whole UTF-8 sequences; what is not UTF-8 passes unchanged."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")

    def write(self, data: bytes, final: bool = False) -> None:
        text = self._decoder.decode(data, final)
        if text:
            self._stream.write(text.encode("utf-8", "surrogateescape"))
            self._stream.flush()

    def finish(self) -> None:
        self.write(b"", final=True)


class UntilStop:
    """Bytes up to the first of some stop strings: what may be the beginning of one is held back.

    Attributes:
        found: the stop string that came; nothing passes after it.
    """

    def __init__(self, stops: Sequence[bytes]) -> None:
        self._stops = stops
        self._held = b""
        self.found: bytes | None = None

    def __call__(self, data: bytes) -> bytes:
        """What can be written now."""
        if self.found is not None:
            return b""
        held = self._held + data
        places = [(held.find(stop), stop) for stop in self._stops if stop in held]
        if places:
            place, self.found = min(places)
            self._held = b""
            return held[:place]
        begun = max((_begun(held, stop) for stop in self._stops), default=0)
        passed = len(held) - begun
        self._held = held[passed:]
        return held[:passed]

    def rest(self) -> bytes:
        """What was held back, when nothing follows."""
        held, self._held = self._held, b""
        return held


def _begun(data: bytes, stop: bytes) -> int:
    """Bytes at the end of the data that are the beginning of the stop string."""
    return next((n for n in range(min(len(data), len(stop) - 1), 0, -1) if data.endswith(stop[:n])), 0)
