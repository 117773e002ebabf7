"""From a configuration and upstream's tensors to a module, with every mismatch named."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from futurefill_rs._torch_args import FLOATS
from futurefill_rs.models._files import read_config, read_mapping, read_tensors
from futurefill_rs.models._names import is_skipped, kind_of, plain_name, shown
from futurefill_rs.models._settings import Held, brief, check
from futurefill_rs.nn.cascade import HyenaCascade
from futurefill_rs.nn.layer import Layer

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
    "stripedhyena2_lm": "futurefill_rs.models.striped_hyena_2:build_striped_hyena_2",
    "stu": "futurefill_rs.models._layers:build_stu",
}
"""`kind` of a configuration: the function that makes the empty module and fits the tensors to it."""

NARROW = frozenset({"stripedhyena2_lm"})
"""Kinds whose 16-bit weights `load` does not widen: most of these models would not fit otherwise."""

MAPPED_BYTES = 1 << 30
"""Weights from which on a module keeps them in the memory of the file that they were loaded from."""

NAMED = 20
"""Names of a sort that one error repeats."""


class State(dict[str, Tensor]):
    """Tensors under the names that a module has for them.

    Attributes:
        beside: what an FP8 library saved beside them, by its own names.
    """

    beside: dict[str, object]


Builder = Callable[[Mapping[str, Any], State], Layer]
Made = TypeVar("Made", bound=Layer)


def build(config: Mapping[str, Any] | str | os.PathLike[str], state: Mapping[str, Tensor]) -> nn.Module:
    """The layer or model that `config` describes, with copies of the tensors of `state` under upstream's own
    names.

    Args:
        config: upstream's configuration and `kind` (see `KINDS`), which a model's `model_type` or keys may
            tell as well; keys that mean nothing here are kept and ignored. Or the path of a file of JSON or
            YAML that has it.
        state: upstream's `state_dict`. What training wrappers add to names is dropped, and so is what FP8
            libraries save beside the weights. Parameters keep its dtypes and devices.

    Raises:
        ValueError: an unknown kind; a setting of another type, or of a size that no tensor has, by key;
            tensors that are missing, unexpected, of another shape or of no floating-point dtype, or that are
            one tensor in the module and come with different values, by name.
    """
    if isinstance(config, str | os.PathLike):
        config = read_mapping(Path(config))
    if not isinstance(config, Mapping):
        raise TypeError(f"config: expected a mapping, got {type(config).__name__}")
    if not isinstance(state, Mapping):
        raise TypeError(f"state: expected a mapping of tensors, got {type(state).__name__}")
    module = _made(config, state)
    convert(module, lambda tensor, exact: tensor.clone(memory_format=torch.contiguous_format))
    return module


def _made(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Layer:
    """The module with the tensors of `state` themselves."""
    kind = kind_of(config)
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"config: expected kind to be one of {', '.join(sorted(KINDS))}, got {brief(kind)}")
    module_name, function = KINDS[kind].split(":")
    builder: Builder = getattr(importlib.import_module(module_name), function)
    tensors = _plain(state, kind)
    check(config, kind, Held.by(tensors))
    config = {**config, "kind": kind}
    try:
        module = builder(config, tensors)
    except KeyError as error:
        raise ValueError(f"config: expected the key {error.args[0]!r} for kind {kind!r}") from None
    if not hasattr(module, "config"):
        module.config = config
    module.eval()
    return module


def _plain(state: Mapping[str, Tensor], kind: str) -> State:
    """The tensors under the names that the module has for them."""
    tensors = State()
    tensors.beside = {}
    origins: dict[str, str] = {}
    for origin, tensor in state.items():
        if not isinstance(origin, str):
            raise TypeError(f"state: expected names of tensors, got {brief(origin)}")
        if is_skipped(origin):
            tensors.beside[origin] = tensor
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"state: expected a tensor for {shown(origin)}, got {type(tensor).__name__}")
        name = plain_name(origin, kind)
        if name in tensors and not same(tensors[name], tensor):
            raise ValueError(
                f"state: expected one tensor for {shown(name)}, "
                f"got different ones as {shown(origins[name])} and {shown(origin)}"
            )
        tensors[name], origins[name] = tensor, origin
    return tensors


def fit(
    make: Callable[[], Made],
    state: dict[str, Tensor],
    *,
    computed: Mapping[str, Callable[[], Tensor]] | None = None,
    ignored: Callable[[str], bool] = lambda name: False,
) -> Made:
    """The module that `make` gives, with the tensors of `state` as they are in place of its own.

    It is made without memory for its tensors. A tensor with several names in it (tied embeddings) may come
    under any of them, and must come with the same values under all it comes under.

    Args:
        computed: names that may be missing, and what computes them.
        ignored: names for which this is true may be in `state` without a place in the module.

    Raises:
        ValueError: the names of tensors that do not fit.
    """
    computed = computed or {}
    try:
        with torch.device("meta"):
            module = make()
    except (RuntimeError, OverflowError) as error:
        raise ValueError(
            f"config: expected sizes that tensors can have: {shown(str(error).partition(chr(10))[0])}"
        ) from None
    expected = module.state_dict(keep_vars=True)
    groups: dict[int, list[str]] = {}
    for name, target in expected.items():
        groups.setdefault(id(target), []).append(name)
    missing, misshaped, mistyped, different = [], [], [], []
    values: dict[int, Tensor] = {}
    for key, names in groups.items():
        given = [name for name in names if name in state]
        wrong = [name for name in given if state[name].shape != expected[name].shape]
        misshaped += [
            f"{name} (expected {tuple(expected[name].shape)}, got {brief(tuple(state[name].shape))})"
            for name in wrong
        ]
        mistyped += [
            f"{name} ({state[name].dtype}, {state[name].layout})"
            for name in given
            if not _plain_floats(state[name])
        ]
        if not given and not any(name in computed for name in names):
            missing += names
        elif given and not wrong:
            values[key] = state[given[0]]
            if any(not same(state[name], state[given[0]]) for name in given[1:]):
                different.append(" and ".join(given))
    problems = {
        "missing": missing,
        "unexpected": [shown(name) for name in state if name not in expected and not ignored(name)],
        "misshaped": misshaped,
        "other than floating-point numbers of 16, 32 or 64 bits": mistyped,
        "different values for the one tensor": different,
    }
    refuse_mismatch(type(module).__name__, problems)
    for name in computed:
        if id(expected[name]) not in values:
            values[id(expected[name])] = computed[name]()
    _replace(module, values)
    return module


def refuse_mismatch(model: str, problems: Mapping[str, list[str]]) -> None:
    """Raise a `ValueError` with the names of tensors that do not fit, if there are any."""
    found = [f"{what} {_some(names)}" for what, names in problems.items() if names]
    if found:
        raise ValueError(f"state: expected the tensors of {model}, got {'; '.join(found)}")


def _some(names: list[str]) -> str:
    rest = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {rest} more" if rest > 0 else "")


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same shape and the same values, whatever their precision and device."""
    if a is b:
        return True
    comparable = a.shape == b.shape and (a.dtype == b.dtype or (_plain_floats(a) and _plain_floats(b)))
    return comparable and a.layout == b.layout and torch.equal(a, b.to(a.device, a.dtype))


def _plain_floats(tensor: Tensor) -> bool:
    return tensor.dtype in FLOATS and tensor.layout == torch.strided


def _replace(module: nn.Module, values: Mapping[int, Tensor]) -> None:
    """Put tensors in the place of the module's own, by the id of these; shared parameters stay shared."""
    made: dict[int, Any] = {}
    for owner in module.modules():
        kept: tuple[dict[str, Any], ...] = (owner._parameters, owner._buffers)
        for own in kept:
            for name, old in own.items():
                if old is None or id(old) not in values:
                    continue
                new = made.get(id(old))
                if new is None:
                    new = values[id(old)].detach()
                    if isinstance(old, nn.Parameter):
                        new = nn.Parameter(new, old.requires_grad)
                    made[id(old)] = new
                own[name] = new


def convert(module: nn.Module, change: Callable[[Tensor, bool], Tensor]) -> None:
    """Replace each tensor by `change(tensor, exact)`, where `exact` are those that upstream keeps in float32
    whatever the others are.
    """
    exact = {
        id(getattr(layer, name))
        for layer in module.modules()
        if isinstance(layer, HyenaCascade)
        for name in layer.exact
    }
    tensors = [*module.parameters(), *module.buffers()]
    # One by one: what is replaced is let go before the next one is made.
    for tensor in tensors:
        new = change(tensor.detach(), id(tensor) in exact)
        if isinstance(tensor, nn.Parameter):
            tensor.data = new
        else:
            _replace(module, {id(tensor): new})


def load(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> nn.Module:
    """The layer or model saved in the folder `path`: a configuration, upstream's own or with `kind`, in JSON
    or YAML, and the tensors as `read_tensors` finds them (no code in them is ever run).

    Large weights that stay as they are stay in the memory of the file, which must not change then.

    Args:
        dtype: the precision to compute in. By default 16-bit tensors are widened to float32, which generates
            faster on a CPU, but those of `stripedhyena2_lm`; `torch.bfloat16` computes in bfloat16. Poles,
            residues and the filters that upstream keeps in float32 are in it whatever the others are.
        device: where the model goes; by default torch's default device.
        settings: settings in place of the configuration's.
    """
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(f"dtype: expected one of {', '.join(map(str, FLOATS))}, got {brief(dtype)}")
    folder = Path(path)
    config = {**read_config(folder), **(settings or {})}
    state = read_tensors(folder)
    device = torch.get_default_device() if device is None else torch.device(device)
    module = _made(config, state)
    del state
    widened = dtype is None and kind_of(getattr(module, "config", {})) not in NARROW
    large = sum(tensor.nbytes for tensor in module.state_dict().values()) >= MAPPED_BYTES

    def placed(tensor: Tensor, exact: bool) -> Tensor:
        wanted = dtype or tensor.dtype
        if wanted.itemsize < 4 and (exact or widened):
            wanted = torch.float32
        moved = tensor.to(device, wanted).contiguous()
        return moved if large or moved is not tensor else moved.clone()

    convert(module, placed)
    return module
