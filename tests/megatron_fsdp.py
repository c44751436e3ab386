"""Megatron-FSDP itself: it divides a model over ranks, and Megatron-LM's loader fills it from a checkpoint."""

from __future__ import annotations

from typing import Any
from unittest import mock

from tests.megatron_lm import Arguments


def load_strictly(model: Any, root: str, *, experts: int | None = None) -> dict[str, Any]:
    """Load a checkpoint of weights into a GPTModel, which trains in bf16; answers what this rank then holds of each weight, by
    its name in the model: where that begins, and a numpy array. Fails if the checkpoint lacks one."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel
    from megatron.core.distributed.fsdp.src.megatron_fsdp.uneven_dtensor import update_uneven_dtensor_chunk_metadata
    from megatron.core.transformer.module import Float16Module
    from megatron.training import checkpointing, global_vars

    model.config.bf16 = True
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=True, use_megatron_fsdp=True, data_parallel_sharding_strategy="optim_grads_params"
    )
    divided = FullyShardedDataParallel(model.config, ddp, Float16Module(model.config, model))
    arguments = Arguments(
        load=root, ckpt_format="fsdp_dtensor", use_megatron_fsdp=True, strict_fsdp_dtensor_load=True, finetune=True,
        no_load_optim=True, no_load_rng=True, swiglu=model.config.gated_linear_unit, num_experts=experts,
    )  # fmt: skip
    with mock.patch.object(global_vars, "_GLOBAL_ARGS", arguments):
        checkpointing.load_checkpoint([divided], None, None, strict=True)
    held = {}
    for name, value in divided.module.state_dict().items():
        if not name.endswith("_extra_state"):
            update_uneven_dtensor_chunk_metadata(value)
            (chunk,) = value.__create_chunk_list__()
            local = value.to_local().float().cpu().numpy().reshape(tuple(chunk.sizes))
            held[name.removeprefix("module.")] = tuple(chunk.offsets), local
    return held


def loaded_without_a_gpu(_rank: int, shape: Any, root: str) -> dict[str, Any]:
    """What `load_strictly` answers of the model of a shape, on the CPU."""
    import torch

    from tests import megatron_cpu
    from trainer import cpu_backend

    answers = {"current_device": lambda: 0, "get_device_capability": lambda *_: (9, 0)}
    with cpu_backend.activate(), mock.patch.multiple(torch.cuda, **answers):
        (model,) = megatron_cpu.build(shape)
        return load_strictly(model, root, experts=model.config.num_moe_experts)
