"""How ids are drawn: distributions against transformers' processors, stop strings against whole texts."""

import math

import pytest
import torch
from futurefill_rs._generate.sampling import Sampler, Sampling, log_weights, row_randoms, vocabulary_of
from futurefill_rs._generate.stops import WINDOW, GrowingText


def processors(ids, logits, temperature=1.0, top_k=None, top_p=None, min_p=None, repetition_penalty=1.0):
    """What transformers' own make of the logits, in its order, in float64."""
    generation = pytest.importorskip("transformers.generation")
    scores = logits.double()
    if repetition_penalty != 1:
        scores = generation.RepetitionPenaltyLogitsProcessor(repetition_penalty)(ids, scores)
    scores = generation.TemperatureLogitsWarper(float(temperature))(ids, scores)
    if top_k is not None:
        scores = generation.TopKLogitsWarper(top_k)(ids, scores)
    if top_p is not None and top_p < 1:
        scores = generation.TopPLogitsWarper(top_p)(ids, scores)
    if min_p is not None:
        scores = generation.MinPLogitsWarper(min_p)(ids, scores)
    return scores.log_softmax(-1)


SETTINGS = [
    {},
    {"temperature": 0.3},
    {"temperature": 1e-3},
    {"temperature": 1e6},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 40},
    {"top_k": 1000},
    {"top_p": 1.0},
    {"top_p": 0.9},
    {"top_p": 0.37},
    {"top_p": 1e-9},
    {"min_p": 0.0},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.5},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.83, "min_p": 0.03, "repetition_penalty": 1.2},
    {"temperature": 1.9, "top_k": 33, "top_p": 0.61, "repetition_penalty": 3.0},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.1, 3.0, 1000.0])
def test_distributions_are_those_of_transformers(settings, dtype, scale):
    random = torch.Generator().manual_seed(3)
    logits = (scale * torch.randn(50, 37, generator=random)).to(dtype)
    ids = torch.randint(0, 37, (50, 8), generator=random)
    seen = torch.zeros(50, 37, dtype=torch.bool).scatter_(1, ids, True)
    want = processors(ids, logits, **settings)
    got = log_weights(logits, Sampling(**{"temperature": 1.0, **settings}), seen)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(got.amax(-1), torch.zeros(50, dtype=got.dtype))
    got = got.double().log_softmax(-1)
    if dtype == torch.bfloat16 and settings.get("top_p", 1.0) < 1:
        # Logits of 8 bits tie, and which of equal ones stand at the border is anybody's choice: as many.
        assert torch.equal(got.isfinite().sum(-1), want.isfinite().sum(-1))
        assert torch.allclose(got.sort(-1).values, want.sort(-1).values, atol=1e-4 * max(1.0, scale))
        return
    assert torch.equal(got == -math.inf, want == -math.inf)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    assert torch.allclose(got, want, **tolerance)


@pytest.mark.parametrize(
    "settings", [{"top_k": 3}, {"min_p": 0.9}, {"top_k": 2, "min_p": 0.9}, {"min_p": 1.0}], ids=str
)
def test_ties_stay_together_as_in_transformers(settings):
    logits = torch.tensor(
        [[1.0, 2.0, 2.0, 2.0, 2.0, -3.0], [5.0, 5.0, 5.0, 5.0, 5.0, 5.0], [3.0, 2.0, 1.0, 1.0, 0.0, 3.0]]
    )
    want = processors(torch.zeros(3, 1, dtype=torch.long), logits, **settings)
    got = log_weights(logits, Sampling(1.0, **settings)).log_softmax(-1)
    assert torch.allclose(got.double(), want)


@pytest.mark.parametrize("top_p", [1e-45, 1e-9, 0.2499, 0.2501, 0.7, 0.9999])
def test_equal_ids_are_cut_to_as_many_as_transformers_keeps(top_p):
    logits = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 4.0, 4.0, 0.0]])
    want = processors(torch.zeros(2, 1, dtype=torch.long), logits, top_p=top_p)
    got = log_weights(logits, Sampling(1.0, top_p=top_p))
    assert torch.equal(got.isfinite().sum(-1), want.isfinite().sum(-1))
    # The first of equal ids stays: what the smallest share leaves is what temperature 0 takes.
    assert torch.equal(got.argmax(-1), logits.argmax(-1))


@pytest.mark.parametrize("temperature", [1e-320, 1e-45, 1e-30, 1e30, 1e300])
def test_extreme_temperatures(temperature):
    logits = torch.tensor([[1.0, 3.0, 3.0 - 1e-6, -1e30, -math.inf], [1e38, -1e38, 0.0, 0.0, -math.inf]])
    got = log_weights(logits, Sampling(temperature, top_k=4, top_p=0.999999, min_p=1e-30))
    assert not got.isnan().any() and (got[:, 4] == -math.inf).all()
    if temperature < 1:
        assert torch.equal(got.isfinite(), torch.nn.functional.one_hot(logits.argmax(-1), 5).bool())
    else:
        assert torch.allclose(got[0, :3], torch.zeros(3))


def test_large_vocabularies_keep_small_shares():
    """Half the mass lies in ids of 1e-5 each: sums in float32 hold it."""
    logits = torch.zeros(1, 50_001)
    logits[0, 7] = math.log(50_000.0)
    got = log_weights(logits, Sampling(1.0, top_p=0.75)).isfinite().sum()
    assert abs(int(got) - 25_001) <= 25
    assert int(log_weights(logits, Sampling(1.0, top_p=0.49)).isfinite().sum()) == 1


@pytest.mark.parametrize("seeded", [True, False])
def test_draws_follow_the_weights(seeded):
    torch.manual_seed(0)
    logits = torch.tensor([0.5, 0.25, 0.2, 0.05]).log().expand(20_000, 4)
    settings = Sampling(0.8, top_k=3, repetition_penalty=2.0)
    randoms = row_randoms(1, 20_000, logits.device) if seeded else None
    ids = Sampler(settings, [[3]] * 20_000, randoms).draw(logits)
    want = log_weights(logits[:1], settings, torch.tensor([[False, False, False, True]])).softmax(-1)[0]
    got = torch.bincount(ids, minlength=4) / 20_000
    assert torch.allclose(got, want, atol=0.012) and torch.equal(got == 0, want == 0)


def test_what_is_left_out_never_comes():
    logits = torch.full((3, 70), -40.0)
    logits[:, 69] = 0.0
    known = torch.zeros(70, dtype=torch.bool)
    known[[3, 5]] = True
    for vocabulary, allowed in ((4, {0, 1, 2, 3}), (known, {3, 5}), (700, set(range(70)))):
        for temperature in (0.0, 1e30):
            sampler = Sampler(Sampling(temperature), [], row_randoms(0, 3, logits.device), vocabulary)
            came = {int(id) for _ in range(30) for id in sampler.draw(logits)}
            assert came <= allowed
            assert (came == {69}) == (temperature == 0 and 69 in allowed)


def test_rows_that_stay_keep_what_they_held_and_their_randomness():
    logits = torch.randn(3, 11)
    settings = Sampling(1.0, repetition_penalty=5.0)

    def sampler(rows):
        held, seeds = [[1], [2, 3], [4]], [5, 6, 7]
        return Sampler(
            settings, [held[i] for i in rows], row_randoms([seeds[i] for i in rows], len(rows), logits.device)
        )

    kept, apart = sampler([0, 1, 2]), sampler([2, 0])
    first = kept.draw(logits)
    assert torch.equal(first[[2, 0]], apart.draw(logits[[2, 0]]))
    kept.keep([2, 0])
    for _ in range(9):
        assert torch.equal(kept.draw(logits[[2, 0]]), apart.draw(logits[[2, 0]]))


@pytest.mark.parametrize(
    ("config", "want"),
    [({"vocab_size": 5}, 5), ({}, None), (None, None), (type("C", (), {"vocab_size": 6})(), 6)],
)
def test_where_a_vocabulary_is_known(config, want):
    assert vocabulary_of(type("Model", (), {"config": config})()) == want
    assert vocabulary_of(object()) is None


class Counted:
    """A decoder that notes how many ids it was asked for."""

    def __init__(self, decode):
        self.decode, self.asked = decode, []

    def __call__(self, ids):
        self.asked.append(len(ids))
        return self.decode(ids)


def words(ids):
    """Like SentencePiece's: blanks in front of words, none at the beginning."""
    return "".join(f" w{id}" if id % 3 else f"x{id}" for id in ids).removeprefix(" ")


def cleaned(ids):
    """Takes back a blank before punctuation."""
    return "".join(". " if id % 5 == 0 else f"{id} " for id in ids).replace(" .", ".")


DECODERS = {
    "latin": lambda ids: bytes(id % 256 for id in ids).decode("latin1"),
    "utf8": lambda ids: bytes(id % 256 for id in ids).decode("utf-8", "replace"),
    "words": words,
    "cleaned": cleaned,
    "backwards": lambda ids: "".join(map(chr, reversed([97 + id % 26 for id in ids]))),
    "length": lambda ids: f"<{len(ids)}>",
    "silent": lambda ids: "x" if len(ids) == 90 else "",
}


def ids_for(name, count=300):
    if name == "utf8":
        return list("añ€😀 ẞ— ".encode() * 30)[:count]
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.mark.parametrize("name", DECODERS)
def test_a_growing_text_is_the_text_of_all_ids(name):
    decode, ids = DECODERS[name], ids_for(name)
    growing = GrowingText(decode, ["never comes"])
    for count, id in enumerate(ids, 1):
        assert growing.add(id) is None
        assert growing.text == decode(ids[:count])


@pytest.mark.parametrize("name", ["latin", "utf8", "words", "cleaned", "backwards", "length", "silent"])
@pytest.mark.parametrize("at", [0, 5, 30, 64, 89, 200, 290])
@pytest.mark.parametrize("length", [1, 2, 7, 60])
def test_a_stop_string_is_found_where_the_whole_text_has_it_first(name, at, length):
    decode, ids = DECODERS[name], ids_for(name)
    text = decode(ids[: at + 3])
    stops = [text[-length:] or "x", "never comes"]
    growing = GrowingText(decode, stops)
    for count, id in enumerate(ids, 1):
        place, whole = growing.add(id), decode(ids[:count])
        want = whole.find(stops[0])
        assert place == (None if want < 0 else want)
        if place is not None:
            break


@pytest.mark.parametrize("name", ["latin", "utf8", "words", "cleaned"])
def test_a_step_decodes_the_last_ids_only(name):
    decode = Counted(DECODERS[name])
    growing = GrowingText(decode, ["never comes"])
    for id in ids_for(name) * 4:
        growing.add(id)
    assert max(decode.asked) <= 2 * WINDOW
    assert sum(decode.asked) <= 3 * WINDOW * 4 * len(ids_for(name))
