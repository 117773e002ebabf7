"""peft: adapters that come, change, are switched and leave; every cached way follows at once."""

from __future__ import annotations

import pytest
import torch
from models_common import MODELS, error, inputs
from plugins_common import LENGTH, TOLERANCE, WITH_LINEAR, changed, compare, linears, make, train_a_step

peft = pytest.importorskip("peft")


def lora(module, **options):
    """Adapters with values that are seen, unlike peft's own first ones, and so small that rounding is not."""
    torch.manual_seed(options.pop("seed", 1))
    options = {"r": 2, "lora_alpha": 1, "target_modules": "all-linear", "init_lora_weights": False, **options}
    return peft.LoraConfig(**options)


def names(module):
    """All linear layers but the head, which may share the embedding's weight."""
    return sorted(name for name in linears(module) if name not in ("lm_head", "unembed"))


@pytest.mark.parametrize("name", WITH_LINEAR)
def test_two_adapters_on_all_linear_layers(name, tmp_path):
    """Added, chosen, switched off, merged, unmerged, saved, loaded, taken away; prompts in between."""
    module = make(name)
    plain = compare(module)
    targets = names(module)
    wrapped = peft.get_peft_model(module, lora(module, target_modules=targets), adapter_name="one")

    def check():
        return compare(module, forward=wrapped)

    one = check()
    assert changed(one, plain)
    wrapped.add_adapter("two", lora(module, target_modules=targets, seed=2))
    assert error(check(), one) < TOLERANCE
    wrapped.set_adapter("two")
    two = check()
    assert changed(two, one) and changed(two, plain)
    with wrapped.disable_adapter():
        assert error(check(), plain) < TOLERANCE
    assert error(check(), two) < TOLERANCE
    wrapped.set_adapter("one")
    assert error(check(), one) < TOLERANCE
    wrapped.merge_adapter()
    assert error(check(), one) < 1e-4
    wrapped.unmerge_adapter()
    assert error(check(), one) < 1e-4

    wrapped.save_pretrained(tmp_path)
    fresh = make(name)
    compare(fresh)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "one", adapter_name="one")
    assert error(compare(fresh, forward=loaded), one) < TOLERANCE
    loaded.load_adapter(tmp_path / "two", adapter_name="two")
    loaded.set_adapter("two")
    assert error(compare(fresh, forward=loaded), two) < TOLERANCE

    taken = wrapped.unload()
    assert error(compare(taken), plain) < 1e-4
    assert error(compare(loaded.merge_and_unload()), two) < 1e-4


@pytest.mark.parametrize("name", WITH_LINEAR)
def test_only_the_adapter_is_trained(name):
    module = make(name)
    wrapped = peft.get_peft_model(module, lora(module, target_modules=names(module)))
    before = compare(module, forward=wrapped)
    trained = [key for key, parameter in wrapped.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in key for key in trained)
    train_a_step(wrapped.train(), inputs(module, LENGTH))
    wrapped.eval()
    assert changed(compare(module, forward=wrapped), before)


@pytest.mark.parametrize(("name", "head"), [("flash_stu", "lm_head"), ("striped_hyena_attention", "unembed")])
# peft's: merging into a weight that the embedding shares would change both.
@pytest.mark.filterwarnings("ignore:.*[tT]ied.*:UserWarning")
def test_an_adapter_on_the_head(name, head):
    module = make(name)
    plain = compare(module)
    wrapped = peft.get_peft_model(module, lora(module, target_modules=[head]))
    after = compare(module, forward=wrapped)
    assert changed(after, plain)
    with wrapped.disable_adapter():
        assert error(compare(module, forward=wrapped), plain) < TOLERANCE
    train_a_step(wrapped.train(), inputs(module, LENGTH))
    wrapped.eval()
    assert changed(compare(module, forward=wrapped), after)


@pytest.mark.parametrize(
    ("name", "weight"),
    [("flash_stu", "stu.M_filters"), ("flash_stu", "stu.M_inputs")],
)
def test_adapters_on_weights_of_no_linear_layer(name, weight):
    """peft's `target_parameters`: the weights are written anew for the time of a call of their owner."""
    module = make(name)
    plain = compare(module)
    config = lora(module, target_modules=[], target_parameters=[weight])
    wrapped = peft.get_peft_model(module, config)
    assert changed(compare(module, forward=wrapped), plain)
    with wrapped.disable_adapter():
        assert error(compare(module, forward=wrapped), plain) < TOLERANCE


@pytest.mark.parametrize("kind", ["IA3", "LoHa", "DoRA"])
def test_other_adapters(kind):
    module = make("hyenadna")
    plain = compare(module)
    torch.manual_seed(1)
    targets = names(module)
    config = {
        "IA3": lambda: peft.IA3Config(target_modules=targets, feedforward_modules=[], init_ia3_weights=False),
        "LoHa": lambda: peft.LoHaConfig(r=2, target_modules=targets, init_weights=False),
        "DoRA": lambda: lora(module, target_modules=targets, use_dora=True),
    }[kind]()
    wrapped = peft.get_peft_model(module, config)
    assert changed(compare(module, forward=wrapped), plain)
    with wrapped.disable_adapter():
        assert error(compare(module, forward=wrapped), plain) < TOLERANCE


def hugging_face(name):
    hf = pytest.importorskip("futurefill_rs.hf")
    from models_common import DNA, FLASH, STRIPED_2, STRIPED_ATTENTION

    torch.manual_seed(0)
    model = {
        "FlashSTU": lambda: hf.FlashSTUForCausalLM(hf.FlashSTUConfig(**FLASH)),
        "HyenaDNA": lambda: hf.HyenaDNAForCausalLM(hf.HyenaDNAConfig(**DNA)),
        "StripedHyena": lambda: hf.StripedHyenaForCausalLM(hf.StripedHyenaConfig(**STRIPED_ATTENTION)),
        "StripedHyena2": lambda: hf.StripedHyena2ForCausalLM(hf.StripedHyena2Config(**STRIPED_2)),
    }[name]()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1 and name == "HyenaDNA" and "filter_fn" not in key:
                parameter.mul_(4)
    return model.eval()


def generated(model, ids, **options):
    return model.generate(
        ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0, **options
    )


# Between peft and transformers.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["FlashSTU", "HyenaDNA", "StripedHyena", "StripedHyena2"])
def test_adapters_around_hugging_face_models(name, tmp_path):
    model = hugging_face(name)
    ids = torch.randint(7, 11, (2, 9))
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
        first = generated(model, ids)
        wrapped = peft.get_peft_model(model, lora(model, task_type="CAUSAL_LM"), adapter_name="one")
        wrapped.add_adapter("two", lora(model, task_type="CAUSAL_LM", seed=2))
        seen = []
        for adapter in ("one", "two", "one"):
            wrapped.set_adapter(adapter)
            seen.append(wrapped(ids, use_cache=False).logits)
            assert error(wrapped(ids, use_cache=True).logits, seen[-1]) < TOLERANCE
            assert torch.equal(generated(wrapped, ids), generated(wrapped, ids, use_cache=False))
        assert changed(seen[0], plain) and changed(seen[1], seen[0]) and torch.equal(seen[0], seen[2])
        with wrapped.disable_adapter():
            assert error(wrapped(ids, use_cache=False).logits, plain) < TOLERANCE
            assert torch.equal(generated(wrapped, ids), first)
        wrapped.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(hugging_face(name), tmp_path / "two")
        assert error(loaded(ids, use_cache=False).logits, seen[1]) < TOLERANCE
        wrapped.set_adapter("two")
        assert torch.equal(generated(loaded, ids), generated(wrapped, ids, use_cache=False))


@pytest.mark.parametrize("name", MODELS)
def test_all_linear_finds_every_linear_layer(name):
    """All but the head, which peft leaves out by itself."""
    module = make(name)
    found = names(module)
    wrapped = peft.get_peft_model(module, lora(module))
    adapted = [path for path, part in module.named_modules() if hasattr(part, "lora_A")]
    assert set(found) <= set(adapted)
    compare(module, forward=wrapped)
