"""LoRA with a separate adapter for each part of a fused layer, such as `adapter_q` or `adapter_up`, as in Hugging Face PEFT.

The parts are computed together: the A matrices are stacked, and the B matrices are the blocks of one block-diagonal matrix. Ranks
are small, so the products with zeros cost less than another pass over the output.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from trainer.peft.fused_layers import FusedParts
from trainer.peft.linear import Linear
from trainer.peft.lora_layers import LoraAdapter, LoraSettings, make_lora_matrices


class LoraPair(torch.nn.Module):
    """The A and B matrices of one part."""

    def __init__(self, linear: Linear, settings: LoraSettings, *, rows: int) -> None:
        super().__init__()
        self.linear_in, self.linear_out = make_lora_matrices(linear, settings, rows=rows)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A and B, each through its module's `forward`: see `LoraWeight`."""
        return self.linear_in(), self.linear_out()


class CanonicalAdapter(LoraAdapter):
    """An adapter with A and B for each of the `chosen` parts of a fused layer."""

    def __init__(self, linear: Linear, settings: LoraSettings, *, parts: FusedParts, chosen: Collection[str]) -> None:
        self.parts, self.chosen = parts, chosen
        super().__init__(linear, settings)

    def make_matrices(self) -> None:
        """Create the matrices of each chosen part."""
        for part in self.chosen:
            setattr(self, f"adapter_{part}", LoraPair(self.linear, self.settings, rows=self.parts.rows(part)))

    def pairs(self) -> list[LoraPair | None]:
        """Return the matrices in the order of the parts; None for a part without an adapter."""
        return [getattr(self, f"adapter_{part}", None) for part in self.parts.sizes]

    def matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the stacked A [sum of ranks, inputs] and the block-diagonal B [outputs, sum of ranks]."""
        pairs = [pair() if pair else None for pair in self.pairs()]
        a = torch.cat([pair[0] for pair in pairs if pair], dim=-2)
        return a, self.parts.block_diagonal([pair[1] if pair else None for pair in pairs])
