"""One fixture for every library and engine that the streaming API serves."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import futurefill_rs as ff
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

# Many small tests on few cores: threads of torch cost more than they give.
torch.set_num_threads(1)

settings.register_profile(
    "futurefill",
    deadline=None,
    derandomize=True,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("futurefill")


@dataclass(frozen=True)
class Library:
    """An array library with one of the engines behind it; tests speak numpy to it."""

    name: str
    device: str | None = None
    engine: str | None = None

    @property
    def is_torch(self) -> bool:
        return self.device is not None

    @property
    def dtypes(self) -> tuple[str, ...]:
        wide = ("float32", "float64")
        return (*wide, "bfloat16", "float16") if self.is_torch else wide

    def dtype(self, name: str) -> Any:
        return getattr(torch, name) if self.is_torch else np.dtype(name)

    def array(self, values: Any, dtype: str | None = None) -> Any:
        """An array of this library; dtype default: the values' own."""
        values = np.asarray(values)
        if not self.is_torch:
            return values.astype(dtype or values.dtype)
        return torch.tensor(values, dtype=None if dtype is None else self.dtype(dtype), device=self.device)

    def numpy(self, array: Any) -> np.ndarray:
        """Back to numpy: half precisions as float32."""
        if not self.is_torch:
            assert isinstance(array, np.ndarray)
            return array
        assert isinstance(array, torch.Tensor) and not array.requires_grad
        array = array.cpu()
        half = array.dtype in (torch.float16, torch.bfloat16)
        return (array.float() if half else array).numpy()

    def plan(self, filters: Any, *args: Any, dtype: str | None = None, **options: Any) -> Any:
        return ff.plan(self.array(filters, dtype), *args, engine=self.engine, **options)

    def stream(self, cache: Any, u: np.ndarray, split: Iterable[int] | None = None) -> np.ndarray:
        """Outputs for u (*C, T): positions one by one, or `split` into 0 (a step) and m (a block of m)."""
        outputs, t = [], 0
        for m in split if split is not None else [0] * u.shape[-1]:
            if m == 0:
                outputs.append(self.numpy(cache.step(self.array(u[..., t])))[..., None].copy())
                t += 1
            else:
                outputs.append(self.numpy(cache.extend(self.array(u[..., t : t + m]))).copy())
                t += m
        if t < u.shape[-1]:
            outputs.append(self.numpy(cache.extend(self.array(u[..., t:]))))
        return np.concatenate(outputs, axis=-1)


LIBRARIES = [
    pytest.param(Library("numpy"), id="numpy"),
    pytest.param(Library("torch-cpu", device="cpu"), id="torch-cpu"),
    pytest.param(Library("torch-engine", device="cpu", engine="torch"), id="torch-engine"),
    pytest.param(Library("cuda", device="cuda"), id="cuda", marks=pytest.mark.cuda),
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(params=LIBRARIES)
def lib(request: pytest.FixtureRequest) -> Library:
    library: Library = request.param
    return library


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
