"""One training step of a small model at any layout: its loss and gradients, which a piece of `trainer.layers` keeps the same."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import torch

from tests.trainer.small import FixedTokens

SEQUENCE, MICRO_BATCHES = 24, 2
SMALL: dict[str, Any] = {
    "num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 8,
    "vocab_size": 64, "make_vocab_size_divisible_by": 16, "seq_length": SEQUENCE, "normalization": "RMSNorm",
    "gated_linear_unit": True, "add_bias_linear": False, "hidden_dropout": 0.0, "attention_dropout": 0.0,
    "layernorm_epsilon": 1e-5,
}  # fmt: skip
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_model_parallel_size": 2},
    "tp2_sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "tp4": {"tensor_model_parallel_size": 4},
    "pp2": {"pipeline_model_parallel_size": 2},
    "full_recompute": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "selective_recompute": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
    "fused_bias_dropout": {"bias_dropout_fusion": True},
}

Gradients = dict[str, np.ndarray]


def step(ranks: Any, fields: dict[str, Any], layout: str = "") -> tuple[float, Gradients]:
    """The loss and the whole gradients of one step of a model with these fields, whose weights follow from their names."""
    changes = LAYOUTS.get(layout, {})
    world = changes.get("tensor_model_parallel_size", 1) * changes.get("pipeline_model_parallel_size", 1)
    answers = ranks.run(on_rank, world, {**SMALL, **fields}, changes)
    whole: Gradients = {}
    for name, region, shape, data in (shard for _, _, shards in answers for shard in shards):
        gradient = whole.setdefault(name, np.full(shape, np.nan, np.float32))
        held = gradient[region]
        assert np.isnan(held).all() or np.allclose(held, data, atol=1e-6), f"replicas of {name} differ"
        gradient[region] = data
    assert not any(np.isnan(gradient).any() for gradient in whole.values())
    norm = sum(np.square(gradient.astype(np.float64)).sum() for gradient in whole.values()) ** 0.5
    for _, of_optimizer, _ in answers:
        assert abs(of_optimizer - norm) <= 1e-6 * norm, f"the optimizer's norm is {of_optimizer}, that of the gradients is {norm}"
    return answers[-1][0], whole


def on_rank(fields: dict[str, Any], changes: dict[str, Any]) -> tuple[float, float, list[Any]]:
    """The loss on this rank, the optimizer's gradient norm, and (name, region, global shape, gradient) of each of its shards."""
    from trainer import model, optim, parallel
    from trainer.checkpoints.live import local_weights
    from trainer.config import RunConfig
    from trainer.model import GPTModelProvider, MLAModelProvider
    from trainer.settings.resolve import resolve

    provider = MLAModelProvider if "kv_lora_rank" in fields else GPTModelProvider
    config = RunConfig(model=provider(**fields, **changes), dataset=FixedTokens(64, SEQUENCE), mixed_precision="fp32")
    config.train.global_batch_size, config.train.micro_batch_size, config.optimizer.lr = 2 * MICRO_BATCHES, 2, 1e-4
    world = config.model.tensor_model_parallel_size * config.model.pipeline_model_parallel_size
    config = resolve(config, world_size=world, device="cpu").config
    with parallel.session(config, "cpu"):
        chunks = model.build(config.model)
        for shard in local_weights(chunks):
            shard.data.copy_(value(shard.name, shard.global_shape)[shard.region])
        wrapped = optim.wrap(chunks, config.model, config.ddp)
        optimizer = optim.make_optimizer(wrapped, config)
        loss = _one_step(wrapped, config)
        optimizer.prepare_grads()
        norm = float(optimizer.get_grad_norm())
        for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
            parameter.data.copy_(parameter.main_grad)
        for buffer in (buffer for chunk in chunks for buffer in chunk.buffers()):
            buffer.zero_()  # has no gradient
        return loss, norm, [(part.name, part.region, part.global_shape, part.data.numpy()) for part in local_weights(chunks)]


def value(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A whole weight that follows from its name; that of a norm is around 1."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    return 1 + 0.3 * noise if "norm" in name and name.endswith("weight") else 0.15 * noise


def _one_step(wrapped: list[Any], config: Any) -> float:
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from trainer.loss import forward_step

    samples = config.dataset.build(None, 0, (10, 0, 0))[0]
    batches = [
        {name: torch.stack([samples[2 * number + row][name] for row in range(2)]) for name in samples[0]}
        for number in range(MICRO_BATCHES)
    ]
    losses = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=wrapped,
        num_microbatches=MICRO_BATCHES,
        seq_length=SEQUENCE,
        micro_batch_size=2,
        forward_only=False,
    )
    last = parallel_state.is_pipeline_last_stage()
    return float(sum(loss for loss, _ in map(tuple, losses))) if last else float("nan")
