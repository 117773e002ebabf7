"""Loading and saving, and regression tests for what upstream gets wrong."""

import json
from concurrent.futures import ThreadPoolExecutor

import futurefill_rs as ff
import numpy as np
import pytest
import torch
from futurefill_rs import models
from futurefill_rs import nn as ffnn
from futurefill_rs.nn.stu import spectral_filters
from models_common import (
    DNA,
    FLASH,
    HYBRID,
    LAYERS,
    MODELS,
    STRIPED,
    STRIPED_ATTENTION,
    build,
    error,
    golden,
    inputs,
    layer,
    stepped,
)
from safetensors.torch import load_file, save_file


@pytest.mark.parametrize("name", MODELS)
def test_save_and_load(name, tmp_path):
    model = layer(name)
    model.save(tmp_path / "new" / "folder")
    twin = models.load(tmp_path / "new" / "folder")
    x = inputs(model, 20)
    assert torch.equal(twin(x), model(x))
    assert twin.config == model.config
    config = json.loads((tmp_path / "new" / "folder" / "config.json").read_text())
    assert config["kind"] == model.config["kind"]
    assert set(load_file(tmp_path / "new" / "folder" / "model.safetensors")) == set(model.state_dict())


def test_load_reads_torch_files_without_running_code_in_them(tmp_path):
    config, state, x, y = golden("hyenadna_lm")
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(
        {"state_dict": {f"model.{key}": value for key, value in state.items()}, "epoch": 3},
        tmp_path / "pytorch_model.bin",
    )
    assert error(models.load(tmp_path)(x), y) < 1e-5

    class Evil:
        def __reduce__(self):
            return print, ("run",)

    torch.save({**state, "evil": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: expected a torch file .* [Ww]eights"):
        models.load(tmp_path)
    for content in (b"", b"not a torch file"):
        (tmp_path / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(ValueError, match=r"pytorch_model\.bin: expected a torch file"):
            models.load(tmp_path)


def test_load_widens_sixteen_bits_unless_told_otherwise(tmp_path):
    config, state, x, y = golden("flash_stu_lm")
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({key: value.half() for key, value in state.items()}, tmp_path / "model.safetensors")
    model = models.load(tmp_path)
    assert model(x).dtype == torch.float32
    assert error(model(x), y) < 0.01
    assert models.load(tmp_path, dtype=torch.bfloat16)(x).dtype == torch.bfloat16


def test_load_names_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        models.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="expected JSON"):
        models.load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        models.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(ValueError, match="safetensors"):
        models.load(tmp_path)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "model.module.", "module._orig_mod."])
@pytest.mark.parametrize("name", ["flash_stu_lm", "hyena_order3", "stripedhyena1_lm"])
def test_prefixes_of_training_wrappers_are_stripped(name, prefix):
    config, state, x, y = golden(name)
    module = models.build(config, {prefix + key: value for key, value in state.items()})
    assert error(module(x), y) < 1e-5


@pytest.mark.parametrize(
    "name", ["flash_stu_lm", "hyena_order2", "h3_head2", "stripedhyena2_hcl", "hyenadna_lm"]
)
def test_mismatched_tensors_are_named(name):
    config, state, _, _ = golden(name)
    key = next(
        key for key in state if key.endswith(("M_inputs", "in_proj.weight", "q_proj.weight", "residues"))
    )
    with pytest.raises(ValueError, match=f"missing {key}"):
        models.build(config, {k: v for k, v in state.items() if k != key})
    with pytest.raises(ValueError, match=r"unexpected surplus\.weight"):
        models.build(config, {**state, "surplus.weight": torch.zeros(1)})
    shape = tuple(state[key].shape)
    with pytest.raises(ValueError) as caught:
        models.build(config, {**state, key: torch.zeros(3, 3, 3)})
    assert f"misshaped {key} (expected {shape}, got (3, 3, 3))" in str(caught.value)


@pytest.mark.parametrize("name", ["stu_tensordot", "stu_full", "flash_stu_lm"])
def test_filters_of_another_shape_are_refused(name):
    config, state, _, _ = golden(name)
    for wrong in (state["phi"][:, :-1], state["phi"][:-1], torch.zeros(3, 3, 3)):
        with pytest.raises(ValueError, match=r"phi.*expected"):
            models.build(config, {**state, "phi": wrong})


@pytest.mark.parametrize("name", LAYERS + MODELS)
def test_a_batch_of_none(name):
    module = layer(name)
    x = inputs(module, 7)[:0]
    want = (0, 7, *module(inputs(module, 7)).shape[2:])
    assert module(x).shape == want
    y, cache = module.prefill(x[:, :4], 3)
    assert y.shape == (0, 4, *want[2:])
    assert module.step(x[:, 4], cache).shape == (0, *want[2:])


def test_configurations_are_checked():
    config, state, _, _ = golden("hyena_order2")
    with pytest.raises(ValueError, match=r"config: expected kind to be one of .*, got 'gpt'"):
        models.build({**config, "kind": "gpt"}, state)
    with pytest.raises(ValueError, match="config: expected kind"):
        models.build({**config, "kind": ["hyena"]}, state)
    with pytest.raises(ValueError, match="config: expected the key 'l_max'"):
        models.build({k: v for k, v in config.items() if k != "l_max"}, state)
    with pytest.raises(TypeError, match="config: expected a mapping"):
        models.build([], state)
    with pytest.raises(TypeError, match="state: expected a tensor for in_proj"):
        models.build(config, {**state, "in_proj.bias": [1.0]})
    with pytest.raises(ValueError, match="expected layer 1 in attn_layer_idxs or hyena_layer_idxs"):
        models.StripedHyena({**STRIPED, "attn_layer_idxs": [], "hyena_layer_idxs": [0]})
    with pytest.raises(ValueError, match="expected smeared_gqa to be False"):
        models.StripedHyena({**STRIPED_ATTENTION, "smeared_gqa": True})
    with pytest.raises(ValueError, match="n_kv_heads: expected a divisor of n_heads = 4, got 0"):
        models.StripedHyena({**STRIPED_ATTENTION, "proj_groups": 8})
    for heads in (0, -2, 4):
        with pytest.raises(ValueError, match=f"num_heads: expected a divisor of 6, got {heads}"):
            ffnn.HyenaCascade(6, "hcs", num_heads=heads, column_split=True)
    with pytest.raises(ValueError, match="n_heads: expected a divisor of n_embd = 6, got 4"):
        ffnn.CausalSelfAttention(6, 4)
    with pytest.raises(ValueError, match="n_heads: expected heads of an even width, got 6 / 2"):
        ffnn.CausalSelfAttention(6, 2)
    with pytest.raises(ValueError, match="sandwich"):
        models.FlashSTU({**FLASH, "stu_enable_mlp_sandwich": True})


@pytest.mark.parametrize(
    "setting",
    [
        {"num_heads": 2},
        {"num_blocks": 2},
        {"inner_factor": 2},
        {"outer_mixing": True},
        {"post_order_ffn": True},
    ],
    ids=str,
)
def test_hyena_settings_that_are_broken_or_not_causal_upstream_are_refused(setting):
    config, state, _, _ = golden("hyena_order2")
    with pytest.raises(ValueError, match=f"config: expected {next(iter(setting))} to be"):
        models.build({**config, **setting}, state)


@pytest.mark.parametrize(
    "name", ["stripedhyena1_lm", "stripedhyena2_hcs", "stripedhyena2_hcm", "stripedhyena2_hcl"]
)
def test_prompts_shorter_than_the_short_filter(name):
    """stripedhyena 0.2.2 and vtx 1.1.0 keep wrong caches for prompts of one and two positions."""
    _, _, x, y = golden(name)
    module = build(name)
    for prompt in (1, 2):
        _, cache = module.prefill(x[:, :prompt], 20)
        assert error(stepped(module, x[:, :12], cache, prompt), y[:, prompt:12]) < 1e-5


@pytest.mark.parametrize("name", ["long_conv", "h3", "h3_heads", "hyena", "monarch_mixer"])
def test_the_future_never_leaks_into_the_past(name):
    """safari's LongConv and fla's LongConvolution wrap around for sequences shorter than the kernel."""
    module = layer(name).double()
    for length in (3, 5, 7, 13, 31):
        x = inputs(module, length).double()
        changed = x.clone()
        changed[:, -1] += 100.0
        assert error(module(changed)[:, :-1], module(x)[:, :-1]) < 1e-9


def leaks(module, features, length):
    """How far earlier outputs move when the last input does, of a module in double precision."""
    x = torch.randn(2, length, features, dtype=torch.float64)
    changed = x.clone()
    changed[:, -1] += 100.0
    return error(module(changed)[:, :-1], module(x)[:, :-1])


def test_the_convolution_of_fla_does_not_leak():
    """fla's LongConvolution, `conv(x, filter) + x`, is `CausalConv` with one more at lag 0."""
    torch.manual_seed(0)
    filters = torch.randn(6, 48, dtype=torch.float64)
    skipping = filters.clone()
    skipping[:, 0] += 1
    module = ffnn.CausalConv.from_filters(skipping)
    for length in (3, 5, 7, 13, 31):
        assert leaks(module, 6, length) < 1e-9
        x = torch.randn(2, length, 6, dtype=torch.float64)
        want = [sum(filters[:, j] * x[:, t - j] for j in range(t + 1)) + x[:, t] for t in range(length)]
        assert error(module(x), torch.stack(want, 1)) < 1e-12


def test_the_mathematics_of_h3conv_does_not_leak():
    """safari's H3Conv has no layer of its own here: between its projections it is H3 with two explicit
    filters, `q * conv(conv(k) * v)`, which is two of `CausalConv` with gates.
    """
    torch.manual_seed(0)
    inner, outer = (ffnn.CausalConv.from_filters(torch.randn(6, 48, dtype=torch.float64)) for _ in range(2))

    def h3conv(x):
        q, k, v = x.chunk(3, -1)
        return q * outer(inner(k) * v)

    for length in (3, 5, 7, 13, 31):
        assert leaks(h3conv, 18, length) < 1e-9


def test_long_conv_agrees_with_a_direct_sum_below_its_length():
    module = layer("long_conv").double()
    x = inputs(module, 13).double()
    k = module.kernel.kernel
    h = torch.relu(k.abs() - module.lam) * k.sign()
    y = torch.stack(
        [
            sum(h[:, :, j] * x[:, t - j, None] for j in range(t + 1)) + module.D * x[:, t, None]
            for t in range(x.shape[1])
        ],
        1,
    )
    assert error(module(x), module.output_linear(torch.nn.functional.gelu(y.flatten(2)))) < 1e-12


def test_flash_stu_takes_every_length_and_its_cache_is_its_state():
    """flash-stu-2 fails for lengths other than seq_len, and its cached generation leaves out the STU."""
    _, _, x, y = golden("flash_stu_lm")
    model = build("flash_stu_lm")
    for length in (1, 2, 17, 63):
        assert error(model(x[:, :length]), y[:, :length]) < 1e-5
    ids = x[:, :4]
    cached = ff.generate(model, ids, 30)
    for _ in range(30):
        ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(cached, ids)


def test_phi_is_loaded_as_it_is():
    """Its trailing eigenvectors are arbitrary below float64's precision: phi is never recomputed."""
    for name in ("flash_stu_lm", "stu_full"):
        config, state, x, y = golden(name)
        flipped = {**state, "phi": state["phi"].clone()}
        flipped["phi"][:, -1] *= -1
        module = models.build(config, flipped)
        assert torch.equal(module.phi, flipped["phi"])
        assert error(module(x), y) > 1e-3


@pytest.mark.parametrize("use_hankel_L", [False, True])
def test_an_eigenvalue_rounded_below_zero_gives_no_nan(use_hankel_L, monkeypatch):
    """Its fourth root would be one; the eigenvector belongs to an eigenvalue of nothing."""
    eigh = np.linalg.eigh

    def rounded(matrix):
        sigma, phi = eigh(matrix)
        sigma[-24] = -1e-20
        return sigma, phi

    monkeypatch.setattr(np.linalg, "eigh", rounded)
    phi = spectral_filters(64, 24, use_hankel_L)
    assert phi.isfinite().all()
    assert not phi[:, 0].any() and phi[:, -1].any()


def test_phi_is_computed_for_a_checkpoint_without_it():
    """flash-stu 1 does not save phi. Filters agree up to the sign of each."""
    for name in ("flash_stu_lm", "stu_full_hankel_l"):
        config, state, _, _ = golden(name)
        module = models.build(config, {key: value for key, value in state.items() if key != "phi"})
        sign = (module.phi * state["phi"]).sum(0).sign()
        # The smallest filters are rounding errors: compare with the size of the largest.
        assert (module.phi * sign - state["phi"]).abs().max() < 1e-6


def test_phi_under_a_layers_name_is_taken():
    config, state, x, y = golden("flash_stu_lm")
    old = {key: value for key, value in state.items() if key != "phi"}
    old["layers.0.stu.phi"] = old["layers.1.stu.phi"] = state["phi"]
    assert error(models.build(config, old)(x), y) < 1e-5


def test_sequences_longer_than_the_filters_are_refused_not_cut():
    """safari silently returns l_max positions for a longer input."""
    module = build("hyena_order2")
    with pytest.raises(ValueError, match="x: expected at most 64 positions, got 65"):
        module(torch.zeros(1, 65, 8))


def test_orders_share_one_axis_differently_in_safari_and_hyenadna():
    config, state, x, y = golden("hyena_order3")
    assert error(models.build({**config, "layout": "o d"}, state)(x), y) > 1e-3
    config, state, x, y = golden("hyenadna_operator_order3")
    assert error(models.build({**config, "layout": "v o"}, state)(x), y) > 1e-3
    with pytest.raises(ValueError, match="layout"):
        ffnn.HyenaOperator(4, 16, layout="d o")


def test_sixteen_bit_time_grids_are_replaced_by_exact_ones():
    """A grid of 48 times does not fit into 8 bits: a bfloat16 model's filter is that of its network."""
    module = layer("hyena")
    reference = module.filter_fn.lags(slice(48))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.bfloat16().float())
    rounded = module.filter_fn.lags(slice(48))
    half = layer("hyena").bfloat16().filter_fn.lags(slice(48))
    assert error(half, rounded) < 0.01 < error(rounded, reference) + 0.01


def test_tied_embeddings_are_one_tensor_and_untied_ones_two():
    config, state, x, _ = golden("flash_stu_lm")
    model = build("flash_stu_lm")
    assert model.lm_head.weight is model.tok_emb.weight
    without = models.build(config, {k: v for k, v in state.items() if k != "lm_head.weight"})
    assert torch.equal(without(x), model(x))
    untied = models.build(config, {**state, "lm_head.weight": 2 * state["lm_head.weight"]})
    assert error(untied(x), 2 * model(x)) < 1e-6
    config, state, x, y = golden("hyenadna_lm")
    embedding = state["backbone.embeddings.word_embeddings.weight"]
    assert error(models.build(config, {**state, "lm_head.weight": embedding})(x), y) < 1e-5
    with pytest.raises(ValueError, match="equal the word embeddings"):
        models.build(config, {**state, "lm_head.weight": embedding + 1})


def test_poles_keep_their_precision_in_a_sixteen_bit_model():
    config, state, x, y = golden("stripedhyena1_lm")
    mixed = {k: v if k.endswith(("poles", "residues")) else v.bfloat16() for k, v in state.items()}
    model = models.build(config, mixed)
    assert model.blocks[0].filter.poles.dtype == torch.float32
    assert model.unembed.weight is model.embedding_layer.weight
    assert error(model(x), y) < 0.05


@pytest.mark.parametrize("name", ["stripedhyena2_hcs", "stripedhyena2_hcm", "stripedhyena2_hcl"])
def test_cascades_in_sixteen_bits_keep_their_filters_precision(name):
    """Evo 2 keeps hcm's taps and hcl's exponentials in float32, all else in bfloat16."""
    config, state, x, y = golden(name)
    wide = ("log_poles", "residues") if name != "stripedhyena2_hcm" else ("h",)
    mixed = {k: v if k.rpartition(".")[2] in wide else v.bfloat16() for k, v in state.items()}
    module = models.build(config, mixed)
    kept = {p.dtype for key, p in module.named_parameters() if key in wide}
    assert kept == (set() if name == "stripedhyena2_hcs" else {torch.float32})
    for inputs16 in (x.bfloat16(), x.half()):
        whole = module(inputs16)
        assert whole.dtype == inputs16.dtype and error(whole, y) < 0.02
        for bound in (20, None):
            got, cache = module.prefill(inputs16[:, :5], bound)
            steps = stepped(module, inputs16[:, :15], cache, 5)
            rest = module.extend(inputs16[:, 15:25], cache)
            assert error(torch.cat([got, steps, rest], 1), whole[:, :25]) < 0.02


def test_attention_agrees_with_its_definition():
    """Softcap before ALiBi, ages 0 to window_size inclusive, slopes of flash-stu."""
    module = layer("attention").double()
    x = inputs(module, 30).double()
    q, k, v = (part.unflatten(-1, (2, 3)) for part in module.c_attn(x).chunk(3, -1))
    want = torch.zeros_like(v)
    for h, slope in enumerate((2.0**-4 * 0.25, 2.0**-8 * 0.25)):
        for t in range(30):
            keys = range(max(0, t - 7), t + 1)
            score = torch.stack([(q[:, t, h] * k[:, s, h]).sum(-1) / 3**0.5 for s in keys], -1)
            score = 50 * torch.tanh(score / 50) - slope * torch.tensor([float(t - s) for s in keys])
            want[:, t, h] = (score.softmax(-1).unsqueeze(-1) * v[:, list(keys), h]).sum(1)
    assert error(module(x), module.c_proj(want.flatten(2))) < 1e-10


def test_the_window_may_be_a_pair():
    """flash-stu-2 takes a pair too; JSON has lists for it."""
    model = layer("hybrid")
    x = inputs(model, 20)
    for pair in ((5, 0), [5, 0]):
        twin = models.build({**model.config, "window_size": pair}, model.state_dict())
        assert torch.equal(twin(x), model(x)) and twin.reach == model.reach
    for wrong in ([5, 1], [5, -1], [5], [5, 0, 0]):
        with pytest.raises(ValueError, match="config: expected window_size to be a number or a pair"):
            models.FlashSTU({**HYBRID, "window_size": wrong})
    with pytest.raises(ValueError, match="window_size: expected 0 or more, got -1"):
        models.FlashSTU({**HYBRID, "window_size": [-1, 0]})


def test_attention_in_blocks_agrees_with_one_piece():
    module = ffnn.SlidingWindowAttention(8, 2, 9).double()
    x = torch.randn(2, 700, 8, dtype=torch.float64)
    q, k, v = module._attention().heads(module.c_attn(x))
    assert error(module(x), module.c_proj(module._attention().attend(q, k, v, None))) < 1e-12


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_rotary_attention_agrees_with_its_definition(groups):
    """Features i and i + d / 2 are a complex number, turned by position / factor * base^(-2 i / d)."""
    heads, width, length = 4, 8, 20
    torch.manual_seed(0)
    module = ffnn.CausalSelfAttention(
        heads * width, heads, n_kv_heads=groups, rotary_base=50, rotary_scaling_factor=2
    ).double()
    x = inputs(module, length).double()
    features = module.Wqkv(x).unflatten(-1, (heads + 2 * groups, width))
    q, k, v = features.split([heads, groups, groups], 2)
    speeds = [50 ** (-2 * i / width) / 2 for i in range(width // 2)]
    angles = torch.tensor([[t * speed for speed in speeds] for t in range(length)], dtype=torch.float64)
    turn = torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
    q, k = (torch.complex(*part.chunk(2, -1)) * turn for part in (q, k))
    want = torch.zeros(2, length, heads, width, dtype=torch.float64)
    for h in range(heads):
        g = h * groups // heads
        for t in range(length):
            score = (q[:, t, h].unsqueeze(1) * k[:, : t + 1, g].conj()).real.sum(-1) / width**0.5
            want[:, t, h] = (score.softmax(-1).unsqueeze(-1) * v[:, : t + 1, g]).sum(1)
    # The angles are rounded to float32.
    assert error(module(x), module.out_proj(want.flatten(2))) < 1e-6


def test_rotary_attention_in_blocks_agrees_with_one_piece():
    module = ffnn.CausalSelfAttention(8, 2, n_kv_heads=1).double()
    x = torch.randn(2, 1400, 8, dtype=torch.float64)
    whole = module(x)
    assert error(module(x, starts=torch.tensor([0, 0])), whole) < 1e-12
    first, cache = module.prefill(x[:, :3], None)
    rest = [module.extend(x[:, 3:700], cache), module.extend(x[:, 700:], cache)]
    assert error(torch.cat([first, *rest], 1), whole) < 1e-12
    late = module(x, starts=torch.tensor([0, 600]))
    # Only distances matter, up to the rounding of the angles.
    assert error(late[1:, 600:], module(x[1:, 600:])) < 1e-4


def test_keys_and_values_take_memory_as_they_come():
    module = ffnn.CausalSelfAttention(8, 2, n_kv_heads=1)
    x = inputs(module, 200)
    per_position = 2 * 4 * 4 * 2  # rows, features of a head, bytes, keys and values
    _, bounded = module.prefill(x[:, :10], 30)
    assert bounded.nbytes == 40 * per_position
    _, cache = module.prefill(x[:, :10], None)
    assert cache.nbytes == 10 * per_position
    grown = set()
    for t in range(10, 200):
        module.step(x[:, t], cache)
        grown.add(cache.nbytes)
        assert cache.nbytes <= 2 * (t + 1) * per_position
    assert len(grown) <= 6


@pytest.mark.parametrize("name", ["attention", "causal_attention", "hybrid", "striped_hyena_attention"])
def test_rows_with_attention_do_not_depend_on_their_batch(name):
    module = layer(name)
    x, other = inputs(module, 30, batch=3), inputs(module, 30, batch=3, seed=2)
    other[1] = x[1]
    outputs = []
    for batch in (x, other):
        y, cache = module.prefill(batch[:, :9], 21)
        steps = stepped(module, batch[:, :20], cache, 9)
        outputs.append(torch.cat([module(batch), y, steps, module.extend(batch[:, 20:], cache)], 1))
    assert torch.equal(outputs[0][1], outputs[1][1])


@pytest.mark.parametrize("name", ["attention", "causal_attention"])
def test_a_reset_row_forgets_what_is_not_finite(name):
    module = layer(name)
    x = inputs(module, 9)
    spoiled = x.clone()
    spoiled[0, 2] = torch.nan
    _, cache = module.prefill(spoiled[:, :4], 5)
    cache.reset([0])
    assert error(stepped(module, x, cache, 4)[:1], module(x[:1, 4:])) < 1e-5


def test_striped_hyena_with_attention_loads_by_upstreams_names():
    """The tensors of stripedhyena's blocks: `inner_mha_cls` is flash-attn's MHA, one projection for all."""
    torch.manual_seed(0)
    shapes = {"embedding_layer.weight": (16, 16), "norm.scale": (16,), "unembed.weight": (16, 16)}
    for i in range(4):
        block = {"pre_norm.scale": (16,), "post_norm.scale": (16,)}
        block |= {"mlp.l1.weight": (24, 16), "mlp.l2.weight": (24, 16), "mlp.l3.weight": (16, 24)}
        if i in (1, 3):
            # Four heads of queries, two of keys and two of values, four features each.
            block |= {"inner_mha_cls.Wqkv.weight": (32, 16), "inner_mha_cls.out_proj.weight": (16, 16)}
            block |= {"inner_mha_cls.out_proj.bias": (16,), "inner_mha_cls.rotary_emb.inv_freq": (2,)}
        else:
            block |= {"projections.weight": (48, 16), "projections.bias": (48,)}
            block |= {"out_filter_dense.weight": (16, 16), "out_filter_dense.bias": (16,)}
            block |= {"filter.short_filter_weight": (48, 1, 3), "filter.short_filter_bias": (48,)}
            block |= {"filter.poles": (16, 4, 1, 2), "filter.residues": (16, 4, 1, 2), "filter.D": (16,)}
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    state = {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}
    config = {"kind": "stripedhyena1_lm", **STRIPED_ATTENTION}
    model = models.build(config, state)
    assert torch.equal(model.blocks[1].inner_mha_cls.Wqkv.weight, state["blocks.1.inner_mha_cls.Wqkv.weight"])
    ids = inputs(model, 12)
    hub = models.build(config, {f"backbone.{name}": tensor for name, tensor in state.items()})
    assert torch.equal(hub(ids), model(ids))
    # Biases are as the configuration has them; those of the convolution's projections are always there.
    assert model.blocks[1].inner_mha_cls.Wqkv.bias is None
    assert model.blocks[0].projections.bias is not None

    key = "blocks.3.inner_mha_cls.Wqkv.weight"
    with pytest.raises(ValueError, match=rf"missing {key}"):
        models.build(config, {name: tensor for name, tensor in state.items() if name != key})
    with pytest.raises(ValueError, match=r"unexpected blocks\.1\.inner_mha_cls\.Wqkv\.bias"):
        models.build(config, {**state, "blocks.1.inner_mha_cls.Wqkv.bias": torch.zeros(32)})
    with pytest.raises(ValueError) as caught:
        models.build(config, {**state, key: torch.zeros(48, 16)})
    assert f"misshaped {key} (expected (32, 16), got (48, 16))" in str(caught.value)


def test_rotary_settings_of_striped_hyena_count():
    model = layer("striped_hyena_attention")
    ids, state = inputs(model, 30), model.state_dict()
    for key, value in (("rotary_emb_base", 10000), ("use_interpolated_rotary_pos_emb", False)):
        other = models.build({**model.config, key: value}, state)
        assert error(other(ids), model(ids)) > 1e-4
    unscaled = {**model.config, "use_interpolated_rotary_pos_emb": False}
    plain = models.build({**unscaled, "rotary_emb_scaling_factor": 7.0}, state)
    assert torch.equal(plain(ids), models.build(unscaled, state)(ids))


@pytest.mark.parametrize("config", [FLASH, HYBRID], ids=["convolutional", "hybrid"])
def test_read_prompt_gives_the_last_logits_of_prefill(config):
    torch.manual_seed(0)
    model = models.FlashSTU(config).eval()
    ids = inputs(model, 400)
    want, _ = model.prefill(ids, 5)
    logits, cache = model.read_prompt(ids, 5)
    assert error(logits, want[:, -1]) < 1e-5
    assert cache.position == 400 and cache.remaining == 5


@pytest.mark.parametrize("name", ["striped_hyena", "striped_hyena_attention"])
def test_read_prompt_in_chunks_when_nothing_drops_out(name):
    model = layer(name)
    ids = inputs(model, 100)
    assert model.reach is None
    whole = model(torch.cat([ids, ids], 1))
    for max_new in (5, None):
        logits, cache = model.read_prompt(ids, max_new, chunk=30)
        assert cache.position == 100 and cache.remaining == max_new
        assert error(logits, whole[:, 99]) < 1e-5
        assert error(model.step(ids[:, 0], cache), whole[:, 100]) < 1e-5


def test_hyenadna_rounds_its_vocabulary_up():
    assert models.HyenaDNA(DNA).vocab_size == 16


@pytest.mark.parametrize("name", MODELS)
def test_ids_of_any_integer_dtype_within_the_vocabulary(name):
    model = layer(name)
    ids = inputs(model, 9)
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert torch.equal(model(ids.to(dtype)), model(ids))
    _, cache = model.prefill(ids, 5)
    want = model(torch.cat([ids, ids[:, :1]], 1))[:, -1]
    for wrong in (model.vocab_size, -1):
        with pytest.raises(ValueError, match=f"x: expected ids from 0 to {model.vocab_size - 1}, got"):
            model.step(torch.tensor([0, wrong]), cache)
    assert error(model.step(ids[:, 0], cache), want) < 1e-5


def test_one_model_serves_many_threads():
    model = layer("hyenadna")
    prompts = [inputs(model, length, 1) for length in range(1, 13)]
    want = [ff.generate(model, prompt, 12) for prompt in prompts]
    with ThreadPoolExecutor(6) as pool:
        got = list(pool.map(lambda prompt: ff.generate(model, prompt, 12), prompts))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
