"""What a model's ids stand for: the bytes of a text, or the letters of DNA."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

BASES = b"ACGTN"
AMBIGUOUS = b"RYSWKMBDHV"
"""Letters of IUPAC for one of several bases."""
PAIRS = (b"ACGTNRYSWKMBDHV", b"TGCANYRSWMKVHDB")
"""Each letter, and the letter of the base across from it."""


class Alphabet:
    """Texts as ids, and the other strand of DNA.

    Args:
        unit: what one id stands for.
        ids: the id of each byte that has one.
        begin: the id that stands before a sequence and ends it; None without one.
        folds: whether small letters stand for capitals.

    Attributes:
        bases: the letters of DNA that have ids.
    """

    def __init__(self, unit: str, ids: Mapping[int, int], *, begin: int | None, folds: bool = False) -> None:
        self.unit, self.begin, self.folds = unit, begin, folds
        self.bytes_of = {id: byte for byte, id in ids.items()}
        self.bases = bytes(letter for letter in BASES + AMBIGUOUS if letter in ids)
        self._ids = np.full(256, -1, np.int64)
        for byte, id in ids.items():
            self._ids[byte] = id
            if folds:
                self._ids[ord(chr(byte).lower())] = id
        self._across = self._complement()

    def _complement(self) -> Tensor:
        """The id across from each id, -1 where it stands for no base."""
        across = torch.full((max(self.bytes_of) + 1,), -1, dtype=torch.int64, device="cpu")
        for strand, other in zip(*PAIRS, strict=True):
            for letters in ((strand, other), (ord(chr(strand).lower()), ord(chr(other).lower()))):
                here, there = (int(self._ids[letter]) for letter in letters)
                if here >= 0:
                    across[here] = there
        return across

    def encode(self, text: str | bytes, name: str) -> Tensor:
        """Ids `(T,)` of a text; a `ValueError` for the argument `name` where a character has none."""
        data = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else bytes(text)
        ids = self._ids[np.frombuffer(data, np.uint8)]
        if ids.size and ids.min() < 0:
            place = int((ids < 0).argmax())
            known = bytes(byte for _, byte in sorted(self.bytes_of.items())).decode()
            # Up to here all are letters of one byte each.
            got = data[place:].decode("utf-8", "replace")[0]
            raise ValueError(f"{name}: expected only the letters {known}, got {got!r} at position {place}")
        return torch.from_numpy(ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids; those that stand for nothing are left out."""
        known = self.bytes_of
        return bytes(known[int(id)] for id in ids if int(id) in known).decode("utf-8", "replace")

    def reverse_complement(self, ids: Tensor, name: str) -> Tensor:
        """The other strand `(T,)` of the bases `ids` `(T,)`, as it is read."""
        across = self._across.to(ids.device)
        known = (ids >= 0) & (ids < across.shape[0])
        other = torch.where(known, across[ids.clamp(0, across.shape[0] - 1)], -1)
        if bool((other < 0).any()):
            place = int((other < 0).nonzero()[0])
            got = self.bytes_of.get(int(ids[place]))
            got_text = f"id {int(ids[place])}" if got is None else repr(chr(got))
            bases = self.bases.decode()
            raise ValueError(
                f"{name}: expected only the bases {bases} for a reverse complement, "
                f"got {got_text} at position {place}"
            )
        return other.flip(0)


BYTES = Alphabet("byte", {i: i for i in range(256)}, begin=None)
GENOMES = Alphabet("byte", {i: i for i in range(256)}, begin=0)
"""The bytes of Evo 1 and Evo 2: 0 begins and ends a sequence."""
NUCLEOTIDES = Alphabet("base", {letter: 7 + i for i, letter in enumerate(BASES)}, begin=1, folds=True)
"""HyenaDNA's character tokenizer: 0 to 6 are special, 1 separates sequences."""


def holds_bytes(vocab_size: int) -> bool:
    """Whether a vocabulary is that of bytes, with up to as many ids beside them."""
    return 256 <= vocab_size <= 512
