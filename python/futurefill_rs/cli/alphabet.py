"""What a model's ids mean to the command line: bytes, or the letters of DNA."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from futurefill_rs.cli.terminal import CommandError

if TYPE_CHECKING:
    from torch import Tensor


class Bytes:
    """Ids 0 to 255 are the bytes themselves."""

    name = "byte"
    bytes_of = {i: i for i in range(256)}  # noqa: RUF012
    start = ord("\n")
    stands_in = "a single line break"
    """What an empty prompt is read as."""

    def letters(self, prompt: bytes) -> bytes:
        """The part of a prompt that the model reads."""
        return prompt

    def shown(self, prompt: bytes) -> bytes:
        """The prompt as it is written in front of its continuation."""
        return prompt

    def encode(self, prompt: bytes) -> list[int]:
        id_of = {byte: id for id, byte in self.bytes_of.items()}
        letters = self.letters(prompt)
        unknown = set(letters) - set(id_of)
        if unknown:
            first = next(byte for byte in letters if byte in unknown)
            known = bytes(sorted(id_of)).decode()
            raise CommandError(f"generate: PROMPT: expected only the letters {known}, got {chr(first)!r}")
        return [id_of[byte] for byte in letters]

    def decode(self, id: int) -> bytes:
        return bytes([self.bytes_of[id]])

    def mask(self, size: int) -> Tensor:
        """`(size,)`, true for the ids that stand for something."""
        import torch

        known = torch.zeros(size, dtype=torch.bool)
        known[list(self.bytes_of)] = True
        return known


class Nucleotides(Bytes):
    """HyenaDNA's character tokenizer: 0 to 6 are special, 1 separates sequences.

    Lower case, blanks and line breaks are allowed, and so is one FASTA record, whose header is passed over.
    """

    name = "base"
    bytes_of = {7 + i: letter for i, letter in enumerate(b"ACGTN")}  # noqa: RUF012
    start = 1
    stands_in = "a separator"

    def letters(self, prompt: bytes) -> bytes:
        lines = [line.strip() for line in prompt.splitlines()]
        lines = [line for line in lines if line]
        headers = [number for number, line in enumerate(lines) if _is_header(line)]
        if headers and headers != [0]:
            raise CommandError(
                "generate: PROMPT: expected one sequence or one FASTA record, got several: "
                f"line {headers[-1] + 1} begins another one"
            )
        return b"".join(b"".join(line.split()) for line in lines[len(headers) :]).upper()

    def shown(self, prompt: bytes) -> bytes:
        """Without line breaks at its end, so that the sequence goes on; a header keeps its own."""
        text = prompt.rstrip()
        return text + b"\n" if _is_header(text[text.rfind(b"\n") + 1 :]) else text


def _is_header(line: bytes) -> bool:
    return line.startswith((b">", b";"))


def alphabet_of(model: Any) -> Bytes:
    """Raises a `CommandError` for a model whose ids are neither bytes nor nucleotides."""
    from futurefill_rs import models

    if isinstance(model, models.HyenaDNA):
        return Nucleotides()
    if not 256 <= model.vocab_size <= 512:
        raise CommandError(
            "generate: --model: expected a model over bytes (256 to 512 ids) or nucleotides, "
            f"got one of {model.vocab_size} ids, whose tokenizer is not known here"
        )
    return Bytes()
