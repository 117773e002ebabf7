"""Shared by the tests of what people put around layers: everything cached is compared with `forward`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import futurefill_rs as ff
import torch
from futurefill_rs import models
from models_common import LAYERS, MODELS, error, inputs, layer, stepped
from torch import Tensor, nn

ALL = [*LAYERS, *MODELS]

ONE_OF_EACH = [
    "causal_conv",
    "stu",
    "hyena",
    "long_conv",
    "h3",
    "monarch_mixer",
    "modal",
    "attention",
    "causal_attention",
]
"""The nine layers."""

LENGTH = 30

# Float32 rounding of a whole convolution, seen on a part of it.
TOLERANCE = 3e-5


def make(name: str, seed: int = 0) -> Any:
    """A small layer or model, with weights so large that each of them is seen in the output."""
    module = layer(name, seed)
    if name == "hyenadna":
        with torch.no_grad():
            for key, parameter in module.named_parameters():
                if parameter.ndim > 1 and "filter_fn" not in key:
                    parameter.mul_(4)
    return module


def has_linear(name: str) -> bool:
    return name in MODELS or name.startswith(
        ("hyena", "long_conv", "h3", "monarch", "attention", "causal_att")
    )


WITH_LINEAR = [name for name in ALL if has_linear(name)]
"""Modules with linear layers inside, which adapters and quantisers look for."""


def linears(module: nn.Module) -> dict[str, nn.Linear]:
    return {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}


def compare(
    module: Any,
    x: Tensor | None = None,
    *,
    forward: Callable[[Tensor], Tensor] | None = None,
    tolerance: float = TOLERANCE,
    prompts: tuple[int, ...] = (1, 7, 23),
) -> Tensor:
    """Raise unless `prefill` with `step` and `extend`, and `generate`, give what `forward` does.

    Args:
        module: has `prefill`, `step` and `extend`.
        x: inputs `(B, T, ..)`.
        forward: what is compared with; the module itself by default.

    Returns:
        the outputs `(B, T, ..)` of `forward`.
    """
    x = inputs(module, LENGTH) if x is None else x
    length = x.shape[1]
    with torch.no_grad():
        whole = (module if forward is None else forward)(x)
    for prompt in prompts:
        for max_new in (length - prompt, None):
            got, cache = module.prefill(x[:, :prompt], max_new)
            steps = stepped(module, x[:, : prompt + 4], cache, prompt)
            rest = module.extend(x[:, prompt + 4 :], cache)
            wrong = error(torch.cat([got, steps, rest], 1), whole)
            assert wrong < tolerance, f"prompt {prompt}, max_new {max_new}: off by {wrong:.1e}"
    if isinstance(module, models.LanguageModel):
        compare_generated(module, x[:, :3], forward=forward, tolerance=tolerance)
    return whole


def compare_generated(
    model: Any,
    prompt: Tensor,
    *,
    forward: Callable[[Tensor], Tensor] | None = None,
    tolerance: float = TOLERANCE,
) -> None:
    """Raise unless each new id is the likeliest one by `forward`, up to rounding."""
    ids = ff.generate(model, prompt, 9)
    with torch.no_grad():
        logits = (model if forward is None else forward)(ids[:, :-1])[:, prompt.shape[1] - 1 :]
    taken = logits.gather(-1, ids[:, prompt.shape[1] :].unsqueeze(-1)).squeeze(-1)
    best = logits[..., : model.config["vocab_size"]].amax(-1)
    assert bool((best - taken <= tolerance * logits.abs().amax()).all())


def changed(got: Tensor, old: Tensor) -> bool:
    """Whether a plug-in has an effect, as it must where nothing is ignored."""
    return error(got, old) > 1e-3


def train_a_step(module: nn.Module, x: Tensor, rate: float = 0.05) -> None:
    """One step of gradient descent; raises unless every parameter that wants a gradient has one."""
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    for parameter in parameters.values():
        parameter.grad = None
    module(x).square().mean().backward()
    missing = [name for name, p in parameters.items() if p.grad is None]
    assert not missing, missing
    with torch.no_grad():
        for parameter in parameters.values():
            parameter -= rate * parameter.grad / (parameter.grad.norm() + 1e-9)


def weights(module: nn.Module, least_ndim: int = 2, tied: bool = True) -> Iterator[tuple[nn.Module, str]]:
    """The owner and the name of every parameter of at least so many axes, a tied one once or not at all."""
    owners: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.ndim >= least_ndim:
                owners.setdefault(parameter, []).append((part, name))
    return (places[0] for places in owners.values() if tied or len(places) == 1)


def blocks(module: nn.Module) -> list[nn.Module]:
    """The blocks of a model, whose features later blocks read; of a layer, itself."""
    for part in module.modules():
        if isinstance(part, nn.ModuleList) and part:
            return list(part)
    return [module]
