"""The built-in text model, on a chapter of the King James text that it was not trained on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import futurefill_rs as ff
import pytest
import torch
from futurefill_rs.data import BUILTIN
from torch.nn import functional as F

CHAPTER = Path(__file__).parent / "data" / "isaiah_51.txt"
FIVE_GRAM = 1.638
"""Bits per byte of the chapter under the Kneser-Ney byte 5-gram of examples/text_baselines.py."""


@pytest.fixture(scope="module")
def model() -> Any:
    return ff.models.load(BUILTIN)


@pytest.fixture(scope="module")
def ids() -> Any:
    return torch.tensor([list(CHAPTER.read_bytes())])


def test_it_is_small_and_comes_with_a_card() -> None:
    assert (BUILTIN / "model.safetensors").stat().st_size < 8_000_000
    card = (BUILTIN / "MODEL_CARD.md").read_text(encoding="utf-8")
    for word in ("King James", "licence", "xz -9", "5-gram", "held-out", "train_text.py"):
        assert word in card


def test_it_is_attention_free_over_bytes_with_a_long_context(model: Any) -> None:
    assert model.config["vocab_size"] == 256
    assert model.config["seq_len"] >= 4096
    assert not model.config["use_attn"]


@torch.no_grad()
def test_it_codes_a_held_out_chapter_better_than_a_five_gram(model: Any, ids: Any) -> None:
    loss = F.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:])
    assert loss.item() / math.log(2) < FIVE_GRAM - 0.3


@torch.no_grad()
@pytest.mark.parametrize("prompt", [1, 2, 77])
def test_prefill_and_step_agree_with_forward(model: Any, ids: Any, prompt: int) -> None:
    length = 200
    expected = model(ids[:, :length])
    first, cache = model.prefill(ids[:, :prompt], length - prompt)
    rest = [model.step(ids[:, t], cache) for t in range(prompt, length)]
    got = torch.cat([first, torch.stack(rest, 1)], 1)
    # Five layers add up their rounding; a single one stays within a few float32 eps.
    assert torch.linalg.norm(got - expected) < 1e-5 * torch.linalg.norm(expected)


def test_it_writes_words_of_the_text(model: Any, ids: Any) -> None:
    prompt = torch.tensor([list(b"In the beginning")])
    text = bytes(ff.generate(model, prompt, 300)[0].tolist()).decode()
    known = set(CHAPTER.read_text(encoding="utf-8").lower().replace(",", "").replace(".", "").split())
    written = [word.strip(",.:;").lower() for word in text.split()[:-1]]
    assert sum(word in known for word in written) > 0.4 * len(written)
    assert torch.equal(*(ff.generate(model, prompt, 64, temperature=0.8, seed=3) for _ in range(2)))
