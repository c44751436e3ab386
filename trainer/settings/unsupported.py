"""Switches of megatron-core that this trainer does not carry out, or that need what a CPU is not: refused by name, where
megatron-core would assert in the middle of the first step, or do nothing.
"""

from __future__ import annotations

from formats.errors import UserError
from trainer.config import RunConfig

_UNSUPPORTED = {
    "model.heterogeneous_block_specs": "layers that differ need megatron-core's heterogeneous configuration",
    "model.experimental_attention_variant": "its layers are not among those of this provider",
    "ddp.nccl_ub": "NCCL's user buffers need GPUs",
    "model.hybrid_context_parallel": "its groups are not formed",
    "model.use_te_activation_func": "Transformer Engine's activations need a GPU",
    "model.fused_single_qkv_rope": "its kernel is Transformer Engine's",
    "model.cpu_offloading": "Transformer Engine moves activations, and needs a GPU",
    "optimizer.optimizer_cpu_offload": "there is no other device to move states from",
    "optimizer.optimizer_cuda_graph": "CUDA graphs need a GPU",
    "profiling.use_nsys_profiler": "it records GPUs",
    "profiling.record_memory_history": "it is the memory of GPUs",
    "diagnostics.gpu_sniff_test": "it measures GPUs",
    "diagnostics.log_straggler": "its clocks are CUDA's events",
    "optimizer.overlap_param_gather_with_optimizer_step": "the loop does not start it",
}
"""Switches that megatron-core has, and what is in their way. Those that name a GPU or Transformer Engine work there."""

_NEVER = ("model.heterogeneous_block_specs", "model.experimental_attention_variant", "model.hybrid_context_parallel",
          "optimizer.overlap_param_gather_with_optimizer_step")  # fmt: skip


def check(config: RunConfig, device: str) -> None:
    """Switches that would fail in the first step, or do nothing."""
    for setting, why in _UNSUPPORTED.items():
        part, _, name = setting.partition(".")
        value = getattr(getattr(config, part), name, None)
        if value and (device == "cpu" or setting in _NEVER):
            where = "here" if setting in _NEVER else "on the CPU"
            raise UserError(f"`{setting}` is `{value}`, which does not work {where}: {why}", hint=f"leave `{setting}` out")
    instances = config.ddp.num_distributed_optimizer_instances
    if instances != 1:
        raise UserError(
            f"`ddp.num_distributed_optimizer_instances` is `{instances}`, and one is all that groups are formed for",
            hint="leave `ddp.num_distributed_optimizer_instances` out",
        )
