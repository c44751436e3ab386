"""A linear layer with an adapter beside it: its own parameters and their names stay as they are.

The layer becomes of a class that is its own and ours, so that whoever looks for its weight, its bias or its class finds them
where they were; `adapter` is one more module in it. Knows no method.
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
    """What is trained beside a linear layer. Give it parameters and `forward`.

    A parameter is the same on all tensor-parallel ranks, or divided among them where it has megatron-core's
    `tensor_model_parallel` and `partition_dim`; two stacked matrices, each divided, have `partition_stride` 2.
    """

    group: Any = None
    """The tensor-parallel ranks; None for those of the run."""

    def forward(self, output: torch.Tensor, layer_input: torch.Tensor) -> torch.Tensor:
        """The layer's new output, from its own and from its input: [sequence, micro batch, features] or [tokens, features].

        `output` is this rank's, may be written in, and has the bias added where the layer adds it. The input of a layer with
        a norm in it is what the norm made.
        """
        raise NotImplementedError

    def reset_parameters(self, generator: torch.Generator) -> None:
        """First values. The generator is the same wherever the layer lies, at any layout; it makes numbers on the CPU."""

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> State:
        """For megatron-core's checkpoints, from the attributes of the parameters."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        group = self.group or parallel_state.get_tensor_model_parallel_group()
        state = self.state_dict(prefix="", keep_vars=True)
        axes = {name: one.partition_dim for name, one in state.items() if getattr(one, "tensor_model_parallel", False)}
        places = {"tp_group": group, "dp_cp_group": metadata["dp_cp_group"]}
        found = make_sharded_tensors_for_checkpoint(state, prefix, axes, sharded_offsets, **places)
        for name in axes:
            if state[name].partition_stride == 2:
                key, singleton = f"{prefix}{name}", metadata.get("singleton_local_shards", False)
                found[key] = apply_swiglu_sharded_factory(found[key], sharded_offsets, singleton, group)
        return found


class AdaptedLayer:
    """What `adapt` adds to a layer's class."""

    adapter: Adapter
    _quantized: tuple[Any, bool] = (None, False)
    """The weight as it was when Transformer Engine last quantized it, and whether that was for a backward pass too."""

    def forward(self, layer_input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the layer's own: megatron-core's answer output and bias, torch's the output alone."""
        self._quantize_once()
        answer = super().forward(layer_input, *args, **kwargs)  # type: ignore[misc]
        if not isinstance(answer, tuple):
            return self.adapter(answer, layer_input)
        output, bias, seen = _taken_apart(answer, layer_input)
        return self.adapter(output, seen), bias

    def _quantize_once(self) -> None:
        """At each step's first microbatch megatron-core has the weight quantized anew. It is frozen: once is enough.

        Delayed scaling finds its scales in the first steps, and quantizes with others than before.
        """
        weight: Any = self.weight
        delayed = getattr(getattr(self, "config", None), "fp8_recipe", None) == "delayed"
        if not getattr(self, "is_first_microbatch", False) or delayed or weight.requires_grad or is_float8tensor(weight):
            return
        seen, backward = (weight.data_ptr(), weight._version), torch.is_grad_enabled()
        if self._quantized in ((seen, True), (seen, backward)):
            self.is_first_microbatch = False
        else:
            self._quantized = (seen, backward)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> State:
        """The layer's own, and the adapter's under `adapter.`."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        ours = f"{prefix}adapter."
        own = self._own_state(prefix, sharded_offsets, metadata)
        kept = {name: one for name, one in own.items() if not name.startswith(ours)}
        return kept | self.adapter.sharded_state_dict(ours, sharded_offsets, metadata)

    def _own_state(self, prefix: str, offsets: Any, metadata: Any) -> State:
        if hasattr(super(), "sharded_state_dict"):
            return super().sharded_state_dict(prefix, offsets, metadata)  # type: ignore[misc]
        group = parallel_state.get_tensor_model_parallel_group()
        state = self.state_dict(prefix="", keep_vars=True)  # type: ignore[attr-defined]
        return make_sharded_tensors_for_checkpoint(
            state, prefix, {}, offsets, tp_group=group, dp_cp_group=metadata["dp_cp_group"]
        )


def _taken_apart(answer: tuple[Any, ...], layer_input: torch.Tensor) -> tuple[torch.Tensor, Any, torch.Tensor]:
    """Output, bias, and what the matrix was multiplied with.

    Transformer Engine's LayerNormLinear appends the norm's output, not gathered along the sequence, to what it answers
    otherwise; megatron-core's wrapper takes that for one output where no bias is returned.
    """
    if len(answer) == 3:
        return answer
    first, bias = answer
    return (first[0], bias, first[1]) if isinstance(first, tuple) else (first, bias, layer_input)


def adapt(module: torch.nn.Module, adapter: Adapter) -> torch.nn.Module:
    """Add an adapter to a linear layer of megatron-core's or torch's; the same module, of another class."""
    kind = type(module)
    module.adapter = adapter
    module.__class__ = type(f"Adapted{kind.__name__}", (AdaptedLayer, kind), {})
    if hasattr(module, "return_layernorm_output"):
        module.return_layernorm_output = True
    return module
