"""`ff.generate`: greedy, sampled, ended, seeded; always the same as generation without a cache."""

import futurefill_rs as ff
import pytest
import torch
from models_common import MODELS, inputs, layer


def without_cache(model, ids, count):
    for _ in range(count):
        ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("prompt", [1, 2, 9])
def test_greedy_equals_generation_without_a_cache(name, prompt):
    model = layer(name)
    ids = inputs(model, prompt, batch=3)
    assert torch.equal(ff.generate(model, ids, 30), without_cache(model, ids, 30))


@pytest.mark.parametrize("name", MODELS)
def test_every_method_generates_the_same(name):
    model = layer(name)
    ids = inputs(model, 4)
    want = ff.generate(model, ids, 40)
    for method in ("naive", "epoched", "continuous"):
        assert torch.equal(ff.generate(model, ids, 40, method=method), want)


def test_generation_goes_on_beyond_the_models_length():
    model = layer("flash_stu")
    ids = inputs(model, 5)
    out = ff.generate(model, ids, 200)
    assert out.shape == (2, 205)
    recent, _ = model.prefill(out[:, :150], 0)
    assert torch.equal(recent[:, -1].argmax(-1), out[:, 150])


def test_shape_dtype_and_prompt():
    model = layer("flash_stu")
    for dtype in (torch.int64, torch.int32):
        ids = inputs(model, 5).to(dtype)
        out = ff.generate(model, ids, 7)
        assert out.shape == (2, 12) and out.dtype == dtype and not out.is_inference()
        assert torch.equal(out[:, :5], ids)
    assert torch.equal(ff.generate(model, ids, 0), ids)


def test_seed_makes_draws_repeatable():
    model = layer("flash_stu")
    ids = inputs(model, 5)
    a = ff.generate(model, ids, 30, temperature=1.0, seed=3)
    assert torch.equal(a, ff.generate(model, ids, 30, temperature=1.0, seed=3))
    assert not torch.equal(a, ff.generate(model, ids, 30, temperature=1.0, seed=4))
    torch.manual_seed(0)
    b = ff.generate(model, ids, 30, temperature=1.0)
    torch.manual_seed(0)
    assert torch.equal(b, ff.generate(model, ids, 30, temperature=1.0))


class Fixed:
    """A model whose logits are always the same."""

    def __init__(self, weights):
        self.logits = torch.tensor(weights).log()

    def prefill(self, x, max_new):
        return self.logits.expand(*x.shape, -1), None

    def step(self, x, cache):
        return self.logits.expand(*x.shape, -1)


def frequencies(**options):
    model = Fixed([0.4, 0.3, 0.2, 0.1])
    out = ff.generate(model, torch.zeros(500, 1, dtype=torch.long), 40, seed=0, **options)
    return torch.bincount(out[:, 1:].flatten(), minlength=4) / (500 * 40)


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({"temperature": 1.0}, [0.4, 0.3, 0.2, 0.1]),
        ({"temperature": 0.5}, [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        ({"temperature": 1.0, "top_k": 2}, [4 / 7, 3 / 7, 0, 0]),
        ({"temperature": 1.0, "top_k": 9}, [0.4, 0.3, 0.2, 0.1]),
        ({"temperature": 1.0, "top_p": 0.65}, [4 / 7, 3 / 7, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.75}, [4 / 9, 3 / 9, 2 / 9, 0]),
        ({"temperature": 1.0, "top_p": 0.01}, [1, 0, 0, 0]),
        ({"temperature": 1.0, "top_p": 1.0}, [0.4, 0.3, 0.2, 0.1]),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.5}, [4 / 7, 3 / 7, 0, 0]),
        ({}, [1, 0, 0, 0]),
    ],
    ids=str,
)
def test_draws_follow_the_distribution(options, want):
    got = frequencies(**options)
    assert torch.allclose(got, torch.tensor(want, dtype=torch.float32), atol=0.015)
    assert torch.equal(got == 0, torch.tensor(want) == 0)


def test_rows_that_ended_repeat_the_end_and_all_ended_stops():
    model = layer("flash_stu")
    ids = inputs(model, 5, batch=3)
    free = ff.generate(model, ids, 40, temperature=1.0, seed=1)
    end = 3
    out = ff.generate(model, ids, 40, temperature=1.0, seed=1, eos_token_id=end)
    firsts = []
    for row, other in zip(out[:, 5:], free[:, 5:], strict=True):
        places = (row == end).nonzero().flatten()
        first = int(places[0]) if len(places) else 40
        firsts.append(first)
        assert (row[first:] == end).all()
        assert torch.equal(row[: min(firsts)], other[: min(firsts)])
    assert out.shape[1] == 5 + min(40, max(firsts) + 1)
    several = ff.generate(model, ids, 40, temperature=1.0, seed=1, eos_token_id=[end, 4])
    assert several.shape[1] <= out.shape[1]


def test_callback_sees_each_new_position():
    model = layer("flash_stu")
    ids = inputs(model, 5)
    seen = []
    out = ff.generate(model, ids, 9, callback=lambda new: seen.append(new.clone()))
    assert torch.equal(torch.stack(seen, 1), out[:, 5:])


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (TypeError, "input_ids", {"input_ids": [[1]]}),
        (TypeError, "input_ids", {"input_ids": torch.zeros(1, 2)}),
        (ValueError, "input_ids", {"input_ids": torch.zeros(2, dtype=torch.long)}),
        (ValueError, "input_ids", {"input_ids": torch.zeros(2, 0, dtype=torch.long)}),
        (ValueError, "max_new", {"max_new": -1}),
        (TypeError, "max_new", {"max_new": 2.0}),
        (ValueError, "temperature", {"temperature": -0.1}),
        (ValueError, "temperature", {"temperature": float("nan")}),
        (ValueError, "top_k", {"top_k": 0}),
        (ValueError, "top_p", {"top_p": 0.0}),
        (ValueError, "top_p", {"top_p": 1.5}),
    ],
)
def test_errors_name_the_argument(error, match, arguments):
    options = {"input_ids": torch.ones(1, 3, dtype=torch.long), "max_new": 3, **arguments}
    with pytest.raises(error, match=f"{match}: expected"):
        ff.generate(layer("flash_stu"), **options)
