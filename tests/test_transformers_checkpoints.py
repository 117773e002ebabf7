"""Checkpoints as upstream and its trainers write them: names, kinds, files, precision."""

import json

import pytest
import torch
from futurefill_rs import hf, models
from models_common import DNA, FLASH, MODELS, STRIPED, error, golden, inputs, layer
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

LANGUAGE_MODELS = [
    "flash_stu_lm",
    "hyenadna_lm",
    "stripedhyena1_lm",
    "stripedhyena1_attention_lm",
    "stripedhyena2_lm",
]


def write(folder, config, state):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    state = {key: value.clone() for key, value in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def renamed(state, rename):
    return {rename(key): value for key, value in state.items()}


NESTED = {
    "in parallel": lambda key: f"module.{key}",
    "fsdp": lambda key: f"_fsdp_wrapped_module.{key}",
    "fsdp, block by block": lambda key: (
        "_fsdp_wrapped_module."
        + key.replace("layers.0.", "layers.0._fsdp_wrapped_module._checkpoint_wrapped_module.").replace(
            ".mlp.", ".mlp._fsdp_wrapped_module."
        )
    ),
    "compiled blocks": lambda key: key.replace("layers.0.", "layers.0._orig_mod."),
    "compiled, in parallel, in a trainer": lambda key: f"module._orig_mod.model.{key}",
}


@pytest.mark.parametrize("name", ["flash_stu_lm", "hyenadna_lm"])
@pytest.mark.parametrize("case", NESTED)
def test_wrappers_anywhere_in_a_name(name, case):
    config, state, x, y = golden(name)
    assert error(models.build(config, renamed(state, NESTED[case]))(x), y) < 1e-5


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_an_untied_head_under_a_prefix(prefix):
    config, state, x, y = golden("flash_stu_lm")
    untied = {**state, "lm_head.weight": 2 * state["lm_head.weight"]}
    model = models.build(config, renamed(untied, lambda key: prefix + key))
    assert error(model(x), 2 * y) < 1e-5
    assert torch.equal(model.tok_emb.weight, state["tok_emb.weight"])


def test_an_untied_model_is_saved_as_one(tmp_path):
    config, state, x, y = golden("flash_stu_lm")
    model = models.build(config, {**state, "lm_head.weight": 2 * state["lm_head.weight"]})
    model.save(tmp_path)
    assert torch.equal(models.load(tmp_path)(x), model(x))
    twin = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert error(twin(x).logits, 2 * y) < 1e-5
    twin.save_pretrained(tmp_path / "again")
    assert error(AutoModelForCausalLM.from_pretrained(tmp_path / "again")(x).logits, 2 * y) < 1e-5


SINE = "backbone.layers.0.mixer.filter_fn.implicit_filter.{}.freq"
SHARED = [
    ("flash_stu_lm", {"tie_word_embeddings": True}, "lm_head.weight", "tok_emb.weight"),
    ("stripedhyena1_lm", {}, "unembed.weight", "embedding_layer.weight"),
    ("hyenadna_lm", {}, "lm_head.weight", "backbone.embeddings.word_embeddings.weight"),
    ("hyenadna_lm", {}, SINE.format(5), SINE.format(1)),
]


@pytest.mark.parametrize(("name", "more", "changed", "other"), SHARED)
def test_one_tensor_with_two_values_is_refused(name, more, changed, other, tmp_path):
    config, state, x, y = golden(name)
    config = {**config, **more}
    equal = {**state, changed: state[other].clone()}
    assert error(models.build(config, equal)(x), y) < 1e-5
    different = {**state, changed: 2 * state[other]}
    for prefix in ("", "module."):
        with pytest.raises(ValueError) as caught:
            models.build(config, renamed(different, lambda key: prefix + key))  # noqa: B023
        assert changed in str(caught.value) and other in str(caught.value)
    config = {**config, "model_type": models._names.MODEL_TYPES[config["kind"]]}
    model = AutoModelForCausalLM.from_pretrained(write(tmp_path / "equal", config, equal))
    assert error(model(x).logits, y[..., : config["vocab_size"]]) < 1e-5
    with pytest.raises(ValueError, match=r"different values for the one tensor") as caught:
        AutoModelForCausalLM.from_pretrained(write(tmp_path / "different", config, different))
    assert changed in str(caught.value) and other in str(caught.value)


def test_one_tensor_under_one_of_its_names_is_enough():
    config, state, x, y = golden("hyenadna_lm")
    rest = {key: value for key, value in state.items() if not key.endswith(("3.freq", "5.freq"))}
    assert len(rest) == len(state) - 4
    assert error(models.build(config, rest)(x), y) < 1e-5
    config, state, x, y = golden("flash_stu_lm")
    for name in ("lm_head.weight", "tok_emb.weight"):
        rest = {key: value for key, value in state.items() if key != name}
        assert error(models.build(config, rest)(x), y) < 1e-5


def test_two_names_of_one_place_must_agree():
    config, state, x, y = golden("flash_stu_lm")
    assert error(models.build(config, {**state, "module.norm.weight": state["norm.weight"]})(x), y) < 1e-5
    with pytest.raises(ValueError, match=r"norm\.weight, got different ones as .* and module\.norm\.weight"):
        models.build(config, {**state, "module.norm.weight": state["norm.weight"] + 1})
    with pytest.raises(ValueError, match=r"phi, got different ones as phi and layers\.1\.stu\.phi"):
        models.build(config, {**state, "layers.1.stu.phi": -state["phi"]})


@pytest.mark.parametrize("name", ["flash_stu_lm", "hyenadna_lm", "stripedhyena1_lm"])
def test_a_stray_name_beside_a_prefix_is_named_alone(name):
    config, state, _, _ = golden(name)
    stray = {**renamed(state, lambda key: f"model.{key}"), "loss.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"got unexpected loss\.weight$"):
        models.build(config, stray)


UPSTREAM_NAMES = {
    "recomputed blocks": (
        "hyenadna_lm",
        lambda key: "model." + key.replace(".mixer.", ".mixer.layer.").replace(".mlp.", ".mlp.layer."),
    ),
    "hyena-dna": ("hyenadna_lm", lambda key: f"model.{key}"),
    "hub": ("hyenadna_lm", lambda key: f"hyena.{key}"),
    "hub, in parallel": ("hyenadna_lm", lambda key: f"module.hyena.{key}"),
    "hub, striped": ("stripedhyena1_lm", lambda key: f"backbone.{key}"),
    "hub, striped, in parallel": ("stripedhyena1_lm", lambda key: f"module.backbone.{key}"),
    "hub, striped, attention": ("stripedhyena1_attention_lm", lambda key: f"backbone.{key}"),
    "compiled": ("flash_stu_lm", lambda key: f"_orig_mod.{key}"),
}


@pytest.mark.parametrize("case", UPSTREAM_NAMES)
def test_upstreams_names(case, tmp_path):
    name, rename = UPSTREAM_NAMES[case]
    config, state, x, y = golden(name)
    state = renamed(state, rename)
    if name == "hyenadna_lm":
        # Lightning saves its measurements too.
        state["train_torchmetrics.loss"] = torch.zeros(1)
    assert error(models.build(config, state)(x), y) < 1e-5
    config = {**config, "model_type": models._names.MODEL_TYPES[config["kind"]]}
    model = AutoModelForCausalLM.from_pretrained(write(tmp_path, config, state))
    y = y[..., : config["vocab_size"]]
    assert error(model(x).logits, y) < 1e-5
    model.save_pretrained(tmp_path / "again")
    assert error(AutoModelForCausalLM.from_pretrained(tmp_path / "again")(x).logits, y) < 1e-5


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_the_kind_is_told_by_upstreams_configuration(name, tmp_path):
    config, state, x, y = golden(name)
    plain = {key: value for key, value in config.items() if key not in ("kind", "source")}
    typed = {**plain, "model_type": models._names.MODEL_TYPES[config["kind"]]}
    for upstream in (plain, typed):
        model = models.load(write(tmp_path, upstream, state))
        assert type(model) is type(models.build(config, state))
        assert error(model(x), y) < 1e-5


def test_a_kind_that_nothing_tells():
    _, state, _, _ = golden("flash_stu_lm")
    evo = {"hyena_filter_groups": 1, "num_layers": 2, "hcl_layer_idxs": [0]}
    for config in ({}, {"model_type": "gpt2"}, {"model_type": "gpt2", **FLASH}, {"kind": None, **FLASH}, evo):
        with pytest.raises(ValueError, match="config: expected kind to be one of"):
            models.build(config, state)


def test_the_flat_configuration_of_the_hub(tmp_path):
    config, state, x, y = golden("hyenadna_lm")
    operator = config["layer"]
    flat = {key: config[key] for key in ("d_model", "n_layer", "d_inner", "vocab_size")}
    flat |= {"model_type": "hyenadna", "pad_vocab_size_multiple": 8, "max_seq_len": operator["l_max"]}
    flat |= {"emb_dim": 5, "filter_order": operator["filter_order"], "activation_freq": 10, "hyena_order": 2}
    state = {f"hyena.{key}": value for key, value in state.items()}
    assert error(models.load(write(tmp_path, flat, state))(x), y) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_transformers_and_load_read_each_others_folders(name, tmp_path):
    model = layer(name)
    ids = inputs(model, 9)
    model.save(tmp_path / "ours")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert error(theirs(ids).logits, model(ids)[..., : model.config["vocab_size"]]) < 1e-6
    theirs.save_pretrained(tmp_path / "theirs")
    again = models.load(tmp_path / "theirs")
    assert type(again) is type(model)
    assert error(again(ids), model(ids)) < 1e-6


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_checkpoints_in_pieces(kind, tmp_path):
    config, state, x, y = golden("stripedhyena1_lm")
    (tmp_path / "config.json").write_text(json.dumps(config))
    whole = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}[kind]
    names = [f"piece-{i}.{kind}" for i in range(3)]
    for i, name in enumerate(names):
        part = {key: value.clone() for key, value in list(state.items())[i::3]}
        save_file(part, tmp_path / name) if kind == "safetensors" else torch.save(part, tmp_path / name)
    index = {"metadata": {}, "weight_map": {key: names[i % 3] for i, key in enumerate(state)}}
    (tmp_path / f"{whole}.index.json").write_text(json.dumps(index))
    assert error(models.load(tmp_path)(x), y) < 1e-5
    (tmp_path / names[1]).unlink()
    with pytest.raises(FileNotFoundError, match=rf"expected {names[1]} in .* {whole}\.index\.json"):
        models.load(tmp_path)
    for wrong, match in (
        ({"weight_map": {"norm.scale": "../piece"}}, "names of files in its folder"),
        ({"weight_map": {"norm.scale": 1}}, "weight_map to name a file"),
        ({}, "weight_map to name a file"),
        ([], "expected a JSON object, got list"),
    ):
        (tmp_path / f"{whole}.index.json").write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=match):
            models.load(tmp_path)


@pytest.mark.parametrize(
    "nest",
    [
        lambda state: {"module": state, "dp_world_size": 2},
        lambda state: {"state_dict": {f"model.{key}": value for key, value in state.items()}},
        lambda state: {"model": {"module": state}, "optimizer": {"lr": torch.zeros(1)}},
        lambda state: {"model_state_dict": state, "step": 3},
    ],
    ids=["deepspeed", "lightning", "nested", "plain"],
)
def test_files_of_trainers(nest, tmp_path):
    config, state, x, y = golden("hyenadna_lm")
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(nest(state), tmp_path / "weights.ckpt")
    assert error(models.load(tmp_path)(x), y) < 1e-5


EXACT = {
    "stripedhyena1_lm": ("poles", "residues"),
    "stripedhyena2_hcl": ("log_poles", "residues"),
    "stripedhyena2_hcm": ("h",),
}


@pytest.mark.parametrize("name", EXACT)
def test_what_upstream_keeps_in_float32_stays_there(name, tmp_path):
    config, state, x, y = golden(name)
    write(tmp_path, config, state)
    module = models.load(tmp_path, dtype=torch.bfloat16)
    found = module.state_dict()
    for key, tensor in found.items():
        exact = key.rsplit(".", 1)[-1] in EXACT[name]
        assert tensor.dtype == (torch.float32 if exact else torch.bfloat16), key
        if exact:
            assert torch.equal(tensor, state[key])
    x = x.bfloat16() if x.is_floating_point() else x
    rounded = models.build(config, {key: value.bfloat16() for key, value in state.items()})
    assert error(module(x), y) < 0.05
    assert error(module(x), y) < error(rounded(x), y)
    assert models.load(tmp_path, dtype=torch.float64).state_dict().popitem()[1].dtype == torch.float64
    # A file in 16 bits has nothing to keep, but the computation is the same.
    write(tmp_path, config, {key: value.bfloat16() for key, value in state.items()})
    for key, tensor in models.load(tmp_path, dtype=torch.bfloat16).state_dict().items():
        assert (tensor.dtype == torch.float32) == (key.rsplit(".", 1)[-1] in EXACT[name])


def test_poles_stay_in_float32_in_transformers(tmp_path):
    config, state, x, y = golden("stripedhyena1_lm")
    write(tmp_path, {**config, "model_type": "stripedhyena"}, state)
    for dtype in (torch.bfloat16, torch.float16):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        for key, tensor in model.model.state_dict().items():
            exact = key.endswith(("poles", "residues"))
            assert tensor.dtype == (torch.float32 if exact else dtype), key
            assert not exact or torch.equal(tensor, state[key])
        assert error(model(x).logits, y[..., : config["vocab_size"]]) < 0.05


DROPPED = {
    "stripedhyena1_lm": ("norm.scale", "blocks.0.filter.D", "blocks.0.filter.poles", "mlp.l1.weight"),
    "hyenadna_lm": ("ln_f.weight", "0.mixer.filter_fn.modulation.deltas", "0.mixer.short_filter.weight"),
    "flash_stu_lm": ("norm.weight", "layers.0.stu.M_inputs"),
}


@pytest.mark.parametrize("name", DROPPED)
def test_transformers_never_fills_in_what_is_missing(name, tmp_path):
    config, state, _, _ = golden(name)
    config = {**config, "model_type": models._names.MODEL_TYPES[config["kind"]]}
    for end in DROPPED[name]:
        key = next(key for key in state if key.endswith(end))
        rest = {other: value for other, value in state.items() if other != key}
        folder = tmp_path / key
        with pytest.raises(ValueError, match=rf"expected the tensors of .*, got missing \S*{key}$"):
            AutoModelForCausalLM.from_pretrained(write(folder, config, rest))
        with pytest.raises(ValueError, match=rf"misshaped \S*{key} \(expected .*, got \(3, 3, 3\)\)$"):
            AutoModelForCausalLM.from_pretrained(write(folder, config, {**state, key: torch.zeros(3, 3, 3)}))
    with pytest.raises(ValueError, match=r"got unexpected surplus\.weight$"):
        surplus = {**state, "surplus.weight": torch.zeros(1)}
        AutoModelForCausalLM.from_pretrained(write(tmp_path / "surplus", config, surplus))
    whole = write(tmp_path / "whole", config, state)
    model, info = AutoModelForCausalLM.from_pretrained(whole, output_loading_info=True)
    assert isinstance(model, hf.ConvolutionForCausalLM) and not info["missing_keys"]


def test_filters_under_a_layers_name_are_taken_by_transformers(tmp_path):
    config, state, x, y = golden("flash_stu_lm")
    old = {key: value for key, value in state.items() if key != "phi"}
    old["layers.0.stu.phi"] = old["layers.1.stu.phi"] = state["phi"]
    write(tmp_path, {**config, "model_type": "FlashSTU"}, old)
    assert error(AutoModelForCausalLM.from_pretrained(tmp_path)(x).logits, y) < 1e-5


@pytest.mark.parametrize("tiles", [{"d_in_tile": 4}, {"d_out_tile": 4}, {"d_in_tile": 64, "d_out_tile": 4}])
def test_tiles_are_other_mathematics(tiles):
    for name in ("flash_stu_lm", "stu_tensordot"):
        config, state, _, _ = golden(name)
        with pytest.raises(ValueError, match="config: expected no tile narrower than n_embd"):
            models.build({**config, **tiles}, state)
    config, state, x, y = golden("stu_full")
    assert error(models.build({**config, **tiles}, state)(x), y) < 1e-5
    config, state, x, y = golden("stu_tensordot")
    assert error(models.build({**config, "d_in_tile": 64, "d_out_tile": None}, state)(x), y) < 1e-5


@pytest.mark.parametrize("setting", ["use_bias", "bias"])
def test_filters_without_their_skip_are_refused(setting):
    config, state, x, y = golden("hyena_order2")
    assert error(models.build({**config, setting: True}, state)(x), y) < 1e-5
    with pytest.raises(ValueError, match=f"config: expected {setting} to be True, got False"):
        models.build({**config, setting: False}, state)
    with pytest.raises(ValueError, match=f"config: expected {setting} to be True, got False"):
        models.HyenaDNA({**DNA, "layer": {**DNA["layer"], setting: False}})


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (lambda: hf.FlashSTUConfig(**FLASH, d_in_tile=4), "no tile narrower"),
        (lambda: hf.HyenaDNAConfig(**DNA, attn_layer_idx=[0]), "attn_layer_idx"),
        (lambda: hf.HyenaDNAConfig(**DNA, use_head=True), "use_head"),
        (lambda: hf.HyenaDNAConfig(d_model=16, max_seq_len=48, emb_dim=5, use_bias=False), "use_bias"),
        (lambda: hf.StripedHyenaConfig(**STRIPED, model_parallel_size=2), "model_parallel_size"),
    ],
    ids=["tiles", "attention", "head", "skip", "parallel"],
)
def test_transformers_hands_on_settings_it_does_not_know(config, match):
    with pytest.raises(ValueError, match=match):
        AutoModelForCausalLM.from_config(config())
