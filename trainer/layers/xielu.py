"""xIELU, an activation with two weights of its own in each layer (Apertus; https://arxiv.org/abs/2411.13010)."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch.nn import functional

from trainer.layers.spec import mlp_layers

BETA = 0.5
"""The slope at 0, and the least curvature below it."""

_LARGEST = -1e-6
"""The largest input of the exponential, as in transformers: its gradient at 0 is not needed."""

_INITIAL = 0.8
"""Both curvatures at first, as in transformers."""


def xielu(inputs: torch.Tensor, alpha_p: torch.Tensor, alpha_n: torch.Tensor) -> torch.Tensor:
    """Return the activation of `inputs` with the weights `alpha_p` and `alpha_n`, [1] each."""
    above, below = functional.softplus(alpha_p), BETA + functional.softplus(alpha_n)
    exponential = torch.expm1(inputs.clamp(max=_LARGEST))
    return torch.where(inputs > 0, above * inputs * inputs, below * (exponential - inputs)) + BETA * inputs


class XIELU(torch.nn.Module):
    """The activation of one layer. Every tensor-parallel rank has both weights and some of the channels."""

    def __init__(self, provider: Any) -> None:
        super().__init__()
        curvatures = torch.tensor([[_INITIAL], [_INITIAL - BETA]])
        weights = curvatures.expm1().log().to(provider.params_dtype)
        self.alpha_p, self.alpha_n = (torch.nn.Parameter(weight.clone()) for weight in weights)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the activation of this rank's channels. Gradients of the weights are added up over ranks."""
        shared = (tensor_parallel.copy_to_tensor_model_parallel_region(weight) for weight in (self.alpha_p, self.alpha_n))
        return xielu(inputs, *shared)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """Return both weights as copies of one on all tensor-parallel ranks."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {},
            sharded_offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )


def activation_weights(provider: Any, model: Any) -> None:
    """Give each layer whose activation is `xielu` its weights, `mlp.activation_func.alpha_p` and `alpha_n`."""
    if provider.activation_func is not xielu:
        return
    for layer in mlp_layers(model):
        layer.mlp.activation_func = XIELU(provider)
