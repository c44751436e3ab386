"""Experts that compute on fewer channels than layers have (`moe_latent_size`, Nemotron 3), without Transformer Engine, whose
linear layers are the only ones that megatron-core projects to these channels and back with."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe import moe_layer
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch.nn import functional

from trainer.layers.spec import has_experts, uses_transformer_engine


def latent_experts(provider: Any, layer: Any) -> None:
    """Give a layer of megatron-core's own modules experts that can compute on `provider.moe_latent_size` channels."""
    if provider.moe_latent_size and has_experts(layer) and not uses_transformer_engine(layer):
        layer.submodules.mlp = partial(_Layer, **layer.submodules.mlp.keywords)


class _Layer(moe_layer.MoELayer):
    """megatron-core's mixture of experts, whose projections are `_Whole`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with mock.patch.multiple(moe_layer, HAVE_TE=True, TELinear=_Whole):
            super().__init__(*args, **kwargs)


class _Whole(torch.nn.Module):
    """A projection that each tensor-parallel rank has whole, as Transformer Engine's `duplicated` is."""

    def __init__(self, inputs: int, outputs: int, *, config: Any, init_method: Any, **_: Any) -> None:
        super().__init__()
        assert not config.add_bias_linear
        self.weight = torch.nn.Parameter(torch.empty(outputs, inputs, dtype=config.params_dtype))
        if config.perform_initialization:
            init_method(self.weight)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return the projected states, and no bias."""
        return functional.linear(states, self.weight), None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """Return the weight, the same on all tensor-parallel ranks."""
        state = self.state_dict(keep_vars=True)
        groups = {"tp_group": parallel_state.get_tensor_model_parallel_group(), "dp_cp_group": metadata["dp_cp_group"]}
        return make_sharded_tensors_for_checkpoint(state, prefix, None, sharded_offsets, **groups)
