"""Hugging Face: what transformers' users ask of a model beside its logits; nothing is silently ignored."""

import copy
import io
import pickle

import futurefill_rs as ff
import pytest
import torch
from futurefill_rs import hf, models
from models_common import error
from transformers import AutoModel, AutoModelForCausalLM
from transformers_common import NAMES, ids_for, make, returned_cache

GREEDY = {"do_sample": False, "max_new_tokens": 8}


@pytest.fixture(params=NAMES)
def model(request):
    return make(request.param)


def embeddings(model, ids):
    return model.get_input_embeddings()(ids).detach()


def test_hidden_states_of_every_layer_at_every_position(model):
    ids, mask = ids_for(model, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, :4] = 0
    seen = []
    blocks = model.language_model.get_submodule(model._blocks)
    hooks = [block.register_forward_hook(lambda _module, _inputs, y: seen.append(y)) for block in blocks]
    last = model.language_model(ids[:1, 4:], features=True)
    for hook in hooks:
        hook.remove()
    want = [embeddings(model, ids[:1, 4:]), *seen[:-1], last]
    assert len(want) == model.config.num_hidden_layers + 1
    plain = model(ids, attention_mask=mask, output_hidden_states=True)
    with torch.no_grad():
        pieces, cache = [], None
        for begin, end in ((0, 5), (5, 6), (6, 10), (10, 12)):
            out = model(
                ids[:, begin:end],
                attention_mask=mask[:, :end],
                use_cache=True,
                output_hidden_states=True,
                **{hf.CACHE_NAME: cache},
            )
            cache = returned_cache(out)
            pieces.append(out.hidden_states)
    cached = [torch.cat(parts, 1) for parts in zip(*pieces, strict=True)]
    for states in (plain.hidden_states, cached):
        assert len(states) == len(want)
        for got, expected in zip(states, want, strict=True):
            assert error(got[:1, 4:], expected) < 1e-5
    with torch.no_grad():
        assert (
            error(plain.logits[:1, 4:], model.language_model.head(last)[..., : plain.logits.shape[2]]) < 1e-5
        )
    model.config.output_hidden_states = True
    assert len(model(ids).hidden_states) == len(want)
    assert len(model(ids, return_dict=False)[-1]) == len(want)
    assert model(ids, output_hidden_states=False).hidden_states is None


def test_hidden_states_of_generate(model):
    ids = ids_for(model, 6)
    options = {"output_hidden_states": True, "return_dict_in_generate": True, **GREEDY}
    cached = model.generate(ids, **options)
    plain = model.generate(ids, use_cache=False, **options)
    for step, (got, want) in enumerate(zip(cached.hidden_states, plain.hidden_states, strict=True)):
        for layer, whole in zip(got, want, strict=True):
            assert layer.shape[1] == (6 if step == 0 else 1)
            assert error(layer, whole[:, -layer.shape[1] :]) < 1e-5
    drafted = model.generate(ids[:1], prompt_lookup_num_tokens=3, **options)
    assert torch.equal(drafted.sequences, cached.sequences[:1])


def test_what_does_not_exist_is_refused(model):
    ids = ids_for(model)
    with pytest.raises(ValueError, match="output_attentions: expected False"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match="output_attentions"):
        model.generate(ids, output_attentions=True, return_dict_in_generate=True, **GREEDY)
    for name in ("position_ids", "token_type_ids", "cu_seq_lens_q", "head_mask"):
        with pytest.raises(TypeError, match=f"{name}: expected None"):
            model(ids, **{name: ids})
    with pytest.raises(ValueError, match="assistant_early_exit: expected None"):
        model.generate(ids, assistant_early_exit=1, **GREEDY)
    with pytest.raises(
        ValueError, match=r"input_ids: expected integers of shape \(B, T\), got torch.float32"
    ):
        model(ids.float())


def test_embeddings_in_place_of_ids(model):
    ids = ids_for(model, 9)
    x = embeddings(model, ids)
    want = model(ids, output_hidden_states=True)
    got = model(inputs_embeds=x, output_hidden_states=True)
    assert error(got.logits, want.logits) < 1e-6
    for a, b in zip(got.hidden_states, want.hidden_states, strict=True):
        assert error(a, b) < 1e-6
    x.requires_grad_()
    model(inputs_embeds=x).logits.square().sum().backward()
    assert float(x.grad.norm()) > 0
    x = x.detach()
    with torch.no_grad():
        cache = returned_cache(model(inputs_embeds=x[:, :4]))
        one = model(inputs_embeds=x[:, 4:5], **{hf.CACHE_NAME: cache}).logits
        rest = model(ids[:, 5:], **{hf.CACHE_NAME: cache}).logits
    assert error(torch.cat([one, rest], 1), want.logits[:, 4:]) < 1e-5
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    x[1, :5] = torch.nan
    for more in (
        {},
        {"num_beams": 2},
        {"prefill_chunk_size": 4},
        {"num_return_sequences": 2, "num_beams": 2},
    ):
        new = model.generate(inputs_embeds=x, attention_mask=mask, **more, **GREEDY)
        plain = model.generate(ids, attention_mask=mask, **more, **GREEDY)[:, 9:]
        assert torch.equal(new, plain)
    with pytest.raises(
        ValueError, match="input_ids: expected a tensor of ids or else inputs_embeds, got both"
    ):
        model(ids, inputs_embeds=x)
    with pytest.raises(ValueError, match="got neither"):
        model()
    with pytest.raises(ValueError, match="inputs_embeds: expected numbers of shape"):
        model(inputs_embeds=x[..., :3])
    with pytest.raises(ValueError, match="inputs_embeds: expected None with assisted decoding"):
        model.generate(inputs_embeds=x[:1], prompt_lookup_num_tokens=2, **GREEDY)


def test_models_are_copied_and_pickled(model):
    ids = ids_for(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(ids).logits, model(ids).logits)


# By its old name and by its new one.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, model):
    ids = ids_for(model, 20)
    held = []

    def gradients():
        model.zero_grad()
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: kept.setdefault(x.data_ptr(), x.nbytes) and x, lambda x: x
        ):
            loss = model(ids, labels=ids, output_hidden_states=True).loss
        held.append(sum(kept.values()))
        loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    model.train()
    want = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    assert model.is_gradient_checkpointing
    for got, expected in zip(gradients(), want, strict=True):
        assert error(got, expected) < 1e-5 if expected.norm() else not got.norm()
    assert held[1] < held[0] / 2
    model.gradient_checkpointing_disable()
    gradients()
    assert held[2] >= held[0]


RESIZED = [(13, None), (40, None), (9, None), (17, 4), (None, 32)]


@pytest.mark.parametrize(("size", "multiple"), RESIZED, ids=str)
def test_another_vocabulary_is_saved_and_loaded_both_ways(size, multiple, model, tmp_path):
    old = model.config.vocab_size
    ids = ids_for(model, 10, seed=4) % 9
    before = model(ids).logits
    model.resize_token_embeddings(size, pad_to_multiple_of=multiple)
    tokens = old if size is None else size
    tokens = tokens if multiple is None else -(-tokens // multiple) * multiple
    assert model.config.vocab_size == tokens
    want = model(ids).logits
    assert want.shape[2] == tokens
    kept = min(old, tokens)
    assert error(want[..., :kept], before[..., :kept]) < 1e-6
    model.save_pretrained(tmp_path / "theirs")
    model.language_model.save(tmp_path / "ours")
    for folder in ("theirs", "ours"):
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / folder)(ids).logits, want)
        assert torch.equal(models.load(tmp_path / folder)(ids)[..., :tokens], want)
    assert model.generate(ids, **GREEDY).max() < tokens
    # A new token does not begin as a row of padding that nobody has trained.
    norms = model.get_input_embeddings().weight[:tokens].detach().norm(dim=1)
    assert float(norms.min()) > float(norms.mean()) / 20


@pytest.mark.parametrize("name", ["hyenadna", "stripedhyena"])
def test_what_only_pads_the_vocabulary_is_never_chosen(name):
    model = make(name)
    model.resize_token_embeddings(13)
    embedding = model.get_input_embeddings().weight
    assert embedding.shape[0] == 16
    ids = ids_for(model, 6)
    with torch.no_grad():
        # What pads would be the likeliest by far.
        embedding[13:] = 50 * embedding[13:]
    options = {"max_new_tokens": 30, "do_sample": True, "temperature": 5.0}
    assert model.generate(ids, num_return_sequences=4, **options).max() < 13
    assert model.generate(ids, num_beams=3, max_new_tokens=20).max() < 13
    assert model(ids).logits.shape[2] == 13


def test_models_without_a_head(model, tmp_path):
    ids = ids_for(model, 9)
    model.save_pretrained(tmp_path / "whole")
    body = AutoModel.from_pretrained(tmp_path / "whole")
    assert isinstance(body, hf.ConvolutionModel)
    want = model(ids, output_hidden_states=True).hidden_states
    assert torch.equal(body(ids).last_hidden_state, want[-1])
    for got, expected in zip(body(ids, output_hidden_states=True).hidden_states, want, strict=True):
        assert torch.equal(got, expected)
    with torch.no_grad():
        out = body(ids[:, :5])
        rest = body(ids[:, 5:], **{hf.CACHE_NAME: returned_cache(out)}).last_hidden_state
    assert error(torch.cat([out.last_hidden_state, rest], 1), want[-1]) < 1e-5
    out = body(ids)
    out.last_hidden_state.sum().backward()
    # Nothing in it waits for a gradient that never comes.
    assert all(parameter.grad is not None for parameter in body.parameters())
    body.save_pretrained(tmp_path / "body")
    assert torch.equal(AutoModel.from_pretrained(tmp_path / "body")(ids).last_hidden_state, want[-1])
    assert type(AutoModel.from_config(model.config)) is type(body)
    if model.config.tie_word_embeddings:
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "body")
        assert torch.equal(again(ids).logits, model(ids).logits)
    else:
        with pytest.raises(ValueError, match="missing"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "body")


def through_torch(cache):
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
    "torch": through_torch,
    "fork": lambda cache: cache.fork(),
}


@pytest.mark.parametrize("way", COPIES)
def test_copies_of_a_cache(way, model):
    ids = ids_for(model, 14)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        cache = hf.ConvolutionCache()
        cache.activate_past_recording()
        options = {hf.CACHE_NAME: cache}
        model(ids[:, :6], attention_mask=mask[:, :6], **options)
        model(ids[:, 6:8], **options)
        twin = COPIES[way](cache)
        assert isinstance(twin, hf.ConvolutionCache) and twin.get_seq_length() == 8
        want = model(ids[:, 8:], attention_mask=mask, **options).logits
        got = model(ids[:, 8:], attention_mask=mask, **{hf.CACHE_NAME: twin}).logits
        assert torch.equal(got, want)
        twin.crop(-3)
        again = model(ids[:, 11:], **{hf.CACHE_NAME: twin}).logits
        assert error(again, want[:, 3:]) < 1e-5
        assert cache.get_seq_length() == 14
        assert hf.ConvolutionCache().fork().get_seq_length() == 0
    with pytest.raises(ValueError, match="attention_mask"):
        wrong = torch.ones(2, 15, dtype=torch.long)
        model(ids[:, :1], attention_mask=wrong, **{hf.CACHE_NAME: COPIES[way](cache)})


def test_a_saved_cache_goes_on_in_generate(model):
    ids = ids_for(model)
    first = model.generate(ids, return_dict_in_generate=True, **GREEDY)
    loaded = through_torch(returned_cache(first))
    want = model.generate(first.sequences, use_cache=False, **GREEDY)
    assert torch.equal(model.generate(first.sequences, **{hf.CACHE_NAME: loaded}, **GREEDY), want)


def test_guidance(model):
    ids, other = ids_for(model), ids_for(model, 4, seed=3)
    options = {"guidance_scale": 1.5, "negative_prompt_ids": other, **GREEDY}
    want = model.generate(ids, use_cache=False, **options)
    assert torch.equal(model.generate(ids, **options), want)


def test_our_own_generate_takes_the_classes(model):
    ids = ids_for(model)
    got = ff.generate(model, ids, 8)
    assert got.shape == (2, 14)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_a_trainer_trains_evaluates_and_reloads(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    model, tokenizer = make("hyenadna"), hf.HyenaDNATokenizer()
    texts = ["GATTACAGATTACA", "ACGT", "TTTTGGGGCC", "CAGCAG", "GATTACA", "AACCGGTT"]
    data = [{"input_ids": tokenizer(text).input_ids} for text in texts]
    arguments = TrainingArguments(
        tmp_path,
        use_cpu=True,
        report_to=[],
        num_train_epochs=2,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=3,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        disable_tqdm=True,
        learning_rate=1e-3,
    )
    trainer = Trainer(
        model,
        arguments,
        DataCollatorForLanguageModeling(tokenizer, mlm=False),
        train_dataset=data,
        eval_dataset=data,
    )

    def loss():
        """Of all predictions, each text alone."""
        with torch.no_grad():
            rows = [torch.tensor([row["input_ids"]]) for row in data]
            parts = [(model(ids, labels=ids).loss * (ids.shape[1] - 1), ids.shape[1] - 1) for ids in rows]
        return float(sum(part for part, _ in parts) / sum(count for _, count in parts))

    model.eval()
    before = loss()
    predicted = trainer.predict(data)
    assert predicted.predictions.shape[2] == model.config.vocab_size
    trainer.train()
    model.eval()
    after = loss()
    assert after < before
    state = {key: value.clone() for key, value in model.state_dict().items()}
    trainer.save_model(tmp_path / "best")
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "best")
    assert all(torch.equal(twin.state_dict()[key], value) for key, value in state.items())
    # Batches of texts padded to one length are the same texts.
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    # The first of a text is predicted by nothing.
    labels = batch.input_ids.masked_fill(batch.attention_mask.cumsum(1) <= 1, -100)
    with torch.no_grad():
        assert abs(float(model(**batch, labels=labels).loss) - after) < 1e-4


def test_the_first_id_after_padding_is_predicted_from_nothing(model):
    ids, mask = ids_for(model, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    labels = torch.where(mask == 0, -100, ids)
    alone = [
        model(row[kept][None], labels=row[kept][None]).loss for row, kept in zip(ids, mask > 0, strict=True)
    ]
    want = (4 * alone[0] + 8 * alone[1]) / 12
    assert error(model(ids, attention_mask=mask, labels=labels).loss, want) < 1e-5
