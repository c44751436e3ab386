"""LoRA on layers that compute several experts at once (Transformer Engine's GroupedLinear): one A and one B for each expert.

The matrices of a rank's experts are stacked: A [experts, r, inputs], B [experts, outputs, r]. Checkpoints store each expert on
its own, under the keys of megatron-core's SequentialMLP: both kinds of layer, at any expert parallelism, load the same files.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from trainer.layers.token_counts import TokenCounts
from trainer.peft.adapter_layer import AdaptedLayer, State
from trainer.peft.canonical import CanonicalAdapter
from trainer.peft.linear import GroupedExperts
from trainer.peft.lora_layers import LoraAdapter, init_lora_a

type Tokens = Sequence[int] | TokenCounts
"""How many tokens each expert has."""

_ALIGNMENT = 16
"""Bytes that torch's `grouped_mm` wants rows to be a multiple of."""


class FrozenExperts:
    """The mixin for a layer of several experts whose weights are frozen. It is called with the number of tokens of each."""

    _stack: torch.Tensor | None = None

    def forward(self, layer_input: torch.Tensor, tokens_per_expert: Tokens) -> Any:
        """Run the layer. Return output and bias, as the layer does."""
        if self._is_one_product(layer_input):
            return grouped_linear(layer_input, self._stacked(), tokens_per_expert), None
        return super().forward(layer_input, tokens_per_expert)  # type: ignore[misc]

    def _is_one_product(self, layer_input: torch.Tensor) -> bool:
        """Tell whether torch multiplies all experts in one kernel, where Transformer Engine starts one for each: on a GPU, with
        frozen weights in bf16, without biases."""
        weight = self.weight0
        in_bf16 = type(weight.data) is torch.Tensor and weight.dtype == layer_input.dtype == torch.bfloat16
        quantized = self.config.fp8 or self.config.fp4
        return bool(in_bf16 and weight.is_cuda and not (weight.requires_grad or quantized or self.use_bias))

    def _stacked(self) -> torch.Tensor:
        """Return the weights of this rank's experts [experts, outputs, inputs]. From now on they are views of it."""
        last = self.num_gemms - 1
        if self._stack is None or self._stack[last].data_ptr() != getattr(self, f"weight{last}").data_ptr():
            weights = [getattr(self, f"weight{index}") for index in range(self.num_gemms)]
            self._stack = torch.stack([weight.data for weight in weights])
            for weight, view in zip(weights, self._stack, strict=True):
                weight.data = view
        return self._stack


class GroupedLayer(AdaptedLayer, FrozenExperts):
    """The mixin for a layer of several experts with an adapter."""

    def forward(self, layer_input: torch.Tensor, tokens_per_expert: Tokens) -> Any:  # type: ignore[override]
        """Run the layer, then the adapter. Return output and bias, as the layer does."""
        self._quantize_once()
        output, bias = super(AdaptedLayer, self).forward(layer_input, tokens_per_expert)
        return self.adapter(output, layer_input, tokens_per_expert), bias

    def _frozen_weight(self) -> Any:
        return self.weight0


def multiply_at_once(module: torch.nn.Module) -> None:
    """Let a layer of several experts without an adapter compute all of them in one product where it can; others stay as they are.

    The layer keeps its parameters; its class becomes a subclass named `Frozen…`.
    """
    if hasattr(module, "num_gemms") and not isinstance(module, (FrozenExperts, AdaptedLayer)):
        module.__class__ = type(f"Frozen{type(module).__name__}", (FrozenExperts, type(module)), {})


class GroupedAdapter(LoraAdapter):
    """Adds s·B·A·x to the output of each token, with the A and B of the token's expert."""

    layer_mixin = GroupedLayer

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Initialize A at random and B with zeros. An expert's values do not depend on the rank that has it."""
        experts, seed = _experts(self), generator.initial_seed()
        generators = [torch.Generator().manual_seed(seed + experts.first + index) for index in range(experts.local)]
        for name, parameter in self.named_parameters():
            if name.endswith("linear_out.weight"):
                torch.nn.init.zeros_(parameter)
                continue
            for a, of_expert in zip(parameter, generators, strict=True):
                init_lora_a(a, self.linear, self.settings, of_expert)

    def forward(  # type: ignore[override]
        self, output: torch.Tensor, layer_input: torch.Tensor, tokens_per_expert: Tokens
    ) -> torch.Tensor:
        """Return output + s·B·A·x; tokens [tokens, features] are sorted by expert."""
        a, b = self._sum_expert_gradients(*self.matrices())
        hidden = grouped_linear(self._apply_dropout(layer_input), a, tokens_per_expert)
        scaled = hidden if self.scale == 1 else hidden * self.scale
        return output + grouped_linear(scaled, b, tokens_per_expert)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> State:
        """Return a factory for each parameter, which makes a ShardedTensor of each expert."""
        del metadata
        state = self.state_dict(prefix="", keep_vars=True)
        return {f"{prefix}{name}": self._factory(f"{prefix}{name}", param, sharded_offsets) for name, param in state.items()}

    def _factory(self, key: str, parameter: Any, offsets: Any) -> ShardedTensorFactory:
        axis = parameter.partition_dim - 1 if parameter.tensor_model_parallel else None
        stride = parameter.partition_stride if axis is not None else 1
        shard = partial(self._shards, offsets=tuple(offsets), axis=axis, stride=stride)
        rank = 0 if axis is not None else self.linear.tp_group.rank()
        replica = (0, rank, _experts(self).replicas.rank())
        return ShardedTensorFactory(key, parameter, shard, partial(_merge, axis=axis or 0, stride=stride), replica)

    @torch.no_grad()
    def _shards(
        self,
        key: str,
        tensor: torch.Tensor,
        replica_id: Any,
        _range: Any,
        *,
        offsets: tuple[Any, ...],
        axis: int | None,
        stride: int,
    ) -> list[ShardedTensor]:
        """Return the blocks of each expert's matrix, `stride` of them along `axis`."""
        experts, group, before = _experts(self), self.linear.tp_group, len(offsets) + 1
        shards = []
        for index, matrix in enumerate(tensor):
            expert = (len(offsets), experts.first + index, experts.total)
            for number, block in enumerate(matrix.chunk(stride, dim=axis or 0)):
                cut = () if axis is None else ((axis + before, number * group.size() + group.rank(), stride * group.size()),)
                options = {"replica_id": replica_id, "prepend_axis_num": before}
                shards.append(ShardedTensor.from_rank_offsets(key, block, *offsets, expert, *cut, **options))
        return shards


class CanonicalGroupedAdapter(GroupedAdapter, CanonicalAdapter):
    """Adapters with A and B for each of the chosen parts of each expert's fused layer."""


def _experts(adapter: LoraAdapter) -> GroupedExperts:
    assert adapter.linear.grouped is not None
    return adapter.linear.grouped


@torch.no_grad()
def _merge(shards: Sequence[torch.Tensor], *, axis: int, stride: int) -> torch.Tensor:
    """Return the stacked matrices [experts, rows, columns] from the blocks that `_shards` makes."""
    blocks = [shards[start : start + stride] for start in range(0, len(shards), stride)]
    return torch.stack([torch.cat(list(parts), dim=axis) for parts in blocks])


def grouped_linear(tokens: torch.Tensor, weights: torch.Tensor, tokens_per_expert: Tokens) -> torch.Tensor:
    """Return tokens · weightᵀ, each token with the weight of its expert: [tokens, in] and [experts, out, in] give [tokens, out].

    >>> grouped_linear(torch.ones(3, 2), torch.tensor([[[1.0, 1.0]], [[2.0, 2.0]]]), [1, 2]).tolist()
    [[2.0], [4.0], [4.0]]
    """
    if isinstance(tokens_per_expert, TokenCounts):
        return torch.nn.functional.grouped_mm(tokens, weights.transpose(1, 2), offs=tokens_per_expert.ends)
    if all(size * tokens.element_size() % _ALIGNMENT == 0 for size in weights.shape[1:]):
        ends = _ends(tuple(tokens_per_expert), tokens.device, _stream(tokens))
        return torch.nn.functional.grouped_mm(tokens, weights.transpose(1, 2), offs=ends)
    parts = zip(tokens.split(list(tokens_per_expert)), weights, strict=True)
    return torch.cat([torch.nn.functional.linear(part, weight) for part, weight in parts])


@lru_cache(maxsize=4)
def _ends(tokens_per_expert: tuple[int, ...], device: torch.device, _stream: Any) -> torch.Tensor:
    """Return where the tokens of each expert end, for all products of a layer of experts. The CPU does not wait for the copy."""
    return torch.tensor(list(accumulate(tokens_per_expert)), dtype=torch.int32).to(device, non_blocking=True)


def _stream(tokens: torch.Tensor) -> Any:
    return torch.cuda.current_stream(tokens.device).stream_id if tokens.is_cuda else None
