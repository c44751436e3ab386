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
        self, num_gemms: int, input_size: int, output_size: int, *, config: Any, init_method: Any, pg_collection: Any, **_: Any
    ) -> None:
        super().__init__()
        self.config, self.num_gemms, self._pg_collection = config, num_gemms, pg_collection
        self._tp_group = pg_collection.expt_tp
        ranks, sizes = self._tp_group.size(), [output_size, input_size]
        sizes[self.axis] //= ranks
        for index in range(num_gemms):
            weight = torch.nn.Parameter(torch.empty(sizes, dtype=config.params_dtype))
            _initialize_affine_weight_cpu(weight, output_size, input_size, sizes[self.axis], self.axis, init_method,
                                          rank=self._tp_group.rank(), world_size=ranks)  # fmt: skip
            weight.allreduce = not (config.expert_model_parallel_size > 1 or ranks != config.tensor_model_parallel_size)
            setattr(self, f"weight{index}", weight)

    def forward(self, tokens: torch.Tensor, tokens_per_expert: list[int]) -> tuple[torch.Tensor, None]:
        parts = enumerate(tokens.split(tokens_per_expert))
        return torch.cat([torch.nn.functional.linear(part, getattr(self, f"weight{index}")) for index, part in parts]), None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        ep, state = self._pg_collection.ep, {}
        for index in range(self.num_gemms):
            offset = (len(sharded_offsets), ep.rank() * self.num_gemms + index, ep.size() * self.num_gemms)
            (tensor,) = make_sharded_tensors_for_checkpoint(
                {"weight": getattr(self, f"weight{index}")}, prefix, {"weight": self.axis}, (*sharded_offsets, offset),
                tp_group=self._tp_group, dp_cp_group=metadata["dp_cp_group"],
            ).values()  # fmt: skip
            tensor.replica_id = (*tensor.replica_id[:2], self._pg_collection.expt_dp.rank())
            state[f"{prefix}weight{index}"] = tensor
        return state


class TEColumnParallelGroupedLinear(_Grouped):
    axis = 0


class TERowParallelGroupedLinear(_Grouped):
    axis = 1


def use() -> None:
    """Have this process build grouped experts."""
    parts = GroupedMLPSubmodules(linear_fc1=TEColumnParallelGroupedLinear, linear_fc2=TERowParallelGroupedLinear)
    LocalSpecProvider.grouped_mlp_modules = lambda _self, _grouped: partial(TEGroupedMLP, submodules=parts)  # type: ignore[assignment]
