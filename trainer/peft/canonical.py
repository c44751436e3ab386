"""An adapter of its own for each layer that megatron-core computes as one, as PEFT has them: `adapter_q`, `adapter_up`.

They are computed as one: their A are stacked, and their B stand on the diagonal of one matrix. Ranks are small, so what is
multiplied with zero costs less than another pass over the output would.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from trainer.peft.fused_layers import FusedParts
from trainer.peft.linear import Linear
from trainer.peft.lora_layers import LoraAdapter, LoraSettings, make_lora_matrices


class Pair(torch.nn.Module):
    """A and B of one part."""

    def __init__(self, linear: Linear, told: LoraSettings, *, rows: int) -> None:
        super().__init__()
        self.linear_in, self.linear_out = make_lora_matrices(linear, told, rows=rows)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B; called for them, as `Matrix` is for its weight."""
        return self.linear_in(), self.linear_out()


class CanonicalAdapter(LoraAdapter):
    """`chosen` parts of a fused layer have A and B."""

    def __init__(self, linear: Linear, told: LoraSettings, *, parts: FusedParts, chosen: Collection[str]) -> None:
        self.parts, self.chosen = parts, chosen
        super().__init__(linear, told)

    def make_matrices(self) -> None:
        """One pair for each part."""
        for part in self.chosen:
            setattr(self, f"adapter_{part}", Pair(self.linear, self.told, rows=self.parts.rows(part)))

    def pairs(self) -> list[Pair | None]:
        """By the order of the parts; None for one that is not chosen."""
        return [getattr(self, f"adapter_{part}", None) for part in self.parts.sizes]

    def matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The A of all parts [sum of ranks, inputs], and the B [rows, sum of ranks]."""
        pairs = [pair() if pair else None for pair in self.pairs()]
        a = torch.cat([pair[0] for pair in pairs if pair])
        return a, self.parts.block([pair[1] if pair else None for pair in pairs])
