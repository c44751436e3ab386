"""Count what ranks hold of a model, in the model itself: one process builds each rank's chunks in turn, on torch's meta device
and in torch's fake process group.

Layers are megatron-core's own on any machine: they have the parameters of Transformer Engine's. Knows no bytes.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.fp8_utils import is_first_last_bf16_layer

from trainer import model, rehearsal
from trainer.estimate import adapters
from trainer.layers.pattern import layers_of_each
from trainer.peft.attach import attach_on_meta, module_names
from trainer.settings.kernels import WITHOUT_CUDA


@dataclass(frozen=True, slots=True)
class Weights:
    """Numbers of parameters on one rank; experts separately, since fewer ranks hold copies of them."""

    dense: int = 0
    experts: int = 0

    @property
    def total(self) -> int:
        """Dense and expert parameters."""
        return self.dense + self.experts


@dataclass(frozen=True, slots=True)
class RankParameters:
    """Parameters of one rank."""

    trained: Weights
    frozen: Weights
    """Empty without `peft`."""

    matrices: int
    """Parameters that FP8 or FP4 quantizes: the matrices of layers that are not left in bf16."""

    magnitudes: int
    """Outputs that DoRA scales."""

    layers: tuple[int, ...]
    """Transformer layers, counted from 0 in the whole model, those of multi-token prediction last."""

    @property
    def total(self) -> int:
        """All parameters."""
        return self.trained.total + self.frozen.total


_LAYER = re.compile(r"(?:^|\.)(?:(decoder|mtp)\.)?layers\.(\d+)$")
_MATRIX = re.compile(
    r"(?:^|\.)(?:(decoder|mtp)\.)?layers\.(\d+)\.(?!.*\.adapter\.).*(linear_\w+|eh_proj|in_proj|out_proj)\.weight\d*$"
)


def count_chunks(chunks: Sequence[Any], provider: Any) -> RankParameters:
    """Count the chunks of one rank, on any device."""
    counts = {(trained, expert): 0 for trained in (True, False) for expert in (True, False)}
    matrices, magnitudes = 0, 0
    for name, parameter in _parameters(chunks):
        counts[parameter.requires_grad, not getattr(parameter, "allreduce", True)] += parameter.numel()
        match = _MATRIX.search(name)
        matrices += parameter.numel() if match and is_quantized(provider, _number(match, provider)) else 0
        magnitudes += parameter.numel() if name.endswith("weight_magnitude") else 0
    trained, frozen = (Weights(counts[trains, False], counts[trains, True]) for trains in (True, False))
    layers = tuple(dict.fromkeys(_layers(chunks, provider)))
    return RankParameters(trained, frozen, matrices, magnitudes, layers)


def is_quantized(provider: Any, number: int) -> bool:
    """Tell whether layer `number` multiplies in FP8 or FP4. Layers of multi-token prediction, after the model's, always do."""
    layers = getattr(provider, "num_layers", 0)
    return bool(provider.fp8 or provider.fp4) and (number >= layers > 0 or not is_first_last_bf16_layer(provider, number))


def _number(match: re.Match[str], provider: Any) -> int:
    """Return the number of a layer in the whole model, as the provider counts; those of multi-token prediction come last."""
    if match[1] == "mtp":
        return int(match[2]) + provider.num_layers
    return int(match[2]) // layers_of_each(provider)


def _parameters(chunks: Sequence[Any]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield each parameter once, under its name in the whole model."""
    seen: set[int] = set()
    for chunk in chunks:
        for name, _, module in module_names(model.unwrap(chunk)):
            for local_name, parameter in module.named_parameters(recurse=False):
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield f"{name}.{local_name}", parameter


def _layers(chunks: Sequence[Any], provider: Any) -> Iterator[int]:
    for chunk in chunks:
        for name, _, module in module_names(model.unwrap(chunk)):
            if (match := _LAYER.search(name)) and hasattr(module, "layer_number"):
                yield _number(match, provider)


_WITHOUT_GPU: dict[str, Any] = WITHOUT_CUDA | {
    # Without it memory is taken on a device by its number, whatever torch's own default is.
    "use_cpu_initialization": True,
    "perform_initialization": False,
    "context_parallel_size": 1,
    "sequence_parallel": False,
    "tp_comm_overlap": False,
    "cpu_offloading": False,
    "moe_grouped_gemm": False,
    "fp8": None,
    "fp8_param": False,
    "fp4": None,
}
"""Settings that change no parameter, with the values that megatron-core's own layers need."""

_WHOLE: dict[str, Any] = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "pipeline_model_parallel_layout": None,
    "num_layers_in_first_pipeline_stage": None,
    "num_layers_in_last_pipeline_stage": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
    "defer_embedding_wgrad_compute": False,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 1,
    "make_vocab_size_divisible_by": 1,
}
"""The layout of one rank that holds everything, without padding."""


def count_whole(provider: Any, peft: Any = None) -> RankParameters:
    """Count the whole model, without padding of the vocabulary and with tied weights once. The provider need not be finalized."""
    local = _with_fields(provider, _WITHOUT_GPU | _WHOLE)
    getattr(local, "finalize", lambda: None)()
    local = _with_fields(local, _WITHOUT_GPU)  # once more, for fields that `finalize` derived
    return _count_rank(local, provider, peft, rank=0, world_size=1)


def count_each_rank(provider: Any, peft: Any = None) -> Iterator[tuple[int, RankParameters]]:
    """Yield pipeline rank and parameters of each rank of a finalized provider that may hold something else: one of each
    pipeline stage and, where `peft` may choose some experts, one of each expert-parallel rank."""
    local = _with_fields(provider, _WITHOUT_GPU)
    tensor, experts = local.tensor_model_parallel_size, local.expert_model_parallel_size
    ranks_per_expert = local.expert_tensor_parallel_size or tensor
    stage = math.lcm(tensor, ranks_per_expert * experts)
    for pp_rank in range(local.pipeline_model_parallel_size):
        for ep_rank in range(experts if _may_choose_experts(peft) else 1):
            rank = pp_rank * stage + ep_rank * ranks_per_expert
            yield pp_rank, _count_rank(local, provider, peft, rank=rank, world_size=stage * local.pipeline_model_parallel_size)


_NUMBER = re.compile(r"[\d?\[]")
"""What a pattern has that fits some experts' names and not others: these differ in a number alone."""


def _may_choose_experts(peft: Any) -> bool:
    """Tell whether a method may adapt some experts and not others."""
    if not adapters.is_known(peft):
        return peft is not None
    return any(_NUMBER.search(pattern) for pattern in (*peft.target_modules, *peft.exclude_modules))


def _with_fields(provider: Any, fields: dict[str, Any]) -> Any:
    changed = copy.copy(provider)
    for name, value in fields.items():
        if hasattr(changed, name):
            setattr(changed, name, value)
    return changed


def _count_rank(built: Any, provider: Any, peft: Any, *, rank: int, world_size: int) -> RankParameters:
    with rehearsal.as_rank(rank, world_size, built):
        chunks = model.shapes(built)
        if peft is not None:
            attach_on_meta(chunks, peft)
        return count_chunks(chunks, provider)
