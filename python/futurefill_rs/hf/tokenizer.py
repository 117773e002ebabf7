"""The tokenizers of HyenaDNA and of Evo 2."""

from __future__ import annotations

import json
import os
from typing import Any, ClassVar

from transformers import PreTrainedTokenizer


class _Unknown(int):
    """The id of `[UNK]` that remembers which character it stands for.

    transformers looks for `stop_strings` in what a tokenizer makes of tokens behind "abcdef", which it first
    turns into ids and back.
    """

    def __new__(cls, index: int, character: str) -> _Unknown:
        unknown = super().__new__(cls, index)
        unknown.character = character
        return unknown

    character: str

    def __getnewargs__(self) -> tuple[int, str]:
        return int(self), self.character


class HyenaDNATokenizer(PreTrainedTokenizer):  # type: ignore[misc]
    """One token for each character: ids 0 to 6 are special, the characters follow from 7 (A, C, G, T, N).

    Any other character is `[UNK]`. No special tokens are added to a text. Padding goes to the left.
    """

    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask"]
    SPECIAL = ("[CLS]", "[SEP]", "[BOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]")

    def __init__(self, characters: str = "ACGTN", padding_side: str = "left", **kwargs: Any) -> None:
        self.characters = characters = "".join(characters)
        self._ids = {token: i for i, token in enumerate((*self.SPECIAL, *characters))}
        self._tokens = list(self._ids)
        names = {"bos": "[BOS]", "eos": "[SEP]", "sep": "[SEP]", "cls": "[CLS]", "pad": "[PAD]"}
        names |= {"mask": "[MASK]", "unk": "[UNK]"}
        for name, token in names.items():
            kwargs.setdefault(f"{name}_token", token)
        super().__init__(characters=characters, padding_side=padding_side, **kwargs)

    @property
    def vocab_size(self) -> int:
        return len(self._tokens)

    def get_vocab(self) -> dict[str, int]:
        return {**self._ids, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        index = self._ids.get(token)
        return _Unknown(self._ids["[UNK]"], token) if index is None else index

    def _convert_id_to_token(self, index: int) -> str:
        if isinstance(index, _Unknown):
            return index.character
        return self._tokens[index] if 0 <= index < len(self._tokens) else "[UNK]"

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        return token_ids_0 + (token_ids_1 or [])

    def get_special_tokens_mask(
        self,
        token_ids_0: list[int],
        token_ids_1: list[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        return [int(i < len(self.SPECIAL)) for i in token_ids_0 + (token_ids_1 or [])]

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        name = "vocab.json" if filename_prefix is None else f"{filename_prefix}-vocab.json"
        path = os.path.join(save_directory, name)
        with open(path, "w", encoding="utf-8") as file:
            json.dump(self._ids, file, indent=2)
        return (path,)


class Evo2Tokenizer(PreTrainedTokenizer):  # type: ignore[misc]
    """One token for each byte of a text in UTF-8; the id is the byte. 0 begins and ends a sequence, 1 is
    padding, and ids from 256 on, of which the vocabulary has as many, stand for nothing.

    No special tokens are added to a text. Padding goes to the left.
    """

    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask"]
    EOD, PAD = "<eod>", "<pad>"

    def __init__(self, vocab_size: int = 512, padding_side: str = "left", **kwargs: Any) -> None:
        self._tokens = [self.EOD, self.PAD, *map(chr, range(2, 256))]
        self._tokens += [f"<{i}>" for i in range(256, vocab_size)]
        self._ids = {token: i for i, token in enumerate(self._tokens)}
        for name, token in {"bos": self.EOD, "eos": self.EOD, "pad": self.PAD}.items():
            kwargs.setdefault(f"{name}_token", token)
        super().__init__(vocab_size=vocab_size, padding_side=padding_side, **kwargs)

    @property
    def vocab_size(self) -> int:
        return len(self._tokens)

    def get_vocab(self) -> dict[str, int]:
        return {**self._ids, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [self._tokens[byte] for byte in text.encode("utf-8", "surrogatepass")]

    def _convert_token_to_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self._tokens[index] if 0 <= index < len(self._tokens) else ""

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        special = {self.EOD, self.PAD}
        text = b"".join(
            token.encode() if token in special else bytes([ord(token)]) if len(token) == 1 else b""
            for token in tokens
        )
        return text.decode("utf-8", "replace")

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        return token_ids_0 + (token_ids_1 or [])

    def get_special_tokens_mask(
        self,
        token_ids_0: list[int],
        token_ids_1: list[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        return [int(i < 2) for i in token_ids_0 + (token_ids_1 or [])]

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        # There is nothing to save: the tokens are the bytes.
        return ()
