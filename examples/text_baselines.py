"""What a text model has to beat: `xz -9` and interpolated byte n-grams, in bits per byte of held-out text."""

from __future__ import annotations

import lzma

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]


def xz_bits_per_byte(held_out: bytes, training: bytes = b"") -> float:
    """Bits that `xz -9` adds for each byte of `held_out` when it has already packed `training`."""

    def packed(data: bytes) -> int:
        return len(lzma.compress(data, preset=9))

    return 8 * (packed(training + held_out) - (packed(training) if training else 0)) / len(held_out)


def ngram_bits_per_byte(held_out: Bytes, training: Bytes, order: int, smoothing: str = "kneser-ney") -> float:
    """Mean code length of `held_out` under an interpolated byte n-gram of `order`, counted on `training`.

    Args:
        order: bytes in an n-gram, 1 to 7: the context is `order - 1` bytes.
        smoothing: "kneser-ney" (modified, three discounts; Chen and Goodman, 1998) or "witten-bell".

    The contexts of the first bytes reach back into `training`, the uniform distribution ends the recursion.
    """
    if not 1 <= order <= 7:
        raise ValueError(f"order: expected 1 to 7, got {order}")
    if smoothing not in ("kneser-ney", "witten-bell"):
        raise ValueError(f"smoothing: expected kneser-ney or witten-bell, got {smoothing!r}")
    text = np.concatenate([training[-order:], held_out]).astype(np.int64)
    place = order + np.arange(len(held_out))
    probability = np.full(len(held_out), 1 / 256)
    for n in range(1, order + 1):
        grams, counts = _count(training, n)
        if smoothing == "kneser-ney" and n < order:
            # Lower orders count in how many contexts a gram occurs, not how often.
            grams, counts = np.unique(_count(training, n + 1)[0] % 256**n, return_counts=True)
        contexts, first = np.unique(grams // 256, return_index=True)
        total = np.add.reduceat(counts, first)
        if smoothing == "kneser-ney":
            discount = _discounts(counts)
            counts = counts - discount
            reserved = np.add.reduceat(discount, first)
        else:
            reserved = np.diff(np.append(first, len(grams))).astype(float)
            total = total + reserved
        query = np.zeros(len(held_out), np.int64)
        for back in range(n - 1, -1, -1):
            query = query * 256 + text[place - back]
        mass = _look_up(contexts, total, query // 256)
        known = _look_up(grams, counts, query) + _look_up(contexts, reserved, query // 256) * probability
        probability = np.where(mass > 0, known / np.maximum(mass, 1e-9), probability)
    return float(-np.log2(probability).mean())


def _count(data: Bytes, n: int) -> tuple[Ints, Ints]:
    """The distinct n-grams of `data` as base-256 numbers, sorted, and how often each occurs."""
    grams = np.zeros(len(data) - n + 1, np.int64)
    for i in range(n):
        grams = grams * 256 + data[i : len(grams) + i]
    return np.unique(grams, return_counts=True)


def _discounts(counts: Ints) -> NDArray[np.float64]:
    n1, n2, n3, n4 = (max(int((counts == i).sum()), 1) for i in range(1, 5))
    y = n1 / (n1 + 2 * n2)
    three = np.array([1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    # Tiny tables give senseless estimates: a discount stays between nothing and the count.
    return np.clip(three, 0.01, [0.99, 1.99, 2.99])[np.minimum(counts, 3) - 1]


def _look_up(keys: Ints, values: NDArray[np.generic], query: Ints) -> NDArray[np.generic]:
    at = np.minimum(np.searchsorted(keys, query), len(keys) - 1)
    return np.where(keys[at] == query, values[at], 0)
