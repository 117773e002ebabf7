"""Outputs of named layers: those that hooks on `forward` see, whatever is asked of them and in pieces."""

import numpy as np
import pytest
import torch
from futurefill_rs import models
from models_common import DNA, MODELS, STRIPED_2, inputs, layer

LAYERS = {
    "flash_stu": ["tok_emb", "layers.1.mlp", "norm"],
    "hybrid": ["layers.1", "layers.3.mlp"],
    "hyenadna": ["backbone.layers.0.mixer", "backbone.layers.1.mlp.fc1", "backbone.ln_f"],
    "striped_hyena": ["blocks.0.filter", "blocks.1.mlp.l3", "norm"],
    "striped_hyena_attention": ["blocks.1.inner_mha_cls", "blocks.3"],
    "striped_hyena_2": ["embedding_layer", "blocks.2.mlp.l3", "blocks.3.inner_mha_cls.out_proj"],
}


def hooked(model, ids, names):
    """What forward hooks see, `(B, T, D)` by name."""
    seen = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, y, name=name: seen.__setitem__(name, y.detach().clone())
        )
        for name in names
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return seen


def close(got, want):
    got, want = torch.as_tensor(np.asarray(got)).double(), torch.as_tensor(np.asarray(want)).double()
    assert got.shape == want.shape
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def dna():
    torch.manual_seed(0)
    return models.HyenaDNA(DNA).eval()


NAME = "backbone.layers.1.mlp.fc2"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("chunk", [None, 7])
def test_they_are_what_hooks_on_forward_see(name, chunk):
    model, names = layer(name), LAYERS[name]
    ids = inputs(model, 40)
    want = hooked(model, ids, names)
    found = model.embeddings(ids, names, chunk=chunk)
    assert list(found) == names
    for each in names:
        close(found[each], want[each])
        close(model.embeddings(ids, each, chunk=chunk), want[each])
        close(model.embeddings(ids, each, positions=-1, chunk=chunk), want[each][:, -1])
        close(model.embeddings(ids, each, pool="mean", chunk=chunk), want[each].mean(1))
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("batch_size", [1, 4])
def test_sequences_of_unequal_length(dna, batch_size):
    rows = [inputs(dna, n, 1, seed=n)[0] for n in (5, 1, 40, 17, 2, 18)]
    want = [hooked(dna, row[None], [NAME])[NAME][0] for row in rows]
    options = {"batch_size": batch_size, "chunk": 6}
    for got, one in zip(dna.embeddings(rows, NAME, **options), want, strict=True):
        close(got, one)
    for places in (0, -1, [0, -1, 0], slice(None, None, 3), slice(-4, None), []):
        found = dna.embeddings(rows, NAME, positions=places, **options)
        for got, one in zip(found, want, strict=True):
            close(got, one[places])
    close(dna.embeddings(rows, NAME, pool="mean", **options), torch.stack([one.mean(0) for one in want]))
    found = dna.embeddings(rows, NAME, pool="mean", positions=slice(0, 4), **options)
    close(found, torch.stack([one[:4].mean(0) for one in want]))


def test_texts_and_arrays_of_positions(dna):
    text = "GATTACANGATTACA"
    want = hooked(dna, dna.alphabet.encode(text, "")[None], [NAME])[NAME][0]
    close(dna.embeddings(text, NAME), want)
    for places in (np.array([3, 0, 14]), torch.tensor([3, 0, 14]), (3, 0, -1)):
        close(dna.embeddings(text, NAME, positions=places, chunk=4), want[[3, 0, 14]])


def test_they_are_written_to_files_and_arrays_as_they_come(dna, tmp_path):
    text = "GATTACA" * 9
    want = dna.embeddings(text, NAME)
    file = tmp_path / "embeddings.npy"
    found = dna.embeddings(text, NAME, out=file, chunk=5)
    assert isinstance(found, np.memmap) and found.dtype == np.float32
    close(found, want)
    close(np.load(file), want)
    for array in (np.empty((63, 16)), np.empty((63, 16), np.float16), torch.empty(63, 16).double()):
        assert dna.embeddings(text, NAME, out=array, chunk=5) is array
        assert np.allclose(np.asarray(array, np.float64), want, atol=2e-3)
    other = "backbone.ln_f"
    found = dna.embeddings(
        text, [NAME, other], positions=[-1, 3], out={NAME: str(tmp_path / "a"), other: tmp_path / "b"}
    )
    close(np.load(tmp_path / "a"), want[[-1, 3]])
    close(found[other], dna.embeddings(text, other, positions=[-1, 3]))


def test_sixteen_bits_stay_in_memory_and_are_widened_in_files(tmp_path):
    torch.manual_seed(0)
    model = models.StripedHyena2(STRIPED_2).eval().bfloat16()
    ids, name = inputs(model, 30, 1)[0], "blocks.2.mlp.l3"
    found = model.embeddings(ids, name)
    assert found.dtype == torch.bfloat16
    close(model.embeddings(ids, name, out=tmp_path / "x.npy"), found.float())
    mean = model.embeddings(ids, name, pool="mean")
    assert mean.dtype == torch.float32
    close(mean, found.double().mean(0).float())


def test_nothing_behind_the_layers_is_computed(dna):
    ran = []
    handle = dna.backbone.layers[1].register_forward_hook(lambda *arguments: ran.append(1))
    dna.embeddings("GATTACA", "backbone.layers.0.mlp")
    assert not ran
    handle.remove()


@pytest.mark.parametrize(
    ("layers", "options", "kind", "words"),
    [
        ("backbone.layer.0", {}, ValueError, r"layers: expected names .* 'backbone.layer.0'; close to"),
        ("", {}, ValueError, "layers: expected names of model.named_modules"),
        ([], {}, ValueError, "layers: expected one or more names, got none"),
        ("backbone.layers", {}, ValueError, "layers: expected layers that see every position, got .backb"),
        (NAME, {"pool": "max"}, ValueError, "pool: expected 'mean' or None, got 'max'"),
        (NAME, {"positions": 7}, ValueError, "positions: expected those of ids with 7 ids, got 7 to 7"),
        (NAME, {"positions": [0.5]}, TypeError, "positions: expected integers, got list"),
        (NAME, {"positions": [], "pool": "mean"}, ValueError, "positions: expected one or more for a mean"),
        (NAME, {"out": np.empty((7, 3))}, ValueError, r"out.*: expected shape \(7, 16\), got \(7, 3\)"),
        (NAME, {"out": np.empty((7, 16), int)}, TypeError, "out.*: expected floating-point numbers"),
        (NAME, {"out": 3}, TypeError, "out.*: expected a path, an array or a tensor, got int"),
        (NAME, {"out": "x", "pool": "mean"}, ValueError, "out: expected one sequence and no pool"),
        ([NAME, "backbone"], {"out": "x"}, ValueError, "out: expected a path or an array for each"),
        (NAME, {"chunk": 0}, ValueError, "chunk: expected a positive integer, got 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_given_is_named(dna, layers, options, kind, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=words):
        dna.embeddings("GATTACA", layers, **options)
    assert not any(module._forward_hooks for module in dna.modules())
    with pytest.raises(ValueError, match=r"ids\[1\]: expected one id or more, got none"):
        dna.embeddings(["A", ""], NAME)
