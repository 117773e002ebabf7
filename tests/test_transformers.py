"""Hugging Face: `generate` with the cache equals `generate` without it, token by token."""

import copy
import json
import pickle

import pytest
import torch
from futurefill_rs import hf, models
from models_common import FLASH, error, golden
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline
from transformers.generation.streamers import BaseStreamer
from transformers_common import NAMES, ids_for, make, returned_cache


@pytest.fixture(params=NAMES)
def model(request):
    return make(request.param)


def both(model, ids, **options):
    """The same call with and without the cache."""
    outputs = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        outputs.append(model.generate(ids, use_cache=use_cache, **options))
    return outputs


@pytest.mark.parametrize("prompt", [1, 2, 7])
def test_greedy(model, prompt):
    cached, plain = both(model, ids_for(model, prompt), max_new_tokens=25, do_sample=False)
    assert torch.equal(cached, plain)
    assert cached.shape == (2, prompt + 25)


def test_sampling(model):
    options = {"max_new_tokens": 20, "do_sample": True, "temperature": 0.9, "top_k": 8, "top_p": 0.95}
    cached, plain = both(model, ids_for(model), **options)
    assert torch.equal(cached, plain)
    cached, plain = both(model, ids_for(model), num_return_sequences=3, **options)
    assert torch.equal(cached, plain) and cached.shape[0] == 6


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=str)
def test_beams(model, options):
    cached, plain = both(model, ids_for(model), max_new_tokens=15, do_sample=False, **options)
    assert torch.equal(cached, plain)


def test_beam_sampling(model):
    cached, plain = both(model, ids_for(model), max_new_tokens=10, do_sample=True, num_beams=3)
    assert torch.equal(cached, plain)


def test_left_padded_batches(model):
    """Rows of a ragged batch continue as they would alone, whatever the padding holds."""
    prompts = [ids_for(model, length, 1, seed=length)[0] for length in (3, 9, 5)]
    ids = torch.stack([torch.cat([torch.full((9 - len(p),), 7), p]) for p in prompts])
    mask = torch.stack([torch.cat([torch.zeros(9 - len(p)), torch.ones(len(p))]) for p in prompts]).long()
    together = model.generate(ids, attention_mask=mask, max_new_tokens=15, do_sample=False)
    plain = model.generate(ids, attention_mask=mask, max_new_tokens=15, do_sample=False, use_cache=False)
    assert torch.equal(together, plain)
    for row, prompt in zip(together, prompts, strict=True):
        alone = model.generate(prompt[None], max_new_tokens=15, do_sample=False)
        assert torch.equal(row[9:], alone[0, len(prompt) :])
    beams = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, num_beams=2)
    plain = model.generate(
        ids, attention_mask=mask, max_new_tokens=8, do_sample=False, num_beams=2, use_cache=False
    )
    assert torch.equal(beams, plain)


def test_padding_on_the_right_changes_nothing(model):
    ids = ids_for(model, 8)
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, 5:] = 0
    assert torch.equal(model(ids, attention_mask=mask).logits, model(ids).logits)


class Listener(BaseStreamer):
    def __init__(self):
        self.seen = []
        self.ended = False

    def put(self, value):
        self.seen.append(value.reshape(-1).clone())

    def end(self):
        self.ended = True


def test_streamers_get_every_token(model):
    listener = Listener()
    out = model.generate(ids_for(model, 6, 1), max_new_tokens=9, do_sample=False, streamer=listener)
    assert torch.equal(torch.cat(listener.seen), out[0]) and listener.ended


def test_going_on_from_a_returned_cache(model):
    ids = ids_for(model)
    whole = model.generate(ids, max_new_tokens=20, do_sample=False)
    first = model.generate(ids, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    cache = returned_cache(first)
    assert isinstance(cache, hf.ConvolutionCache) and cache.get_seq_length() == 13
    copied = copy.deepcopy(cache)
    for kept in (cache, copied):
        rest = model.generate(first.sequences, max_new_tokens=12, do_sample=False, **{hf.CACHE_NAME: kept})
        assert torch.equal(rest, whole)


def test_a_conversation_adds_more_than_one_token(model):
    ids, more = ids_for(model), ids_for(model, 4, seed=2)
    first = model.generate(ids, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    talk = torch.cat([first.sequences, more], 1)
    # Said outright, as a generated token may be the one that pads.
    options = {"attention_mask": torch.ones_like(talk), "max_new_tokens": 6, "do_sample": False}
    want = model.generate(talk, use_cache=False, **options)
    got = model.generate(talk, **{hf.CACHE_NAME: returned_cache(first)}, **options)
    assert torch.equal(got, want)


def test_one_prompt_many_continuations(model):
    ids = ids_for(model, 6, 1)
    with torch.no_grad():
        out = model(ids[:, :-1], use_cache=True)
    cache = returned_cache(out)
    cache.batch_repeat_interleave(3)
    with torch.no_grad():
        again = model(ids[:, -1:].expand(3, -1), **{hf.CACHE_NAME: cache})
        assert error(again.logits[:, 0], model(ids.expand(3, -1)).logits[:, -1]) < 1e-5
    cache.batch_select_indices(torch.tensor([1]))
    assert cache.batch_size == 1


def test_the_cache_of_generate_depends_on_the_new_tokens_only():
    model = make("flash_stu")
    cache = hf.ConvolutionCache(45)
    with torch.no_grad():
        model(ids_for(model, 40), **{hf.CACHE_NAME: cache})
    assert cache.state.remaining == 5


def test_forward_returns_a_cache_only_when_it_can_be_used(model):
    ids = ids_for(model)
    assert returned_cache(model(ids)) is None  # gradients are asked for
    with torch.no_grad():
        assert returned_cache(model(ids)) is not None
        assert returned_cache(model(ids, use_cache=False)) is None
        assert model(ids, logits_to_keep=2).logits.shape[1] == 2
        assert isinstance(model(ids, return_dict=False), tuple)


def test_training(model):
    ids = ids_for(model)
    out = model(ids, labels=ids)
    want = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert error(out.loss, want) < 1e-5
    out.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_save_and_load(model, tmp_path):
    ids = ids_for(model)
    model.save_pretrained(tmp_path)
    twin = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(twin) is type(model)
    assert torch.equal(twin(ids).logits, model(ids).logits)
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.model_config() == model.config.model_config()
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half(ids).logits.dtype == torch.bfloat16
    # Rounded weights, a few layers deep.
    assert error(half(ids).logits, model(ids).logits) < 0.1


@pytest.mark.parametrize("name", ["flash_stu_lm", "hyenadna_lm", "stripedhyena1_lm"])
def test_upstream_checkpoints_load_by_their_own_names(name, tmp_path):
    config, state, x, y = golden(name)
    classes = {
        "flash_stu_lm": (hf.FlashSTUConfig, hf.FlashSTUForCausalLM),
        "hyenadna_lm": (hf.HyenaDNAConfig, hf.HyenaDNAForCausalLM),
        "stripedhyena1_lm": (hf.StripedHyenaConfig, hf.StripedHyenaForCausalLM),
    }
    config_class, model_class = classes[name]
    fields = {key: value for key, value in config.items() if key in config_class._fields}
    config_class(**fields).save_pretrained(tmp_path)
    save_file({key: value.clone() for key, value in state.items()}, tmp_path / "model.safetensors")
    model = model_class.from_pretrained(tmp_path)
    want = y[..., : config["vocab_size"]]
    assert error(model(x).logits, want) < 1e-5
    if name == "flash_stu_lm":
        # flash-stu 1 does not save phi.
        save_file({k: v for k, v in state.items() if k != "phi"}, tmp_path / "model.safetensors")
        model = model_class.from_pretrained(tmp_path)
        assert error(model.model.phi.abs(), state["phi"].abs()) < 1e-5


def test_checkpoints_of_the_hub(tmp_path):
    """HyenaDNA on the hub: a flat configuration, one more prefix, and the tied head saved beside the
    embedding.
    """
    config, state, x, y = golden("hyenadna_lm")
    layer = config["layer"]
    flat = {
        "model_type": "hyenadna",
        **{key: config[key] for key in ("d_model", "n_layer", "d_inner", "vocab_size")},
        "pad_vocab_size_multiple": 8,
        "max_seq_len": layer["l_max"],
        "emb_dim": layer["emb_dim"],
        "filter_order": layer["filter_order"],
        "activation_freq": layer["w"],
        "hyena_order": 2,
        "short_filter_order": 3,
        "num_inner_mlps": 2,
        "use_bias": True,
        "train_freq": True,
    }
    named = {f"hyena.{key}": value.clone() for key, value in state.items()}
    named["lm_head.weight"] = state["backbone.embeddings.word_embeddings.weight"].clone()
    (tmp_path / "config.json").write_text(json.dumps(flat))
    save_file(named, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert error(model(x).logits, y[..., :12]) < 1e-5
    assert error(models.build({**flat, "kind": "hyenadna_lm"}, named)(x), y) < 1e-5


def test_assisted_decoding(model):
    """A draft by another model, or looked up in the prompt, changes nothing but the number of calls."""
    ids = ids_for(model, 9, 1).repeat(1, 2)
    want = model.generate(ids, max_new_tokens=24, do_sample=False)
    assistant = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    # Sometimes right, always right.
    for helper in (assistant, copy.deepcopy(model)):
        got = model.generate(ids, max_new_tokens=24, do_sample=False, assistant_model=helper)
        assert torch.equal(got, want)
    got = model.generate(ids, max_new_tokens=24, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(got, want)


@pytest.mark.parametrize("length", [1, 8])
def test_long_drafts_are_undone(length, model, monkeypatch):
    """Drafts of more positions than every cache can undo, with the first call and with later ones."""
    monkeypatch.setattr(hf.cache, "DRAFT", 4)
    ids = ids_for(model, length, 1).repeat(1, 3)
    options = {"max_new_tokens": 24, "do_sample": False}
    want = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=11, **options), want)
    # Always wrong, sometimes wrong, always right.
    for noise in (1.0, 0.02, 0.0):
        assistant = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in assistant.parameters():
                parameter.add_(noise * torch.randn_like(parameter))
        assistant.generation_config.num_assistant_tokens = 9
        assistant.generation_config.assistant_confidence_threshold = 0.0
        for schedule in ("constant", "heuristic"):
            assistant.generation_config.num_assistant_tokens_schedule = schedule
            assert torch.equal(model.generate(ids, assistant_model=assistant, **options), want)


def test_drafts_for_a_padded_prompt_are_undone(model):
    ids = torch.cat([torch.full((1, 3), 7), ids_for(model, 5, 1).repeat(1, 3)], 1)
    mask = (torch.arange(ids.shape[1]) >= 3).long()[None]
    options = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
    want = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=6, **options), want)


def test_a_cache_is_cut_back_only_when_it_was_told_to_remember(model):
    ids = ids_for(model, 12)
    with torch.no_grad():
        whole = model(ids).logits
        cache = hf.ConvolutionCache()
        cache.activate_past_recording()
        model(ids[:, :5], **{hf.CACHE_NAME: cache})
        model(ids[:, 2:6], **{hf.CACHE_NAME: cache})
        assert cache.is_croppable and cache.get_seq_length() == 9
        cache.crop(-4)
        rest = model(ids[:, 5:], **{hf.CACHE_NAME: copy.deepcopy(cache)})
        assert error(rest.logits, whole[:, 5:]) < 1e-5
        with pytest.raises(ValueError, match="count: expected at most 4"):
            cache.crop(-5)
        with pytest.raises(ValueError, match="tokens_to_remove"):
            cache.crop(1)
        cache = returned_cache(model(ids))
        assert not cache.is_croppable
        with pytest.raises(ValueError, match="count: expected at most 0"):
            cache.crop(-1)


def test_errors_are_named():
    model = make("flash_stu")
    ids = ids_for(model)
    with pytest.raises(TypeError, match="expected a ConvolutionCache"), torch.no_grad():
        model(ids, **{hf.CACHE_NAME: object()})
    with pytest.raises(ValueError, match="input_ids: expected at most 48 positions, got 60"):
        model(ids_for(model, 60))
    with pytest.raises(ValueError, match="input_ids"):
        model()
    with torch.no_grad():
        cache = returned_cache(model(ids))
        with pytest.raises(ValueError, match="input_ids: expected 2 rows"):
            model(ids[:1, :1], **{hf.CACHE_NAME: cache})
        mask = torch.ones(2, 9, dtype=torch.long)
        with pytest.raises(ValueError, match="attention_mask"):
            model(ids, attention_mask=mask)
    with pytest.raises(ValueError, match="cache_implementation"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static")


def test_prompts_that_say_nothing_new_are_refused(model):
    """transformers would read such a prompt a second time, or look for the last of no logits."""
    ids = ids_for(model, 6)
    for use_cache in (True, False):
        with pytest.raises(ValueError, match="input_ids: expected a prompt of at least one id, got none"):
            model.generate(ids[:, :0], max_new_tokens=2, use_cache=use_cache)
    for kept in (6, 4):
        with torch.no_grad():
            cache = returned_cache(model(ids))
        options = {
            "max_new_tokens": 2,
            "attention_mask": torch.ones_like(ids[:, :kept]),
            hf.CACHE_NAME: cache,
        }
        with pytest.raises(ValueError, match=f"expected more positions than the 6 in the cache, got {kept}"):
            model.generate(ids[:, :kept], **options)


def test_new_tokens_alone_with_a_mask_of_all(model):
    ids = ids_for(model, 9)
    want = model.generate(ids, max_new_tokens=5, do_sample=False)
    with torch.no_grad():
        cache = returned_cache(model(ids[:, :6]))
    options = {"attention_mask": torch.ones_like(ids), hf.CACHE_NAME: cache}
    got = model.generate(ids[:, 6:], max_new_tokens=5, do_sample=False, **options)
    assert torch.equal(got[:, 3:], want[:, 9:])


def test_tokenizer(tmp_path):
    tokenizer = hf.HyenaDNATokenizer()
    assert tokenizer("ACGTN").input_ids == [7, 8, 9, 10, 11]
    assert tokenizer("AXA").input_ids == [7, 6, 7]
    assert tokenizer.decode([7, 8, 9, 10, 11]) == "ACGTN"
    assert tokenizer.decode([2, 7, 1], skip_special_tokens=True) == "A"
    assert tokenizer.pad_token_id == 4 and tokenizer.unk_token_id == 6
    assert (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.bos_token_id) == (0, 1, 2)
    assert len(tokenizer) == tokenizer.vocab_size == 12
    batch = tokenizer(["ACG", "T"], padding=True, return_tensors="pt")
    assert batch.input_ids.tolist() == [[7, 8, 9], [4, 4, 10]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    # Characters that are none come back from ids that never became a tensor.
    unknown = tokenizer("AxA").input_ids
    assert "".join(map(tokenizer._convert_id_to_token, copy.deepcopy(unknown))) == "AxA"
    assert pickle.loads(pickle.dumps(unknown)) == unknown and json.dumps(unknown) == "[7, 6, 7]"
    assert tokenizer("AxA", return_tensors="pt").input_ids.tolist() == [[7, 6, 7]]
    tokenizer.save_pretrained(tmp_path)
    assert hf.HyenaDNATokenizer.from_pretrained(tmp_path)("GATTACA").input_ids == [9, 7, 10, 10, 7, 8, 7]


def test_pipeline(tmp_path):
    model = make("hyenadna")
    model.save_pretrained(tmp_path)
    hf.HyenaDNATokenizer().save_pretrained(tmp_path)
    generator = pipeline(
        "text-generation",
        model=AutoModelForCausalLM.from_pretrained(tmp_path),
        tokenizer=AutoTokenizer.from_pretrained(tmp_path),
    )
    (out,) = generator("GATTACA", max_new_tokens=10, do_sample=False)
    ids = torch.tensor([[9, 7, 10, 10, 7, 8, 7]])
    want = model.generate(ids, max_new_tokens=10, do_sample=False, use_cache=False)
    assert out["generated_text"] == generator.tokenizer.decode(want[0], skip_special_tokens=True)
    both = generator(["GATTACA", "AC"], max_new_tokens=10, do_sample=False, batch_size=2)
    alone = generator("AC", max_new_tokens=10, do_sample=False)
    assert both[0][0] == out and both[1][0] == alone[0]


def test_stop_strings():
    model, tokenizer = make("hyenadna"), hf.HyenaDNATokenizer()
    ids = tokenizer("GATTACA", return_tensors="pt").input_ids
    whole = model.generate(ids, max_new_tokens=20, do_sample=False)
    stop = tokenizer.decode(whole[0, 10:12])
    stopped = model.generate(
        ids, max_new_tokens=20, do_sample=False, stop_strings=[stop], tokenizer=tokenizer
    )
    new, all_new = (tokenizer.decode(x[0, 7:]) for x in (stopped, whole))
    assert new == all_new[: all_new.index(stop) + len(stop)]


def test_config_files_are_upstreams(tmp_path):
    hf.FlashSTUConfig(**FLASH).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "FlashSTU"
    assert {key: config[key] for key in FLASH} == FLASH
    assert hf.FlashSTUConfig(n_embd=24).hidden_size == 24
