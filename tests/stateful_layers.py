"""The world of layers and models: every operation on their caches against `forward`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import futurefill_rs as ff
import models_common
import numpy as np
import torch
from futurefill_rs import models, nn
from stateful import Setup, World
from stateful_engine import COPIES, draw_method, method_of, size
from torch import Tensor

# The relative L2 error of a row's outputs so far; layers add rounding of their own.
TOLERANCE = {"float32": 2e-5, "float64": 1e-12}
# Angles are float32 as upstream's (see `_Rotary`): a row that begins late is only nearly one from position 0.
ROTARY = {"float32": 1e-4, "float64": 1e-6}


@functools.cache
def module(name: str, dtype: str) -> Any:
    return models_common.layer(name).to(getattr(torch, dtype)).requires_grad_(False)


def bits(x: Tensor) -> bytes:
    return x.detach().contiguous().numpy().tobytes()


class LayersWorld(World):
    name = "layers"
    operations: ClassVar[dict[str, int]] = {
        "step": 8,
        "extend": 6,
        "prefill": 3,
        "fork": 3,
        "reorder": 5,
        "reset_rows": 4,
        "reset": 1,
        "keep": 3,
        "rewind": 5,
        "step_all": 3,
        "copies": 2,
        "refuse": 4,
        "strangers": 2,
    }

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Setup:
        return {
            "layer": str(rng.choice([*models_common.LAYERS, *models_common.MODELS])),
            "dtype": str(rng.choice(["float32", "float64"])),
            "batch": int(rng.integers(1, 4)),
            "method": draw_method(rng),
        }

    @classmethod
    def simpler(cls, setup: Setup) -> Iterator[Setup]:
        plain = {"layer": "causal_conv", "dtype": "float64", "batch": 1, "method": "naive"}
        yield from ({**setup, key: value} for key, value in plain.items() if setup[key] != value)

    def __init__(self, setup: Setup, rng: np.random.Generator) -> None:
        self.setup = setup
        self.module = module(setup["layer"], setup["dtype"])
        self.batch = setup["batch"]
        self.longest = self.module.max_length or 48
        turning = any(isinstance(part, nn.CausalSelfAttention) for part in self.module.modules())
        self.late = ROTARY if turning else TOLERANCE
        self.prefill(rng)

    def __repr__(self) -> str:
        return f"{self.setup['layer']} {self.cache!r}"

    def random(self, rng: np.random.Generator, batch: int, m: int) -> Tensor:
        if isinstance(self.module, models.LanguageModel):
            return torch.from_numpy(rng.integers(0, self.module.vocab_size, (batch, m)))
        x = rng.standard_normal((batch, m, self.module.width))
        return torch.from_numpy(x.astype(self.setup["dtype"]))

    # What is right.

    def begin(self, x: Tensor, starts: list[int], rng: np.random.Generator) -> None:
        """Read the prompt x `(B, P)`, row i from `starts[i]` on."""
        capacity = None if rng.random() < 0.4 else int(rng.integers(self.longest - x.shape[1] + 1))
        padding = torch.tensor(starts) if any(starts) else None
        method = method_of(self.setup["method"])
        y, self.cache = self.module.prefill(x, capacity, method=method, starts=padding)
        self.capacity, self.used = capacity, 0
        self.position = x.shape[1]
        # Row i of `past` begins at `starts[i]`; what stands before is forgotten.
        self.past, self.got, self.starts = x, y, starts
        # `keep` was called at `kept` with `limit`; every position from `floor` on can be reached by `rewind`.
        self.kept = self.limit = self.floor = None
        self.compare()

    def compare(self) -> None:
        assert (self.cache.position, self.cache.batch_size) == (self.position, len(self.past))
        assert self.cache.remaining == (None if self.capacity is None else self.capacity - self.used)
        assert self.got.shape[:2] == self.past.shape[:2]
        for start in set(self.starts):
            rows = [i for i, s in enumerate(self.starts) if s == start]
            if self.past.shape[1] == start:
                continue
            want = self.module(self.past[rows, start:]).double()
            error = (self.got[rows, start:].double() - want).flatten(1).norm(dim=1)
            relative = float((error / want.flatten(1).norm(dim=1)).max())
            tolerance = (self.late if start else TOLERANCE)[self.setup["dtype"]]
            assert relative <= tolerance, f"a row is off by {relative:.3g}, allowed {tolerance:.3g}"

    def room(self, m: int) -> int:
        """m, or as many positions as capacity and the longest row leave."""
        left = self.longest - max([self.past.shape[1] - start for start in self.starts], default=0)
        return min(m, left if self.capacity is None else min(left, self.capacity - self.used))

    def feed(self, cache: Any, x: Tensor, rng: np.random.Generator) -> Tensor:
        """Outputs `(B, m, ..)` in a random split."""
        outputs, t = [self.module.extend(x[:, :0], cache)], 0
        while t < x.shape[1]:
            if rng.random() < 0.5:
                outputs.append(self.module.step(x[:, t], cache).unsqueeze(1))
                t += 1
            else:
                m = int(rng.integers(1, x.shape[1] - t + 1))
                outputs.append(self.module.extend(x[:, t : t + m], cache))
                t += m
        return torch.cat(outputs, 1)

    def took(self, x: Tensor, y: Tensor) -> None:
        self.past, self.got = torch.cat([self.past, x], 1), torch.cat([self.got, y], 1)
        self.used += x.shape[1]
        self.position += x.shape[1]
        if self.limit is not None:
            self.floor = max(self.floor, self.used - self.limit)
        self.compare()

    def advance(self, rng: np.random.Generator, *others: Any, most: int = 8) -> None:
        """Go on, and the same bits from `others`."""
        x = self.random(rng, len(self.past), self.room(int(rng.integers(most + 1))))
        seed = int(rng.integers(2**32))
        outputs = [self.feed(cache, x, np.random.default_rng(seed)) for cache in (self.cache, *others)]
        assert all(bits(y) == bits(outputs[0]) for y in outputs), "two equal caches part"
        self.took(x, outputs[0])

    def refused(self, kind: Any, call: Callable[[], Any]) -> None:
        try:
            call()
        except kind:
            pass
        else:
            raise AssertionError(f"expected {kind}")
        assert (self.cache.position, self.cache.batch_size) == (self.position, len(self.past))

    # Operations.

    def step(self, rng: np.random.Generator) -> None:
        x = self.random(rng, len(self.past), self.room(size(rng, 10)))
        y = [self.module.step(x[:, t], self.cache).unsqueeze(1) for t in range(x.shape[1])]
        self.took(x, torch.cat([self.got[:, :0], *y], 1))

    def extend(self, rng: np.random.Generator) -> None:
        x = self.random(rng, len(self.past), self.room(size(rng, 20)))
        self.took(x, self.module.extend(x, self.cache))

    def prefill(self, rng: np.random.Generator) -> None:
        x = self.random(rng, self.batch, size(rng, 30))
        starts = [0] * self.batch
        if rng.random() < 0.3:
            starts = [int(start) for start in rng.integers(0, x.shape[1], self.batch)]
        self.begin(x, starts, rng)

    def fork(self, rng: np.random.Generator) -> None:
        first, other = self.cache.fork(), self.cache.fork()
        self.feed(other, self.random(rng, len(self.past), self.room(int(rng.integers(8)))), rng)
        other.reset()
        self.advance(rng, first)
        if rng.random() < 0.5:
            self.cache = first

    def reorder(self, rng: np.random.Generator) -> None:
        n = len(self.past)
        index = rng.integers(-n, n, int(rng.integers(0, 5)) if n else 0)
        self.cache.reorder((index, index.tolist(), torch.from_numpy(index))[rng.integers(3)])
        rows = torch.from_numpy(index % max(1, n))
        self.past, self.got = self.past[rows], self.got[rows]
        self.starts = [self.starts[row] for row in rows]
        self.advance(rng)

    def reset_rows(self, rng: np.random.Generator) -> None:
        n = len(self.past)
        chosen = rng.random(n) < 0.5
        self.cache.reset(chosen if rng.random() < 0.5 else chosen.nonzero()[0].tolist())
        now = self.past.shape[1]
        self.starts = [now if new else start for start, new in zip(self.starts, chosen, strict=True)]
        if self.limit is not None and chosen.any():
            self.kept = self.floor = self.used
        self.advance(rng)

    def reset(self, rng: np.random.Generator) -> None:
        self.cache.reset()
        self.past, self.got, self.starts = self.past[:, :0], self.got[:, :0], [0] * len(self.past)
        self.used = self.position = 0
        if self.limit is not None:
            self.kept = self.floor = 0
        self.advance(rng)

    def keep(self, rng: np.random.Generator) -> None:
        self.limit = size(rng, 12)
        self.cache.keep(self.limit)
        self.kept = self.floor = self.used
        self.advance(rng)

    def rewind(self, rng: np.random.Generator) -> None:
        """Back to `floor` it must go, beyond `kept` or `limit` it must not."""
        count = size(rng, 12)
        if self.limit is None or count > min(self.limit, self.used - self.kept):
            return self.refused(ValueError, lambda: self.module.rewind(self.cache, count))
        count = min(count, self.used - self.floor)
        self.module.rewind(self.cache, count)
        stop = self.past.shape[1] - count
        self.past, self.got = self.past[:, :stop], self.got[:, :stop]
        self.used -= count
        self.position -= count
        self.compare()
        self.advance(rng)

    def step_all(self, rng: np.random.Generator) -> None:
        """Rows at different positions in one call."""
        other = LayersWorld({**self.setup, "batch": int(rng.integers(1, 3))}, rng)
        for _ in range(min(self.room(6), other.room(6))):
            mine, theirs = self.random(rng, len(self.past), 1), self.random(rng, len(other.past), 1)
            y = self.module.step_all(torch.cat([mine, theirs])[:, 0], [self.cache, other.cache]).unsqueeze(1)
            self.took(mine, y[: len(mine)])
            other.took(theirs, y[len(mine) :])
        self.advance(rng)
        other.advance(rng)

    def copies(self, rng: np.random.Generator) -> None:
        copied = COPIES[rng.choice(list(COPIES))](self.cache)
        self.advance(rng, copied)
        self.cache = copied

    def refuse(self, rng: np.random.Generator) -> None:
        """A call that must fail, and then the same bits as if it had not been made."""
        n = len(self.past)
        x = self.random(rng, n, 2)
        wrong_dtype = x.float() if not x.is_floating_point() else x.long()
        wrong: dict[str, tuple[Any, Callable[[], Any]]] = {
            "batch": (ValueError, lambda: self.module.step(self.random(rng, n + 1, 1)[:, 0], self.cache)),
            "axes": (ValueError, lambda: self.module.step(x, self.cache)),
            "dtype": (TypeError, lambda: self.module.extend(wrong_dtype, self.cache)),
            "index": (IndexError, lambda: self.cache.reorder([0, n])),
            "float index": (TypeError, lambda: self.cache.reorder([0.5])),
            "rows": (IndexError, lambda: self.cache.reset([-n - 1])),
            "keep": (ValueError, lambda: self.cache.keep(0)),
            "rewind": (ValueError, lambda: self.module.rewind(self.cache, -1)),
        }
        if self.capacity is not None:
            too_long = self.random(rng, n, self.capacity - self.used + 1)
            wrong["capacity"] = (ff.CapacityError, lambda: self.module.extend(too_long, self.cache))
        other = self.cache.fork()
        self.refused(*wrong[rng.choice(list(wrong))])
        self.advance(rng, other)

    def strangers(self, rng: np.random.Generator) -> None:
        """Whatever one row meets, the others keep their bits; a reset forgets it."""
        n = len(self.past)
        if not n:
            return
        clean, spoilt = self.cache.fork(), self.cache.fork()
        x, row, seed = self.random(rng, n, self.room(6)), int(rng.integers(n)), int(rng.integers(2**32))
        bad = x.clone()
        bad[row] = bad[row] * float("nan") if x.is_floating_point() else bad[row].flip(0)
        others = [i for i in range(n) if i != row]
        a = self.feed(clean, x, np.random.default_rng(seed))
        b = self.feed(spoilt, bad, np.random.default_rng(seed))
        assert bits(a[others]) == bits(b[others]), "a row depends on another one"
        for cache in (clean, spoilt):
            cache.reset([row])
        m = 4 if clean.remaining is None else min(4, clean.remaining)
        x, seed = self.random(rng, n, m), int(rng.integers(2**32))
        a, b = (self.feed(cache, x, np.random.default_rng(seed)) for cache in (clean, spoilt))
        assert bits(a) == bits(b), "a reset has not forgotten everything"
