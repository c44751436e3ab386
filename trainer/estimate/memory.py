"""Estimate how large a model is, and how much of a GPU's memory a run takes.

Counts what megatron-core keeps for each weight and token. Leaves out the CUDA context and NCCL's buffers, which are outside
torch's allocator, and fragmentation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.transformer.enums import AttnBackend

from formats.errors import UserError
from trainer.config import RunConfig, is_packed
from trainer.estimate import built
from trainer.estimate.activations import activations
from trainer.estimate.built import RankParameters, Weights
from trainer.estimate.routing import is_even

FP8_COPIES = 2
"""Bytes per quantized weight: FP8 once as it is and once transposed, for the backward pass (Transformer Engine)."""

FP32 = 4
MOMENTS = 2
WORKSPACE = 64 << 20
"""Bytes that cuBLAS takes on Hopper: 32 MiB for torch's own calls and as much for Transformer Engine's."""


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes for one purpose on one GPU."""

    name: str
    size: int
    why: str


@dataclass(frozen=True, slots=True)
class Estimate:
    """Memory of the fullest pipeline rank's GPUs, in bytes."""

    pp_rank: int
    parts: tuple[Part, ...]
    uneven: int
    """Bytes of the fullest rank where routers send the experts of one rank all the tokens they can."""

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(part.size for part in self.parts)


def parameters(provider: Any) -> int:
    """Count the parameters of the model, without padding of the vocabulary and with a tied embedding once."""
    return built.count_whole(provider).total


def memory(config: RunConfig, world_size: int) -> Estimate:
    """Return the bytes on each GPU of the fullest rank, by purpose, for a resolved run. Builds what each rank holds
    (`estimate.built`); a run, which has built it, calls `of_rank`."""
    ranks = built.count_each_rank(config.model, config.peft)
    estimates = [of_rank(config, parameters, pp_rank, world_size) for pp_rank, parameters in ranks]
    return replace(max(estimates, key=lambda estimate: estimate.total), uneven=max(estimate.uneven for estimate in estimates))


def of_rank(config: RunConfig, parameters: RankParameters, pp_rank: int, world_size: int) -> Estimate:
    """Return the bytes of one rank of pipeline stage `pp_rank`, which holds the parameters `held`."""
    copies = _copies(config.model, world_size)
    constant = (
        _weights(config.model, config.peft, parameters),
        *_adapters(config.model, config.peft, parameters),
        _gradients(config, parameters.trained),
        _optimizer(config, parameters.trained, copies),
    )
    data_parallel = copies[0] // config.model.context_parallel_size
    even = tuple(_activations(config, parameters, pp_rank, data_parallel))
    uneven = even if is_even(config.model) else _activations(config, parameters, pp_rank, data_parallel, uneven=True)
    beside = (*_mask(config), *_workspace(config.model))
    return Estimate(pp_rank, (*constant, *even, *beside), sum(part.size for part in (*constant, *uneven, *beside)))


def _activations(
    config: RunConfig, parameters: RankParameters, pp_rank: int, data_parallel: int, *, uneven: bool = False
) -> Iterator[Part]:
    micro, length = config.train.micro_batch_size, config.dataset.sequence_length
    counted = activations(
        config.model,
        layers=parameters.layers,
        pp_rank=pp_rank,
        tokens=length * micro,
        num_microbatches=config.train.global_batch_size // (micro * data_parallel),
        sequence_length=length,
        peft=config.peft,
        uneven=uneven,
    )
    try:
        yield from [Part(name, size, why) for name, size, why in counted]
    except UserError:
        yield Part("activations", 0, "not counted: there is no formula for this model")


def _workspace(model: Any) -> Iterator[Part]:
    if model.attention_backend is not AttnBackend.local:
        yield Part("workspace", WORKSPACE, "cuBLAS")


def _adapters(model: Any, peft: Any, parameters: RankParameters) -> Iterator[Part]:
    """Yield the bytes of adapters, and of what DoRA keeps beside them."""
    if peft is None:
        return
    kind = model.params_dtype
    yield Part("adapters", parameters.trained.total * kind.itemsize, f"{parameters.trained.total:,} parameters in {_name(kind)}")
    if parameters.magnitudes:
        why = f"{parameters.magnitudes:,} rows of frozen weights, squared, in float32"
        yield Part("lengths of rows", parameters.magnitudes * FP32, why)


def _mask(config: RunConfig) -> Iterator[Part]:
    """Yield the bytes of the attention mask that megatron-core's own attention needs for packed rows; a GPU's needs none."""
    if is_packed(config.dataset) and config.model.attention_backend is AttnBackend.local:
        rows, length = config.train.micro_batch_size, config.dataset.sequence_length
        yield Part("attention mask", rows * length**2, f"which tokens of packed rows see which: {rows} × {length}² pairs")


def _copies(model: Any, world_size: int) -> tuple[int, int]:
    """Return how many GPUs hold the same dense weights, and the same experts, context-parallel ranks included."""
    pipeline, tensor = model.pipeline_model_parallel_size, model.tensor_model_parallel_size
    experts = (model.expert_tensor_parallel_size or tensor) * model.expert_model_parallel_size
    return world_size // (pipeline * tensor), world_size // (pipeline * experts)


def _weights(model: Any, peft: Any, parameters: RankParameters) -> Part:
    count = (parameters.trained if peft is None else parameters.frozen).total
    size, why = count * model.params_dtype.itemsize, f"{count:,} parameters in {_name(model.params_dtype)}"
    if model.fp8 or model.fp4:
        size += parameters.matrices * FP8_COPIES - (parameters.matrices * model.params_dtype.itemsize if model.fp8_param else 0)
        why += (
            f", {parameters.matrices:,} of them quantized {'instead' if model.fp8_param else 'as well'}, with a transposed copy"
        )
    return Part("weights", size, why)


def _gradients(config: RunConfig, trained: Weights) -> Part:
    kind = torch.float32 if config.ddp.grad_reduce_in_fp32 else config.model.params_dtype
    owner = "parameter" if config.peft is None else "parameter of an adapter"
    return Part("gradients", trained.total * kind.itemsize, f"one per {owner}, added up in {_name(kind)}")


def _optimizer(config: RunConfig, trained: Weights, copies: tuple[int, int]) -> Part:
    optimizer = config.optimizer
    mixed = config.model.params_dtype != torch.float32
    if optimizer.use_precision_aware_optimizer:
        # A bf16 weight holds the upper half of its fp32 master: the lower half is all that is left to keep.
        master = 2 if optimizer.store_param_remainders and config.model.bf16 else optimizer.main_params_dtype.itemsize
        bytes_per_parameter = master + optimizer.exp_avg_dtype.itemsize + optimizer.exp_avg_sq_dtype.itemsize
    else:
        bytes_per_parameter = FP32 * (MOMENTS + mixed)
        # Reduced in bf16, gradients are copied to fp32 for the step.
        bytes_per_parameter += FP32 if mixed and not config.ddp.grad_reduce_in_fp32 else 0
    shares = copies if optimizer.use_distributed_optimizer else (1, 1)
    size = bytes_per_parameter * trained.dense // shares[0] + bytes_per_parameter * trained.experts // shares[1]
    why = f"{bytes_per_parameter} bytes per parameter" + (" of an adapter" if config.peft is not None else "")
    return Part("optimizer", size, why + (f", over {shares[0]} ranks" if shares[0] > 1 else ""))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
