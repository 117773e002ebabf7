"""Prompts and scores layer by layer in pieces of positions: the same numbers, whatever the pieces are."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
from futurefill_rs import models
from futurefill_rs.models._long import read_pieces
from futurefill_rs.nn import reading
from futurefill_rs.nn.operators.convolution import LongFilter
from futurefill_rs.nn.operators.long import FEW_LAGS
from futurefill_rs.nn.operators.plans import Plans
from futurefill_rs.nn.protocol import Operator
from futurefill_rs.nn.reading import Reading
from models_common import STRIPED_2, error, inputs, layer
from torch import Tensor

MODELS = ["flash_stu", "hybrid", "hyenadna", "striped_hyena", "striped_hyena_attention", "striped_hyena_2"]


def logits(model, ids: Tensor, piece: int, starts: Tensor | None = None) -> Tensor:
    parts, pieces = zip(*read_pieces(model, ids, piece=piece, starts=starts), strict=True)
    assert [part.start for part in parts] == list(range(0, ids.shape[1], piece))
    assert [part.stop for part in parts][-1] == ids.shape[1]
    return torch.cat(pieces, 1)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("length", [1, 2, 17, 47])
def test_logits_in_pieces_are_those_of_forward(name, length):
    model = layer(name)
    ids = inputs(model, length)
    for starts in (None, torch.tensor([0, length // 2])):
        want = model(ids, starts=starts).detach()
        for piece in (1, 3, 5, 8, 100):
            got = logits(model, ids, piece, starts)
            if starts is not None:
                got[1, : length // 2] = want[1, : length // 2]
            assert error(got, want) < 1e-5, (piece, starts)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("prompt", [1, 7, 29])
def test_steps_after_a_prompt_read_in_pieces(name, prompt):
    model = layer(name)
    ids = inputs(model, 44)
    for starts in (None, torch.tensor([prompt // 2, 0])):
        want = model(ids, starts=starts).detach()
        for chunk, max_new in ((1, None), (2, 44 - prompt), (5, None), (6, 44 - prompt)):
            read, cache = model.read_prompt(ids[:, :prompt], max_new, chunk=chunk, starts=starts)
            assert error(read, want[:, prompt - 1]) < 1e-5
            assert (cache.position, cache.remaining) == (prompt, max_new)
            fork = cache.fork()
            for t in range(prompt, 40):
                assert error(model.step(ids[:, t], cache), want[:, t]) < 1e-5
            assert error(model.extend(ids[:, prompt:], fork), want[:, prompt:]) < 1e-5


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("piece", [7, 32])
def test_sequences_longer_than_the_model(name, piece):
    model = layer(name)
    ids = inputs(model, 150)
    first, cache = model.prefill(ids[:, :1], None)
    want = torch.cat([first, model.extend(ids[:, 1:], cache)], 1)
    assert error(logits(model, ids, piece), want) < 1e-5
    read, cache = model.read_prompt(ids[:, :140], 10, chunk=piece)
    assert error(read, want[:, 139]) < 1e-5
    assert error(model.extend(ids[:, 140:], cache), want[:, 140:]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("lags", "block"), [(1, 3), (40, 3), (700, 4), (700, 16), (90, 100), (300, 1)])
def test_long_filters_against_sums(lags, block, dtype):
    """Blocks of any size, pieces that end anywhere, filters shorter and longer than the sequence."""
    torch.manual_seed(0)
    length, ahead = 333, 60
    for many in (lags, lags + FEW_LAGS):
        for shape, rows in (((4, many), (2, 4)), ((3, 1, many), (2, 1, 4)), ((4, many), (3, 2, 4))):
            filters = torch.randn(*shape, dtype=dtype)
            u = torch.randn(*rows, length, dtype=dtype)
            want = convolved(torch.nn.functional.pad(u, (0, ahead)), filters)
            long_filter = LongFilter(Plans(), "", lambda count, filters=filters: filters[..., :count])
            reader = long_filter.reading(u[..., :block], length, ahead)
            ends = sorted({0, block, *torch.randint(0, length, (9,)).tolist(), length})
            y = [reader.extend(u[..., a:b]) for a, b in itertools.pairwise(ends)]
            tolerance = 1e-5 if dtype == torch.float32 else 1e-13
            assert error(torch.cat(y, -1), want[..., :length]) < tolerance
            cache = reader.finish(ahead, "auto")
            owed = cache.extend(u.new_zeros(*rows, ahead))
            assert (owed - want[..., length:]).abs().max() < tolerance * want.abs().max()


def convolved(u: Tensor, filters: Tensor) -> Tensor:
    """The convolution as sums, in float64."""
    u, filters = u.double(), filters.double()
    y = torch.zeros_like(u * filters[..., :1])
    for lag in range(min(filters.shape[-1], u.shape[-1])):
        y[..., lag:] += filters[..., lag : lag + 1] * u[..., : u.shape[-1] - lag]
    return y


@pytest.mark.parametrize("name", MODELS)
def test_hooks_see_every_piece_in_order_and_the_modules_around_everything(name):
    model = layer(name).eval()
    blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    ids = inputs(model, 20)
    seen: list[tuple[Tensor, Tensor]] = []
    whole: list[Tensor] = []
    block = blocks[1].register_forward_hook(lambda _, x, y: seen.append((x[0], y)))
    around = model.register_forward_hook(lambda _, x, y: whole.append(y))
    with torch.no_grad():
        model(ids)
    (before, after), features = seen.pop(), model.hidden(ids, lambda operator, u: operator.whole(u))
    seen.clear()
    whole.clear()
    list(read_pieces(model, ids, piece=6))
    assert [y.shape[1] for _, y in seen] == [6, 6, 6, 2]
    # What a hook keeps is not written to afterwards.
    assert error(torch.cat([x for x, _ in seen], 1), before) < 1e-5
    assert error(torch.cat([y for _, y in seen], 1), after) < 1e-5
    assert len(whole) == 1 and error(whole[0], features) < 1e-5
    block.remove()
    around.remove()
    blocks[0].register_forward_hook(lambda _, x, y: 2 * y)
    assert error(logits(model, ids, 6), model(ids)) < 1e-5


def test_embeddings_in_the_place_of_ids_are_not_written_to():
    model = layer("striped_hyena_2")
    x = torch.randn(2, 20, model.features)
    kept = x.clone()
    assert (
        error(logits(model, x, 6), model.head(model.hidden(x, lambda operator, u: operator.whole(u)))) < 1e-5
    )
    assert torch.equal(x, kept)


@pytest.mark.parametrize("name", ["hyenadna", "striped_hyena_2"])
def test_weights_of_16_bits(name):
    model = layer(name).bfloat16()
    ids = inputs(model, 40)
    got = logits(model, ids, 9)
    assert got.dtype == torch.bfloat16
    assert error(got, model(ids)) < 1e-2


def test_operators_of_others_need_no_reader():
    class Sum:
        """Sums of all inputs so far."""

        def __init__(self, total: Tensor | float = 0.0) -> None:
            self.total = total

        def whole(self, u: Tensor) -> Tensor:
            return u.cumsum(1)

        def prefill(self, u: Tensor, max_new: int | None, method: object) -> tuple[Tensor, Sum]:
            return u.cumsum(1), Sum(u.sum(1))

        def extend(self, u: Tensor) -> Tensor:
            y = self.total.unsqueeze(1) + u.cumsum(1)
            self.total = y[:, -1]
            return y

    class Layer(torch.nn.Module):
        def forward(self, x: Tensor, *, time: object) -> Tensor:
            operator: Operator = Sum()
            return time(operator, x)

    u = torch.randn(2, 11, 3)
    time = Reading(11, 4)
    assert error(time.across(Layer(), u), u.cumsum(1)) < 1e-6
    assert error(time.states[0].total, u.sum(1)) < 1e-6


def test_long_prompts_of_every_entry_go_in_pieces(monkeypatch):
    monkeypatch.setattr(reading, "LEAST", 8)
    monkeypatch.setattr(reading, "ELEMENTS", 8 * 2 * 16)
    model = layer("striped_hyena_2")
    ids = inputs(model, 40)
    want = model(ids).detach()
    calls = []
    model.blocks[0].register_forward_hook(lambda _, x, y: calls.append(y.shape[1]))
    y, cache = model.prefill(ids[:, :30], 10)
    assert calls == [8, 8, 8, 6]
    assert error(y, want[:, :30]) < 1e-5
    assert error(model.extend(ids[:, 30:], cache), want[:, 30:]) < 1e-5
    scores = want[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    calls.clear()
    assert torch.allclose(model.score(ids), scores, atol=1e-4)
    assert calls == [8, 8, 8, 8, 7]


MEMORY = """
import resource, sys, torch
from futurefill_rs import models
torch.manual_seed(0)
layer = dict(emb_dim=3, filter_order=16, l_max=1 << 17)
model = models.HyenaDNA(dict(d_model=64, n_layer=2, d_inner=128, vocab_size=12, layer=layer))
ids = torch.randint(7, 11, (1, 1 << 17))
model.read_prompt(ids[:, : 1 << 12], 10, chunk=1 << 11)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model.read_prompt(ids, 10, chunk=1 << 11)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / (4 * 64 << 17))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is in kilobytes on Linux only")
def test_memory_of_a_long_prompt():
    """In arrays of all positions: the features, what the convolution keeps, its filters, and pieces."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 4.5


def test_evo_2_block_kinds_in_pieces_with_tiles():
    """Filters of 128 taps and of exponentials over many pieces."""
    torch.manual_seed(0)
    model = models.StripedHyena2(STRIPED_2).eval()
    ids = inputs(model, 700, 1)
    assert error(logits(model, ids, 64), model(ids)) < 1e-5


def test_hidden_states_of_transformers_in_pieces(monkeypatch):
    hf = pytest.importorskip("futurefill_rs.hf")
    torch.manual_seed(0)
    settings = {"l_max": 64, "emb_dim": 5, "filter_order": 8, "w": 10}
    model = hf.HyenaDNAForCausalLM(hf.HyenaDNAConfig(d_model=16, n_layer=2, layer=settings)).eval()
    ids = torch.randint(7, 11, (2, 40))
    with torch.no_grad():
        whole = model(ids, output_hidden_states=True, use_cache=True)
        monkeypatch.setattr(reading, "LEAST", 8)
        monkeypatch.setattr(reading, "ELEMENTS", 1)
        pieces = model(ids, output_hidden_states=True, use_cache=True)
    assert error(pieces.logits, whole.logits) < 1e-5
    for got, want in zip(pieces.hidden_states, whole.hidden_states, strict=True):
        assert error(got, want) < 1e-5
