"""StripedHyena 2, the architecture of Evo 2: upstream's files, its settings, precision, memory."""

import io
import json
import subprocess
import sys

import futurefill_rs as ff
import pytest
import torch
from futurefill_rs import models
from models_common import STRIPED_2, build, error, golden, inputs, layer, stepped

NAME = "stripedhyena2_lm"
GOLDENS = [NAME, "stripedhyena2_lm_interpolated"]


def upstream(name=NAME):
    """The configuration as upstream's YAML files have it, and the golden file's tensors."""
    config, state, x, y = golden(name)
    return {key: value for key, value in config.items() if key not in ("kind", "source")}, dict(state), x, y


def head_by_head(state, heads):
    """Rows of Wqkv as upstream's published checkpoints have them."""
    return {
        name: tensor.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)
        if ".Wqkv." in name
        else tensor
        for name, tensor in state.items()
    }


def with_fp8_states(state, states):
    """What the FP8 library saves beside the projections, one sort after another."""
    names = [name for name in state if name.endswith("projections.weight")]
    return {
        **state,
        **{name.replace("weight", "_extra_state"): states[i % len(states)] for i, name in enumerate(names)},
    }


def pickled():
    buffer = io.BytesIO()
    torch.save({"recipe": None}, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("name", GOLDENS)
@pytest.mark.parametrize("parts", [0, 1, 3])
@pytest.mark.parametrize("suffix", ["yml", "json"])
def test_upstreams_files(name, parts, suffix, tmp_path):
    yaml = pytest.importorskip("yaml")
    config, state, x, y = upstream(name)
    (tmp_path / f"config.{suffix}").write_text((yaml.safe_dump if suffix == "yml" else json.dumps)(config))
    torch.save(state, tmp_path / "evo2.pt")
    if parts:
        content = (tmp_path / "evo2.pt").read_bytes()
        (tmp_path / "evo2.pt").unlink()
        for i in range(parts):
            part = content[len(content) * i // parts : len(content) * (i + 1) // parts]
            (tmp_path / f"evo2.pt.part{i}").write_bytes(part)
    model = models.load(tmp_path)
    assert isinstance(model, models.StripedHyena2)
    with torch.no_grad():
        assert error(model(x), y) < 1e-5
        first, cache = model.prefill(x[:, :2], 30)
        assert error(torch.cat([first, stepped(model, x[:, :32], cache, 2)], 1), y[:, :32]) < 1e-5
    model.save(tmp_path / "again")
    again = models.load(tmp_path / "again")
    assert torch.equal(again(x), model(x)) and again.config == model.config


@pytest.mark.parametrize(
    "states",
    [[io.BytesIO(pickled())], [pickled()], [torch.tensor(list(pickled()), dtype=torch.uint8), None]],
    ids=["buffer", "bytes", "tensor"],
)
def test_published_checkpoints_have_queries_keys_and_values_head_by_head(states, tmp_path):
    """Upstream's loader puts the rows of Wqkv in order (`column_split`), as a published file still needs."""
    config, state, x, y = upstream()
    published = with_fp8_states(head_by_head(state, config["num_attention_heads"]), states)
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(published, tmp_path / "evo2_7b.pt")
    with torch.no_grad():
        model = models.load(tmp_path)
        assert error(model(x), y) < 1e-5
        assert error(models.build(config, published)(x), y) < 1e-5
        # What is saved is in order.
        model.save(tmp_path / "again")
        assert error(models.load(tmp_path / "again")(x), y) < 1e-5
        # A model's own state_dict is in order as well, and so is one that says so.
        assert (
            error(models.build({**config, "column_split": False}, with_fp8_states(state, states))(x), y)
            < 1e-5
        )
        told = {**config, "qkv_layout": "blocks"}
        assert error(models.build(told, with_fp8_states(state, states))(x), y) < 1e-5
        told = {**config, "qkv_layout": "heads"}
        assert error(models.build(told, head_by_head(state, config["num_attention_heads"]))(x), y) < 1e-5
    with pytest.raises(ValueError, match="config: expected qkv_layout to be 'heads' or 'blocks'"):
        models.build({**config, "qkv_layout": "rows"}, state)


@pytest.mark.parametrize(
    "beside", [b"scales", io.BytesIO(b"scales"), torch.zeros(9, dtype=torch.uint8), None, {}]
)
def test_states_that_are_no_pickles_are_skipped(beside, tmp_path):
    config, state, x, y = upstream()
    state = with_fp8_states(state, [beside])
    assert error(models.build(config, state)(x), y) < 1e-5
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(state, tmp_path / "evo2.pt")
    assert error(models.load(tmp_path)(x), y) < 1e-5


def test_models_that_need_eight_bits_are_refused_unless_told_otherwise(tmp_path):
    config, state, x, y = upstream()
    config["use_fp8_input_projections"] = True
    with pytest.raises(
        ValueError, match=r"expected use_fp8_input_projections to be false, .* only those of 7B"
    ):
        models.build(config, state)
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(state, tmp_path / "evo2_1b.pt")
    with pytest.raises(ValueError, match="use_fp8_input_projections"):
        models.load(tmp_path)
    insisted = models.load(tmp_path, settings={"use_fp8_input_projections": False})
    assert error(insisted(x), y) < 1e-5
    with torch.device("meta"):
        seven = {**config, "hidden_size": 4096, "num_layers": 32, "attn_layer_idxs": [3, 10, 17, 24, 31]}
        seven |= {"hcs_layer_idxs": list(range(32))}
        assert len(models.StripedHyena2(seven).blocks) == 32


def test_sixteen_bits_stay_and_what_is_sensitive_does_not(tmp_path):
    config, state, x, y = upstream()
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save({name: tensor.bfloat16() for name, tensor in state.items()}, tmp_path / "evo2.pt")
    exact = ("log_poles", "residues", "blocks.1.filter.h")
    model = models.load(tmp_path)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == (torch.float32 if name.endswith(exact) else torch.bfloat16), name
    model_from_32 = models.build(config, state)
    for dtype in (torch.float32, torch.float64):
        loaded = models.load(tmp_path, dtype=dtype)
        assert {tensor.dtype for tensor in loaded.state_dict().values()} == {dtype}
        assert error(loaded(x), model_from_32(x)) < 0.05
    with torch.no_grad():
        whole = model(x)
        assert whole.dtype == torch.bfloat16 and error(whole, y) < 0.1
        for prompt, bound in ((1, 60), (7, None), (130, 20)):
            first, cache = model.prefill(x[:, :prompt], bound)
            rest = stepped(model, x[:, : prompt + 20], cache, prompt)
            assert error(torch.cat([first, rest], 1), whole[:, : prompt + 20]) < 0.03


def test_every_layer_is_of_one_kind():
    config, state, _, _ = upstream()
    with pytest.raises(
        ValueError, match="config: expected layer 2 in one of attn_layer_idxs, hcl_layer_idxs"
    ):
        models.build({**config, "hcl_layer_idxs": [5]}, state)
    with pytest.raises(ValueError, match=r"config: expected hcl_layer_idxs to be a list of integers from 0"):
        models.build({**config, "hcl_layer_idxs": 5}, state)
    with pytest.raises(ValueError, match="config: expected long_fir_threshold to be None"):
        models.build({**config, "long_fir_threshold": 512}, state)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("rotary_emb_base", 500),
        ("evo2_style_activations", False),
        ("hyena_flip_x1x2", True),
        ("interleave", False),
    ],
)
def test_settings_count(setting, value):
    config, state, x, y = upstream()
    assert error(models.build({**config, setting: value}, state)(x), y) > 1e-3


def test_short_and_medium_filters_are_told_by_their_length():
    """Upstream reads filters of 128 taps and more from tap 0 on, with a skip, whatever the layer is."""
    torch.manual_seed(0)
    config = {**STRIPED_2, "hcm_filter_length": 127, "hcs_filter_length": 128}
    model = models.StripedHyena2(config)
    assert model.blocks[0].filter.variant == "hcm" and model.blocks[0].filter.D is not None
    assert model.blocks[1].filter.variant == "hcs" and model.blocks[1].filter.D is None


@pytest.mark.parametrize("bound", [40, None])
def test_prompts_of_unequal_length(bound):
    """Rows that begin late are what they are alone; forks, other orders and rewinds go on exactly."""
    model, ids = build(NAME), golden(NAME)[2][:1, :90]
    lengths = [1, 2, 5, 40]
    longest = max(lengths)
    padded = torch.stack([torch.cat([ids.new_ones(longest - n), ids[0, 3 : 3 + n]]) for n in lengths])
    starts = torch.tensor([longest - n for n in lengths])
    with torch.no_grad():
        whole = model(padded, starts=starts)
        y, cache = model.prefill(padded, bound, starts=starts)
        alone = [model(ids[:, 3 : 3 + n + 20])[0] for n in lengths]
        for row, n in enumerate(lengths):
            for got in (whole, y):
                assert error(got[row, longest - n :], alone[row][:n]) < 1e-5
        cache.keep(16)
        order = [3, 0, 0, 2]
        fork = cache.fork()
        fork.reorder(order)
        for t in range(16):
            step = model.step(torch.stack([ids[0, 3 + n + t] for n in lengths]), cache)
            forked = model.step(torch.stack([ids[0, 3 + lengths[row] + t] for row in order]), fork)
            for row, n in enumerate(lengths):
                assert error(step[row], alone[row][n + t]) < 1e-5
            for place, row in enumerate(order):
                assert error(forked[place], alone[row][lengths[row] + t]) < 1e-5
        model.rewind(cache, 11)
        block = torch.stack([ids[0, 3 + n + 5 : 3 + n + 16] for n in lengths])
        again = model.extend(block, cache)
        for row, n in enumerate(lengths):
            assert error(again[row], alone[row][n + 5 : n + 16]) < 1e-5
        cache.reset([1])
        step = model.step(ids[0, :1].expand(4), cache)
        assert error(step[1], model(ids[:, :1])[0, 0]) < 1e-5


def test_generation_is_that_of_the_whole_sequence():
    model, ids = build(NAME), golden(NAME)[2][:, :3]
    got = ff.generate(model, ids, 20)
    for _ in range(20):
        ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(got, ids)


def test_features_of_a_named_layer_by_a_hook():
    model, x = build(NAME), golden(NAME)[2]
    seen = []
    hook = model.get_submodule("blocks.5.mlp.l3").register_forward_hook(
        lambda module, args, y: seen.append(y)
    )
    with torch.no_grad():
        model(x[:, :20])
        _, cache = model.prefill(x[:, :15], 5)
        for t in range(15, 20):
            model.step(x[:, t], cache)
    hook.remove()
    whole, first, *steps = seen
    assert error(torch.cat([first, torch.stack(steps, 1)], 1), whole) < 1e-5


MEMORY = """
import sys, torch, resource
from futurefill_rs import models

def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) << 10

before = peak()
model = models.load(sys.argv[1])
size = sum(tensor.nbytes for tensor in model.state_dict().values()) - model.unembed.weight.nbytes
if sys.argv[2] == "touch":
    assert all(float(parameter.sum()) == 0 for parameter in model.parameters())
print(size, peak() - before)
"""


@pytest.mark.parametrize("parts", [1, 2])
def test_loading_takes_the_memory_of_the_weights(parts, tmp_path):
    """A checkpoint of 2 GB: in one piece its memory is that of the file, in two it is read once."""
    config = {**STRIPED_2, "hidden_size": 2048, "inner_mlp_size": 5632, "num_layers": 20, "vocab_size": 512}
    config |= {"attn_layer_idxs": [3], "hcl_layer_idxs": [2], "hcm_layer_idxs": [1]}
    config |= {"hcs_layer_idxs": [0, *range(4, 20)], "hcm_filter_groups": 256, "hcs_filter_groups": 256}
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in models.StripedHyena2(config).state_dict().items()}
    del shapes["unembed.weight"]
    state = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    file = tmp_path / "evo2.pt"
    torch.save(state, file)
    size = file.stat().st_size
    assert size > 1.9e9
    if parts > 1:
        with file.open("rb") as whole, (tmp_path / "evo2.pt.part1").open("wb") as second:
            whole.seek(size // 2)
            while piece := whole.read(1 << 24):
                second.write(piece)
        with file.open("r+b") as first:
            first.truncate(size // 2)
        file.rename(tmp_path / "evo2.pt.part0")
    command = [sys.executable, "-c", MEMORY, str(tmp_path), "touch"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    weights, peak = map(int, run.stdout.split())
    assert weights > 1.9e9
    assert peak < 1.1 * weights


def test_the_models_people_run_can_be_made():
    """Upstream's sizes, without memory: names and shapes of every tensor."""
    sizes = {
        "1B": {"hidden_size": 1920, "num_attention_heads": 15, "inner_mlp_size": 5120, "num_layers": 25},
        "7B": {"hidden_size": 4096, "num_attention_heads": 32, "inner_mlp_size": 11264, "num_layers": 32},
    }
    for setting in sizes.values():
        n = setting["num_layers"]
        config = {
            **STRIPED_2,
            **setting,
            "hcm_filter_groups": 128,
            "hcs_filter_groups": 128,
            "vocab_size": 512,
        }
        config |= {"attn_layer_idxs": list(range(3, n, 4)), "hcl_layer_idxs": list(range(2, n, 4))}
        config |= {"hcm_layer_idxs": list(range(1, n, 4)), "hcs_layer_idxs": list(range(0, n, 4))}
        with torch.device("meta"):
            model = models.StripedHyena2(config)
        width = setting["hidden_size"]
        assert model.blocks[2].filter.log_poles.shape == (width, 16, 1)
        assert model.blocks[1].filter.h.shape == (128, 1, 128)
        assert model.blocks[3].inner_mha_cls.Wqkv.weight.shape == (3 * width, width)


def test_a_random_model_steps_as_it_runs():
    model = layer("striped_hyena_2")
    x = inputs(model, 60)
    with torch.no_grad():
        whole = model(x)
        for prompt in range(1, 12):
            first, cache = model.prefill(x[:, :prompt], None)
            assert error(torch.cat([first, stepped(model, x, cache, prompt)], 1), whole) < 1e-5


BLOCK = """
import torch
from futurefill_rs import nn

torch.set_num_threads(1)
layer = nn.HyenaCascade(1024, "hcl")
x = torch.randn(1, 2048, 3072)
with torch.no_grad():
    _, cache = layer.prefill(x[:, :8], None)
    layer.extend(x[:, 8:16], cache)

    def peak():
        for line in open("/proc/self/status"):
            if line.startswith("VmHWM"):
                return int(line.split()[1]) << 10

    before = peak()
    layer.extend(x, cache)
    print(peak() - before)
"""


def test_a_block_takes_no_tensor_of_modes_by_positions():
    """16 modes at 1024 features and 2048 positions would be 268 MB in float64."""
    run = subprocess.run([sys.executable, "-c", BLOCK], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 200e6


def test_evo2_tokens_are_bytes(tmp_path):
    hf = pytest.importorskip("futurefill_rs.hf")
    auto = pytest.importorskip("transformers")
    tokenizer = hf.Evo2Tokenizer()
    assert tokenizer("ACGTN").input_ids == list(b"ACGTN")
    assert len(tokenizer) == tokenizer.vocab_size == 512
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 0, 1)
    for text in ("ACGT", "acgt|\n", "ä€😀", ""):
        assert tokenizer(text).input_ids == list(text.encode())
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.decode([65, 300, 0, 66, 1], skip_special_tokens=True) == "AB"
    batch = tokenizer(["AC", "ACGT"], padding=True)
    assert batch.input_ids == [[1, 1, 65, 67], [65, 67, 71, 84]]
    assert batch.attention_mask == [[0, 0, 1, 1], [1, 1, 1, 1]]
    model = layer("striped_hyena_2")
    model.save(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = auto.AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(again, hf.Evo2Tokenizer) and again("ACGT").input_ids == list(b"ACGT")


def test_medium_filters_stay_in_float32_in_transformers(tmp_path):
    auto = pytest.importorskip("transformers")
    pytest.importorskip("futurefill_rs.hf")
    build(NAME).save(tmp_path)
    model = auto.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    exact = ("log_poles", "residues", "blocks.1.filter.h")
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == (torch.float32 if name.endswith(exact) else torch.bfloat16), name
