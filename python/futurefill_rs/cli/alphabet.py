"""What a prompt means to a model, and what its ids are written as: bytes, or the letters of DNA."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from futurefill_rs.cli.sequences import bases_of, is_header
from futurefill_rs.cli.terminal import CommandError

if TYPE_CHECKING:
    from torch import Tensor

    from futurefill_rs.models._alphabet import Alphabet


class Text:
    """Prompts of a model over bytes."""

    def __init__(self, alphabet: Alphabet) -> None:
        self.alphabet = alphabet
        self.unit = alphabet.unit
        begin = alphabet.begin
        self.start = ord("\n") if begin is None else begin
        """What an empty prompt is read as."""
        self.end = begin
        """The id that ends a sequence; None without one."""
        self.stands_in = "a single line break" if begin is None else "the token between sequences"

    def letters(self, prompt: bytes) -> bytes:
        """The part of a prompt that the model reads."""
        return prompt

    def shown(self, prompt: bytes) -> bytes:
        """The prompt as it is written in front of its continuation."""
        return prompt

    def encode(self, prompt: bytes) -> list[int]:
        ids: list[int] = self.alphabet.encode(self.letters(prompt), "generate: PROMPT").tolist()
        return ids

    def decode(self, id: int) -> bytes:
        return bytes([self.alphabet.bytes_of[id]])

    def mask(self, size: int) -> Tensor:
        """`(size,)`, true for the ids that stand for something."""
        import torch

        known = torch.zeros(size, dtype=torch.bool)
        known[list(self.alphabet.bytes_of)] = True
        return known


class Genome(Text):
    """Prompts of a model over DNA: one FASTA record is read as its sequence, the header is passed over.

    A model over bytes takes everything else as it is; one over bases alone takes small letters, blanks and
    line breaks too.
    """

    def letters(self, prompt: bytes) -> bytes:
        lines = prompt.splitlines()
        headers = [number for number, line in enumerate(lines, 1) if is_header(line)]
        first = next((number for number, line in enumerate(lines, 1) if line.strip()), 0)
        if not self.alphabet.folds and headers[:1] != [first]:
            return prompt
        if headers and headers != [first]:
            raise CommandError(
                "generate: PROMPT: expected one sequence or one FASTA record, got several: "
                f"line {headers[-1]} begins another one"
            )
        known = self.alphabet.bases
        return b"".join(
            bases_of(line, known, f"generate: PROMPT: line {number}")
            for number, line in enumerate(lines, 1)
            if number not in headers
        )

    def shown(self, prompt: bytes) -> bytes:
        """Without line breaks at its end, so that the sequence goes on; a header keeps its own."""
        if self.letters(prompt) == prompt:
            return prompt
        text = prompt.rstrip()
        return text + b"\n" if is_header(text[text.rfind(b"\n") + 1 :]) else text


def alphabet_of(model: Any, command: str) -> Alphabet:
    """Raises a `CommandError` for a model whose ids are neither bytes nor nucleotides."""
    alphabet: Alphabet | None = model.alphabet
    if alphabet is None:
        raise CommandError(
            f"{command}: --model: expected a model over bytes (256 to 512 ids) or nucleotides, "
            f"got one of {model.vocab_size} ids, whose tokenizer is not known here"
        )
    return alphabet


def prompts_of(model: Any) -> Text:
    """How prompts are read and continued."""
    alphabet = alphabet_of(model, "generate")
    return Text(alphabet) if alphabet.begin is None else Genome(alphabet)
