"""Ground truth: direct sums in float64, and how far a result may be from them."""

from __future__ import annotations

from typing import Any

import numpy as np

# Rounding unit times two of every dtype of the API.
EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}
# Row shapes of inputs and filters that broadcast in every way.
SHAPES = [
    ((3,), (3,)),
    ((), ()),
    ((2, 3), (3,)),
    ((2, 1, 3), (4, 1)),
    ((2,), ()),
    ((1,), (4,)),
    ((), (2,)),
    ((2, 1, 3), (2, 3)),
]


def conv(u: Any, filters: Any, wide: Any = np.float64) -> np.ndarray:
    """`y[..., t] = sum_{j <= min(t, L-1)} filters[..., j] u[..., t-j]`, summed in `wide`.

    u (*C, T), filters (*F, L).
    """
    u, filters = np.asarray(u, wide), np.asarray(filters, wide)
    length = u.shape[-1]
    y = np.zeros((*np.broadcast_shapes(u.shape[:-1], filters.shape[:-1]), length), wide)
    for j in range(min(length, filters.shape[-1])):
        y[..., j:] += filters[..., j, None] * u[..., : length - j]
    return y


def futurefill(v: Any, w: Any) -> np.ndarray:
    """`[FutureFill(v, w)]_s = sum_{i=1}^{t2-s} v_{t1-i+1} w_{s+i}`, s = 1 .. t2-1, as the paper writes it."""
    v, w = np.asarray(v, np.float64), np.asarray(w, np.float64)
    t1, t2 = v.shape[-1], w.shape[-1]
    y = np.zeros((*np.broadcast_shapes(v.shape[:-1], w.shape[:-1]), t2 - 1))
    for s in range(1, t2):
        for i in range(1, min(t2 - s, t1) + 1):
            y[..., s - 1] += v[..., t1 - i] * w[..., s + i - 1]
    return y


def assert_close(y: Any, reference: np.ndarray, dtype: str, length: int | None = None) -> None:
    """Relative L2 error of the whole result below `eps * log2(2 T)`."""
    y = np.asarray(y, np.float64)
    assert y.shape == reference.shape
    if reference.size == 0:
        return
    bound = EPS[dtype] * np.log2(2 * max(1, length if length is not None else reference.shape[-1]))
    error, norm = np.linalg.norm(y - reference), np.linalg.norm(reference)
    assert error <= bound * norm, f"relative error {error / norm if norm else error:.3g}, allowed {bound:.3g}"


def assert_same_bits(a: Any, b: Any) -> None:
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    assert a.dtype == b.dtype and a.shape == b.shape
    assert a.tobytes() == b.tobytes()
