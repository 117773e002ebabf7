"""Single layers from upstream's configuration and tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from futurefill_rs.models._io import fit
from futurefill_rs.nn import STU
from torch import Tensor


def build_stu(config: Mapping[str, Any], state: dict[str, Tensor]) -> STU:
    layer = STU(
        config["n_embd"],
        config["num_eigh"],
        config["seq_len"],
        config.get("use_hankel_L", False),
        config.get("use_approx", True),
        phi=state.get("phi"),
    )
    fit(layer, state, optional=("phi",))
    return layer
