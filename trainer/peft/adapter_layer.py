"""Add an adapter to a linear layer without a wrapper: the layer's parameters keep their names.

The layer's class is replaced by a subclass of it and `AdaptedLayer`, so code that reads its weight, its bias or its class works
as before. The adapter is the submodule `adapter`.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint

State = dict[str, Any]


class Adapter(torch.nn.Module):
    """The trained module of a linear layer. A subclass adds parameters and `forward`.

    A parameter is replicated on all tensor-parallel ranks, unless it has megatron-core's attributes `tensor_model_parallel` and
    `partition_dim`. Two stacked matrices, each of them sharded, have `partition_stride` 2.
    """

    group: Any = None
    """The tensor-parallel group; None for the run's."""

    layer_mixin: type[AdaptedLayer] | None = None
    """What `adapt` adds to the layer's class; None for `AdaptedLayer`."""

    def forward(self, output: torch.Tensor, layer_input: torch.Tensor) -> torch.Tensor:
        """Return the layer's new output from its own output and its input: [sequence, micro batch, features] or [tokens,
        features].

        `output` is this rank's part, may be overwritten, and includes the bias if the layer adds it. For a layer with a norm in
        it,
        `layer_input` is the norm's output.
        """
        raise NotImplementedError

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Initialize the parameters. `generator`, on the CPU, is the same for a layer at any parallel layout."""

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> State:
        """Return the ShardedTensors for megatron-core's checkpoints, by the attributes of the parameters."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        group = self.group or parallel_state.get_tensor_model_parallel_group()
        state = self.state_dict(prefix="", keep_vars=True)
        axes = {name: param.partition_dim for name, param in state.items() if getattr(param, "tensor_model_parallel", False)}
        groups = {"tp_group": group, "dp_cp_group": metadata["dp_cp_group"]}
        sharded = make_sharded_tensors_for_checkpoint(state, prefix, axes, sharded_offsets, **groups)
        for name in axes:
            if state[name].partition_stride == 2:
                key, singleton = f"{prefix}{name}", metadata.get("singleton_local_shards", False)
                sharded[key] = apply_swiglu_sharded_factory(sharded[key], sharded_offsets, singleton, group)
        return sharded


class AdaptedLayer:
    """The mixin that `adapt` adds to a layer's class."""

    adapter: Adapter
    _quantized: tuple[Any, bool] = (None, False)
    """The address and version of the weight when Transformer Engine last quantized it, and whether for a backward pass too."""

    def forward(self, layer_input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the layer, then the adapter. Returns what the layer returns: output and bias (megatron-core), or the output
        (torch)."""
        self._quantize_once()
        result = super().forward(layer_input, *args, **kwargs)  # type: ignore[misc]
        if not isinstance(result, tuple):
            return self.adapter(result, layer_input)
        output, bias, linear_input = _split_outputs(result, layer_input)
        return self.adapter(output, linear_input), bias

    def _quantize_once(self) -> None:
        """Skip the quantization of the weight that megatron-core requests at the first microbatch of each step: the weight is
        frozen.

        Delayed scaling is not skipped, since its scales change in the first steps.
        """
        weight: Any = self._frozen_weight()
        delayed = getattr(getattr(self, "config", None), "fp8_recipe", None) == "delayed"
        if not getattr(self, "is_first_microbatch", False) or delayed or weight.requires_grad or is_float8tensor(weight):
            return
        version, backward = (weight.data_ptr(), weight._version), torch.is_grad_enabled()
        if self._quantized in ((version, True), (version, backward)):
            self.is_first_microbatch = False
        else:
            self._quantized = (version, backward)

    def _frozen_weight(self) -> Any:
        return self.weight

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> State:
        """Return the layer's ShardedTensors, and the adapter's under `adapter.`."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        adapter_prefix = f"{prefix}adapter."
        state = self._layer_state(prefix, sharded_offsets, metadata)
        layer = {name: tensor for name, tensor in state.items() if not name.startswith(adapter_prefix)}
        return layer | self.adapter.sharded_state_dict(adapter_prefix, sharded_offsets, metadata)

    def _layer_state(self, prefix: str, offsets: Any, metadata: Any) -> State:
        if hasattr(super(), "sharded_state_dict"):
            return super().sharded_state_dict(prefix, offsets, metadata)  # type: ignore[misc]
        group = parallel_state.get_tensor_model_parallel_group()
        state = self.state_dict(prefix="", keep_vars=True)  # type: ignore[attr-defined]
        return make_sharded_tensors_for_checkpoint(
            state, prefix, {}, offsets, tp_group=group, dp_cp_group=metadata["dp_cp_group"]
        )


def _split_outputs(result: tuple[Any, ...], layer_input: torch.Tensor) -> tuple[torch.Tensor, Any, torch.Tensor]:
    """Return output, bias, and the input of the matrix product.

    Transformer Engine's LayerNormLinear also returns the norm's output, not gathered along the sequence. If no bias is returned,
    megatron-core's wrapper takes output and norm output for one value.
    """
    if len(result) == 3:
        return result
    first, bias = result
    return (first[0], bias, first[1]) if isinstance(first, tuple) else (first, bias, layer_input)


def adapt(module: torch.nn.Module, adapter: Adapter) -> torch.nn.Module:
    """Add an adapter to a linear layer of megatron-core or torch, in place, and return the layer.

    The layer keeps its parameters; its class becomes a subclass named `Adapted…`.

    >>> adapt(torch.nn.Linear(4, 2), Adapter())
    AdaptedLinear(
      in_features=4, out_features=2, bias=True
      (adapter): Adapter()
    )
    """
    layer_class = type(module)
    module.adapter = adapter
    module.__class__ = type(f"Adapted{layer_class.__name__}", (adapter.layer_mixin or AdaptedLayer, layer_class), {})
    if hasattr(module, "return_layernorm_output"):
        module.return_layernorm_output = True
    return module
