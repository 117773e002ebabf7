"""The files of a checkpoint folder: its configuration and its tensors. No code in them is ever run."""

from __future__ import annotations

import bisect
import importlib
import io
import itertools
import json
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from futurefill_rs.models._names import is_skipped, shown

CONFIG_BYTES = 16 << 20
"""A configuration is never this long."""

TENSOR_FILES = ("model.safetensors", "pytorch_model.bin", "weights.ckpt", "model.pt")
NESTS = ("state_dict", "model_state_dict", "model", "module")
"""Where trainers put the tensors of a file that holds more."""


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json`, or the folder's one YAML file."""
    if (folder / "config.json").is_file():
        return read_mapping(folder / "config.json")
    found = sorted([*folder.glob("*.yml"), *folder.glob("*.yaml")])
    if len(found) > 1:
        raise ValueError(f"path: expected one configuration in {folder}, got {_listed(found)}")
    if not found:
        raise FileNotFoundError(f"path: expected a folder with config.json, got {folder}")
    return read_mapping(found[0])


def read_mapping(file: Path) -> dict[str, Any]:
    """The mapping in a file of JSON or, by its suffix, YAML."""
    syntax = "YAML" if file.suffix in (".yml", ".yaml") else "JSON"
    if file.stat().st_size > CONFIG_BYTES:
        raise ValueError(f"{file}: expected at most {CONFIG_BYTES} bytes of {syntax}")
    try:
        text = file.read_text(encoding="utf-8")
        content = _yaml(text) if syntax == "YAML" else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: expected {syntax}: {_one_line(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a {syntax} object, got {type(content).__name__}")
    return content


def _yaml(text: str) -> Any:
    try:
        yaml: Any = importlib.import_module("yaml")
    except ImportError:
        raise ImportError(
            "a configuration in YAML needs PyYAML: install the extra with  pip install 'futurefill_rs[evo2]'"
        ) from None

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        def compose_node(self, parent: Any, index: Any) -> Any:
            # One anchor can hold itself, and a few can stand for a number of nodes without bound.
            if self.check_event(yaml.AliasEvent):
                raise ValueError("an alias, which configurations have no use for")
            return super().compose_node(parent, index)

    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder, in memory shared with its files where these can be mapped.

    They are in the first of `TENSOR_FILES` that is there, in one piece or in those that NAME.index.json
    tells; otherwise in the only NAME.pt, in one piece or cut into NAME.pt.part0, NAME.pt.part1 and so on.
    """
    for name in TENSOR_FILES:
        if (folder / name).is_file():
            return _read(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _read_indexed(index)
    found = sorted({*folder.glob("*.pt"), *(part.with_suffix("") for part in folder.glob("*.pt.part0"))})
    if len(found) > 1:
        raise ValueError(f"path: expected one checkpoint in {folder}, got {_listed(found)}")
    if not found:
        raise FileNotFoundError(f"path: expected {' or '.join(TENSOR_FILES[:2])} in {folder}")
    return _read(found[0]) if found[0].is_file() else _read_cut(found[0])


def _read_indexed(index: Path) -> dict[str, Tensor]:
    places = read_mapping(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{index}: expected weight_map to name a file for each tensor")
    state: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name:
            raise ValueError(f"{index}: expected the names of files in its folder, got {shown(name)}")
        if not (index.parent / name).is_file():
            raise FileNotFoundError(f"path: expected {shown(name)} in {index.parent}, as {index.name} says")
        state.update(_read(index.parent / name))
    return state


def _read(file: Path) -> dict[str, Tensor]:
    if file.suffix != ".safetensors":
        return _read_torch(file, file)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    # A dtype that torch or this version of safetensors does not know is a KeyError or an AttributeError.
    except (SafetensorError, KeyError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{file}: expected a safetensors file: {_one_line(error)}") from None


def _read_cut(file: Path) -> dict[str, Tensor]:
    """The tensors of a file that is there in pieces, whose bytes follow one another."""
    numbers = {part.suffix.removeprefix(".part") for part in file.parent.glob(f"{file.name}.part*")}
    parts = [file.with_name(f"{file.name}.part{i}") for i in range(len(numbers))]
    for part in parts:
        if not part.is_file():
            raise FileNotFoundError(f"path: expected {part.name} in {file.parent}, as it has other parts")
    with Joined(parts) as source:
        return _read_torch(source, file)


class Joined(io.RawIOBase):
    """Files read one after another, as if they were one."""

    def __init__(self, parts: Iterable[Path]) -> None:
        self._files = [part.open("rb", buffering=0) for part in parts]
        self._ends = list(itertools.accumulate(file.seek(0, io.SEEK_END) for file in self._files))
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._ends[-1]}[whence]
        if base + offset < 0:
            raise ValueError(f"offset: expected a position from 0, got {base + offset}")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        read = 0
        while read < len(view) and self._position < self._ends[-1]:
            i = bisect.bisect_right(self._ends, self._position)
            end = self._ends[i]
            self._files[i].seek(self._position - end, io.SEEK_END)
            some = self._files[i].readinto(view[read : read + end - self._position])
            if not some:
                break
            read, self._position = read + some, self._position + some
        return read

    def close(self) -> None:
        for file in self._files:
            file.close()
        super().close()


def _read_torch(source: Path | Joined, file: Path) -> dict[str, Tensor]:
    """The tensors that torch saved in `source`; errors call it `file`."""
    try:
        stored = _stored(source)
        # What FP8 libraries save beside the weights may be a BytesIO, which does nothing when it is loaded.
        with torch.serialization.safe_globals([io.BytesIO]):
            mapped = stored and isinstance(source, Path)
            content = torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)  # type: ignore[arg-type]
        return _tensors_in(content)
    except PermissionError:
        raise
    # A damaged pickle may raise anything.
    except Exception as error:
        reason = _one_line(error)
        raise ValueError(
            f"{file}: expected a torch file of nothing but tensors, read with weights_only: {reason}"
        ) from None


def _stored(source: Path | Joined) -> bool:
    """Whether this is the archive of today's torch; raise if what is in it is compressed, or there twice."""
    if not zipfile.is_zipfile(source):
        if isinstance(source, Joined):
            source.seek(0)
        return False
    with zipfile.ZipFile(source) as archive:
        entries = archive.infolist()
    size = source.stat().st_size if isinstance(source, Path) else source.seek(0, io.SEEK_END)
    stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    if not stored or sum(entry.file_size for entry in entries) > size:
        raise ValueError("the archive is compressed, or its entries overlap")
    if isinstance(source, Joined):
        source.seek(0)
    return True


def _tensors_in(content: Any) -> dict[str, Tensor]:
    for _ in range(2 * len(NESTS)):
        if not isinstance(content, Mapping):
            raise ValueError(f"expected a mapping of tensors, got {type(content).__name__}")
        inner = [content[key] for key in NESTS if isinstance(content.get(key), Mapping)]
        if not inner:
            _refuse_inflated({name: value for name, value in content.items() if isinstance(value, Tensor)})
            return {
                name: value
                for name, value in content.items()
                if isinstance(value, Tensor) or is_skipped(name)
            }
        content = inner[0]
    raise ValueError("expected a mapping of tensors, got mappings within each other")


def _refuse_inflated(state: Mapping[str, Tensor]) -> None:
    """Raise if the tensors would take much more memory each for itself than they do in the file.

    A stride of zero makes a tensor of any size out of one number. Names of one tensor count once, and one
    for all beside its parts may be there too.
    """
    plain = {name: tensor for name, tensor in state.items() if tensor.layout == torch.strided}
    storages = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in plain.values()
    }
    views = {
        (
            tensor.untyped_storage()._cdata,
            tensor.storage_offset(),
            tensor.shape,
            tensor.stride(),
        ): tensor.nbytes
        for tensor in plain.values()
    }
    if sum(views.values()) > 2 * sum(storages.values()):
        largest = max(plain, key=lambda name: plain[name].nbytes)
        raise ValueError(
            f"expected tensors with values of their own, got shared ones, as in {shown(largest)}"
        )


def _one_line(error: BaseException) -> str:
    """The reason in an error of torch or of a parser, without advice."""
    text = str(error).partition("WeightsUnpickler error:")[2] or str(error)
    lines = text.strip().splitlines()
    reason = lines[0].partition(". Please")[0] if lines else ""
    return shown(reason) or type(error).__name__


def _listed(files: Iterable[Path]) -> str:
    return ", ".join(shown(file.name) for file in files)
