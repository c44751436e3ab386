"""Adding a product of small matrices to a large output without another pass over it."""

from __future__ import annotations

from typing import Any

import torch


class FusedAdd(torch.autograd.Function):
    """`output + hidden @ weight.T`, written over `output` by the multiplication itself.

    output [..., out], hidden [..., r], weight [out, r]. Nothing may need what `output` was: linear layers keep their weight and
    their input for the backward pass, never their output. autograd is passed by because it refuses writes into what a custom
    function (Transformer Engine's) answered as a view.
    """

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The sum, in the memory of `output`."""
        ctx.save_for_backward(hidden, weight)
        total = output.data
        total.view(-1, total.shape[-1]).addmm_(hidden.reshape(-1, hidden.shape[-1]), weight.t())
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """The output's gradient passes unchanged."""
        (gradient,) = gradients
        hidden, weight = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])
        for_hidden = (flat @ weight).view_as(hidden) if ctx.needs_input_grad[1] else None
        for_weight = flat.t() @ hidden.reshape(-1, hidden.shape[-1]) if ctx.needs_input_grad[2] else None
        return gradient, for_hidden, for_weight
