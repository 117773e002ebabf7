"""The base of every layer and model: `mix` is the mathematics, the entries run it through time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from futurefill_rs._args import integer
from futurefill_rs._torch_args import FLOATS
from futurefill_rs.nn._files import save
from futurefill_rs.nn.cache import Cache, run_together
from futurefill_rs.nn.operators.plans import Plans
from futurefill_rs.nn.operators.precision import autocasting
from futurefill_rs.nn.protocol import Prefilling, Time, padded, whole


class Layer(nn.Module):
    """Base of every layer and model: `mix` is the mathematics, the entries below run it through time.

    Every entry is a call of the module, `self(x, time=time)`, which hooks and wrappers see.
    """

    max_length: int | None = None
    """Positions `forward` accepts; None where the layer has no longest sequence."""

    config: dict[str, Any]
    """The mapping that `models.build` made the layer from; a layer made by hand has no such attribute."""

    _sequence_ndim = 3

    def __init__(self) -> None:
        super().__init__()
        self._plans = Plans()

    def mix(self, x: Tensor, time: Time) -> Tensor:
        """The layer's mathematics, which every subclass writes once for all entries.

        What reaches across time is `time(operator, u)`; modules inside are called, with `time=time` where
        they reach across time too.
        """
        raise NotImplementedError

    def _check(self, x: Tensor, ndim: int, batch_size: int | None = None) -> None:
        """Raise unless x is `(B, T, D)` (ndim 3) or `(B, D)` (ndim 2) for this layer."""
        width = self.width
        if not isinstance(x, Tensor) or x.dtype not in FLOATS:
            raise TypeError(f"x: expected a floating-point tensor, got {kind_of(x)}")
        wanted = self.input_dtype
        if wanted is not None and x.dtype != wanted and not _autocast(x, wanted):
            raise TypeError(f"x: expected {wanted} as the weights have, got {x.dtype}")
        if x.dtype == torch.float64 and all(p.dtype != torch.float64 for p in self.parameters()):
            # Nothing is computed in less precision than what comes in.
            raise TypeError(
                f"x: expected at most the precision of the weights, got {x.dtype}: use layer.double()"
            )
        if x.ndim != ndim or x.shape[-1] != width or (batch_size is not None and x.shape[0] != batch_size):
            batch = "B" if batch_size is None else str(batch_size)
            expected = f"({batch}, T, {width})" if ndim == 3 else f"({batch}, {width})"
            raise ValueError(f"x: expected shape {expected}, got {tuple(x.shape)}")

    @property
    def width(self) -> int:
        """Features of one input position."""
        raise NotImplementedError

    @property
    def input_dtype(self) -> torch.dtype | None:
        """The dtype that inputs must have; None where every floating-point dtype will do."""
        return None

    def forward(
        self, x: Tensor, *, time: Time | None = None, starts: Tensor | None = None, **options: Any
    ) -> Tensor:
        """Outputs at every position of `x` `(B, T, D)`, T at most `max_length`; differentiable.

        With `starts` `(B,)` row i begins at position `starts[i]`: what stands before it is padding, has no
        effect on the row, and its outputs mean nothing. `time` is what a module around this one hands on (see
        `nn.protocol`); `options` are those of `mix`.
        """
        if time is None:
            self._check(x, self._sequence_ndim)
            if self.max_length is not None and x.shape[1] > self.max_length:
                raise ValueError(f"x: expected at most {self.max_length} positions, got {x.shape[1]}")
            time = padded(whole, x, starts)
        return self.mix(x, time, **options)

    @torch.no_grad()
    def prefill(
        self, x: Tensor, max_new: int | None = None, *, method: Any = "auto", starts: Tensor | None = None
    ) -> tuple[Tensor, Cache]:
        """Outputs at every position of the prompt `x` `(B, P, D)` and a cache for `max_new` more positions.

        `max_new=None` puts no bound on what follows: what lies further back than the filters reach drops out.
        `method` is that of `futurefill_rs.plan`: "auto", "naive", "epoched", "continuous" or a `Schedule`;
        `starts` is that of `forward`. The cache keeps the filters as they are now.
        """
        self._check(x, self._sequence_ndim)
        return self._read(x, max_new, method, starts)

    def _read(
        self,
        x: Tensor,
        max_new: int | None,
        method: Any = "auto",
        starts: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Cache]:
        """`prefill` with options of `mix`."""
        time = Prefilling(None if max_new is None else integer(max_new, "max_new"), method)
        y = self(x, time=padded(time, x, starts), **options)
        return y, Cache(time.states, x.shape[0], x.shape[1], time.max_new)

    @torch.no_grad()
    def step(self, x: Tensor, cache: Cache) -> Tensor:
        """Outputs at the next position: `x` `(B, D)` gives `(B, D_out)`."""
        self._check(x, self._sequence_ndim - 1, cache.batch_size)
        return cache._run(self, x, stepping=True)

    @torch.no_grad()
    def step_all(self, x: Tensor, caches: Sequence[Cache]) -> Tensor:
        """`step` for the rows of several caches, which may be at different positions: `x` `(B, D)` holds
        those of the first cache, then those of the second, and so on.

        What does not reach across time is computed for all rows together.
        """
        if len(caches) == 1:
            return self.step(x, caches[0])
        self._check(x, self._sequence_ndim - 1, sum(cache.batch_size for cache in caches))
        if not caches:
            raise ValueError("caches: expected one or more, got none")
        return run_together(self, x, caches)

    @torch.no_grad()
    def extend(self, x: Tensor, cache: Cache) -> Tensor:
        """Outputs at the next m positions, all known: `x` `(B, m, D)` gives what m steps would."""
        self._check(x, self._sequence_ndim, cache.batch_size)
        return cache._run(self, x, stepping=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `config.json` and `model.safetensors`, for `models.load`, into the folder `path`, made if
        need be.
        """
        if not hasattr(self, "config"):
            raise ValueError("config: expected a model, or a layer that models.build made, got neither")
        save(self.config, self.state_dict(), path)

    @torch.no_grad()
    def rewind(self, cache: Cache, count: int) -> None:
        """Undo the last `count` positions of a cache that was told to `keep` as many.

        For speculative decoding: extend by a draft, look at the outputs, rewind what was not accepted.
        """
        cache._undo(self, integer(count, "count"))

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Promise that no filter changes inside the block, whatever shapes it: weights, adapters, settings.

        Prefills then take the plans they kept without comparing filters, after the first of each kind. For
        serving; a promise that is not held gives outputs of the filters before.

        >>> import torch, futurefill_rs as ff
        >>> layer = ff.nn.CausalConv(4, 1000)
        >>> with layer.frozen():
        ...     for prompt in torch.randn(3, 1, 20, 4):
        ...         y, cache = layer.prefill(prompt, 30)
        """
        with ExitStack() as stack:
            for module in self.modules():
                if isinstance(module, Layer):
                    stack.enter_context(module._plans.frozen())
            yield


def dtype_of(projection: nn.Module) -> torch.dtype | None:
    """The dtype a linear layer takes; None where it is not that of its weights, as in quantised ones."""
    weight = getattr(projection, "weight", None)
    return weight.dtype if isinstance(weight, Tensor) and weight.dtype in FLOATS else None


def _autocast(x: Tensor, wanted: torch.dtype) -> bool:
    """Whether torch itself will bring inputs and weights together, which it does not for float64."""
    return torch.float64 not in (x.dtype, wanted) and autocasting(x.device)


def kind_of(x: object) -> str:
    """What x is, for errors."""
    return f"a tensor of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
