"""Folders: every kind in every precision, layers saved as models are, files in pieces, and hostile ones."""

import contextlib
import io
import json
import pickle
import random
import resource
import time
import warnings
import zipfile

import pytest
import torch
from futurefill_rs import models
from futurefill_rs import nn as ffnn
from models_common import DNA, FLASH, NAMES, STRIPED, STRIPED_2, build, error, golden, layer
from safetensors.torch import save_file

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
KINDS = {golden(name)[0]["kind"]: name for name in NAMES}


def write(folder, config, state, file="pytorch_model.bin"):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(state, folder / file)
    return folder


def test_there_is_a_golden_file_of_every_kind():
    assert set(KINDS) == set(models.KINDS)


@pytest.mark.parametrize("dtype", [None, *DTYPES])
@pytest.mark.parametrize("kind", sorted(models.KINDS))
def test_every_kind_loads_in_every_precision(kind, dtype, tmp_path):
    _, _, x, y = golden(KINDS[kind])
    build(KINDS[kind]).save(tmp_path)
    module = models.load(tmp_path, dtype=dtype)
    assert type(module) is type(build(KINDS[kind])) and module.config["kind"] == kind
    exact = ("poles", "residues", "blocks.1.filter.h") if "striped" in kind else ()
    if kind == "stripedhyena2_hcm":
        exact = (*exact, "h")
    for name, tensor in module.state_dict().items():
        wanted = dtype or torch.float32
        wide = wanted.itemsize < 4 and name.endswith(exact)
        assert tensor.dtype == (torch.float32 if wide else wanted), name
    x = x.to(dtype) if x.is_floating_point() and dtype else x
    with torch.no_grad():
        got = module(x)
        assert error(got, y) < {torch.float16: 0.02, torch.bfloat16: 0.1}.get(dtype, 1e-5)
        # A cache agrees with the whole in this precision too.
        first, cache = module.prefill(x[:, :5], 3)
        rest = [module.step(x[:, t], cache) for t in range(5, 8)]
    steps = torch.cat([first, torch.stack(rest, 1)], 1)
    assert error(steps, got[:, :8]) < {torch.float16: 6e-3, torch.bfloat16: 0.04}.get(dtype, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["flash_stu_lm", "hyenadna_lm", "stripedhyena1_lm", "stripedhyena2_lm"])
def test_every_model_loads_in_every_precision_by_transformers(kind, dtype, tmp_path):
    hf = pytest.importorskip("transformers")
    import futurefill_rs.hf  # noqa: F401

    _, _, x, y = golden(KINDS[kind])
    model = build(KINDS[kind])
    model.save(tmp_path)
    theirs = hf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert theirs.dtype == dtype
    with torch.no_grad():
        got, want = theirs(x).logits, models.load(tmp_path, dtype=dtype)(x)
    assert error(got, want[..., : got.shape[-1]]) < (1e-3 if dtype.itemsize < 4 else 1e-6)
    assert error(got, y[..., : got.shape[-1]]) < {torch.float16: 0.02, torch.bfloat16: 0.1}.get(dtype, 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_what_build_returns_can_be_saved(name, tmp_path):
    _, _, x, _ = golden(name)
    module = build(name)
    module.save(tmp_path)
    twin = models.load(tmp_path)
    assert type(twin) is type(module) and twin.config == module.config
    assert torch.equal(twin(x), module(x))
    # Over the files it was loaded from, too.
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.9)
    twin.save(tmp_path)
    assert torch.equal(models.load(tmp_path)(x), twin(x))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_layer_without_a_configuration_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match=r"config: expected a model, or a layer that models\.build made"):
        ffnn.CausalConv(4, 3).save(tmp_path)


def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    model = layer("flash_stu")
    model.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space"):
        model.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_build_copies_and_parameters_train():
    config, state, x, _ = golden("flash_stu_lm")
    kept = {name: tensor.clone() for name, tensor in state.items()}
    model = models.build(config, state)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.lm_head.weight is model.tok_emb.weight
    model(x).sum().backward()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    assert all(torch.equal(state[name], kept[name]) for name in state)


def test_only_large_weights_stay_in_their_file(tmp_path, monkeypatch):
    """They take no memory beside the file's. What is written over a file does not change a small model."""
    from futurefill_rs.models import _io

    model = layer("flash_stu")
    for most, changes in ((1 << 30, False), (1, True)):
        monkeypatch.setattr(_io, "MAPPED_BYTES", most)
        model.save(tmp_path)
        loaded = models.load(tmp_path)
        with (tmp_path / "model.safetensors").open("r+b") as file:
            file.seek(-16, io.SEEK_END)
            file.write(b"\0" * 16)
        same = [torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items()]
        assert all(same) != changes


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_a_torch_file_in_one_piece_or_cut(parts, tmp_path):
    config, state, x, y = golden("hyenadna_lm")
    write(tmp_path, config, state, "whole.pt")
    if parts > 1:
        content = (tmp_path / "whole.pt").read_bytes()
        (tmp_path / "whole.pt").unlink()
        size = -(-len(content) // parts)
        for i in range(parts):
            (tmp_path / f"whole.pt.part{i}").write_bytes(content[i * size : (i + 1) * size])
    assert error(models.load(tmp_path)(x), y) < 1e-5
    if parts > 2:
        (tmp_path / "whole.pt.part1").unlink()
        with pytest.raises(FileNotFoundError, match=r"expected whole\.pt\.part1 in"):
            models.load(tmp_path)
    write(tmp_path, config, state, "other.pt")
    with pytest.raises(ValueError, match=r"path: expected one checkpoint in .*, got other\.pt, whole\.pt"):
        models.load(tmp_path)


def test_old_torch_files_are_read(tmp_path):
    config, state, x, y = golden("hyenadna_lm")
    write(tmp_path, config, state)
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert error(models.load(tmp_path)(x), y) < 1e-5


def test_what_libraries_save_beside_the_weights_is_skipped(tmp_path):
    config, state, x, y = golden("flash_stu_lm")
    extra = [b"scales", io.BytesIO(b"scales"), torch.zeros(3, dtype=torch.uint8), None, {"a": 1}]
    more = {f"layers.{i}.mlp._extra_state": value for i, value in enumerate(extra)}
    assert error(models.build(config, {**state, **more})(x), y) < 1e-5
    assert error(models.load(write(tmp_path, config, {**state, **more}))(x), y) < 1e-5


def test_a_configuration_in_yaml(tmp_path):
    yaml = pytest.importorskip("yaml")
    config, state, x, y = golden("stripedhyena1_lm")
    write(tmp_path, config, state)
    (tmp_path / "config.json").unlink()
    (tmp_path / "model.yml").write_text(yaml.safe_dump(config))
    assert error(models.load(tmp_path)(x), y) < 1e-5
    assert error(models.build(tmp_path / "model.yml", state)(x), y) < 1e-5
    for text, match in (
        ("a: &a [*a]", "expected YAML: an alias"),
        ("a: [", "expected YAML: while parsing"),
        ("- 1", "expected a YAML object, got list"),
        ("a: !!python/object/apply:os.getcwd []", "expected YAML: could not determine a constructor"),
    ):
        (tmp_path / "model.yml").write_text(text)
        with pytest.raises(ValueError, match=match):
            models.load(tmp_path)
    (tmp_path / "other.yaml").write_text("{}")
    with pytest.raises(
        ValueError, match=r"path: expected one configuration in .*, got model\.yml, other\.yaml"
    ):
        models.load(tmp_path)


def test_yaml_without_its_library_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "yaml", None)
    (tmp_path / "model.yml").write_text("a: 1")
    with pytest.raises(ImportError, match=r"futurefill_rs\[evo2\]"):
        models.load(tmp_path)


SIZES = [
    ("flash_stu_lm", "n_layers"),
    ("flash_stu_lm", "n_embd"),
    ("flash_stu_lm", "vocab_size"),
    ("flash_stu_lm", "seq_len"),
    ("hyenadna_lm", "n_layer"),
    ("hyenadna_lm", "layer.order"),
    ("hyenadna_lm", "layer.num_inner_mlps"),
    ("hyenadna_lm", "layer.l_max"),
    ("stripedhyena1_lm", "num_layers"),
    ("stripedhyena1_lm", "inner_mlp_size"),
    ("hyena_order2", "order"),
    ("stu_tensordot", "seq_len"),
    ("h3_head1", "d_state"),
    ("long_conv", "channels"),
    ("monarch_mixer", "hyena_filter_order"),
    ("stripedhyena2_hcl", "hidden_size"),
]


@pytest.mark.parametrize(("name", "path"), SIZES)
@pytest.mark.parametrize("value", [10**9, 10**30, -1, 0.5, "7", None, [], True, float("nan")], ids=repr)
def test_sizes_that_no_tensor_has_are_told_by_key(name, path, value):
    config, state, _, _ = golden(name)
    config = json.loads(json.dumps(config))
    *outer, key = path.split(".")
    inner = config
    for part in outer:
        inner = inner[part]
    inner[key] = value
    began = time.monotonic()
    if value is None and key == "inner_mlp_size":
        match = "misshaped"
    elif value == 10**9 and key == "seq_len":
        # phi bounds it.
        match = "misshaped phi"
    else:
        match = f"config: expected {path} to be an integer from"
    with pytest.raises(ValueError, match=match):
        models.build(config, state)
    assert time.monotonic() - began < 2


def test_phi_is_not_computed_for_hours():
    config, state, _, _ = golden("flash_stu_lm")
    rest = {name: tensor for name, tensor in state.items() if name != "phi"}
    with pytest.raises(ValueError, match=r"state: expected phi, hours of work for 131072 positions"):
        models.build({**config, "seq_len": 131072}, rest)


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.bool, torch.complex64, torch.uint8, torch.float8_e4m3fn]
)
def test_weights_that_are_no_real_numbers_are_refused(dtype):
    for name, key in (("flash_stu_lm", "norm.weight"), ("hyena_order2", "in_proj.bias"), ("long_conv", "D")):
        config, state, _, _ = golden(name)
        match = rf"floating-point numbers of 16, 32 or 64 bits {key} \({dtype}, torch\.strided\)"
        with pytest.raises(ValueError, match=match):
            models.build(config, {**state, key: state[key].to(dtype)})
    with pytest.raises(ValueError, match=r"norm\.weight \(torch\.float32, torch\.sparse_coo\)"):
        models.build(golden("flash_stu_lm")[0], {**golden("flash_stu_lm")[1], "norm.weight": sparse()})


def sparse():
    return golden("flash_stu_lm")[1]["norm.weight"].to_sparse()


def test_names_from_a_file_do_not_reach_the_terminal_as_they_are(tmp_path):
    config, state, _, _ = golden("flash_stu_lm")
    red = "\x1b[31mred\n\u202e"
    for change in ({**state, red: torch.zeros(1)}, {**state, "module." + red: 1}):
        with pytest.raises((ValueError, TypeError)) as caught:
            models.build(config, change)
        assert str(caught.value).isprintable() and r"\x1b[31mred\n\u202e" in str(caught.value)
    for key in ("kind", "n_layers", "window_size"):
        with pytest.raises(ValueError) as caught:
            models.build({**config, key: red}, state)
        assert str(caught.value).isprintable()
    many = {f"surplus.{i}.{'x' * 1000}": torch.zeros(1) for i in range(1000)}
    with pytest.raises(ValueError, match="and 980 more") as caught:
        models.build(config, {**state, **many})
    assert len(str(caught.value)) < 10_000

    write(tmp_path, config, {})
    (tmp_path / "pytorch_model.bin").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": red}}))
    with pytest.raises(FileNotFoundError) as caught:
        models.load(tmp_path)
    assert str(caught.value).isprintable()


class Evil:
    def __init__(self, *arguments):
        self.arguments = arguments

    def __reduce__(self):
        return print, self.arguments


def test_a_refused_pickle_gives_its_reason_on_one_line(tmp_path):
    write(tmp_path, FLASH | {"kind": "flash_stu_lm"}, {"evil": Evil("run")})
    with pytest.raises(ValueError) as caught:
        models.load(tmp_path)
    text = str(caught.value)
    assert text.endswith("Unsupported global: GLOBAL print was not an allowed global by default")
    assert text.isprintable()


def test_mappings_that_hold_themselves_end(tmp_path):
    config = FLASH | {"kind": "flash_stu_lm"}
    within = {}
    within["model"] = within
    with pytest.raises(ValueError, match="mappings within each other"):
        models.load(write(tmp_path, config, within))
    nested = {}
    for _ in range(50):
        nested = {"model": nested}
    with pytest.raises(ValueError, match="mappings within each other"):
        models.load(write(tmp_path, config, nested))


def test_files_that_grow_when_they_are_read_are_refused(tmp_path):
    config, state, _, _ = golden("flash_stu_lm")
    write(tmp_path, config, {**state, "norm.weight": torch.zeros(1).expand(1 << 40)})
    with pytest.raises(ValueError, match=r"values of their own, got shared ones, as in norm\.weight"):
        models.load(tmp_path)
    write(tmp_path, config, state)
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin") as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    with pytest.raises(ValueError, match="the archive is compressed"):
        models.load(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        "9" * 10_000,
        "\ufeff{}",
        "NaN",
        '{"n_layers": NaN}',
        "\0",
        '"\x1b[31m"',
    ],
    ids=lambda text: ascii(text[:9]),
)
def test_configurations_that_are_none(text, tmp_path):
    _, state, _, _ = golden("flash_stu_lm")
    write(tmp_path, {}, state)
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        models.load(tmp_path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


def test_a_long_configuration_is_not_read(tmp_path):
    write(tmp_path, {}, {})
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match=r"config\.json: expected at most 16777216 bytes"):
        models.load(tmp_path)


@pytest.mark.parametrize("wrong", [torch.int8, torch.complex64, "bfloat16", 16], ids=str)
def test_a_precision_to_compute_in(wrong, tmp_path):
    with pytest.raises(TypeError, match=r"dtype: expected one of torch\.float16, .*, got"):
        models.load(tmp_path, dtype=wrong)


VALUES = [
    None, -1, 0, 1, 2, 3, 7, 64, 10**6, 10**9, 10**18, 10**40, 0.0, 0.5, 1e308, float("nan"), float("inf"),
    -3.5, "", "x", "\x1b[2J", "y" * 10_000, True, False, [], [0], [1, 1], [-1], [10**9], ["a"],
    list(range(10_000)), {}, {"a": 1}, {"l_max": 10**9}, torch.float16,
]  # fmt: skip


CHANGES = [
    lambda name, tensor: None,
    lambda name, tensor: 3,
    lambda name, tensor: {name: tensor},
    lambda name, tensor: tensor.unsqueeze(0),
    lambda name, tensor: tensor.flatten(),
    lambda name, tensor: tensor.flatten()[:0],
    lambda name, tensor: tensor.long(),
    lambda name, tensor: tensor.bfloat16(),
    lambda name, tensor: tensor.to(torch.complex64),
    lambda name, tensor: tensor.to_sparse(),
    lambda name, tensor: torch.zeros(1).expand(1 << 40),
    lambda name, tensor: torch.zeros(()),
    lambda name, tensor: torch.full_like(tensor, torch.nan),
]


def mutated_config(config, draw):
    """A copy with one to three settings removed, or with another value."""
    config = {key: dict(value) if isinstance(value, dict) else value for key, value in config.items()}
    for _ in range(draw.randint(1, 3)):
        inner = draw.choice([config, *(value for value in config.values() if isinstance(value, dict))])
        key = draw.choice([*inner, "kind", "window_size", "n_heads", "hyena_filter_groups"])
        if draw.random() < 0.2:
            inner.pop(key, None)
        elif draw.random() < 0.3 and isinstance(inner.get(key), int):
            inner[key] += draw.choice([-1, 1, 1000])
        else:
            inner[key] = draw.choice(VALUES)
    return config


def mutated_state(state, draw):
    """A copy with one to three tensors removed, renamed, or replaced by something else."""
    state = dict(state)
    for _ in range(draw.randint(0, 3)):
        name = draw.choice(list(state))
        tensor = state[name]
        kind = draw.random()
        if kind < 0.2:
            del state[name]
        elif kind < 0.5:
            new = draw.choice(
                ["x", "\x1b]0;x\x07", "a\nb", "", 3, None, ("a", 1), f"model.{name}", f"{name}" * 500]
            )
            state[new] = tensor
        elif isinstance(tensor, torch.Tensor):
            state[name] = draw.choice(CHANGES)(name, tensor)
        if not state:
            break
    return state


def judged(call):
    """The result, or None for an error of ours: short, on one line, and soon."""
    began = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return call()
        except (ValueError, TypeError) as caught:
            text = str(caught)
            assert text.isprintable() and len(text) < 20_000, text
            assert text.startswith(("config", "state", "/")) or ": expected" in text, text
            return None
        finally:
            assert time.monotonic() - began < 10


@pytest.mark.parametrize("name", NAMES)
def test_random_damage_ends_in_an_error_of_ours(name, tmp_path):
    config, state, x, _ = golden(name)
    draw = random.Random(name)
    for _ in range(40):
        damaged = mutated_config(config, draw) if draw.random() < 0.8 else config
        tensors = mutated_state(state, draw)
        module = judged(lambda: models.build(damaged, tensors))  # noqa: B023
        # torch has no product of two precisions, which parameters keep.
        if module is not None and len({tensor.dtype for tensor in module.state_dict().values()}) == 1:
            judged(lambda: module(x[:1, :9]))  # noqa: B023
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert memory < 3 << 20


def test_random_bytes_end_in_an_error_of_ours(tmp_path):
    config, state, _, _ = golden("long_conv")
    draw = random.Random(0)
    write(tmp_path, config, state)
    save_file(state, tmp_path / "whole.safetensors")
    contents = [
        (tmp_path / "pytorch_model.bin").read_bytes(),
        (tmp_path / "whole.safetensors").read_bytes(),
        pickle.dumps({"a": 1}, 2),
    ]
    (tmp_path / "whole.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").unlink()
    for _ in range(300):
        content = bytearray(draw.choice(contents))
        for _ in range(draw.randint(0, 8)):
            content[draw.randrange(min(len(content), 3000))] = draw.randrange(256)
        content = content[: draw.choice([len(content), draw.randrange(len(content))])]
        for file in ("model.safetensors", "model.pt"):
            (tmp_path / file).write_bytes(content)
            judged(lambda: models.load(tmp_path))
            with contextlib.suppress(FileNotFoundError):
                (tmp_path / file).unlink()


@pytest.mark.parametrize(
    ("model", "config"),
    [
        (models.FlashSTU, FLASH | {"n_layers": "2"}),
        (models.HyenaDNA, DNA | {"n_layer": 2.0}),
        (models.StripedHyena, STRIPED | {"num_layers": None}),
        (models.StripedHyena2, STRIPED_2 | {"num_layers": -1}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_settings_of_a_new_model_are_told_by_key(model, config):
    with pytest.raises(ValueError, match=r"config: expected (n|num)_layers? to be an integer from 0, got"):
        model(config)
