"""`ff.generate`: greedy, sampled, ended, seeded; always the same as generation without a cache."""

import copy
import pickle
from collections import deque

import futurefill_rs as ff
import numpy as np
import pytest
import torch
from futurefill_rs._generate import many
from models_common import FLASH, MODELS, inputs, layer


def without_cache(model, ids, count):
    for _ in range(count):
        logits = model(ids)[:, -1, : model.config["vocab_size"]]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
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


def test_end_ids_are_integers_of_any_library_and_size():
    model = layer("flash_stu")
    ids = inputs(model, 5)
    want = ff.generate(model, ids, 9, eos_token_id=3)
    for end in (np.int64(3), torch.tensor(3), [3], np.array([3]), torch.tensor([3])):
        assert torch.equal(ff.generate(model, ids, 9, eos_token_id=end), want)
    narrow = ff.generate(model, ids.to(torch.uint8), 9, eos_token_id=259)
    assert torch.equal(narrow.long(), ff.generate(model, ids, 9))


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.9}, {"top_k": 3, "top_p": 0.9}])
@pytest.mark.parametrize("temperature", [1e-7, 1e-45, 1e-300])
def test_the_smallest_temperatures_are_greedy(temperature, options):
    model = layer("flash_stu")
    ids = inputs(model, 5)
    got = ff.generate(model, ids, 9, temperature=temperature, seed=0, **options)
    assert torch.equal(got, ff.generate(model, ids, 9))


def test_a_seed_for_each_row_and_one_for_all():
    """A row's draws depend on its seed alone: in any batch, as a row or as a prompt of a list."""
    model = layer("flash_stu")
    ids = inputs(model, 5, batch=3)
    options = {"temperature": 1.0, "top_p": 0.95}
    together = ff.generate(model, ids, 20, seed=[7, 8, 7], **options)
    for row, seed, out in zip(ids, (7, 8, 7), together, strict=True):
        assert torch.equal(ff.generate(model, row[None], 20, seed=[seed], **options)[0], out)
    listed = ff.generate(model, list(ids), 20, seed=np.array([7, 8, 7]), batch_size=2, **options)
    assert torch.equal(torch.stack([result.ids for result in listed]), together)
    common = ff.generate(model, ids, 20, seed=5, **options)
    apart = [5 * 1_000_003 + number for number in range(3)]
    assert torch.equal(ff.generate(model, ids, 20, seed=apart, **options), common)
    listed = ff.generate(model, list(ids), 20, seed=5, **options)
    assert torch.equal(torch.stack([result.ids for result in listed]), common)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 50.0, "seed": 1}, {"repetition_penalty": 9.0}], ids=str
)
def test_ids_that_pad_the_vocabulary_never_come(options):
    model = layer("hyenadna")
    assert model.config["vocab_size"] == 12 < model.vocab_size == 16
    with torch.no_grad():
        # What pads is the likeliest by far.
        model.backbone.embeddings.word_embeddings.weight[12:] += 9.0
        model.backbone.ln_f.bias += 3.0
    ids = inputs(model, 5) % 12
    assert (model(ids)[:, -1].argmax(-1) >= 12).all()
    assert (ff.generate(model, ids, 40, **options) < 12).all()
    assert all((result.ids < 12).all() for result in ff.generate(model, list(ids), 40, **options))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_logits_without_a_largest_one_are_refused(bad):
    model = Fixed([0.5, 0.5])
    model.logits[:] = bad
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="logits: expected a largest one that is finite, got"):
            ff.generate(model, torch.zeros(1, 2, dtype=torch.long), 3, temperature=temperature)


@pytest.mark.parametrize("name", MODELS)
def test_a_repetition_penalty_counts_what_each_row_holds(name):
    model = layer(name)
    known = model.config["vocab_size"]
    prompts = [prompt % known for prompt in prompts_for(model, (3, 1, 7))]
    results = ff.generate(model, prompts, 9, repetition_penalty=1.7, batch_size=2)
    for prompt, result in zip(prompts, results, strict=True):
        ids = prompt[None]
        for _ in range(9):
            logits = model(ids)[0, -1, :known]
            held = logits[ids[0]]
            logits[ids[0]] = torch.where(held < 0, held * 1.7, held / 1.7)
            ids = torch.cat([ids, logits.argmax().view(1, 1)], 1)
        assert torch.equal(result.ids, ids[0])
        assert torch.equal(ff.generate(model, prompt[None], 9, repetition_penalty=1.7), ids)


def test_results_are_ordinary_tensors_that_copy_and_save(tmp_path):
    model = layer("flash_stu")
    (result,) = ff.generate(model, [[1, 2, 3]], 5, temperature=1.0, decode=str)
    (nothing,) = ff.generate(model, [[1, 2, 3]], 0)
    for each in (result, nothing):
        assert not each.ids.is_inference() and not each.log_probs.is_inference()
        each.log_probs.requires_grad_().sum().backward()
        each.log_probs.requires_grad_(False)
    assert isinstance(result, ff.Continuation)
    torch.save([result], tmp_path / "results.pt")
    kept = [
        copy.copy(result), copy.deepcopy(result), pickle.loads(pickle.dumps(result)),
        *torch.load(tmp_path / "results.pt", weights_only=True),
    ]  # fmt: skip
    for other in kept:
        assert torch.equal(other.ids, result.ids) and torch.equal(other.log_probs, result.log_probs)
        assert (other.reason, other.text) == (result.reason, result.text)
    out = ff.generate(model, torch.tensor([[1, 2, 3]]), 5, callback=lambda new: new.add_(0))
    assert not out.is_inference()


def test_callback_sees_each_new_position():
    model = layer("flash_stu")
    ids = inputs(model, 5)
    seen = []
    out = ff.generate(model, ids, 9, callback=lambda new: seen.append(new.clone()))
    assert torch.equal(torch.stack(seen, 1), out[:, 5:])


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (TypeError, "input_ids", {"input_ids": "text"}),
        (TypeError, "input_ids", {"input_ids": 3}),
        (TypeError, "input_ids", {"input_ids": [1, 2]}),
        (ValueError, "input_ids", {"input_ids": [[1], []]}),
        (ValueError, "input_ids", {"input_ids": [[0.5]]}),
        (TypeError, "max_new", {"max_new": None}),
        (ValueError, "max_new", {"input_ids": [[1]], "max_new": None}),
        (ValueError, "input_ids", {"input_ids": [[1], [True]]}),
        (ValueError, "input_ids", {"input_ids": [[1], np.array([1.0])]}),
        (ValueError, "input_ids", {"input_ids": [[1], torch.ones(1, 2, dtype=torch.long)]}),
        (TypeError, "input_ids", {"input_ids": [[1], "text"]}),
        (ValueError, "batch_size", {"input_ids": [[1]], "batch_size": 0}),
        (TypeError, "batch_size", {"input_ids": [[1]], "batch_size": 1.5}),
        (TypeError, "batch_size", {"input_ids": [[1]], "batch_size": True}),
        (ValueError, "stop", {"input_ids": [[1]], "stop": "", "decode": str}),
        (ValueError, "stop", {"input_ids": [[1]], "stop": ["a", ""], "decode": str}),
        (TypeError, "stop", {"input_ids": [[1]], "stop": [3], "decode": str}),
        (ValueError, "decode", {"input_ids": [[1]], "stop": "a"}),
        (ValueError, "stop, decode", {"stop": "a"}),
        (TypeError, "input_ids", {"input_ids": torch.zeros(1, 2)}),
        (ValueError, "input_ids", {"input_ids": torch.zeros(2, dtype=torch.long)}),
        (ValueError, "input_ids", {"input_ids": torch.zeros(2, 0, dtype=torch.long)}),
        (ValueError, "max_new", {"max_new": -1}),
        (TypeError, "max_new", {"max_new": 2.0}),
        (ValueError, "temperature", {"temperature": -0.1}),
        (ValueError, "temperature", {"temperature": float("nan")}),
        (ValueError, "top_k", {"top_k": 0}),
        (TypeError, "top_k", {"top_k": 1.5, "temperature": 1.0}),
        (ValueError, "top_p", {"top_p": 0.0}),
        (ValueError, "top_p", {"top_p": 1.5}),
        (TypeError, "top_p", {"top_p": "most"}),
        (ValueError, "min_p", {"min_p": -0.1}),
        (ValueError, "min_p", {"min_p": float("nan")}),
        (ValueError, "repetition_penalty", {"repetition_penalty": 0.0}),
        (ValueError, "repetition_penalty", {"repetition_penalty": float("inf")}),
        (TypeError, "repetition_penalty", {"repetition_penalty": None}),
        (TypeError, "seed", {"seed": 1.5}),
        (TypeError, "seed", {"seed": [1, True], "input_ids": [[1], [2]]}),
        (ValueError, "seed", {"seed": [1, 2]}),
        (ValueError, "seed", {"seed": [2**63]}),
    ],
)
def test_errors_name_the_argument(error, match, arguments):
    options = {"input_ids": torch.ones(1, 3, dtype=torch.long), "max_new": 3, **arguments}
    with pytest.raises(error, match=f"{match}: expected"):
        ff.generate(layer("flash_stu"), **options)


def prompts_for(model, lengths):
    return [inputs(model, length, batch=1, seed=length)[0] for length in lengths]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_prompts_of_different_lengths(name, batch_size):
    """More prompts than rows: a row that ends reads the next prompt; each continues as it would alone."""
    model = layer(name)
    prompts = prompts_for(model, (5, 1, 9, 3, 12))
    results = ff.generate(model, prompts, 14, batch_size=batch_size)
    assert [result.reason for result in results] == ["length"] * 5
    for result, prompt in zip(results, prompts, strict=True):
        assert torch.equal(result.ids, ff.generate(model, prompt[None], 14)[0])


def alone(model, prompt, number, ends, max_new=None, temperature=1.0, seed=5):
    """A prompt continued by itself without a cache, its draws as documented, and their log-probabilities."""
    random = torch.Generator().manual_seed(seed * 1_000_003 + number)
    ids, log_probs = prompt.tolist(), []
    while len(log_probs) != max_new and not (log_probs and ids[-1] in ends):
        logits, _ = model.read_prompt(torch.tensor([ids]), 0)
        known = model.config["vocab_size"]
        weights = (logits[0, :known] / temperature).softmax(-1)
        noise = torch.empty(model.vocab_size).exponential_(generator=random)
        new = int((weights / noise[:known]).argmax())
        ids.append(new)
        log_probs.append(float(logits.log_softmax(-1)[0, new]))
    return ids, log_probs


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
@pytest.mark.parametrize("max_new", [12, None])
def test_prompts_that_end_at_their_own_times(monkeypatch, name, batch_size, max_new):
    """Caches with little room, padding or groups of one: each prompt becomes what it would alone."""
    monkeypatch.setattr(many, "ROOM", 4)
    monkeypatch.setattr(many, "PADDING", 0 if batch_size == 3 else 1024)
    model = layer(name)
    prompts = prompts_for(model, (5, 1, 60, 3, 12, 2, 1, 9))
    ends = [0, 7]
    results = ff.generate(
        model, prompts, max_new, temperature=1.0, seed=5, eos_token_id=ends, batch_size=batch_size
    )
    for number, (result, prompt) in enumerate(zip(results, prompts, strict=True)):
        ids, log_probs = alone(model, prompt, number, ends, max_new)
        assert result.ids.tolist() == ids
        assert torch.allclose(result.log_probs, torch.tensor(log_probs), atol=1e-4)
        assert result.reason == ("end" if ids[-1] in ends else "length")


class Watched:
    """A model that notes what it was asked: prompts read, rows of each step and their caches' sizes."""

    def __init__(self, monkeypatch, name):
        self.model = layer(name)
        self.read, self.rooms, self.rows, self.sizes = [], [], [], []
        read, step = self.model.read_prompt, self.model.step_all

        def read_prompt(ids, max_new, **options):
            self.read.append(tuple(ids.shape))
            self.rooms.append(max_new)
            return read(ids, max_new, **options)

        def step_all(ids, caches):
            self.rows.append(len(ids))
            self.sizes.append(sum(cache.nbytes for cache in caches))
            return step(ids, caches)

        monkeypatch.setattr(self.model, "read_prompt", read_prompt)
        monkeypatch.setattr(self.model, "step_all", step_all)


@pytest.mark.parametrize("name", MODELS)
def test_waiting_prompts_are_read_at_once_into_caches_of_their_own(monkeypatch, name):
    watched = Watched(monkeypatch, name)
    prompts = prompts_for(watched.model, (30,) * 7)
    results = ff.generate(watched.model, prompts, 10, batch_size=2)
    assert watched.read == [(2, 30), (2, 30), (2, 30), (1, 30)]
    assert watched.rooms == [10] * 4
    assert watched.rows == [2] * 27 + [1] * 9
    assert max(watched.sizes[9:]) <= max(watched.sizes[:9])
    for result, prompt in zip(results, prompts, strict=True):
        assert torch.equal(result.ids, ff.generate(watched.model, prompt[None], 10)[0])


def test_rows_that_ended_are_not_stepped(monkeypatch):
    watched = Watched(monkeypatch, "flash_stu")
    prompts = prompts_for(watched.model, (5, 1, 9, 3))
    results = ff.generate(watched.model, prompts, None, temperature=1.0, seed=2, eos_token_id=3)
    lengths = [len(result.log_probs) for result in results]
    assert watched.rows == [sum(length > step for length in lengths) for step in range(1, max(lengths))]
    assert len(set(lengths)) == 4


def test_a_place_is_given_to_the_next_prompt_at_once(monkeypatch):
    watched = Watched(monkeypatch, "hyenadna")
    prompts = prompts_for(watched.model, (5, 1, 9, 3, 4, 2, 8, 1, 1))
    results = ff.generate(watched.model, prompts, 30, temperature=1.0, seed=2, eos_token_id=3, batch_size=3)
    free, seen = [0] * 3, 0
    for result in results:
        place = free.index(min(free))
        free[place] += len(result.log_probs)
        seen = max(seen, free[place])
    # A prompt's first id comes from reading it, the others from one step each.
    assert len(watched.rows) == seen - 1 and max(watched.rows) <= 3
    assert sum(watched.rows) == sum(len(result.log_probs) - 1 for result in results)


def test_without_a_number_room_grows_with_need(monkeypatch):
    monkeypatch.setattr(many, "ROOM", 4)
    watched = Watched(monkeypatch, "hyenadna")
    (result,) = ff.generate(
        watched.model, [[1]], None, stop=["x"], decode=lambda ids: "x" if len(ids) == 200 else ""
    )
    # As much again each time, until a cache without a bound is no larger (the model's length is 48).
    assert watched.rooms == [4, 6, 13, 27, None]
    assert torch.equal(result.ids, ff.generate(watched.model, torch.tensor([[1]]), 200)[0])
    watched = Watched(monkeypatch, "striped_hyena")
    ff.generate(watched.model, [[1]], None, stop=["x"], decode=lambda ids: "x" * (len(ids) > 50))
    assert watched.rooms == [None]


@pytest.mark.parametrize("name", MODELS)
def test_padding_of_prompts_read_together_is_not_computed(name):
    model = layer(name)
    prompts = prompts_for(model, (5, 1, 40, 3))
    shapes = []
    blocks = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    handles = [
        block.register_forward_hook(lambda b, args, y: shapes.append(args[0].shape)) for block in blocks
    ]
    results = ff.generate(model, prompts, 1, batch_size=4)
    for handle in handles:
        handle.remove()
    assert {shape[:2] for shape in shapes} == {(1, 49)} and len(shapes) == len(blocks)
    for result, prompt in zip(results, prompts, strict=True):
        logits = model(prompt[None])[0, -1].detach()
        known = logits[: model.config["vocab_size"]]
        assert int(result.ids[-1]) == int(known.argmax())
        assert abs(float(result.log_probs[0] - logits.log_softmax(-1)[known.argmax()])) < 1e-4


def test_prompts_read_together_have_little_padding():
    def groups(lengths, places=8):
        waiting = deque(many._Row(n, [0] * length, None, None) for n, length in enumerate(lengths))
        read = [[len(row.prompt) for row in rows] for rows in many._following(waiting, places)]
        return read, len(waiting)

    assert groups([5, 1, 60, 3]) == ([[1, 3, 5, 60]], 0)
    assert groups([1500] * 5, 3) == ([[1500] * 3], 2)
    assert groups([3, 90000, 80000, 4, 4]) == ([[3, 4, 4], [80000, 90000]], 0)
    assert groups([3, 3, 90000, 4, 4]) == ([[3, 3, 4, 4], [90000]], 0)
    assert groups([3, 4], 0) == ([], 2)
    assert groups([]) == ([], 0)


def test_prompts_of_any_library():
    model = layer("flash_stu")
    want = ff.generate(model, [[1, 2, 3]], 9)[0].ids
    prompts = [
        [np.int64(1), np.int32(2), 3], (1, 2, 3), np.array([1, 2, 3]), np.array([1, 2, 3], np.uint8),
        torch.tensor([1, 2, 3], dtype=torch.int32), list(torch.tensor([1, 2, 3])), bytes([1, 2, 3]),
    ]  # fmt: skip
    for result in ff.generate(model, prompts, 9, batch_size=3):
        assert torch.equal(result.ids, want)


@pytest.mark.parametrize("bad", [-1, 19, 10**30])
def test_ids_beyond_the_vocabulary_are_found_before_anything_is_generated(bad):
    model = layer("flash_stu")
    seen = []
    with pytest.raises(ValueError, match=f"input_ids: expected ids from 0 to 18 in prompt 2, got {bad}"):
        ff.generate(model, [[1], [2], [3, bad, 4]], 3, batch_size=1, callback=lambda *new: seen.append(new))
    assert not seen


def test_models_are_recognised():
    ids = torch.tensor([[1, 2, 3]])
    for model in (object(), torch.nn.Linear(2, 2)):
        with pytest.raises(TypeError, match="model: expected a model of"):
            ff.generate(model, ids, 3)
    with pytest.raises(TypeError, match=r"model: expected .* with a list of prompts, got Fixed"):
        ff.generate(Fixed([0.5, 0.5]), [[1]], 3)


def test_the_language_model_of_a_hugging_face_model_generates():
    hf = pytest.importorskip("futurefill_rs.hf")
    model = hf.FlashSTUForCausalLM(hf.FlashSTUConfig(**FLASH)).eval()
    ids = torch.tensor([[1, 2, 3]])
    want = ff.generate(model.language_model, ids, 9)
    assert torch.equal(ff.generate(model, ids, 9), want)
    assert torch.equal(ff.generate(model, [[1, 2, 3]], 9)[0].ids, want[0])


def test_texts_are_decoded_when_asked_for():
    """All new ids at every step only where stop strings need them."""
    model = layer("flash_stu")
    calls = []

    def decode(ids):
        calls.append(list(ids))
        return str(len(ids))

    (result,) = ff.generate(model, [[1]], 9, decode=decode)
    assert result.text == "9" and calls == [result.ids[1:].tolist()]
    (result,) = ff.generate(model, [[1]], 9, decode=decode, stop="4")
    assert result.text == "" and result.reason == "stop" and len(result.log_probs) == 4


def test_prompts_may_be_lists_and_draws_do_not_depend_on_the_batch():
    model = layer("flash_stu")
    prompts = [prompt.tolist() for prompt in prompts_for(model, (5, 1, 9, 3))]
    runs = [
        ff.generate(model, prompts, 12, temperature=1.0, top_k=7, seed=4, batch_size=size) for size in (1, 3)
    ]
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a.ids, b.ids)
        assert torch.allclose(a.log_probs, b.log_probs, atol=1e-4)


def test_log_probs_are_the_models():
    model = layer("hyenadna")
    (result,) = ff.generate(model, prompts_for(model, (6,)), 20, temperature=1.0, seed=1)
    want = model.score(result.ids[None])[0, 5:]
    assert result.log_probs.shape == (20,)
    assert torch.allclose(result.log_probs, want, atol=1e-4)


def test_each_prompt_ends_for_its_own_reason():
    model = layer("flash_stu")
    prompts = prompts_for(model, (5, 1, 9, 3))

    def decode(ids):
        return "".join(chr(97 + i) for i in ids)

    free = ff.generate(model, prompts, 30, temperature=1.0, seed=2, decode=decode)
    assert all(len(result.text) == 30 for result in free)
    end = int(free[0].ids[5 + 10])
    stop = free[1].text[3:5]
    seen = []
    results = ff.generate(
        model, prompts, 30, temperature=1.0, seed=2, eos_token_id=end, stop=[stop, "?"], decode=decode,
        callback=lambda number, new: seen.append((number, new)),
    )  # fmt: skip
    for number, (result, whole) in enumerate(zip(results, free, strict=True)):
        new = result.ids[len(prompts[number]) :]
        assert torch.equal(result.ids, whole.ids[: len(result.ids)])
        assert [i for n, i in seen if n == number] == new.tolist()
        text = decode(new.tolist())
        if result.reason == "end":
            assert int(new[-1]) == end and not (new[:-1] == end).any()
        elif result.reason == "stop":
            assert stop in text and result.text == text[: text.index(stop)]
        else:
            assert len(new) == 30
    assert results[0].reason != "length" and results[1].reason != "length"


def test_without_a_number_each_prompt_goes_on_until_it_ends():
    model = layer("flash_stu")
    prompts = prompts_for(model, (5, 1, 9))
    results = ff.generate(model, prompts, None, temperature=1.0, seed=2, eos_token_id=3, batch_size=2)
    assert all(result.reason == "end" and int(result.ids[-1]) == 3 for result in results)


def test_lists_without_work():
    model = layer("flash_stu")
    assert ff.generate(model, [], 5) == []
    (result,) = ff.generate(model, [[1, 2]], 0)
    assert result.ids.tolist() == [1, 2] and len(result.log_probs) == 0 and result.text is None
    (result,) = ff.generate(model, [[1, 2]], 0, decode=str)
    assert result.text == ""


@pytest.mark.parametrize("name", MODELS)
def test_scores_in_chunks(name):
    model = layer(name)
    ids = inputs(model, 45)
    want = model(ids)[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    for chunk in (1, 7, 44, 100):
        assert torch.allclose(model.score(ids, chunk=chunk), want, atol=1e-4)
    assert model.score(ids[:, :1]).shape == (2, 0)
    assert model.score(inputs(model, 200), chunk=64).shape == (2, 199)
    with pytest.raises(ValueError, match="chunk"):
        model.score(ids, chunk=0)
    with pytest.raises(TypeError, match="chunk"):
        model.score(ids, chunk=2.5)


@pytest.mark.parametrize("place", [0, 20, 44])
def test_scores_of_ids_beyond_the_vocabulary(place):
    model = layer("hyenadna")
    for bad in (-1, model.vocab_size):
        ids = inputs(model, 45)
        ids[1, place] = bad
        with pytest.raises(ValueError, match=f"ids: expected ids from 0 to {model.vocab_size - 1}, got"):
            model.score(ids, chunk=9)
