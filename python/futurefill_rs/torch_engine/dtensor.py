"""Causal convolution of tensors that are spread over several devices: each convolves what it has.

Channels and sequences are independent, so shards along any axis but time need no communication.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from futurefill_rs._args import broadcast


def causal_conv(u: Tensor, filters: Tensor, convolve: Callable[[Tensor, Tensor], Tensor]) -> DTensor:
    """`convolve` on the shards of `u (*C, T)` and `filters (*F, L)`, of which one may be a plain tensor.

    The result is sharded as the inputs are (as u where both differ); what is sharded along time, or is a
    partial sum, is gathered first. A plain tensor counts as replicated.
    """
    mesh = u.device_mesh if isinstance(u, DTensor) else filters.device_mesh  # type: ignore[attr-defined]
    u, filters = (_spread(values, mesh) for values in (u, filters))
    if u.device_mesh != filters.device_mesh:
        raise ValueError(f"filters: expected the mesh {u.device_mesh} of u, got {filters.device_mesh}")
    outer = broadcast(tuple(u.shape[:-1]), tuple(filters.shape[:-1]), "u")
    rank = len(outer)
    axes = [
        next((a for a in (_outer_axis(t, i, rank) for t in (u, filters)) if a is not None), None)
        for i in range(mesh.ndim)
    ]
    local = [_shards(values, axes, rank) for values in (u, filters)]
    placements = [Replicate() if axis is None else Shard(axis) for axis in axes]
    shape = torch.Size((*outer, u.shape[-1]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(convolve(*local), mesh, placements, run_check=False, shape=shape, stride=stride)


def _spread(values: Tensor, mesh: Any) -> DTensor:
    if isinstance(values, DTensor):
        return values
    return DTensor.from_local(values, mesh, [Replicate()] * mesh.ndim, run_check=False)


def _outer_axis(values: DTensor, i: int, rank: int) -> int | None:
    """The axis of the result along which mesh axis i has the shards of these values."""
    placement = values.placements[i]
    if not isinstance(placement, Shard):
        return None
    axis = placement.dim % values.dim()
    if axis == values.dim() - 1 or values.shape[axis] == 1:
        return None
    return axis + rank + 1 - values.dim()


def _shards(values: DTensor, axes: list[int | None], rank: int) -> Tensor:
    """This process's part of the values for a result sharded along `axes`."""
    wanted: list[Placement] = []
    gradients: list[Placement] = []
    for axis in axes:
        own = None if axis is None else axis - (rank + 1 - values.dim())
        if own is not None and own >= 0 and values.shape[own] != 1:
            wanted.append(Shard(own))
            gradients.append(Shard(own))
        else:
            # Each process gives its part of the gradient where it has a part of the result.
            wanted.append(Replicate())
            gradients.append(Replicate() if axis is None else Partial())
    local: Tensor = values.redistribute(values.device_mesh, wanted).to_local(grad_placements=gradients)
    return local
