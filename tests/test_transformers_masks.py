"""Hugging Face: what is masked is never read as a token, wherever it stands and whenever it comes.

Compared with every row alone: without a cache, without padding, without a batch.
"""

import copy
import itertools

import pytest
import torch
from futurefill_rs import hf
from models_common import error
from transformers_common import NAMES, ids_for, make, returned_cache

GREEDY = {"do_sample": False}
DRAFTED = {"max_new_tokens": 8, **GREEDY}


@pytest.fixture(params=NAMES)
def model(request):
    return make(request.param)


def alone(model, ids, mask):
    """Logits at the tokens of every row, each row read by itself."""
    with torch.no_grad():
        return [
            model(row[kept][None], use_cache=False).logits[0] for row, kept in zip(ids, mask > 0, strict=True)
        ]


def check(logits, mask, want):
    for row, kept, expected in zip(logits, mask > 0, want, strict=True):
        assert row[kept].shape == expected.shape
        assert error(row[kept], expected) < 1e-5


def read(model, ids, mask, cuts):
    """Logits of a sequence read in several calls that end at `cuts`."""
    pieces, cache, edges = [], None, [0, *cuts, ids.shape[1]]
    with torch.no_grad():
        for begin, end in itertools.pairwise(edges):
            out = model(
                ids[:, begin:end], attention_mask=mask[:, :end], use_cache=True, **{hf.CACHE_NAME: cache}
            )
            cache = returned_cache(out)
            assert cache.get_seq_length() == end
            pieces.append(out.logits)
    return torch.cat(pieces, 1), cache


def random_mask(seed, rows, length):
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(rows, length, generator=generator) < 0.6).long()
    mask[:, -1] = 1
    return mask


@pytest.mark.parametrize("seed", range(3))
def test_padding_anywhere_in_the_first_call(seed, model):
    ids, mask = ids_for(model, 14, 3, seed), random_mask(seed, 3, 14)
    want = alone(model, ids, mask)
    check(model(ids, attention_mask=mask).logits, mask, want)
    check(model(ids, attention_mask=mask.bool()).logits, mask, want)
    logits, cache = read(model, ids, mask, [])
    check(logits, mask, want)
    more = torch.cat([ids, ids_for(model, 5, 3, seed + 9)], 1)
    whole = torch.cat([mask, torch.ones(3, 5, dtype=torch.long)], 1)
    with torch.no_grad():
        rest = model(more[:, 14:], attention_mask=whole, **{hf.CACHE_NAME: cache}).logits
    check(torch.cat([logits, rest], 1), whole, alone(model, more, whole))


def test_padding_at_the_end_is_not_what_a_cache_goes_on_from(model):
    ids = ids_for(model, 12)
    mask = torch.ones_like(ids)
    mask[0, 5:9] = 0
    logits, _ = read(model, ids, mask, [9])
    check(logits, mask, alone(model, ids, mask))


@pytest.mark.parametrize("cuts", [[4], [3, 6, 9, 12], [1, 2, 3, 4], [7, 8, 13], [5, 10]], ids=str)
def test_rows_begin_in_whichever_call(cuts, model):
    """Late rows are all padding in the first calls, begin within a later one or at its edge."""
    ids = ids_for(model, 16, 5)
    starts = torch.tensor([0, 3, 5, 12, 15])
    mask = (torch.arange(16) >= starts.unsqueeze(-1)).long()
    logits, _ = read(model, ids, mask, cuts)
    check(logits, mask, alone(model, ids, mask))
    # Nothing but padding in any row at first.
    logits, _ = read(model, ids[2:], mask[2:], cuts)
    check(logits, mask[2:], alone(model, ids[2:], mask[2:]))


def test_rows_pause_together(model):
    ids = ids_for(model, 15, 3)
    mask = torch.ones_like(ids)
    mask[:2, 6:9] = 0
    # The last begins after the pause of the others.
    mask[2, :10] = 0
    logits, _ = read(model, ids, mask, [5, 10, 12])
    check(logits, mask, alone(model, ids, mask))
    with pytest.raises(ValueError, match="attention_mask: expected rows that have begun to pause together"):
        mask[0, 13] = 0
        read(model, ids, mask, [5, 10, 12])


def test_what_was_read_stays_read(model):
    ids = ids_for(model, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        cache = returned_cache(model(ids[:, :6], attention_mask=mask[:, :6]))
        options = {hf.CACHE_NAME: cache}
        for row, position, match in (
            (1, 4, "expected a token at position 4 of row 1, as the cache has read it, got padding"),
            (0, 2, "expected padding at position 2 of row 0, as the cache has read it, got a token"),
        ):
            other = mask.clone()
            other[row, position] = 1 - other[row, position]
            with pytest.raises(ValueError, match=f"attention_mask: {match}"):
                model(ids[:, 6:], attention_mask=other, **options)
        with pytest.raises(ValueError, match=r"attention_mask: expected shape \(2, 9\), got \(2, 3\)"):
            model(ids[:, 6:], attention_mask=mask[:, 6:], **options)
        # Nothing of that has moved the cache; without a mask there is nothing but tokens.
        rest = model(ids[:, 6:], **options).logits
    check(
        torch.cat([torch.zeros(2, 6, rest.shape[2]), rest], 1)[:, 6:],
        mask[:, 6:],
        [logits[-3:] for logits in alone(model, ids, mask)],
    )


@pytest.mark.parametrize("chunk", [1, 3, 4, 7, 10, 13, 20, 64])
def test_chunks_of_a_padded_prompt(chunk, model):
    ids = ids_for(model, 20, 3)
    starts = torch.tensor([13, 0, 8])
    mask = (torch.arange(20) >= starts.unsqueeze(-1)).long()
    options = {"max_new_tokens": 8, **GREEDY}
    got = model.generate(ids, attention_mask=mask, prefill_chunk_size=chunk, **options)
    for row, start, prompt in zip(got, starts, ids, strict=True):
        want = model.generate(prompt[None, start:], use_cache=False, **options)
        assert torch.equal(row[start:], want[0])
    beams = model.generate(ids, attention_mask=mask, prefill_chunk_size=chunk, num_beams=2, **options)
    plain = model.generate(ids, attention_mask=mask, use_cache=False, num_beams=2, **options)
    assert torch.equal(beams, plain)


def test_gaps_in_a_prompt_of_generate(model):
    ids, mask = ids_for(model, 12), random_mask(3, 2, 12)
    options = {"max_new_tokens": 8, **GREEDY}
    got = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(got, model.generate(ids, attention_mask=mask, use_cache=False, **options))
    for row, kept, prompt in zip(got, mask > 0, ids, strict=True):
        want = model.generate(prompt[kept][None], use_cache=False, **options)[0]
        assert torch.equal(row[12:], want[kept.sum() :])


def test_a_gap_between_turns(model):
    """A conversation of one: padding between its turns is passed over."""
    ids, more = ids_for(model, 5, 1), ids_for(model, 7, 1, 2)
    first = model.generate(ids, max_new_tokens=4, return_dict_in_generate=True, **GREEDY)
    talk = torch.cat([first.sequences, more], 1)
    mask = torch.ones_like(talk)
    mask[0, 9:12] = 0
    options = {"max_new_tokens": 6, **GREEDY}
    got = model.generate(talk, attention_mask=mask, **{hf.CACHE_NAME: returned_cache(first)}, **options)
    want = model.generate(talk[mask > 0][None], use_cache=False, **options)
    assert torch.equal(got[0, 16:], want[0, 13:])


def test_a_turn_that_ended_early_cannot_be_taken_back(model):
    """The row that ended was fed padding as tokens while the other went on."""
    ids = ids_for(model, 6)
    first = model.generate(ids, max_new_tokens=6, return_dict_in_generate=True, **GREEDY)
    talk = torch.cat([first.sequences, ids_for(model, 4, 2, 5)], 1)
    mask = torch.ones_like(talk)
    mask[0, 8:12] = 0
    with pytest.raises(ValueError, match="attention_mask: expected a token at position 8 of row 0"):
        model.generate(talk, attention_mask=mask, max_new_tokens=2, **{hf.CACHE_NAME: returned_cache(first)})


def test_padding_is_found_by_its_id_but_not_among_generated_ids(model):
    """Without a mask transformers takes the id that pads for padding."""
    ids = ids_for(model, 8)
    ids[0, :3], ids[1, 4] = 0, 0
    options = {"max_new_tokens": 6, **GREEDY}
    got = model.generate(ids, **options)
    assert torch.equal(got, model.generate(ids, attention_mask=(ids != 0).long(), use_cache=False, **options))
    first = model.generate(ids, max_new_tokens=3, return_dict_in_generate=True, **GREEDY)
    # Had it been generated, it would have been read as a token.
    sequences = torch.cat([first.sequences[:, :-1], torch.full((2, 1), 5)], 1)
    mask = torch.cat([(ids != 0).long(), torch.ones(2, 3, dtype=torch.long)], 1)
    plain = model.generate(sequences, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(model.generate(sequences, **{hf.CACHE_NAME: returned_cache(first)}, **options), plain)


def test_a_prompt_that_says_nothing_new_is_not_read_again_in_chunks(model):
    ids = ids_for(model, 9)
    with torch.no_grad():
        cache = returned_cache(model(ids[:, :6]))
    options = {"prefill_chunk_size": 2, "max_new_tokens": 4, hf.CACHE_NAME: cache, **GREEDY}
    with pytest.raises(ValueError, match="expected more positions than the 6 in the cache, got 6"):
        model.generate(ids[:, :6], attention_mask=torch.ones(2, 6), **options)
    got = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(got, model.generate(ids, use_cache=False, max_new_tokens=4, **GREEDY))
    with pytest.raises(ValueError, match="prefill_chunk_size: expected a positive integer, got 0"):
        model.generate(ids, prefill_chunk_size=0, max_new_tokens=2)


class TestDrafts:
    """Assisted decoding and prompt lookup that go on from a returned cache."""

    @pytest.mark.parametrize("padded", [False, True])
    def test_the_prompt_is_not_read_twice(self, padded, model):
        ids = ids_for(model, 9, 1).repeat(1, 2)
        mask = torch.ones_like(ids)
        if padded:
            mask[:, :4] = 0
        first = model.generate(
            ids, attention_mask=mask, max_new_tokens=5, return_dict_in_generate=True, **GREEDY
        )
        talk = torch.cat([first.sequences, ids[:, :4]], 1)
        mask = torch.cat([mask, torch.ones(1, talk.shape[1] - mask.shape[1], dtype=torch.long)], 1)
        want = model.generate(talk, attention_mask=mask, use_cache=False, **DRAFTED)
        for draft in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": make_noisy(model)}):
            cache = returned_cache(first).fork()
            options = {"attention_mask": mask, hf.CACHE_NAME: cache, **draft, **DRAFTED}
            assert torch.equal(model.generate(talk, **options), want)
            # A second time from what the first has left, which remembers how to go back.
            longer = torch.cat([want, ids[:, :3]], 1)
            options["attention_mask"] = torch.nn.functional.pad(mask, (0, 11), value=1)
            again = model.generate(longer, **options)
            assert torch.equal(again[:, : longer.shape[1]], longer)
            plain = {**options, "use_cache": False, hf.CACHE_NAME: None}
            plain = {key: value for key, value in plain.items() if key not in draft}
            assert torch.equal(again, model.generate(longer, **plain))

    def test_new_ids_alone(self, model):
        ids = ids_for(model, 12, 1)
        with torch.no_grad():
            cache = returned_cache(model(ids[:, :7]))
        options = {"attention_mask": torch.ones_like(ids), hf.CACHE_NAME: cache, **DRAFTED}
        got = model.generate(ids[:, 7:], prompt_lookup_num_tokens=3, **options)
        assert torch.equal(got[:, 5:], model.generate(ids, use_cache=False, **DRAFTED)[:, 12:])

    @pytest.mark.parametrize("draft", [{}, {"prompt_lookup_num_tokens": 3}], ids=["plain", "lookup"])
    def test_another_prompt_is_refused(self, draft, model):
        ids = ids_for(model, 9, 1)
        with torch.no_grad():
            cache = returned_cache(model(ids[:, :6]))
        other = ids.clone()
        other[0, 2] = 3 if other[0, 2] != 3 else 4
        options = {hf.CACHE_NAME: cache, "attention_mask": torch.ones_like(ids), "max_new_tokens": 3}
        with pytest.raises(
            ValueError, match="input_ids: expected the 6 ids that the cache has read to come first"
        ):
            model.generate(other, **draft, **options)
        assert cache.get_seq_length() == 6

    def test_other_rows_are_refused(self, model):
        ids = ids_for(model, 6)
        first = model.generate(ids, num_beams=2, max_new_tokens=4, return_dict_in_generate=True, **GREEDY)
        with pytest.raises(ValueError, match="input_ids: expected 4 rows as in the cache, got 2"):
            model.generate(first.sequences, max_new_tokens=2, **{hf.CACHE_NAME: returned_cache(first)})


def make_noisy(model):
    assistant = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return assistant
