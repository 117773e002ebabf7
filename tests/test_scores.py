"""Scores and entropies of sequences of any lengths, and of variants of one: each is what it is alone."""

import futurefill_rs as ff
import numpy as np
import pytest
import torch
from futurefill_rs import models
from models_common import DNA, MODELS, STRIPED_2, inputs, layer

TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def dna():
    torch.manual_seed(0)
    return models.HyenaDNA(DNA).eval()


@pytest.fixture(scope="module")
def evo():
    torch.manual_seed(0)
    return models.StripedHyena2({**STRIPED_2, "vocab_size": 512}).eval()


def bases(count, seed=0, letters="ACGT"):
    return "".join(np.random.default_rng(seed).choice(list(letters), count))


def ids_of(model, text):
    return [model.alphabet.encode(letter, "")[0].item() for letter in text]


def other_strand(text):
    return text[::-1].translate(str.maketrans("ACGTN", "TGCAN"))


@torch.no_grad()
def distributions(model, ids, begin=()):
    """Log-probabilities `(T, V)` over each id that has something before it, and those ids, in float64."""
    whole = torch.tensor([*begin, *ids])
    if whole.numel() < 2:
        return torch.zeros(0, model.vocab_size).double(), whole[1:]
    return model(whole[None])[0, :-1].double().log_softmax(-1), whole[1:]


def by_hand(model, ids, begin=()):
    log_probs, following = distributions(model, ids, begin)
    return log_probs.gather(-1, following[:, None])[:, 0]


def close(got, want, tolerance=TOLERANCE):
    assert got.shape == want.shape
    assert torch.allclose(got.double(), want.double(), rtol=0, atol=tolerance), (got, want)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("begin", [False, 3])
def test_sequences_of_unequal_length_score_as_if_alone(name, batch_size, begin):
    model = layer(name)
    rows = [inputs(model, n, 1, seed=n)[0] for n in (5, 1, 40, 17, 2, 18, 40, 0)]
    front = () if begin is False else (begin,)
    want = [by_hand(model, row.tolist(), front) for row in rows]
    for given in (rows, [row.tolist() for row in rows], [row.numpy() for row in rows]):
        found = model.score(given, begin=begin, batch_size=batch_size, chunk=7)
        assert isinstance(found, list) and len(found) == len(rows)
        for one, other in zip(found, want, strict=True):
            close(one, other)
    sums = model.score(rows, begin=begin, batch_size=batch_size, reduce="sum")
    assert sums.dtype == torch.float64
    close(sums, torch.stack([one.sum() for one in want]))
    long = [i for i, one in enumerate(want) if one.numel()]
    means = model.score([rows[i] for i in long], begin=begin, reduce="mean")
    close(means, torch.stack([want[i].mean() for i in long]))


@pytest.mark.parametrize("name", MODELS)
def test_entropies(name):
    model = layer(name)
    rows = [inputs(model, n, 1, seed=n)[0] for n in (5, 40, 17)]
    found = model.entropies(rows, begin=1, chunk=9)
    for row, one in zip(rows, found, strict=True):
        log_probs, _ = distributions(model, row.tolist(), (1,))
        close(one, -(log_probs.exp() * log_probs).sum(-1))
    close(model.entropies(rows, begin=1, reduce="mean"), torch.stack([one.mean() for one in found]))


def test_shapes_follow_what_is_given(dna):
    text, ids = "GATTACA", torch.tensor([[7, 8, 9, 10]] * 3)
    assert dna.score(text).shape == (6,)
    assert dna.score(text, begin=True).shape == (7,)
    assert dna.score(text, reduce="sum").shape == ()
    assert (
        dna.score(ids[0]).shape == dna.score(ids[0].tolist()).shape == dna.score(ids[0].numpy()).shape == (3,)
    )
    assert dna.score(ids).shape == dna.score(ids.numpy()).shape == (3, 3)
    assert dna.score(ids.int(), reduce="mean").shape == (3,)
    assert dna.score([]) == [] and dna.score([], reduce="sum").shape == (0,)
    assert dna.score(ids[:0]).shape == (0, 3) and dna.score(ids[:, :0]).shape == (3, 0)
    assert [one.shape[0] for one in dna.score(["A", "", "ACG"])] == [0, 0, 2]
    assert dna.score("", begin=True).shape == (0,)


def test_texts_are_what_the_tokenizers_make_of_them(dna, evo):
    from futurefill_rs.hf import Evo2Tokenizer, HyenaDNATokenizer

    text = "GATTNACA"
    for model, tokenizer in ((dna, HyenaDNATokenizer()), (evo, Evo2Tokenizer())):
        assert torch.equal(model.score(text), model.score(tokenizer(text)["input_ids"]))
        assert model.alphabet.decode([*model.alphabet.encode(text, ""), model.vocab_size - 1]) == text
    assert torch.equal(dna.score(text.lower()), dna.score(text))
    assert not torch.equal(evo.score(text.lower()), evo.score(text))
    assert torch.equal(evo.score("caf\u00e9"), evo.score(list("caf\u00e9".encode())))
    assert torch.equal(evo.score(text, begin=True), evo.score(text, begin=0))
    assert torch.equal(dna.score(text, begin=True), dna.score(text, begin=1))


@pytest.mark.parametrize("which", ["dna", "evo"])
def test_the_other_strand(which, request):
    model = request.getfixturevalue(which)
    texts = [bases(n, n, "ACGTN") for n in (9, 30, 2)]
    others = [other_strand(text) for text in texts]
    for reduce in ("sum", "mean"):
        for begin in (True, False):
            both = model.score(texts, reduce=reduce, begin=begin, reverse_complement=True)
            alone = [model.score(strand, reduce=reduce, begin=begin) for strand in (texts, others)]
            close(both, (alone[0] + alone[1]) / 2)
    for score in (model.score, model.entropies):
        found = score(texts, begin=True, reverse_complement=True)
        for one, text, other in zip(found, texts, others, strict=True):
            close(one, (score(text, begin=True) + score(other, begin=True).flip(0)) / 2)
    ids = torch.tensor([ids_of(model, texts[0])])
    close(
        model.score(ids, reduce="sum", reverse_complement=True)[0],
        model.score(texts[:1], reduce="sum", reverse_complement=True)[0],
    )


def test_ambiguous_letters_have_complements(evo):
    both = evo.score(["RYSWKMBDHVN", "acgtn"], reduce="sum", reverse_complement=True)
    other = evo.score(["NBDHVKMWSRY", "nacgt"], reduce="sum")
    close(both, (evo.score(["RYSWKMBDHVN", "acgtn"], reduce="sum") + other) / 2)


def test_a_sum_of_many_positions_keeps_small_differences(dna):
    text = bases(200_000)
    per_position = dna.score(text)
    total = dna.score(text, reduce="sum")
    assert abs(float(total) - float(np.sum(per_position.numpy().astype(np.longdouble)))) < 1e-6


def test_progress_counts_ids(dna):
    seen = []
    dna.score(
        ["ACG", "ACGTA", "A" * 30], batch_size=1, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(30, 38), (35, 38), (38, 38)]


@pytest.mark.parametrize(
    ("given", "options", "kind", "words"),
    [
        ("ACGU", {}, ValueError, r"ids: expected only the letters ACGTN, got 'U' at position 3"),
        (["AC", "A\u00e9"], {}, ValueError, r"ids\[1\]: expected only the letters .* 'é' at position 1"),
        ([[7], [99]], {}, ValueError, r"ids\[1\]: expected ids from 0 to 15, got 99 to 99"),
        ([[7.5]], {}, TypeError, r"ids\[0\]: expected a text or integer ids, got list"),
        ([7, True], {}, TypeError, r"ids: expected a text or integer ids"),
        (torch.zeros(3), {}, TypeError, "ids: expected integer ids, got a tensor of torch.float32"),
        (torch.zeros(1, 2, 3).long(), {}, ValueError, r"ids: expected shape \(T,\) or \(B, T\), got \(1, 2"),
        (7, {}, TypeError, "ids: expected a text, ids, or a list of either, got int"),
        ("ACG", {"reduce": "max"}, ValueError, "reduce: expected 'mean', 'sum' or None, got 'max'"),
        (["ACG", "A"], {"reduce": "mean"}, ValueError, r"ids\[1\]: expected two ids or more for a mean"),
        ("ACG", {"begin": 16}, ValueError, "begin: expected an id from 0 to 15, got 16"),
        ("ACG", {"begin": "x"}, TypeError, "begin: expected True, False or an id, got 'x'"),
        ("ACG", {"batch_size": 0}, ValueError, "batch_size: expected a positive integer, got 0"),
        ("ACG", {"reverse_complement": True}, ValueError, "reverse_complement: expected a beginning token"),
        ([7, 5, 8], {"reverse_complement": True, "reduce": "sum"}, ValueError, "got id 5 at position 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_scored_is_named(dna, given, options, kind, words):
    with pytest.raises(kind, match=words):
        dna.score(given, **options)


def test_models_without_a_tokenizer_take_ids_alone():
    model = layer("flash_stu")
    with pytest.raises(ValueError, match="ids: expected ids for a model whose 19 ids have no tokenizer here"):
        model.score("ACG")
    with pytest.raises(ValueError, match="begin: expected an id for FlashSTU, which has none of its own"):
        model.score([1, 2], begin=True)


def single_base_variants(text):
    return [(i, text[i], base) for i in range(len(text)) for base in "ACGT" if base != text[i]]


def applied(text, variant):
    place, ref, alt = variant
    assert text[place : place + len(ref)] == ref
    return text[:place] + alt + text[place + len(ref) :]


@pytest.mark.parametrize("name", ["dna", "evo"])
@pytest.mark.parametrize("begin", [True, False])
@pytest.mark.parametrize("batch_size", [1, 5, 32])
def test_every_single_base_variant_scores_as_if_alone(name, begin, batch_size, request):
    model = request.getfixturevalue(name)
    text = bases(40)
    variants = single_base_variants(text)
    order = np.random.default_rng(1).permutation(len(variants))
    variants = [variants[i] for i in order]
    found = ff.score_variants(model, text, variants, begin=begin, batch_size=batch_size)
    want = model.score([applied(text, variant) for variant in variants], reduce="sum", begin=begin)
    assert found.dtype == torch.float64
    close(found, want)
    relative = ff.score_variants(model, text, variants, begin=begin, relative=True)
    close(relative, want - model.score(text, reduce="sum", begin=begin))


MIXED = [
    (0, "G", "T"), (0, "", "ACGT"), (0, "GATT", ""), (3, "TACA", "TACAGG"), (3, "T", "T"), (7, "GATT", ""),
    (4, "", "CCCCCCCCCC"), (13, "A", ""), (14, "", "G"), (14, "", ""), (0, "GATTACAGATTACA", "C"),
    (13, "A", "T"), "GATTACAGATTACA", "GATTACA", "C",
    "GATTACAGATTACAGATTACA", "CATTACAGATTACA", "GATTACAGATTACT",
]  # fmt: skip


@pytest.mark.parametrize("name", ["dna", "evo"])
@pytest.mark.parametrize(
    "options", [{}, {"begin": True, "reduce": "mean"}, {"begin": True, "relative": True}]
)
@pytest.mark.parametrize("strands", [False, True])
def test_insertions_deletions_and_whole_sequences(name, options, strands, request):
    model = request.getfixturevalue(name)
    text = "GATTACAGATTACA"
    found = ff.score_variants(model, text, MIXED, reverse_complement=strands, **options)
    whole = [variant if isinstance(variant, str) else applied(text, variant) for variant in MIXED]
    plain = {"reduce": options.get("reduce", "sum"), "begin": options.get("begin", False)}
    want = model.score([*whole, text], reverse_complement=strands, **plain)
    close(found, want[:-1] - want[-1] if options.get("relative") else want[:-1])


@pytest.mark.parametrize("name", MODELS)
def test_variants_as_ids(name):
    model = layer(name)
    reference = inputs(model, 45, 1)[0]
    changes = [
        (i, [int(reference[i])], [(int(reference[i]) + 1) % model.vocab_size]) for i in range(0, 45, 4)
    ]
    changes += [(9, torch.empty(0).long(), [1, 2, 3]), (20, reference[20:25], [])]
    found = ff.score_variants(model, reference, changes)
    want = []
    for place, ref, alt in changes:
        ids = reference.tolist()
        want.append(ids[:place] + list(map(int, alt)) + ids[place + len(ref) :])
    close(found, model.score(want, reduce="sum"), 1e-3)
    close(ff.score_variants(model, reference.tolist(), want), found, 1e-3)


def test_windows_longer_than_a_piece_and_caches_that_fill_the_memory(dna, monkeypatch):
    from futurefill_rs.models import _variants

    text = bases(90)
    variants = single_base_variants(text)[::7]
    want = dna.score([applied(text, variant) for variant in variants], reduce="sum")
    monkeypatch.setattr(_variants, "PIECE", 24)
    close(ff.score_variants(dna, text, variants), want)
    monkeypatch.setattr(_variants, "CACHE_BYTES", 1)
    seen = []
    found = ff.score_variants(dna, text, variants, progress=lambda done, total: seen.append((done, total)))
    close(found, want)
    assert [done for done, _ in seen[1:]] == list(range(seen[0][0] + 1, len(variants) + 1))


def test_few_variants_far_apart_do_not_read_what_they_share(evo):
    read = []
    handle = evo.blocks[0].register_forward_hook(
        lambda module, args, y: read.append(args[0].shape[:2].numel())
    )
    text = bases(1000)
    try:
        ff.score_variants(evo, text, [(950, text[950:951], ""), (100, "", "A"), (952, "", "A")])
    finally:
        handle.remove()
    # The reference twice, once for its own score, and what follows each change.
    assert sum(read) < 2 * 1000 + 900 + 3 * 50 + 100


def test_no_variants(dna):
    assert ff.score_variants(dna, "ACGT", []).shape == (0,)
    assert ff.score_variants(dna, "", ["ACGT", ""]).shape == (2,)


def test_models_of_transformers_are_taken(dna):
    from futurefill_rs.hf import HyenaDNAConfig, HyenaDNAForCausalLM

    torch.manual_seed(0)
    wrapped = HyenaDNAForCausalLM(HyenaDNAConfig(d_model=16, n_layer=1, layer=DNA["layer"])).eval()
    close(ff.score_variants(wrapped, "ACGT", ["ACCT"]), wrapped.language_model.score(["ACCT"], reduce="sum"))


@pytest.mark.parametrize(
    ("variants", "options", "kind", "words"),
    [
        ([(3, "A", "C")], {}, ValueError, r"variants\[0\]: expected ref .* at position 3, 'T', got 'A'"),
        (["ACGT", (3, "TT", "")], {}, ValueError, r"variants\[1\]: .* ends .* of 4 ids .* from position 3"),
        ([(5, "", "C")], {}, ValueError, r"variants\[0\]: .* got 0 ids from position 5 on"),
        ([(-1, "T", "C")], {}, ValueError, r"variants\[0\]: position: expected a non-negative .* got -1"),
        ([(1.5, "T", "C")], {}, TypeError, r"variants\[0\]: position: expected a non-negative .* got float"),
        ([(1, "U", "C")], {}, ValueError, r"variants\[0\]: ref: expected only the letters ACGTN, got 'U'"),
        ([(1, "C", "X")], {}, ValueError, r"variants\[0\]: alt: expected only the letters ACGTN, got 'X'"),
        ("ACGT", {}, TypeError, "variants: expected a list of variants, got str"),
        (["A"], {"reduce": "mean"}, ValueError, r"variants\[0\]: expected two ids or more for a mean"),
        (["A"], {"reduce": None}, ValueError, "reduce: expected 'sum' or 'mean', got None"),
    ],
)  # fmt: skip
def test_variants_that_do_not_fit_are_named(dna, variants, options, kind, words):
    with pytest.raises(kind, match=words):
        ff.score_variants(dna, "ACGT", variants, **options)
