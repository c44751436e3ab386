"""How large a model is, and how much of a GPU's memory a run takes, from arithmetic alone.

Knows what megatron-core keeps for each weight and token. Does not know the CUDA context and NCCL's buffers, which live outside
torch's allocator, nor fragments in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.enums import AttnBackend, LayerType
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from trainer.config import RunConfig
from trainer.counting import adapters as counting
from trainer.counting.activations import activations, is_quantized
from trainer.counting.adapters import Adapters, known
from trainer.counting.shape import Shape, shape_of
from trainer.data import is_packed

FP8_COPIES = 2
"""Bytes per quantized weight: FP8 once as it is and once transposed, for the backward pass (Transformer Engine)."""

FP32 = 4
MOMENTS = 2
WORKSPACE = 64 << 20
"""Bytes that cuBLAS takes on Hopper: 32 MiB for torch's own calls and as much for Transformer Engine's."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Numbers of parameters on one rank. Experts are apart: fewer ranks hold copies of them."""

    dense: int
    experts: int
    matrices: int = 0
    """Those of both that FP8 or FP4 quantizes: what layers multiply with, but for those left in bf16."""

    @property
    def total(self) -> int:
        """All parameters of the rank."""
        return self.dense + self.experts


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

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(part.size for part in self.parts)


def parameters(provider: Any) -> int:
    """Every parameter of the model, with the vocabulary's own size and a tied embedding counted once."""
    shape = shape_of(provider)
    layers = sum(sum(_layer(shape, number, tp=1, ep=1, etp=1)) for number in range(shape.layers))
    vocabulary = shape.vocab * shape.hidden * (1 if shape.tied else 2)
    return layers + vocabulary + (shape.positions + shape.norm) * shape.hidden


def _layer(shape: Shape, number: int, *, tp: int, ep: int, etp: int) -> tuple[int, int]:
    """Parameters of one layer on one rank: the replicated and tensor-parallel ones, and those of experts."""
    hidden, fused = shape.hidden, (shape.queries + 2 * shape.keys) // tp
    norms = shape.norm * (2 * hidden + (2 * shape.head if shape.qk_norm else 0))
    attention = shape.attention_matrices // tp
    biases = (fused if shape.qkv_bias else 0) + (hidden if shape.linear_bias else 0)
    if not shape.experts[number]:
        return norms + attention + biases + _mlp(shape, shape.ffn, tp), 0
    router = shape.num_experts * (hidden + (1 if shape.linear_bias else 0))
    shared = _mlp(shape, shape.shared_ffn, tp) if shape.shared_ffn else 0
    return norms + attention + biases + router + shared, shape.num_experts // ep * _mlp(shape, shape.expert_ffn, etp)


def _mlp(shape: Shape, ffn: int, tp: int) -> int:
    biases = shape.gates * ffn // tp + shape.hidden if shape.linear_bias else 0
    return shape.mlp_matrices(ffn) // tp + biases


def parameters_per_rank(provider: Any, *, pp_rank: int = 0) -> Weights:
    """Parameters on each GPU of a pipeline rank of a finalized provider, as megatron-core lays them out: padded vocabulary,
    and with tied weights a second copy of the embedding on the last pipeline rank."""
    shape, tp, pp = shape_of(provider), provider.tensor_model_parallel_size, provider.pipeline_model_parallel_size
    ep, etp = provider.expert_model_parallel_size, provider.expert_tensor_parallel_size or tp
    held = _layers(provider, pp_rank)
    counts = [_layer(shape, number, tp=tp, ep=ep, etp=etp) for number in held]
    dense, experts = (sum(count[which] for count in counts) for which in (0, 1))
    multiplied = [
        shape.attention_matrices // tp + (one[1] if shape.experts[n] else shape.mlp_matrices(shape.ffn) // tp)
        for n, one in zip(held, counts, strict=True)
    ]
    matrices = sum(number for n, number in zip(held, multiplied, strict=True) if is_quantized(provider, n))
    first, last = pp_rank == 0, pp_rank == pp - 1
    vocabulary = shape.padded_vocab * shape.hidden // tp
    dense += (vocabulary + shape.positions * shape.hidden) * first + shape.norm * shape.hidden * last
    dense += vocabulary * (last and not (first and shape.tied))
    return Weights(dense, experts, matrices)


def adapters(provider: Any, peft: Any) -> int:
    """Parameters that a method of fine-tuning adds to the model, all of which are trained; 0 for one that is not known here."""
    return counting.adapters(peft, shape_of(provider))


def adapters_per_rank(provider: Any, peft: Any, *, pp_rank: int = 0) -> Adapters:
    """The same on each GPU of a pipeline rank of a finalized provider; of ranks with different experts, on the fullest."""
    tp, ep = provider.tensor_model_parallel_size, provider.expert_model_parallel_size
    sizes = {"tp": tp, "ep": ep, "etp": provider.expert_tensor_parallel_size or tp}
    return counting.on_rank(peft, shape_of(provider), _layers(provider, pp_rank), **sizes)


def _layers(provider: Any, pp_rank: int) -> list[int]:
    """The layers that a pipeline rank computes."""
    layout, virtual = provider.pipeline_model_parallel_layout, provider.virtual_pipeline_model_parallel_size
    if layout is not None:
        stages = [
            rank
            for chunk in zip(*layout.layout, strict=True)
            for rank, one in enumerate(chunk)
            for kind in one
            if kind == LayerType.decoder
        ]
        return [number for number, rank in enumerate(stages) if rank == pp_rank]
    held: list[int] = []
    for stage in range(virtual or 1):
        vp_stage = stage if virtual else None
        start = get_transformer_layer_offset(provider, vp_stage, pp_rank)
        held.extend(range(start, start + get_num_layers_to_build(provider, vp_stage, pp_rank)))
    return held


def memory(config: RunConfig, world_size: int) -> Estimate:
    """Bytes on each GPU of the fullest pipeline rank, for a run that `resolve` has gone through: a line per purpose."""
    ranks = range(config.model.pipeline_model_parallel_size)
    return max((_on_rank(config, rank, world_size) for rank in ranks), key=lambda one: one.total)


def _on_rank(config: RunConfig, pp_rank: int, world_size: int) -> Estimate:
    held = parameters_per_rank(config.model, pp_rank=pp_rank)
    added = adapters_per_rank(config.model, config.peft, pp_rank=pp_rank)
    trained = held if config.peft is None else Weights(added.dense, added.experts)
    copies = _copies(config.model, world_size)
    micro = config.train.micro_batch_size
    data_parallel = copies[0] // config.model.context_parallel_size
    parts = (
        _weights(config.model, held),
        *_adapters(config, added),
        _gradients(config, trained),
        _optimizer(config, trained, copies),
        *(
            Part(name, size, why)
            for name, size, why in activations(
                config.model,
                layers=_layers(config.model, pp_rank),
                pp_rank=pp_rank,
                tokens=config.dataset.sequence_length * micro,
                num_microbatches=config.train.global_batch_size // (micro * data_parallel),
                sequence_length=config.dataset.sequence_length,
                peft=config.peft,
            )
        ),
        *_mask(config),
        Part("workspace", WORKSPACE, "cuBLAS"),
    )
    return Estimate(pp_rank, parts)


def _adapters(config: RunConfig, added: Adapters) -> Iterator[Part]:
    """Adapters, and what DoRA keeps beside them."""
    if config.peft is None:
        return
    kind, method = config.model.params_dtype, type(config.peft).__name__
    why = f"{added.total:,} parameters in {_name(kind)}"
    if not known(config.peft):
        why = f"what `{method}` adds is not known here and not counted: not its parameters, their gradients nor optimizer state"
    yield Part("adapters", added.total * kind.itemsize, why)
    if added.rows:
        yield Part("lengths of rows", added.rows * FP32, f"{added.rows:,} rows of frozen weights, squared, in float32")


def _mask(config: RunConfig) -> Iterator[Part]:
    """On a GPU attention is told where examples begin; megatron-core's own takes a mask instead."""
    if is_packed(config.dataset) and config.model.attention_backend is AttnBackend.local:
        rows, length = config.train.micro_batch_size, config.dataset.sequence_length
        yield Part("attention mask", rows * length**2, f"which tokens of packed rows see which: {rows} × {length}² pairs")


def _copies(model: Any, world_size: int) -> tuple[int, int]:
    """GPUs that hold the same dense weights, and the same experts: context-parallel ranks among them."""
    pipeline, tensor = model.pipeline_model_parallel_size, model.tensor_model_parallel_size
    experts = (model.expert_tensor_parallel_size or tensor) * model.expert_model_parallel_size
    return world_size // (pipeline * tensor), world_size // (pipeline * experts)


def _weights(model: Any, held: Weights) -> Part:
    size, why = held.total * model.params_dtype.itemsize, f"{held.total:,} parameters in {_name(model.params_dtype)}"
    if model.fp8 or model.fp4:
        size += held.matrices * FP8_COPIES - (held.matrices * model.params_dtype.itemsize if model.fp8_param else 0)
        why += f", {held.matrices:,} of them quantized {'instead' if model.fp8_param else 'as well'}, with a transposed copy"
    return Part("weights", size, why)


def _gradients(config: RunConfig, held: Weights) -> Part:
    kind = torch.float32 if config.ddp.grad_reduce_in_fp32 else config.model.params_dtype
    which = "parameter" if config.peft is None else "parameter of an adapter"
    return Part("gradients", held.total * kind.itemsize, f"one per {which}, added up in {_name(kind)}")


def _optimizer(config: RunConfig, held: Weights, copies: tuple[int, int]) -> Part:
    told = config.optimizer
    mixed = config.model.params_dtype != torch.float32
    if told.use_precision_aware_optimizer:
        # A bf16 weight holds the upper half of its fp32 master: the lower half is all that is left to keep.
        master = 2 if told.store_param_remainders and config.model.bf16 else told.main_params_dtype.itemsize
        each = master + told.exp_avg_dtype.itemsize + told.exp_avg_sq_dtype.itemsize
    else:
        each = FP32 * (MOMENTS + mixed)
        # Reduced in bf16, gradients are copied to fp32 for the step.
        each += FP32 if mixed and not config.ddp.grad_reduce_in_fp32 else 0
    shares = copies if told.use_distributed_optimizer else (1, 1)
    size = each * held.dense // shares[0] + each * held.experts // shares[1]
    why = f"{each} bytes per parameter" + (" of an adapter" if config.peft is not None else "")
    return Part("optimizer", size, why + (f", over {shares[0]} ranks" if shares[0] > 1 else ""))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
