"""Writing a layer or a model as a folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor


def save(config: Mapping[str, Any], state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write `config.json` and `model.safetensors` into the folder `path`, made if need be.

    Each file is there whole or as it was before: a folder may be the one that the tensors are mapped from.
    """
    from safetensors.torch import save_file

    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2, default=_plain) + "\n"
    # safetensors refuses tensors that share memory, which tied weights do.
    tensors, storages = {}, set()
    for name, tensor in state.items():
        tensor = tensor.detach().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    _replace(folder / "model.safetensors", lambda file: save_file(tensors, file, metadata={"format": "pt"}))
    _replace(folder / "config.json", lambda file: file.write_text(text, encoding="utf-8"))


def _replace(file: Path, write: Callable[[Path], object]) -> None:
    new = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        write(new)
        new.replace(file)
    finally:
        new.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    """A value that JSON has no form for: a number of numpy's as a number, a dtype and others by name."""
    return value.item() if hasattr(value, "item") else str(value)
