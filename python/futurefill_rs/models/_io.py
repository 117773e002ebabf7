"""From a configuration and upstream's tensors to a module, with every mismatch named."""

from __future__ import annotations

import importlib
import json
import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from futurefill_rs.models._names import kind_of, plain_name

KINDS: dict[str, str] = {
    "flash_stu_lm": "futurefill_rs.models.flash_stu:build_flash_stu",
    "h3": "futurefill_rs.models._layers:build_h3",
    "hyena": "futurefill_rs.models._layers:build_hyena",
    "hyenadna_lm": "futurefill_rs.models.hyenadna:build_hyenadna",
    "long_conv": "futurefill_rs.models._layers:build_long_conv",
    "monarch_mixer": "futurefill_rs.models._layers:build_monarch_mixer",
    "stripedhyena1_lm": "futurefill_rs.models.striped_hyena:build_striped_hyena",
    "stripedhyena2_hcl": "futurefill_rs.models._layers:build_cascade",
    "stripedhyena2_hcm": "futurefill_rs.models._layers:build_cascade",
    "stripedhyena2_hcs": "futurefill_rs.models._layers:build_cascade",
    "stu": "futurefill_rs.models._layers:build_stu",
}
"""`kind` of a configuration: the function that makes the empty module and fits the tensors to it."""

Builder = Callable[[Mapping[str, Any], dict[str, Tensor]], nn.Module]


def build(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
    """The layer or model that `config` describes, with the tensors of `state` under upstream's own names.

    Args:
        config: upstream's configuration and `kind` (see `KINDS`), which a model's `model_type` or keys may
            tell as well; keys that mean nothing here are kept and ignored.
        state: upstream's `state_dict`. What training wrappers add to names is dropped. Parameters keep its
            dtypes.

    Raises:
        ValueError: an unknown kind; tensors that are missing, unexpected or of another shape, or that are one
            tensor in the module and come with different values, by name.
    """
    if not isinstance(config, Mapping):
        raise TypeError(f"config: expected a mapping, got {type(config).__name__}")
    kind = kind_of(config)
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"config: expected kind to be one of {', '.join(sorted(KINDS))}, got {kind!r}")
    module_name, function = KINDS[kind].split(":")
    builder: Builder = getattr(importlib.import_module(module_name), function)
    tensors = _plain(state, kind)
    try:
        module = builder({**config, "kind": kind}, tensors)
    except KeyError as error:
        raise ValueError(f"config: expected the key {error.args[0]!r} for kind {kind!r}") from None
    module.eval()
    return module


def _plain(state: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The tensors under the names that the module has for them."""
    tensors: dict[str, Tensor] = {}
    origins: dict[str, str] = {}
    for origin, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"state: expected a tensor for {origin}, got {type(tensor).__name__}")
        name = plain_name(origin, kind)
        if name in tensors and not _same(tensors[name], tensor):
            raise ValueError(
                f"state: expected one tensor for {name}, got different ones as {origins[name]} and {origin}"
            )
        tensors[name], origins[name] = tensor, origin
    return tensors


def fit(
    module: nn.Module,
    state: dict[str, Tensor],
    *,
    optional: tuple[str, ...] = (),
    ignored: Callable[[str], bool] = lambda name: False,
) -> None:
    """Give the module the tensors of `state` as they are, dtype included, or raise a `ValueError` with the
    names.

    A tensor with several names in the module (tied embeddings) may come under any of them, and must come with
    the same values under all it comes under.

    Args:
        optional: names that may be missing; the module's own values stay.
        ignored: names for which this is true may be in `state` without a place in the module.
    """
    expected = module.state_dict(keep_vars=True)
    groups: dict[int, list[str]] = {}
    for name, target in expected.items():
        groups.setdefault(id(target), []).append(name)
    missing, misshaped, different = [], [], []
    for names in groups.values():
        given = [name for name in names if name in state]
        if not given and not any(name in optional for name in names):
            missing += names
        wrong = [name for name in given if state[name].shape != expected[name].shape]
        misshaped += [
            f"{name} (expected {tuple(expected[name].shape)}, got {tuple(state[name].shape)})"
            for name in wrong
        ]
        if not wrong and any(not _same(state[name], state[given[0]]) for name in given[1:]):
            different.append(" and ".join(given))
    problems = {
        "missing": missing,
        "unexpected": [name for name in state if name not in expected and not ignored(name)],
        "misshaped": misshaped,
        "different values for the one tensor": different,
    }
    refuse_mismatch(type(module).__name__, problems)
    _assign(module, {name: state[name] for name in expected if name in state})


def refuse_mismatch(model: str, problems: Mapping[str, list[str]]) -> None:
    """Raise a `ValueError` with the names of tensors that do not fit, if there are any."""
    found = [f"{what} {', '.join(names)}" for what, names in problems.items() if names]
    if found:
        raise ValueError(f"state: expected the tensors of {model}, got {'; '.join(found)}")


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and torch.equal(a, b.to(a.device, a.dtype)))


def _assign(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy tensors in, each keeping its own floating dtype; shared parameters stay shared."""
    with torch.no_grad():
        targets: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
        targets.update(module.named_buffers(remove_duplicate=False))
        for name, tensor in state.items():
            target = targets[name]
            if target.dtype != tensor.dtype and tensor.is_floating_point():
                target.data = target.data.to(tensor.dtype)
            target.copy_(tensor)


def load(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> nn.Module:
    """The model saved in the folder `path`: `config.json`, upstream's own or with `kind`, and the tensors as
    `read_tensors` finds them (no code in them is ever run).

    Args:
        dtype: the precision to compute in. By default 16-bit tensors are widened to float32, which generates
            faster on a CPU; `torch.bfloat16` computes in bfloat16. Poles, residues and the filters that
            upstream keeps in float32 stay in it.
        device: where the model goes.
    """
    folder = Path(path)
    config = _json(folder / "config.json", "a folder with config.json")
    state = read_tensors(folder)
    if dtype is None:
        state = {name: _widened(tensor) for name, tensor in state.items()}
    module = build(config, state)
    if dtype is not None:
        _cast(module, dtype)
    if device is not None:
        module.to(device)
    return module


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    """The module in another precision, but for the parameters that a layer calls `exact`: these have 32 bits
    at least.
    """
    exact = [
        (layer, name, _widened(getattr(layer, name).detach()))
        for layer in module.modules()
        for name in getattr(layer, "exact", ())
    ]
    module.to(dtype)
    if dtype.itemsize < 4:
        for layer, name, tensor in exact:
            getattr(layer, name).data = tensor


def _json(file: Path, wanted: str) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"path: expected {wanted}, got {file.parent}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(content).__name__}")
    return content


TENSOR_FILES = ("model.safetensors", "pytorch_model.bin", "weights.ckpt", "model.pt")


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder: the first of `TENSOR_FILES` that is there, in one piece or in those
    that NAME.index.json tells.
    """
    for name in TENSOR_FILES:
        if (folder / name).is_file():
            return _read(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _read_pieces(index)
    raise FileNotFoundError(f"path: expected {' or '.join(TENSOR_FILES[:2])} in {folder}")


def _read_pieces(index: Path) -> dict[str, Tensor]:
    places = _json(index, "an index").get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{index}: expected weight_map to name a file for each tensor")
    state: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        file = index.parent / name
        if Path(name).name != name:
            raise ValueError(f"{index}: expected the names of files in its folder, got {name!r}")
        if not file.is_file():
            raise FileNotFoundError(f"path: expected {name} in {index.parent}, as {index.name} says")
        state.update(_read(file))
    return state


def _read(file: Path) -> dict[str, Tensor]:
    if file.suffix != ".safetensors":
        return _tensors_in(_unpickled(file), file)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file}: expected a safetensors file: {error}") from None


def _unpickled(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{file}: expected a torch file of nothing but tensors: {reason}") from None


NESTS = ("state_dict", "model_state_dict", "model", "module")
"""Where trainers put the tensors of a file that holds more."""


def _tensors_in(content: Any, file: Path) -> dict[str, Tensor]:
    while isinstance(content, Mapping):
        inner = [content[key] for key in NESTS if isinstance(content.get(key), Mapping)]
        if not inner:
            return {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
        content = inner[0]
    raise ValueError(f"{file}: expected a mapping of tensors, got {type(content).__name__}")
