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

WRAPPERS = ("module.", "_orig_mod.", "model.", "net.", "_forward_module.", "state_dict.")
"""Prefixes that training wrappers put before every key."""

Builder = Callable[[Mapping[str, Any], dict[str, Tensor]], nn.Module]


def build(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
    """The layer or model that `config` describes, with the tensors of `state` under upstream's own names.

    Args:
        config: upstream's configuration and `kind` (see `KINDS`); keys that mean nothing here are kept and
            ignored.
        state: upstream's `state_dict`. Wrapper prefixes common to all keys are dropped. Parameters keep its
            dtypes.

    Raises:
        ValueError: an unknown kind; tensors that are missing, unexpected or of another shape, by name.
    """
    if not isinstance(config, Mapping):
        raise TypeError(f"config: expected a mapping, got {type(config).__name__}")
    kind = config.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"config: expected kind to be one of {', '.join(sorted(KINDS))}, got {kind!r}")
    module_name, function = KINDS[kind].split(":")
    builder: Builder = getattr(importlib.import_module(module_name), function)
    tensors = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"state: expected a tensor for {name}, got {type(tensor).__name__}")
        tensors[name] = tensor
    try:
        module = builder(config, tensors)
    except KeyError as error:
        raise ValueError(f"config: expected the key {error.args[0]!r} for kind {kind!r}") from None
    module.eval()
    return module


def fit(
    module: nn.Module,
    state: dict[str, Tensor],
    *,
    optional: tuple[str, ...] = (),
    ignored: Callable[[str], bool] = lambda name: False,
) -> None:
    """Give the module the tensors of `state` as they are, dtype included, or raise a `ValueError` with the
    names.

    Args:
        optional: names that may be missing; the module's own values stay.
        ignored: names for which this is true may be in `state` without a place in the module.
    """
    expected = module.state_dict()
    state = _unwrap(state, expected)
    missing = [name for name in expected if name not in state and name not in optional]
    unexpected = [name for name in state if name not in expected and not ignored(name)]
    misshaped = [
        f"{name} (expected {tuple(expected[name].shape)}, got {tuple(state[name].shape)})"
        for name in expected
        if name in state and expected[name].shape != state[name].shape
    ]
    problems = [
        f"{what} {', '.join(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("misshaped", misshaped))
        if names
    ]
    if problems:
        raise ValueError(f"state: expected the tensors of {type(module).__name__}, got {'; '.join(problems)}")
    _assign(module, {name: state[name] for name in expected if name in state})


def _unwrap(state: dict[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    while not any(name in expected for name in state):
        for prefix in WRAPPERS:
            if state and all(name.startswith(prefix) for name in state):
                state = {name[len(prefix) :]: tensor for name, tensor in state.items()}
                break
        else:
            return state
    return state


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
    """The model saved in the folder `path`: `config.json` with `kind`, and `model.safetensors` or
    `pytorch_model.bin` (read with `weights_only=True`: no code in it is ever run).

    Args:
        dtype: the precision to compute in. By default 16-bit tensors are widened to float32, which generates
            faster on a CPU; `torch.bfloat16` computes in bfloat16.
        device: where the model goes.
    """
    folder = Path(path)
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"path: expected a folder with config.json, got {folder}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON: {error}") from None
    state = read_tensors(folder)
    if dtype is None:
        state = {
            name: tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
            for name, tensor in state.items()
        }
    module = build(config, state)
    if dtype is not None:
        module.to(dtype)
    if device is not None:
        module.to(device)
    return module


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder."""
    safe = folder / "model.safetensors"
    if safe.is_file():
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(safe)
        except SafetensorError as error:
            raise ValueError(f"{safe}: expected a safetensors file: {error}") from None
    for name in ("pytorch_model.bin", "weights.ckpt", "model.pt"):
        if (folder / name).is_file():
            return _tensors_in(_unpickled(folder / name), folder / name)
    raise FileNotFoundError(f"path: expected model.safetensors or pytorch_model.bin in {folder}")


def _unpickled(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{file}: expected a torch file of nothing but tensors: {reason}") from None


def _tensors_in(content: Any, file: Path) -> dict[str, Tensor]:
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise ValueError(f"{file}: expected a mapping of tensors, got {type(content).__name__}")
    return {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
