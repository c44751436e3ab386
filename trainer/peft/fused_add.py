"""Add a low-rank product to a large output in one pass."""

from __future__ import annotations

from typing import Any

import torch


class FusedAdd(torch.autograd.Function):
    """`output + hidden @ weight.T`, computed in place in `output` by `addmm_`.

    output [..., out], hidden [..., r], weight [out, r]. The old value of `output` must not be needed for a backward pass; linear
    layers save their weight and input, not their output. A custom function is used because autograd refuses to write into a view
    that another custom function (Transformer Engine's) returned.
    """

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return the sum, in the memory of `output`."""
        ctx.save_for_backward(hidden, weight)
        total = output.data
        total.view(-1, total.shape[-1]).addmm_(hidden.reshape(-1, hidden.shape[-1]), weight.t())
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """Return the gradients of output (unchanged), hidden and weight."""
        (gradient,) = gradients
        hidden, weight = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])
        for_hidden = (flat @ weight).view_as(hidden) if ctx.needs_input_grad[1] else None
        for_weight = flat.t() @ hidden.reshape(-1, hidden.shape[-1]) if ctx.needs_input_grad[2] else None
        return gradient, for_hidden, for_weight
