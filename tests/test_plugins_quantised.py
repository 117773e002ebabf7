"""Weight quantisers find every linear layer, and every way through time uses what they made of it."""

from __future__ import annotations

import pytest
import torch
from models_common import error, inputs
from plugins_common import TOLERANCE, WITH_LINEAR, changed, compare, linears, make
from torch import nn

SCHEMES = ["int8", "int4"]


def quantise(module, scheme):
    quantization = pytest.importorskip("torchao.quantization")
    config = {
        "int8": quantization.Int8WeightOnlyConfig,
        "int4": lambda: quantization.IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=quantization.PerAxis(0)
        ),
    }[scheme]()
    quantization.quantize_(module, config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", WITH_LINEAR)
def test_torchao(name, scheme, dtype):
    module = make(name).to(dtype)
    x = inputs(module, 30, dtype=dtype)
    wide = dtype == torch.float32
    before = compare(module, x, tolerance=TOLERANCE if wide else 0.05)
    found = linears(module)
    quantise(module, scheme)
    assert found and all(type(part.weight) is not nn.Parameter for part in found.values())
    after = compare(module, x, tolerance=TOLERANCE if wide else 0.05)
    assert changed(after, before)
    # One row at a time: the short way of a step must know what it cannot view.
    compare(module, x[:1], tolerance=TOLERANCE if wide else 0.05, prompts=(3,))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_large_quantised_layers(scheme):
    """As wide as layers that a step of one row multiplies in halves."""
    import futurefill_rs as ff

    torch.manual_seed(0)
    module = ff.nn.HyenaOperator(256, 64).eval()
    x = torch.randn(1, 20, 256)
    compare(module, x, prompts=(10,))
    quantise(module, scheme)
    compare(module, x, prompts=(10,))


class _Int8(torch.Tensor):
    """A quantised weight that knows the linear layer and no view."""

    @staticmethod
    def __new__(cls, w):
        return torch.Tensor._make_wrapper_subclass(cls, w.shape, dtype=w.dtype, device=w.device)

    def __init__(self, w):
        self.scale = w.abs().amax(1, keepdim=True) / 127
        self.q = (w / self.scale).round().to(torch.int8)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.linear:
            x, w, *bias = args
            bias = bias[0] if bias else (kwargs or {}).get("bias")
            return torch.nn.functional.linear(x, w.q * w.scale, bias)
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{cls.__name__}: {func}")


@pytest.mark.parametrize("name", WITH_LINEAR)
def test_a_weight_that_knows_the_linear_layer_only(name):
    module = make(name)
    before = compare(module)
    for part in linears(module).values():
        part.weight = nn.Parameter(_Int8(part.weight.detach()), requires_grad=False)
    assert changed(compare(module), before)


@pytest.mark.filterwarnings("ignore:.*quantization.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*quantiz.*:UserWarning")
@pytest.mark.parametrize("name", WITH_LINEAR)
def test_quantize_dynamic(name):
    """torch's own. It rounds the features too, by the range of all that come in one call: a step's are finer
    than those of the whole, so that both agree as far as either agrees with the layers it replaced."""
    module = make(name)
    before = compare(module)
    found = linears(module)
    small = torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, dtype=torch.qint8)
    converted = [part for part in small.modules() if "quantized" in type(part).__module__]
    assert len([part for part in converted if hasattr(part, "in_features")]) == len(found)
    with torch.no_grad():
        after = small(inputs(module, 30))
    assert 1e-4 < error(after, before) < 1
    compare(small, tolerance=3 * error(after, before))


def test_bitsandbytes():
    bnb = pytest.importorskip("bitsandbytes")
    module = make("hyenadna")
    before = compare(module)
    for path, part in linears(module).items():
        new = bnb.nn.Linear4bit(part.in_features, part.out_features, part.bias is not None, torch.float32)
        new.load_state_dict(part.state_dict())
        module.set_submodule(path, new.to("cpu"))
    assert changed(compare(module), before)


def test_filters_that_come_from_quantised_networks_follow_them():
    """A second quantisation, of the network that draws the filter alone, after plans were made."""
    module = make("hyena")
    before = compare(module)
    quantise(module.filter_fn, "int4")
    assert changed(compare(module), before)
    assert type(module.in_proj.weight) is nn.Parameter
