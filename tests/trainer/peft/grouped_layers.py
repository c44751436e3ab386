"""Transformer Engine's grouped layers in plain torch, for megatron-core's TEGroupedMLP on a CPU: the same names, parameters,
calls and keys in checkpoints."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.tensor_parallel.layers import _initialize_affine_weight_cpu
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, TEGroupedMLP
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint


class _Grouped(torch.nn.Module):
    axis = 0

    def __init__(
        self, num_gemms: int, input_size: int, output_size: int, *, config: Any, init_method: Any, bias: bool = False,
        skip_bias_add: bool = False, pg_collection: Any, **_: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config, self.num_gemms, self._pg_collection = config, num_gemms, pg_collection
        self.use_bias, self.returns_bias = bias, bias and skip_bias_add
        self._tp_group = pg_collection.expt_tp
        ranks, sizes = self._tp_group.size(), [output_size, input_size]
        sizes[self.axis] //= ranks
        for index in range(num_gemms):
            weight = torch.nn.Parameter(torch.empty(sizes, dtype=config.params_dtype))
            _initialize_affine_weight_cpu(weight, output_size, input_size, sizes[self.axis], self.axis, init_method,
                                          rank=self._tp_group.rank(), world_size=ranks)  # fmt: skip
            weight.allreduce = not (config.expert_model_parallel_size > 1 or ranks != config.tensor_model_parallel_size)
            setattr(self, f"weight{index}", weight)
            if bias:
                setattr(self, f"bias{index}", torch.nn.Parameter(torch.zeros(sizes[0], dtype=config.params_dtype)))
                getattr(self, f"bias{index}").allreduce = weight.allreduce

    def forward(self, tokens: torch.Tensor, tokens_per_expert: list[int]) -> tuple[torch.Tensor, list[torch.Tensor] | None]:
        biases = [getattr(self, f"bias{index}") if self.use_bias else None for index in range(self.num_gemms)]
        added = biases if not self.returns_bias else [None] * self.num_gemms
        outputs = [
            torch.nn.functional.linear(part, getattr(self, f"weight{index}"), added[index])
            for index, part in enumerate(tokens.split(tokens_per_expert))
        ]
        return torch.cat(outputs), biases if self.returns_bias else None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        ep, state = self._pg_collection.ep, {}
        for index in range(self.num_gemms):
            offset = (len(sharded_offsets), ep.rank() * self.num_gemms + index, ep.size() * self.num_gemms)
            axes = {"weight": self.axis} | ({"bias": 0} if self.axis == 0 else {})
            tensors = make_sharded_tensors_for_checkpoint(
                {name: getattr(self, f"{name}{index}") for name in ("weight", "bias")[: 1 + self.use_bias]}, prefix, axes,
                (*sharded_offsets, offset), tp_group=self._tp_group, dp_cp_group=metadata["dp_cp_group"],
            )  # fmt: skip
            for key, tensor in tensors.items():
                tensor.replica_id = (*tensor.replica_id[:2], self._pg_collection.expt_dp.rank())
                state[f"{key}{index}"] = tensor
        return state


class TEColumnParallelGroupedLinear(_Grouped):
    axis = 0


class TERowParallelGroupedLinear(_Grouped):
    axis = 1


def use() -> None:
    """Have this process build grouped experts."""
    parts = GroupedMLPSubmodules(linear_fc1=TEColumnParallelGroupedLinear, linear_fc2=TERowParallelGroupedLinear)
    LocalSpecProvider.grouped_mlp_modules = lambda _self, _grouped: partial(TEGroupedMLP, submodules=parts)  # type: ignore[assignment]
