"""The layers that megatron-core computes as one: query, key and value; gate and up. Names and rows, no method.

A fused layer's outputs come in groups, in each of which every part has its rows: those of `linear_qkv` in one group per
key-value head (its queries, its key, its value), those of `linear_fc1` in a single one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from formats.errors import UserError
from trainer.peft.linear import Linear

_PARTS = {
    "linear_qkv": {"q": "linear_q", "k": "linear_k", "v": "linear_v"},
    "linear_fc1": {"gate": "linear_fc1_gate", "up": "linear_fc1_up"},
}
"""Of each fused layer: a part's short name, and that under which Megatron-Bridge lets it be targeted."""


def part_names(name: str) -> dict[str, str]:
    """The whole names of a module's parts, by their short names; empty for a layer that is not fused."""
    before, dot, last = name.rpartition(".")
    return {part: f"{before}{dot}{alias}" for part, alias in _PARTS.get(last, {}).items()}


@dataclass(frozen=True)
class FusedParts:
    """How a fused layer's rows of this rank divide: `groups` times the `sizes`, part after part."""

    groups: int
    sizes: dict[str, int]

    def rows(self, part: str) -> int:
        """Those of one part, of all groups."""
        return self.groups * self.sizes[part]

    def block(self, weights: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """One matrix [rows, sum of ranks] that multiplies each part with its own columns; zeros for a part without weight.

        Weights are [rows of the part, r], in the order of the parts.
        """
        present = [one for one in weights if one is not None]
        width, before, bands = sum(one.shape[1] for one in present), 0, []
        for size, weight in zip(self.sizes.values(), weights, strict=True):
            if weight is None:
                bands.append(present[0].new_zeros(self.groups, size, width))
                continue
            after = width - before - weight.shape[1]
            bands.append(torch.nn.functional.pad(weight.view(self.groups, size, -1), (before, after)))
            before += weight.shape[1]
        return torch.cat(bands, dim=1).flatten(0, 1)

    def together(self, vectors: Sequence[torch.Tensor]) -> torch.Tensor:
        """One number per row of the fused layer, from one vector for each part."""
        sized = zip(self.sizes.values(), vectors, strict=True)
        return torch.cat([one.view(self.groups, size) for size, one in sized], dim=1).flatten()

    def apart(self, vector: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """One vector for each part."""
        bands = vector.view(self.groups, -1).split(list(self.sizes.values()), dim=1)
        return tuple(one.flatten() for one in bands)


def find(linear: Linear, config: Any) -> FusedParts:
    """The parts of a fused layer on this rank. UserError where ranks hold pieces of them, or the layer has others."""
    if linear.name.endswith("linear_fc1"):
        if not linear.gated:
            raise UserError(
                f"`{linear.name}` has no gate: `model.gated_linear_unit` is `false`", hint="set `peft.canonical=false`"
            )
        return FusedParts(1, dict.fromkeys(("gate", "up"), linear.rows // 2))
    heads, ranks = config.num_attention_heads, linear.group.size()
    groups = config.num_query_groups or heads
    if groups % ranks:
        raise UserError(
            f"`model.num_query_groups` is `{groups}`, which tensor parallelism over `{ranks}` cuts into pieces; `peft.canonical` "
            "needs whole ones",
            hint=f"set `peft.canonical=false`, or a tensor-parallel size that divides {groups}",
        )
    sizes = {"q": heads // groups * config.kv_channels, "k": config.kv_channels, "v": config.kv_channels}
    found = FusedParts(groups // ranks, sizes)
    if found.groups * sum(sizes.values()) != linear.rows:
        raise UserError(
            f"`{linear.name}` has `{linear.rows * ranks}` outputs, query, key and value have `{groups * sum(sizes.values())}`",
            hint="set `peft.canonical=false`",
        )
    return found
