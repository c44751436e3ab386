"""What optimizer state is: for each weight Adam's two moments and the weight in fp32, and the parameter groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from formats.spec import Reader

EXP_AVG, EXP_AVG_SQ, MASTER = STATES = ("exp_avg", "exp_avg_sq", "param")
"""Adam's two moments, and the weights in fp32, in the words of `fully_reshardable`: `optimizer.state.param.KEY`."""

FULLY_RESHARDABLE = "fully_reshardable"
"""megatron-core's word for the way that this project writes: loaded by 0.15 and later at any layout."""

LOSS_SCALE = "grad_scaler"
"""What optimizers call the state of their loss scale."""

WEIGHTS_ALONE = (
    "the weights are read all the same: `mcore-to-hf` exports them, `reshard --weights-only` leaves the optimizer out, and "
    "`checkpoint.pretrained_checkpoint` of mbtrain starts from them"
)
"""The hint for optimizer state that is not read."""


class OptimizerState(NamedTuple):
    """The state of an optimizer of Adam's kind."""

    kind: str
    """How it is stored, in megatron-core's words where it has them: `fully_reshardable`, `dp_reshardable`, …"""

    states: Mapping[str, Reader]
    """For each of `STATES` that the optimizer keeps, a reader of fp32 tensors with the names and shapes of the weights. Weights
    without state (frozen ones) are in none. Reading is exact in any region, and may be done from several threads."""

    groups: Sequence[Sequence[Mapping[str, Any]]]
    """The hyper-parameters of every parameter group (`lr`, `weight_decay`, `step`, …), without the parameters: of one optimizer,
    or of a model with experts that of the other weights and that of the experts."""

    loss_scale: Mapping[str, Any] = MappingProxyType({})
    """The dynamic loss scale of training in fp16 (`scale`, `growth_tracker`, …), tensors as arrays; empty where there is none."""
