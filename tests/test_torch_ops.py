"""causal_conv and futurefill as differentiable operators."""

from __future__ import annotations

import copy
from typing import Any

import futurefill_rs as ff
import numpy as np
import oracle
import pytest
import torch
from futurefill_rs.torch_engine import autograd
from futurefill_rs.torch_engine import fft as fft_module
from futurefill_rs.torch_engine.fft import causal_conv_fft, fast_length, filter_grad_fft
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

SHAPES = [*oracle.SHAPES, ((2, 3, 1, 2), (3, 4, 1)), ((0, 3), (3,))]
LENGTHS = [(7, 5), (5, 9), (1, 1), (8, 8)]


def pair(c: tuple[int, ...], f: tuple[int, ...], t: int, lags: int, dtype: Any = torch.float64) -> Any:
    generator = torch.Generator().manual_seed(7)
    u = torch.randn(*c, t, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return u, torch.randn(*f, lags, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def direct(u: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
    """The sum itself, in torch: autograd of it is the reference for gradients."""
    length = u.shape[-1]
    return sum(
        torch.nn.functional.pad(filters[..., j : j + 1] * u[..., : length - j], (j, 0))
        for j in range(min(length, filters.shape[-1]))
    )


@pytest.mark.parametrize(("c", "f"), SHAPES)
def test_gradients_and_their_gradients(c, f):
    for t, lags in LENGTHS:
        u, filters = pair(c, f, t, lags)
        reference = oracle.conv(u.detach().numpy(), filters.detach().numpy())
        oracle.assert_close(ff.causal_conv(u, filters).detach().numpy(), reference, "float64")
        assert torch.autograd.gradcheck(ff.causal_conv, (u, filters), fast_mode=u.numel() > 50)
        assert torch.autograd.gradgradcheck(ff.causal_conv, (u, filters), fast_mode=True)
        assert torch.autograd.gradcheck(ff.futurefill, (u, filters), fast_mode=True)


@pytest.mark.parametrize(("c", "f"), SHAPES)
def test_torch_path_of_other_devices(c, f, monkeypatch):
    for t, lags in [*LENGTHS, (300, 128), (128, 300)]:
        u, filters = (x.detach() for x in pair(c, f, t, lags))
        reference = oracle.conv(u.numpy(), filters.numpy())
        for chunk in (1, 600, 1 << 20):
            monkeypatch.setattr(fft_module, "_CPU_CHUNK", chunk)
            y = causal_conv_fft(u, filters, t)
            assert y.is_contiguous()
            oracle.assert_close(y.numpy(), reference, "float64")
            v, w = u.clone().requires_grad_(), filters.clone().requires_grad_()
            upper = torch.randn(y.shape, dtype=torch.float64)
            (expected,) = torch.autograd.grad(direct(v, w), w, upper)
            # A gradient cancels much of what it sums, so its relative error may be several times a sum's.
            oracle.assert_close(
                filter_grad_fft(upper, u, w.shape).numpy(), expected.numpy(), "float64", 1 << 30
            )
        # Beyond the input's end: what it still adds to later outputs.
        longer = torch.nn.functional.pad(u, (0, 40))
        y = causal_conv_fft(u, filters, t + 40)
        oracle.assert_close(y.numpy(), oracle.conv(longer.numpy(), filters.numpy()), "float64")


def test_long_gradients_stay_exact():
    for t, lags in ((1000, 37), (37, 1000), (777, 777)):
        u, filters = pair((2, 3), (3,), t, lags, torch.float32)
        upper = torch.randn(2, 3, t)
        grads = torch.autograd.grad(ff.causal_conv(u, filters), (u, filters), upper)
        v, w = u.detach().double().requires_grad_(), filters.detach().double().requires_grad_()
        references = torch.autograd.grad(direct(v, w), (v, w), upper.double())
        for grad, reference in zip(grads, references, strict=True):
            assert grad.dtype is torch.float32
            oracle.assert_close(grad.numpy(), reference.numpy(), "float32", t)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_precisions(dtype):
    name = str(dtype).removeprefix("torch.")
    for inner, outer in (
        (dtype, dtype),
        (dtype, torch.float32),
        (torch.float32, dtype),
        (dtype, torch.float64),
    ):
        u, _ = pair((2, 3), (3,), 60, 40, outer)
        _, filters = pair((2, 3), (3,), 60, 40, inner)
        y = ff.causal_conv(u, filters)
        assert y.dtype is outer
        reference = oracle.conv(u.detach().double().numpy(), filters.detach().double().numpy())
        oracle.assert_close(y.detach().double().numpy(), reference, name)
        y.double().square().sum().backward()
        assert u.grad.dtype is outer and filters.grad.dtype is inner
        assert torch.isfinite(u.grad).all() and torch.isfinite(filters.grad).all()


def test_gradients_of_only_one_argument():
    u, filters = pair((2, 3), (3,), 9, 4)
    ff.causal_conv(u.detach(), filters).sum().backward()
    ff.causal_conv(u, filters.detach()).sum().backward()
    assert u.grad is not None and filters.grad is not None
    assert not ff.causal_conv(u.detach(), filters.detach()).requires_grad
    with torch.no_grad():
        assert not ff.causal_conv(u, filters).requires_grad


# opcheck itself reads .grad of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_registered_operators_pass_opcheck():
    u, filters = pair((2, 1, 3), (4, 1), 8, 5)
    torch.library.opcheck(autograd._causal_conv, (u, filters, 1))
    upper = torch.randn(2, 4, 3, 8, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(autograd._filter_grad, (upper, u, (4, 1, 5), 1))


def test_vmap_and_functional_gradients():
    u, w = (x.detach() for x in pair((6, 3), (6, 3), 8, 5))
    assert torch.allclose(torch.func.vmap(ff.causal_conv)(u, w), ff.causal_conv(u, w))
    batched = torch.func.vmap(ff.causal_conv, in_dims=(1, 0))(u, w[0])
    for i in range(3):
        assert torch.allclose(batched[i], ff.causal_conv(u[:, i], w[0, i]))

    def loss(w: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return ff.causal_conv(u, w).pow(3).sum()

    grad = torch.func.grad(loss)
    for dims in ((None, 0), (0, None), (0, 0)):
        left, right = (w if dims[0] == 0 else w[0]), (u if dims[1] == 0 else u[0])
        mapped = torch.func.vmap(grad, in_dims=dims)(left, right)
        rows = [grad(w[i] if dims[0] == 0 else w[0], u[i] if dims[1] == 0 else u[0]) for i in range(6)]
        assert torch.allclose(mapped, torch.stack(rows))
    by_u = torch.func.vmap(torch.func.grad(loss, argnums=1), in_dims=(0, None))(w, u[0])
    assert torch.allclose(by_u, torch.stack([torch.func.grad(loss, argnums=1)(w[i], u[0]) for i in range(6)]))
    outer = torch.func.grad(lambda w: torch.func.vmap(loss, in_dims=(None, 0))(w, u).sum())(w[0])
    assert torch.allclose(outer, sum(grad(w[0], u[i]) for i in range(6)))
    hessian = torch.func.jacrev(torch.func.jacrev(loss))(w[0, 0], u[0, 0])
    assert torch.allclose(hessian, hessian.T) and hessian.shape == (5, 5)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
@pytest.mark.parametrize(("t", "lags"), [(9, 7), (5, 8), (1, 1)])
@pytest.mark.parametrize(("c", "f"), [((2, 3), (3,)), ((2, 1, 3), (4, 1)), ((), (3,))])
def test_forward_mode(c, f, t, lags):
    u, w = pair(c, f, t, lags)
    du, dw = torch.randn_like(u), torch.randn_like(w)
    a, b = u.detach(), w.detach()
    tangent = ff.causal_conv(du, b) + ff.causal_conv(a, dw)
    for found in (
        torch.func.jvp(ff.causal_conv, (a, b), (du, dw))[1],
        torch.func.jvp(lambda a: ff.causal_conv(a, b), (a,), (du,))[1]
        + torch.func.jvp(lambda b: ff.causal_conv(a, b), (b,), (dw,))[1],
    ):
        assert torch.allclose(found, tangent)
    with forward_ad.dual_level():
        y = ff.causal_conv(forward_ad.make_dual(a, du), forward_ad.make_dual(b, dw))
        assert torch.allclose(forward_ad.unpack_dual(y).tangent, tangent)
    forward, backward = (
        kind(ff.causal_conv, (0, 1))(a, b) for kind in (torch.func.jacfwd, torch.func.jacrev)
    )
    for left, right in zip(forward, backward, strict=True):
        assert torch.allclose(left, right)
    torch.autograd.gradcheck(ff.causal_conv, (u, w), check_forward_ad=True)
    torch.autograd.gradgradcheck(ff.causal_conv, (u, w), check_fwd_over_rev=True)


def test_backward_of_a_bank_over_a_batch():
    u, w = pair((6, 1, 4), (8, 1), 64, 32)
    y = ff.causal_conv(u, w)
    grad = torch.randn_like(y)
    found = torch.autograd.grad(y, (u, w), grad)
    again = [torch.zeros_like(u), torch.zeros_like(w)]
    for i in range(6):
        for k in range(8):
            a, b = u[i : i + 1].detach().requires_grad_(), w[k : k + 1].detach().requires_grad_()
            parts = torch.autograd.grad(ff.causal_conv(a, b), (a, b), grad[i : i + 1, k : k + 1])
            again[0][i] += parts[0][0]
            again[1][k] += parts[1][0]
    for left, right in zip(found, again, strict=True):
        assert torch.allclose(left, right)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_to_one_graph():
    def model(u: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
        return ff.causal_conv(torch.tanh(u), filters) * 2

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for t in (8, 9, 15, 15):
        u, filters = pair((2, 3), (3,), t, 5)
        v, w = copy.deepcopy(u), copy.deepcopy(filters)
        y, z = compiled(u, filters), model(v, w)
        assert torch.allclose(y, z)
        y.pow(2).sum().backward()
        z.pow(2).sum().backward()
        assert torch.allclose(u.grad, v.grad) and torch.allclose(filters.grad, w.grad)


def test_autocast():
    u, filters = pair((2, 3), (3,), 30, 20, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        full = ff.causal_conv(u, filters)
        half = ff.causal_conv(u.bfloat16(), filters)
    assert full.dtype is torch.float32 and half.dtype is torch.bfloat16
    assert torch.equal(full, ff.causal_conv(u, filters))
    half.float().sum().backward()
    assert filters.grad.dtype is torch.float32


def test_a_filter_learns():
    torch.manual_seed(0)
    target, filters = torch.randn(3, 8), torch.zeros(3, 8, requires_grad=True)
    u = torch.randn(4, 3, 50)
    goal = ff.causal_conv(u, target)
    optimiser = torch.optim.Adam([filters], lr=0.1)
    for _ in range(200):
        optimiser.zero_grad()
        torch.nn.functional.mse_loss(ff.causal_conv(u, filters), goal).backward()
        optimiser.step()
    assert torch.allclose(filters.detach(), target, atol=0.05)


def test_workers_change_no_bit():
    u, filters = (x.detach() for x in pair((2, 8), (8,), 700, 300, torch.float32))
    y = ff.causal_conv(u, filters)
    for workers in (2, -1):
        oracle.assert_same_bits(ff.causal_conv(u, filters, workers=workers).numpy(), y.numpy())


def test_fake_and_meta_tensors():
    u, filters = torch.randn(2, 1, 3, 9, device="meta"), torch.randn(4, 1, 5, device="meta")
    assert ff.causal_conv(u, filters).shape == (2, 4, 3, 9)
    with FakeTensorMode():
        u = torch.randn(2, 1, 3, 9, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        filters = torch.randn(4, 1, 5, device="cuda", requires_grad=True)
        y = ff.causal_conv(u, filters)
        assert y.shape == (2, 4, 3, 9) and y.device.type == "cuda" and y.dtype is torch.bfloat16
        # The autograd engine itself wants a real device, so the gradients' operators are called directly.
        upper = torch.randn(y.shape, device="cuda")
        grad = autograd._input_grad(upper, filters, u, 1)
        assert grad.shape == u.shape and grad.dtype is torch.bfloat16 and grad.device.type == "cuda"
        grad = autograd._correlate(upper, u, (4, 1, 5), 1)
        assert grad.shape == filters.shape and grad.dtype is torch.float32 and grad.device.type == "cuda"
        assert causal_conv_fft(u.detach().float(), filters.detach(), 9).device.type == "cuda"
        assert filter_grad_fft(y.detach().float(), u.detach().float(), (4, 1, 5)).device.type == "cuda"


def test_errors():
    u, filters = torch.randn(2, 3, 9), torch.randn(3, 4)
    for bad in (u.int(), u.bool()):
        with pytest.raises(TypeError, match="u: expected float16"):
            ff.causal_conv(bad, filters)
    with pytest.raises(TypeError, match="filters"):
        ff.causal_conv(u, filters.numpy())
    with pytest.raises(ValueError, match="filters: expected device cpu, got meta"):
        ff.causal_conv(u, filters.to("meta"))
    with pytest.raises(ValueError, match=r"u: .*\(3,\).*\(2, 5\)"):
        ff.causal_conv(torch.randn(2, 5, 9), filters)
    with pytest.raises(ValueError, match="filters"):
        ff.causal_conv(u, filters[:, :0])
    with pytest.raises(ValueError, match="u"):
        ff.causal_conv(torch.tensor(1.0), filters)
    with pytest.raises(ValueError, match="workers"):
        ff.causal_conv(u, filters, workers=0)
    with pytest.raises(ValueError, match="w: "):
        ff.futurefill(u, filters[:, :0])


def test_no_positions_and_no_rows_have_gradients():
    for c, t in (((2, 3), 0), ((0, 3), 5)):
        u, filters = pair(c, (3,), t, 4)
        y = ff.causal_conv(u, filters)
        assert y.shape == (*c, t)
        y.sum().backward()
        assert torch.equal(filters.grad, torch.zeros_like(filters))


def test_futurefill_is_the_tail_of_the_whole_convolution():
    for t1, t2 in ((5, 4), (1, 6), (9, 2), (4, 1), (0, 3), (200, 60)):
        v, w = torch.randn(2, t1, dtype=torch.float64), torch.randn(2, t2, dtype=torch.float64)
        y = ff.futurefill(v, w)
        assert y.shape == (2, t2 - 1) and y.is_contiguous()
        for row in range(2):
            if t1:
                expected = np.convolve(v[row].numpy(), w[row].numpy())[t1 : t1 + t2 - 1]
                np.testing.assert_allclose(y[row].numpy(), expected, atol=1e-12)
            else:
                assert not y[row].any()


def test_fast_lengths():
    assert [fast_length(n) for n in (1, 2, 7, 11, 17, 97, 1025)] == [1, 2, 8, 12, 18, 100, 1080]
