"""Models as the commands take them: from a folder, onto a device, with their progress."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from futurefill_rs.cli.terminal import CommandError
from futurefill_rs.data import BUILTIN


def load(command: str, name: str, device_name: str) -> Any:
    """The language model that `--model` and `--device` say."""
    try:
        import torch
    except ImportError:
        raise CommandError(
            f"{command}: needs torch: install the extra with  pip install 'futurefill_rs[torch]'"
        ) from None
    from futurefill_rs import models

    device = torch.device(device_name)
    _check_device(command, device)
    folder = BUILTIN if name == "builtin" else Path(name)
    if name == "builtin" and not (folder / "config.json").is_file():
        raise CommandError(
            f"{command}: --model builtin: this installation was built without the built-in model"
        )
    try:
        model = models.load(folder)
    except (OSError, ValueError, ImportError) as error:
        raise CommandError(f"{command}: --model {name}: {error}") from None
    if not isinstance(model, models.LanguageModel):
        raise CommandError(
            f"{command}: --model {name}: expected a language model, got {type(model).__name__}"
        )
    return model.to(device)


def _check_device(command: str, device: Any) -> None:
    import torch

    if device.type == "cuda":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            present = torch.cuda.is_available()
        if not present:
            raise CommandError(f"{command}: --device cuda: torch finds no CUDA device")


@contextlib.contextmanager
def counting(model: Any, progress: Callable[[float], None]) -> Iterator[None]:
    """Calls `progress` with the positions that have been through the model: a block's share of each."""
    from torch import nn

    blocks = next((module for module in model.modules() if isinstance(module, nn.ModuleList)), ())
    done = 0

    def count(block: nn.Module, arguments: tuple[Any, ...], output: object) -> None:
        nonlocal done
        done += arguments[0].shape[:2].numel()
        progress(done / len(blocks))

    handles = [block.register_forward_hook(count) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
