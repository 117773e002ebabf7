"""The protocol of all layers and models: all entries agree; caches fork, reorder and reset."""

import copy
import io

import futurefill_rs as ff
import numpy as np
import pytest
import torch
from futurefill_rs.nn.operators import convolution, modal
from models_common import LAYERS, MODELS, error, inputs, layer, stepped
from torch._subclasses import FakeTensorMode

ALL = [*LAYERS, *MODELS]
LENGTH = 40

# Float32 rounding of a whole convolution, seen on a part of it.
TOLERANCE = 1e-5


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_entries_agree_at_every_prompt_length(name, dtype):
    module = layer(name).to(dtype)
    x = inputs(module, LENGTH, dtype=dtype)
    whole = module(x)
    # 16-bit steps round between operators as the whole does, but not always to the same side.
    tolerance = {torch.bfloat16: 0.02, torch.float32: TOLERANCE, torch.float64: 1e-12}[dtype]
    for prompt in range(1, LENGTH + 1):
        got, cache = module.prefill(x[:, :prompt], LENGTH - prompt)
        assert got.dtype == whole.dtype
        assert error(got, whole[:, :prompt]) < tolerance
        assert cache.position == prompt and cache.remaining == LENGTH - prompt
        stop = LENGTH if prompt in (1, 2, 3, 11) else min(LENGTH, prompt + 2)
        if stop > prompt:
            assert error(stepped(module, x[:, :stop], cache, prompt), whole[:, prompt:stop]) < tolerance
            assert cache.position == stop and cache.remaining == LENGTH - stop


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("method", ["naive", "epoched", "continuous", "auto"])
def test_methods_agree(name, method):
    module = layer(name)
    x = inputs(module, LENGTH)
    got, cache = module.prefill(x[:, :3], LENGTH - 3, method=method)
    assert error(torch.cat([got, stepped(module, x, cache, 3)], 1), module(x)) < TOLERANCE


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("bounded", [True, False])
def test_extend_agrees_in_any_split(name, bounded):
    module = layer(name)
    x = inputs(module, LENGTH)
    whole = module(x)
    for first, *blocks in ([1, 2, 3, 30], [7, 0, 13, 1, 15], [2, 20, 15]):
        y, cache = module.prefill(x[:, :first], LENGTH - first if bounded else None)
        outputs, position = [y], first
        for size in blocks:
            outputs.append(module.extend(x[:, position : position + size], cache))
            outputs.append(module.step(x[:, position + size], cache)[:, None])
            position += size + 1
        assert error(torch.cat(outputs, 1), whole[:, :position]) < TOLERANCE


@pytest.mark.parametrize("name", ALL)
def test_fork_is_independent(name):
    module = layer(name)
    x, other = inputs(module, 24), inputs(module, 24, seed=2)
    other[:, :10] = x[:, :10]
    _, cache = module.prefill(x[:, :6], 18)
    stepped(module, x[:, :10], cache, 6)
    fork = cache.fork()
    assert fork.position == 10 and fork.remaining == cache.remaining
    a = torch.stack([module.step(x[:, t], cache) for t in range(10, 24)], 1)
    b = torch.stack([module.step(other[:, t], fork) for t in range(10, 24)], 1)
    assert error(a, module(x)[:, 10:]) < TOLERANCE
    assert error(b, module(other)[:, 10:]) < TOLERANCE


@pytest.mark.parametrize("name", ALL)
def test_reorder_gathers_and_multiplies_rows(name):
    module = layer(name)
    x = inputs(module, 24, batch=3)
    _, cache = module.prefill(x[:, :5], 19)
    stepped(module, x[:, :10], cache, 5)
    index = [2, 0, 0, -2]
    cache.reorder(index)
    assert cache.batch_size == 4
    assert error(stepped(module, x[index], cache, 10), module(x)[index, 10:]) < TOLERANCE


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("rows", [[1], torch.tensor([False, True, False])], ids=["index", "mask"])
def test_reset_rows_start_again_while_others_go_on(name, rows):
    module = layer(name)
    x = inputs(module, 36, batch=3)
    _, cache = module.prefill(x[:, :5], 31)
    stepped(module, x[:, :11], cache, 5)
    cache.reset(rows)
    assert cache.position == 11 and cache.remaining == 25
    fork = cache.fork()
    for kept in (cache, fork):
        got = stepped(module, x, kept, 11)
        assert error(got[0::2], module(x)[0::2, 11:]) < TOLERANCE
        assert error(got[1:2], module(x[1:2, 11:])) < TOLERANCE


@pytest.mark.parametrize("name", ALL)
def test_reset_of_all_starts_at_position_zero_with_the_whole_capacity(name):
    module = layer(name)
    x = inputs(module, 30)
    _, cache = module.prefill(x[:, :5], 20)
    stepped(module, x[:, :12], cache, 5)
    cache.reset()
    assert cache.position == 0 and cache.remaining == 20
    assert error(stepped(module, x[:, :20], cache), module(x[:, :20])) < TOLERANCE


@pytest.mark.parametrize("name", ALL)
def test_steps_past_the_capacity_are_an_error_that_changes_nothing(name):
    module = layer(name)
    x = inputs(module, 10)
    _, cache = module.prefill(x[:, :5], 3)
    stepped(module, x[:, :7], cache, 5)
    with pytest.raises(ff.CapacityError, match="expected at most 1 more positions, got 2"):
        module.extend(x[:, 7:9], cache)
    y = module.step(x[:, 7], cache)
    assert error(y, module(x)[:, 7]) < TOLERANCE
    with pytest.raises(ff.CapacityError):
        module.step(x[:, 8], cache)
    assert cache.position == 8 and cache.remaining == 0


@pytest.mark.parametrize("name", ALL)
def test_wrong_inputs_are_errors_that_change_nothing(name):
    module = layer(name)
    x = inputs(module, 12)
    _, cache = module.prefill(x[:, :5], 7)
    with pytest.raises(ValueError, match="x: expected shape"):
        module.step(x[:1, 5], cache)
    with pytest.raises(ValueError, match="x: expected shape"):
        module.step(x, cache)
    with pytest.raises(ValueError, match="x: expected shape"):
        module(x[:, 0])
    with pytest.raises(TypeError, match="x: expected"):
        module(x.long() if x.is_floating_point() else x.float())
    with pytest.raises(TypeError, match="max_new"):
        module.prefill(x, 1.5)
    with pytest.raises(ValueError, match="max_new"):
        module.prefill(x, -1)
    with pytest.raises(IndexError, match="rows"):
        cache.reset([2])
    with pytest.raises(TypeError, match="index"):
        cache.reorder([0.5])
    assert error(stepped(module, x, cache, 5), module(x)[:, 5:]) < TOLERANCE


FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def refused(call):
    """Whether a call is refused for its dtype; any other error is none of this test's."""
    try:
        call()
    except TypeError as error:
        assert str(error).startswith("x: expected ")
        return True
    return False


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("weights", FLOATS, ids=str)
def test_every_dtype_works_everywhere_or_is_refused_before_anything_moves(name, weights):
    module = layer(name).to(weights)
    x = inputs(module, 12, dtype=weights)
    whole = module(x)
    for dtype in [*FLOATS, torch.float8_e4m3fn]:
        other = x.to(dtype)
        answers = [refused(lambda other=other: module(other))]
        answers.append(refused(lambda other=other: module.prefill(other, 3)))
        for bound in (7, None):
            for call, part in ((module.step, other[:, 5]), (module.extend, other[:, 5:7])):
                _, cache = module.prefill(x[:, :5], bound)
                answers.append(refused(lambda call=call, part=part, cache=cache: call(part, cache)))
                tolerance = 0.1 if 16 in (torch.finfo(weights).bits, torch.finfo(dtype).bits) else TOLERANCE
                position = cache.position
                assert error(stepped(module, x, cache, position), whole[:, position:]) < tolerance
        assert len(set(answers)) == 1
        assert not answers[0] or dtype != weights
        assert answers[0] or dtype in FLOATS


def test_autocast_brings_inputs_and_weights_together():
    for name in LAYERS:
        module = layer(name)
        x = inputs(module, 9)
        with torch.autocast("cpu", torch.bfloat16):
            assert error(module(x.bfloat16()), module(x)) < 0.05


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("error_class", [RuntimeError, Interrupted])
@pytest.mark.parametrize("entry", ["step", "step_all", "extend", "rewind"])
@pytest.mark.parametrize("name", [n for n in ALL if n not in ("stu", "stu_hankel_l")])
def test_a_cache_that_an_error_left_between_operators_goes_no_further(name, entry, error_class):
    module = layer(name)
    x = inputs(module, 12)
    _, cache = module.prefill(x[:, :5], 12)
    cache.keep(4)
    module.extend(x[:, 5:8], cache)
    fork = cache.fork()

    class Failing(torch.overrides.TorchFunctionMode):
        """Fails where the first operator's result is used."""

        def __torch_function__(self, function, types, args=(), kwargs=None):
            if done:
                raise error_class
            return function(*args, **(kwargs or {}))

    done = []
    mix = module.mix

    def failing(x, time):
        def then_fail(operator, u):
            y = time(operator, u)
            done.append(operator)
            return y

        with Failing():
            return mix(x, then_fail)

    module.mix = failing
    calls = {
        "step": lambda: module.step(x[:, 8], cache),
        "step_all": lambda: module.step_all(torch.cat([x[:, 8], x[:, 8]]), [cache, fork.fork()]),
        "extend": lambda: module.extend(x[:, 8:10], cache),
        "rewind": lambda: module.rewind(cache, 2),
    }
    with pytest.raises(error_class):
        calls[entry]()
    assert done
    del module.mix
    for call in (*calls.values(), lambda: module.step(x[:, 8], cache.fork())):
        with pytest.raises(RuntimeError, match="cache: expected one whose last call came to its end"):
            call()
    assert error(stepped(module, x, fork, 8), module(x)[:, 8:]) < TOLERANCE
    cache.reset()
    assert error(stepped(module, x, cache), module(x)) < TOLERANCE


@pytest.mark.parametrize("name", ALL)
def test_forward_is_differentiable_and_agrees_after_an_optimiser_step(name):
    """Plans follow the weights: after training, a prefill uses the new filters."""
    module = layer(name).train()
    x = inputs(module, 20)
    module.prefill(x[:, :4], 16)
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
    module(x).square().mean().backward()
    missing = [key for key, p in module.named_parameters() if p.grad is None]
    assert not missing
    optimiser.step()
    got, cache = module.prefill(x[:, :4], 16)
    assert not got.requires_grad
    assert error(torch.cat([got, stepped(module, x, cache, 4)], 1), module(x)) < TOLERANCE


def test_plans_follow_writes_that_no_version_counter_sees():
    module = layer("causal_conv")
    x = inputs(module, 20)
    module.prefill(x[:, :4], 16)
    module.weight.data.neg_()
    got, cache = module.prefill(x[:, :4], 16)
    assert error(torch.cat([got, stepped(module, x, cache, 4)], 1), module(x)) < TOLERANCE
    with torch.inference_mode():
        frozen = layer("causal_conv")
        for scale in (1.0, 2.0):
            frozen.weight.mul_(scale)
            got, _ = frozen.prefill(x, 0)
            assert error(got, frozen(x)) < TOLERANCE


def test_plans_follow_writes_to_large_tensors():
    module = ff.nn.CausalConv(300, 1000)
    x = torch.randn(1, 20, 300)
    for change in (lambda w: w.neg_(), lambda w: w[150, 3:4].add_(1.0), lambda w: w.mul_(0.5)):
        module.prefill(x, 0)
        change(module.weight.data)
        assert error(module.prefill(x, 0)[0], module(x)) < TOLERANCE


def test_plans_are_shared_between_prompts_of_alike_lengths():
    module = layer("causal_conv")
    x = inputs(module, 33)
    module.prefill(x[:, :4], 20)
    ((_, plan),) = module._plans._plans["weight"].values()
    for prompt in (1, 2, 3):
        module.prefill(x[:, :prompt], 20)
    ((_, same),) = module._plans._plans["weight"].values()
    assert same is plan


@pytest.mark.parametrize("name", ALL)
def test_modules_copy_and_pickle(name):
    module = layer(name)
    x = inputs(module, 16)
    module.prefill(x[:, :4], 12)
    twin = copy.deepcopy(module)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    for other in (twin, torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x), module(x))
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(0.5)
        got, cache = other.prefill(x[:, :4], 12)
        assert error(torch.cat([got, stepped(other, x, cache, 4)], 1), other(x)) < TOLERANCE
        assert error(other(x), module(x)) > 1e-3


@pytest.mark.parametrize("name", ["causal_conv", "stu", "hyena", "flash_stu", "hyenadna", "hybrid"])
def test_unbounded_streams_forget_what_lies_beyond_the_filters_reach(name):
    """A stream of three times the model's length: each output is that of the last `reach` inputs alone."""
    module = layer(name)
    x = inputs(module, 150)
    y, cache = module.prefill(x[:, :60], None)
    got = torch.cat([y, stepped(module, x, cache, 60)], 1)
    assert cache.position == 150 and cache.remaining is None
    reach = getattr(module, "reach", None) or {"causal_conv": 20, "stu": 48, "hyena": 97}[name]
    for t in (59, 60, 99, 149):
        start = max(0, t + 1 - reach)
        recent, _ = module.prefill(x[:, start : t + 1], None)
        assert error(recent[:, -1], got[:, t]) < 5e-6


@pytest.mark.parametrize("name", [n for n in ALL if n not in ("causal_conv", "hcs", "hcm", "hcl", "modal")])
def test_forward_refuses_sequences_longer_than_the_model(name):
    module = layer(name)
    if module.max_length is None:
        assert module(inputs(module, 60)).shape[1] == 60
        return
    with pytest.raises(ValueError, match=f"x: expected at most {module.max_length} positions, got 49"):
        module(inputs(module, 49))


def test_the_cache_does_not_grow_with_the_prompt():
    module = layer("flash_stu")
    sizes = set()
    for prompt in (1, 20, 40):
        _, cache = module.prefill(inputs(module, prompt), 8)
        sizes.add(cache.nbytes)
    assert max(sizes) <= 2 * min(sizes)


def test_rows_do_not_see_each_other():
    for name in ALL:
        module = layer(name)
        x = inputs(module, 12, batch=3)
        _, cache = module.prefill(x[:, :4], 8)
        _, alone = module.prefill(x[1:2, :4], 8)
        assert error(stepped(module, x, cache, 4)[1:2], stepped(module, x[1:2], alone, 4)) < TOLERANCE


def test_repr_of_a_cache_says_where_it_is():
    module = layer("stu")
    _, cache = module.prefill(inputs(module, 5), 4)
    assert repr(cache) == f"Cache(batch_size=2, position=5, remaining=4, nbytes={cache.nbytes})"


@pytest.mark.parametrize("name", ALL)
def test_rows_may_start_late(name):
    """Left-padded rows: each row's outputs and its cache are those of the row alone."""
    module = layer(name)
    x = inputs(module, 30, batch=4)
    starts = torch.tensor([0, 7, 3, 19])
    if x.is_floating_point():
        x[1, :7] = torch.nan
    y = module(x, starts=starts)
    got, cache = module.prefill(x[:, :20], 10, starts=starts)
    cache.reorder([3, 2, 1, 0])
    steps = stepped(module, x.flip(0), cache, 20).flip(0)
    for row, start in enumerate(starts.tolist()):
        alone = module(x[row : row + 1, start:])
        assert error(y[row : row + 1, start:], alone) < TOLERANCE
        assert error(got[row : row + 1, start:], alone[:, : 20 - start]) < TOLERANCE
        assert error(steps[row : row + 1], alone[:, 20 - start :]) < TOLERANCE
    with pytest.raises(ValueError, match="starts"):
        module(x, starts=starts[:2])


@pytest.mark.parametrize("name", ALL)
def test_runs_under_fake_cuda_tensors(name):
    """No device mixed up, no value asked for: what a GPU needs, without one."""
    with FakeTensorMode(), torch.device("cuda"):
        module = layer(name)
        if name in MODELS:
            x = torch.zeros(2, 10, dtype=torch.int64)
        else:
            x = torch.randn(2, 10, module.width)
        outputs = [module(x)]
        for max_new in (5, None):
            y, cache = module.prefill(x, max_new, starts=torch.tensor([0, 3]))
            fork = cache.fork()
            fork.reorder([1, 0, 1])
            fork.reset([1])
            outputs += [y, module.step(x[:, 0], cache), module.extend(x[:, :2], cache)]
        if name in MODELS:
            outputs.append(ff.generate(module, x, 4, temperature=1.0, top_k=3))
        assert {output.device.type for output in outputs} == {"cuda"}


@pytest.mark.parametrize("name", ALL)
def test_the_torch_engine_agrees(name, monkeypatch):
    """What a GPU runs, on the CPU."""
    compiled = ff.plan
    monkeypatch.setattr(ff, "plan", lambda *args: compiled(*args, engine="torch"))
    module = layer(name)
    x = inputs(module, LENGTH)
    whole = module(x)
    for max_new in (LENGTH - 7, None):
        got, cache = module.prefill(x[:, :7], max_new)
        cache = cache.fork()
        got = torch.cat([got, stepped(module, x[:, :20], cache, 7), module.extend(x[:, 20:], cache)], 1)
        assert error(got, whole) < TOLERANCE


@pytest.mark.parametrize("name", ALL)
def test_no_positions_at_all(name):
    module = layer(name)
    x = inputs(module, 4)
    assert module(x[:, :0]).shape[:2] == (2, 0)
    y, cache = module.prefill(x[:, :0], 4)
    assert y.shape[:2] == (2, 0) and cache.position == 0
    assert error(stepped(module, x, cache), module(x)) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["causal_conv", "stu", "stu_full", "hyena", "h3_heads", "modal", "hybrid"])
def test_a_long_prompt_needs_a_plan_for_what_follows_only(name, dtype, monkeypatch):
    monkeypatch.setattr(convolution, "LONG_PROMPT", 4)
    module = layer(name).to(dtype)
    x = inputs(module, LENGTH, batch=3, dtype=dtype)
    whole = module(x)
    tolerance = 0.02 if dtype == torch.bfloat16 else TOLERANCE
    got, cache = module.prefill(x[:, :30], 10)
    assert error(got, whole[:, :30]) < tolerance
    first = stepped(module, x[:, :33], cache, 30)
    rest = module.extend(x[:, 33:36], cache.fork())
    cache.reorder([2, 1, 0])
    cache.reset([2])
    steps = stepped(module, x.flip(0), cache, 33).flip(0)
    assert error(torch.cat([first, rest], 1), whole[:, 30:36]) < tolerance
    assert error(steps[1:], whole[1:, 33:]) < tolerance
    assert error(steps[:1], module(x[:1, 33:])) < tolerance
    cache.reset()
    assert error(stepped(module, x[:, :10], cache), module(x[:, :10])) < tolerance
    with pytest.raises(ff.CapacityError):
        module.step(x[:, 10], cache)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["h3", "h3_heads", "hcl", "modal", "striped_hyena"])
def test_a_bounded_recurrence_agrees_with_the_engine(name, dtype, monkeypatch):
    module = layer(name).to(dtype)
    x = inputs(module, LENGTH, batch=3, dtype=dtype)
    whole = module(x)
    tolerance = {torch.bfloat16: 0.02, torch.float32: TOLERANCE, torch.float64: 1e-12}[dtype]
    sizes = []
    for pays in (True, False):
        monkeypatch.setattr(modal, "recurrence_pays", lambda u, residues, pays=pays: pays)
        y, cache = module.prefill(x[:, :7], LENGTH - 7)
        sizes.append(cache.nbytes)
        steps = stepped(module, x[:, :20], cache, 7)
        fork = cache.fork()
        rest = module.extend(x[:, 20:], cache)
        assert error(torch.cat([y, steps, rest], 1), whole) < tolerance
        assert cache.remaining == 0
        fork.reorder([2, 0])
        fork.reset([1])
        steps = stepped(module, x[[2, 0]], fork, 20)
        assert error(steps[:1], whole[2:, 20:]) < tolerance
        assert error(steps[1:], module(x[:1, 20:])) < tolerance
    assert sizes[0] < sizes[1]


def test_the_recurrence_runs_where_it_is_cheaper():
    """Few modes of many features; never against a method that was asked for, nor on a GPU."""
    few, many = torch.zeros(4096, 2, dtype=torch.complex128), torch.zeros(4096, 64, dtype=torch.complex128)
    u = torch.zeros(1, 3, 4096)
    assert modal.recurrence_pays(u, few) and not modal.recurrence_pays(u, many)
    assert not modal.recurrence_pays(u[..., :64], few[:64])
    assert not modal.recurrence_pays(u.to("meta"), few)
    module = ff.nn.HyenaCascade(2048, "modal", state_size=1)
    x = inputs(module, 3, batch=1)
    assert module.prefill(x, 400)[1].nbytes < 200_000 < module.prefill(x, 400, method="epoched")[1].nbytes


def test_the_plan_of_a_long_prompt_is_small():
    module = ff.nn.CausalConv(2, 10000)
    module.prefill(torch.randn(1, 8000, 2), 16)
    ((_, plan),) = module._plans._plans["weight"].values()
    assert plan.horizon == 16 and plan.nbytes < 10000


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("bounded", [True, False])
def test_rewind(name, bounded):
    """Drafts that are partly accepted: what remains is what was never undone."""
    module = layer(name)
    x, wrong = inputs(module, LENGTH), inputs(module, LENGTH, seed=9)
    whole = module(x)
    _, cache = module.prefill(x[:, :5], LENGTH - 5 if bounded else None)
    cache.keep(6)
    position = 5
    for accepted, rejected in ((3, 2), (0, 4), (1, 0), (2, 6), (5, 1), (1, 5)):
        draft = torch.cat([x[:, position : position + accepted], wrong[:, :rejected]], 1)
        y = module.extend(draft, cache)
        assert error(y[:, :accepted], whole[:, position : position + accepted]) < TOLERANCE or not accepted
        module.rewind(cache, rejected)
        position += accepted
        assert cache.position == position
        assert error(module.step(x[:, position], cache), whole[:, position]) < TOLERANCE
        position += 1
    stepped(module, x[:, : position + 7], cache, position)
    position += 7
    fork = cache.fork()
    module.rewind(cache, 3)
    cache.reorder([1, 0])
    module.rewind(cache, 2)
    position -= 5
    got = stepped(module, x.flip(0), cache, position)
    assert error(got, whole.flip(0)[:, position:]) < TOLERANCE
    assert error(stepped(module, x, fork, position + 5), whole[:, position + 5 :]) < TOLERANCE


def test_rewind_knows_how_far_it_can():
    module = layer("stu")
    x = inputs(module, 20)
    _, cache = module.prefill(x[:, :5], 15)
    with pytest.raises(ValueError, match="count: expected at most 0 positions to undo, got 1"):
        module.rewind(cache, 1)
    size = cache.nbytes
    cache.keep(4)
    assert cache.nbytes <= 2 * size
    stepped(module, x[:, :7], cache, 5)
    with pytest.raises(ValueError, match="at most 2 positions"):
        module.rewind(cache, 3)
    stepped(module, x[:, :19], cache, 7)
    with pytest.raises(ValueError, match="at most 4 positions"):
        module.rewind(cache, 5)
    module.rewind(cache, 4)
    assert cache.remaining == 5 and cache.nbytes < 4 * size
    cache.reset([0])
    with pytest.raises(ValueError, match="at most 0 positions"):
        module.rewind(cache, 1)


def test_attention_forgets_what_rows_saw_before_a_reset():
    module = layer("causal_attention")
    x = inputs(module, 400, batch=2)
    _, cache = module.prefill(x[:, :3])
    sizes, born = [], [0, 0]
    for t in range(3, 400):
        if t % 10 == 0:
            row = t // 10 % 2
            cache.reset([row])
            born[row] = t
        y = module.step(x[:, t], cache)
        sizes.append(cache.nbytes)
        for row in range(2):
            whole = module(x[row : row + 1, born[row] : t + 1])
            assert error(y[row : row + 1], whole[:, -1]) < TOLERANCE
    assert max(sizes[50:]) <= 4 * 20 * sizes[0] / 3


@pytest.mark.parametrize("name", ALL)
def test_caches_at_different_positions_step_together(name):
    module = layer(name)
    x = inputs(module, LENGTH, batch=6)
    whole = module(x)
    rows = [slice(0, 2), slice(2, 3), slice(3, 6)]
    caches = [
        module.prefill(x[part, :prompt], room)[1]
        for part, prompt, room in zip(rows, (5, 1, 12), (20, None, 30), strict=True)
    ]
    caches[1].keep(4)
    for _ in range(20):
        ids = torch.cat([x[part, cache.position] for part, cache in zip(rows, caches, strict=True)])
        want = torch.cat([whole[part, cache.position] for part, cache in zip(rows, caches, strict=True)])
        assert error(module.step_all(ids, caches), want) < TOLERANCE
    assert [cache.position for cache in caches] == [25, 21, 32]
    module.rewind(caches[1], 3)
    assert error(module.step_all(x[2:3, 18], caches[1:2]), whole[2:3, 18]) < TOLERANCE


def test_caches_that_cannot_step_together():
    module = layer("stu")
    x = inputs(module, 8)
    caches = [module.prefill(x, room)[1] for room in (3, 0)]
    with pytest.raises(ff.CapacityError):
        module.step_all(torch.cat([x[:, 0], x[:, 0]]), caches)
    assert [cache.position for cache in caches] == [8, 8]
    with pytest.raises(ValueError, match="x: expected shape"):
        module.step_all(x[:, 0], caches)
    with pytest.raises(ValueError, match="caches: expected one or more"):
        module.step_all(x[:0, 0], [])


@pytest.mark.parametrize(
    ("error", "value"),
    [(ValueError, -1), *((TypeError, value) for value in (2.5, True, "a", None, torch.tensor(1.5)))],
)
def test_numbers_of_positions_are_integers(error, value):
    module = layer("stu")
    _, cache = module.prefill(inputs(module, 5), 15)
    with pytest.raises(error, match="count: expected a positive integer, got"):
        cache.keep(value)
    cache.keep(np.int64(3))
    with pytest.raises(error, match="count: expected a non-negative integer, got"):
        module.rewind(cache, value)
    if value is not None:
        with pytest.raises(error, match="max_new: expected a non-negative integer, got"):
            module.prefill(inputs(module, 5), value)
    with pytest.raises(ValueError, match="count"):
        cache.keep(0)


@pytest.mark.parametrize("name", MODELS)
def test_an_id_refused_before_the_operators_leaves_caches_as_they_were(name):
    module = layer(name)
    x = inputs(module, 12)
    wrong = torch.tensor([module.vocab_size + 90, 0])
    whole = module(x)
    caches = [module.prefill(x[:, :5], 7)[1] for _ in range(2)]
    for call in (
        lambda: module.step(wrong, caches[0]),
        lambda: module.extend(wrong[:, None], caches[0]),
        lambda: module.step_all(torch.cat([x[:, 5], wrong]), caches),
    ):
        with pytest.raises(ValueError, match="x: expected ids"):
            call()
    for cache in caches:
        assert error(stepped(module, x, cache, 5), whole[:, 5:]) < TOLERANCE


def test_a_shared_stu_asks_for_its_filters():
    layer = ff.nn.STU(6, 5, 48, shared=True)
    with pytest.raises(
        ValueError, match="phi: expected the filters in every call of a shared layer, got None"
    ):
        layer(torch.randn(1, 4, 6))
