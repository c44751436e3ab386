"""The parts of megatron-core's fused layers: query, key and value in `linear_qkv`; gate and up in `linear_fc1`.

The output rows of a fused layer are ordered in groups, and each group has rows of every part: `linear_qkv` has a group per
key-value head (its queries, its key, its value), `linear_fc1` has one group.
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
"""For each fused layer, the short name of a part, and the module name by which Megatron-Bridge targets it."""


def part_names(name: str) -> dict[str, str]:
    """Return the full names of a module's parts by short name; empty for a layer that is not fused.

    >>> part_names("decoder.layers.0.mlp.linear_fc1")
    {'gate': 'decoder.layers.0.mlp.linear_fc1_gate', 'up': 'decoder.layers.0.mlp.linear_fc1_up'}
    """
    parent, dot, last = name.rpartition(".")
    return {part: f"{parent}{dot}{alias}" for part, alias in _PARTS.get(last, {}).items()}


@dataclass(frozen=True)
class FusedParts:
    """The row order of a fused layer on this rank: `groups` groups, each with `sizes[part]` rows of every part in turn."""

    groups: int
    sizes: dict[str, int]

    def rows(self, part: str) -> int:
        """Return the number of rows of a part, over all groups."""
        return self.groups * self.sizes[part]

    def block_diagonal(self, weights: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """Return a matrix [rows, sum of ranks] with each part's weight in its own columns and zeros elsewhere.

        `weights` are [rows of the part, r] in the order of the parts, or one such matrix for each of several experts; None for a
        part without an adapter, whose rows are zero.
        """
        present = [weight for weight in weights if weight is not None]
        width, before, bands = sum(weight.shape[-1] for weight in present), 0, []
        for size, weight in zip(self.sizes.values(), weights, strict=True):
            if weight is None:
                bands.append(present[0].new_zeros(*present[0].shape[:-2], self.groups, size, width))
                continue
            after = width - before - weight.shape[-1]
            bands.append(torch.nn.functional.pad(weight.unflatten(-2, (self.groups, size)), (before, after)))
            before += weight.shape[-1]
        return torch.cat(bands, dim=-2).flatten(-3, -2)

    def interleave(self, vectors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return a vector [rows] of the fused layer from one vector per part."""
        sized = zip(self.sizes.values(), vectors, strict=True)
        return torch.cat([vector.view(self.groups, size) for size, vector in sized], dim=1).flatten()

    def split(self, vector: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return one vector per part from a vector [rows] of the fused layer."""
        bands = vector.view(self.groups, -1).split(list(self.sizes.values()), dim=1)
        return tuple(band.flatten() for band in bands)


def find_fused_parts(linear: Linear, config: Any) -> FusedParts:
    """Return the parts of a fused layer on this rank. Raises UserError if a group is split among ranks, or the rows do not
    match."""
    if linear.name.endswith("linear_fc1"):
        if not linear.gated:
            raise UserError(
                f"`{linear.name}` has no gate: `model.gated_linear_unit` is `false`", hint="set `peft.canonical=false`"
            )
        return FusedParts(1, dict.fromkeys(("gate", "up"), linear.rows // 2))
    heads, ranks = config.num_attention_heads, linear.tp_group.size()
    groups = config.num_query_groups or heads
    if groups % ranks:
        raise UserError(
            f"`model.num_query_groups` is `{groups}`, which is not divisible by the tensor-parallel size `{ranks}`, as "
            "`peft.canonical` needs",
            hint=f"set `peft.canonical=false`, or a tensor-parallel size that divides {groups}",
        )
    sizes = {"q": heads // groups * config.kv_channels, "k": config.kv_channels, "v": config.kv_channels}
    parts = FusedParts(groups // ranks, sizes)
    if parts.groups * sum(sizes.values()) != linear.rows:
        raise UserError(
            f"`{linear.name}` has `{linear.rows * ranks}` outputs, query, key and value have `{groups * sum(sizes.values())}`",
            hint="set `peft.canonical=false`",
        )
    return parts
