"""Where weights are kept: on no device, in main memory, on disk, in shards. Right, or refused by name."""

from __future__ import annotations

import pytest
import torch
from models_common import MODELS, error, inputs
from plugins_common import ALL, LENGTH, TOLERANCE, blocks, changed, compare, make


def plan_of_blocks(module, *places):
    """A device map with the blocks of a model in turn on `places`, and what is beside them on the first."""
    paths = {part: path for path, part in module.named_modules()}
    plan = {paths[block]: places[i % len(places)] for i, block in enumerate(blocks(module))}
    parents = {path.rpartition(".")[0] for path in plan}  # the list of blocks
    for path, part in module.named_modules():
        inside = any(path == other or path.startswith(f"{other}.") for other in plan)
        around = any(other.startswith(f"{path}.") or not path for other in [*plan, *parents])
        own = list(part.named_parameters(recurse=False)) + list(part.named_buffers(recurse=False))
        if path and not inside and not around:
            plan[path] = places[0]
        elif around:
            plan |= {f"{path}.{name}".lstrip("."): places[0] for name, _ in own}
    return plan


@pytest.mark.parametrize("name", ALL)
def test_cpu_offload(name):
    accelerate = pytest.importorskip("accelerate")
    module = make(name)
    before = compare(module)
    accelerate.cpu_offload(module, execution_device=torch.device("cpu"))
    assert {parameter.device.type for parameter in module.parameters()} == {"meta"}
    assert error(compare(module), before) < TOLERANCE
    # Each time anew: other weights in the place of those that were offloaded.
    accelerate.hooks.remove_hook_from_submodules(module)
    assert error(compare(module), before) < TOLERANCE


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_disk_offload(name, buffers, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    module = make(name)
    before = compare(module)
    accelerate.disk_offload(module, tmp_path, execution_device=torch.device("cpu"), offload_buffers=buffers)
    assert error(compare(module), before) < TOLERANCE


# accelerate's, of a buffer that belongs to the whole model.
BUFFERS = pytest.mark.filterwarnings("ignore:The following device_map keys do not match:UserWarning")


@BUFFERS
@pytest.mark.parametrize("places", [("cpu",), ("cpu", "disk")], ids="+".join)
@pytest.mark.parametrize("name", MODELS)
def test_device_map(name, places, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    module = make(name)
    before = compare(module)
    plan = plan_of_blocks(module, *places)
    accelerate.dispatch_model(module, plan, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    if "disk" in places:
        assert "meta" in {parameter.device.type for parameter in module.parameters()}
    assert error(compare(module), before) < TOLERANCE


@pytest.mark.parametrize("name", ALL)
def test_made_on_no_device_and_filled_later(name):
    """Nothing but parameters and buffers carries values: what a checkpoint holds is all there is."""
    reference = make(name)
    with torch.device("meta"):
        module = make(name)
        x = inputs(reference, LENGTH) if name in MODELS else torch.empty(2, LENGTH, reference.width)
    assert {tensor.device.type for tensor in module.state_dict().values()} == {"meta"}
    y = module(x.to("meta"))
    assert y.device.type == "meta" and y.shape == reference(inputs(reference, LENGTH)).shape
    module.to_empty(device="cpu")
    module.load_state_dict(reference.state_dict())
    assert error(compare(module.eval()), compare(reference)) < TOLERANCE
    with torch.device("meta"):
        module = make(name)
    module.load_state_dict(reference.state_dict(), assign=True)
    assert error(compare(module.eval()), compare(reference)) < TOLERANCE


@pytest.mark.parametrize("name", ALL)
def test_prompts_on_no_device_are_refused_or_have_shapes(name):
    """Never garbage: a cache of a module without values is an error that says so, or has none either."""
    with torch.device("meta"):
        module = make(name)
    x = inputs(make(name), LENGTH).to("meta")
    try:
        y, cache = module.prefill(x[:, :5], 10)
        step = module.step(x[:, 5], cache)
    except (TypeError, ValueError, NotImplementedError) as refusal:
        assert "meta" in str(refusal)
    else:
        assert y.device.type == step.device.type == "meta"
        assert y.shape[:2] == (2, 5) and step.shape == (2, *y.shape[2:])


HUGGING_FACE = ["FlashSTU", "HyenaDNA", "StripedHyena", "StripedHyena2"]


@BUFFERS
@pytest.mark.parametrize("where", ["device_map", "cpu_offload", "disk"])
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face_models(name, where, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    from test_plugins_adapters import generated, hugging_face

    model = hugging_face(name)
    ids = torch.randint(7, 11, (2, 9))
    with torch.no_grad():
        want, text = model(ids, use_cache=False).logits, generated(model, ids)
        if where == "cpu_offload":
            accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        else:
            model.save_pretrained(tmp_path / "saved")
            places = {"device_map": ("cpu",), "disk": ("cpu", "disk")}[where]
            plan = plan_of_blocks(model, *places) if where == "disk" else {"": "cpu"}
            options = {"device_map": plan, "offload_folder": str(tmp_path / "offload")}
            model = type(model).from_pretrained(tmp_path / "saved", **options).eval()
        assert error(model(ids, use_cache=False).logits, want) < TOLERANCE
        assert torch.equal(generated(model, ids), text)
        assert not changed(model(ids, use_cache=True).logits, want)
