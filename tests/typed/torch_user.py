"""A user of torch tensors, layers and models: passes mypy --strict and pyright's strict mode."""

# pyright: strict
from __future__ import annotations

import futurefill_rs as ff
import numpy as np
import torch
from typing_extensions import assert_type


class Stream:
    """What keeps a plan and a cache of any library names them so."""

    plan: ff.Plan
    cache: ff.Cache

    def __init__(self, filters: torch.Tensor, horizon: int | None) -> None:
        self.plan = ff.plan(filters, horizon)
        self.cache = self.plan.new_cache()

    def __call__(self, u: torch.Tensor) -> torch.Tensor:
        return self.cache.step(u)


def generate(plan: ff.Plan, prompt: torch.Tensor, count: int) -> torch.Tensor:
    y, cache = plan.prefill(prompt, count)
    assert_type(y, torch.Tensor)
    out = torch.empty(y.shape[:-1])
    for _ in range(count):
        assert_type(cache.step(y[..., -1], out=out), torch.Tensor)
    return out


plan = ff.plan(torch.ones(2, 8), 100)
as_declared: ff.Plan = plan
assert_type(plan.dtype, torch.dtype)
assert_type(plan.filters, torch.Tensor)
cache = plan.new_cache((3, 2))
one: ff.Cache = cache
assert_type(cache.step(torch.ones(3, 2)), torch.Tensor)
assert_type(cache.step(torch.ones(3, 2), out=torch.ones(3, 2)), torch.Tensor)
assert_type(cache.extend(torch.ones(3, 2, 5)), torch.Tensor)
assert_type(cache.pending(3), torch.Tensor)
assert_type(ff.plan(torch.ones(3)).new_cache().step(0.5), torch.Tensor)
cache.reorder(torch.tensor([0, 0, 1]))
cache.reset(torch.tensor([True, False, False]))
engine = ff.plan(torch.ones(2, 8), engine="torch", dtype=torch.float64)
assert_type(engine.prefill(torch.ones(2, 5), 3)[0], torch.Tensor)

assert_type(ff.causal_conv(torch.ones(2, 9), torch.ones(3)), torch.Tensor)
assert_type(ff.futurefill(torch.ones(3), torch.ones(4)), torch.Tensor)
# The other library still has its own types beside this one.
assert_type(ff.plan(np.ones(3)).new_cache().step(np.ones(())), "np.typing.NDArray[np.float64]")

layer = ff.nn.CausalConv(4, 6)
assert_type(layer.step(torch.ones(2, 4), layer.prefill(torch.ones(2, 5, 4), 3)[1]), torch.Tensor)


def sample(model: ff.models.HyenaDNA, ids: torch.Tensor) -> torch.Tensor:
    logits, cache = model.prefill(ids, 4)
    assert_type(logits, torch.Tensor)
    assert_type(model.step(ids[:, -1], cache), torch.Tensor)
    new = ff.generate(model, ids, 4, temperature=0.5, top_k=3, seed=1)
    assert_type(new, torch.Tensor)
    many = ff.generate(model, [[1, 2], [3]], 4, batch_size=2)
    assert_type(many, list[ff.Continuation])
    return new


assert isinstance(plan, ff.Plan) and isinstance(cache, ff.Cache)
assert generate(plan, torch.ones(2, 5), 3).shape == (2,)
assert Stream(torch.ones(2, 3), None)(torch.ones(2)).shape == (2,)
