"""Refuse, by name, settings of megatron-core that this trainer does not implement, or that need a GPU: megatron-core would assert
in the first step, or ignore them.

`tests/trainer/test_every_setting.py` checks that each field of megatron-core's configurations is refused here, or changes what is
built or done.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

from megatron.core import distributed
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig

from formats.errors import UserError
from trainer.config import RunConfig
from trainer.settings.refused import as_text, default_of

NEVER: dict[str, dict[str, str]] = {
    "model": {
        "its process groups are not formed": """tensor_parallel_num_weight_shards gtp_weight_remat_size
            expert_tensor_parallel_num_weight_shards expert_gtp_weight_remat_size hybrid_context_parallel
            hierarchical_context_parallel_sizes
            max_seqlen_per_dp_cp_rank pipeline_model_parallel_comm_backend""",
        "the training loop sets it": """finalize_model_grads_func grad_scale_func moe_grad_scale_func mtp_grad_scale_func
            no_sync_func grad_sync_func param_sync_func""",
        "the run's log has a clock of its own": "timers barrier_with_L1_time",
        "precision is what `mixed_precision` says": "enable_autocast fp8_quantizer_factory fp4_quantizer_factory quant_recipe",
        "layers take what the residual connection carries in the precision of their weights": "fp32_residual_connection",
        "Transformer Engine offloads no weights without activations": "cpu_offloading_activations",
        "weights would hold whatever was in memory": "perform_initialization init_model_with_meta_device",
        "`model.cuda_graph_impl=full_iteration` is how CUDA graphs are captured": """enable_cuda_graph external_cuda_graph
            cuda_graph_modules cuda_graph_scope inference_cuda_graph_scope cuda_graph_use_single_mempool
            cuda_graph_retain_backward_graph use_te_rng_tracker""",
        "layers of multi-token prediction are those of DeepSeek-V3": """mtp_use_repeated_layer mtp_detach_heads
            mtp_hybrid_override_pattern mtp_standalone""",
        "layers that differ need megatron-core's heterogeneous configuration": """heterogeneous_block_specs
            hetereogenous_dist_checkpoint""",
        "the indexer of sparse attention is not trained here": """dsa_indexer_loss_coeff dsa_indexer_use_sparse_loss
            experimental_attention_variant_loss_scale_func""",
        "sparse attention has only been compared with the kernels of torch": "dsa_kernel_backend",
        "its layers are not among those of this provider": """dsa_indexer_scoring_relu dsa_indexer_k_norm_fp32
            mrope_section use_grouped_gemm_for_dense_mlp""",
        "Mamba's other kernels were not tried": "mamba_training_ssm_states_dtype use_mamba_mem_eff_path",
        "nothing in the step clips or reports attention's logits": """qk_clip qk_clip_alpha qk_clip_threshold
            log_max_attention_logit""",
        "the forward step has no schedule to divide": """overlap_moe_expert_parallel_comm delay_wgrad_compute
            overlap_dispatch_backward_with_experts_wgrad ep_overlap_early_attn_memory_release high_priority_a2a_comm_stream
            num_microbatches_with_partial_activation_checkpoints""",
        "it needs a torch with ring exchange, which no package index has": "use_ring_exchange_p2p",
        "it needs APEX, which no package index has": """defer_embedding_wgrad_compute wgrad_deferral_limit
            memory_efficient_layer_norm""",
        "Transformer Engine does not read it any more": """tp_comm_split_ag tp_comm_atomic_ag tp_comm_split_rs tp_comm_atomic_rs
            fp8_interval fp8_wgrad cpu_offloading_weights cpu_offloading_double_buffering""",
        "CUDA graphs of offloaded layers are not captured": "cpu_offloading_retain_pinned_cpu_buffers",
        "what attention in FP8 takes and gives is bf16 (`model.fp8_dot_product_attention`)": "fp8_multi_head_attention",
        "NCCL starts Transformer Engine's buffers": "tp_comm_bootstrap_backend",
        "versions of flash-attn were not tried": "flash_attention_version",
        "megatron-core does not read it": "apply_residual_connection_post_layernorm moe_token_dropping",
        "NVIDIA's Kitchen is not supported": "use_kitchen use_kitchen_attention kitchen_attention_backend",
        "it is for megatron-core's inference, which this trainer does not run": """flash_decode batch_invariant_mode
            symmetric_ar_type nccl_all_reduce_for_prefill use_inference_optimized_layers inference_fuse_tp_communication
            inference_disable_triton_nvls_kernels inference_grouped_gemm_backend inference_moe_disable_fused_quant_kernels
            inference_moe_token_dispatcher_type inference_rng_tracker inference_sampling_seed mlp_chunks_for_prefill
            moe_pad_experts_for_cuda_graph_inference moe_enable_routing_replay test_mode""",
        "layers follow from the device": "transformer_impl",
        "a run's settings are kept in its own folder": "config_logger_dir",
        "`moe_flex_dispatcher_backend` and `moe_flex_dispatcher_num_sms` took its place": """moe_enable_deepep moe_deepep_num_sms
            moe_hybridep_num_sms""",
        "HybridEP's own permutation and block sizes were not tried": """moe_permute_fusion_into_hybridep
            moe_hybridep_pad_uneven_dispatch_inputs moe_hybridep_num_blocks_permute moe_hybridep_num_blocks_unpermute
            moe_hybridep_num_sms_preprocessing moe_expert_rank_capacity_factor""",
        "NCCL EP was not tried": "moe_ncclep_static_shape moe_ncclep_zero_copy",
        "stashed and offloaded activations were not tried": """moe_paged_stash moe_paged_stash_page_size
            moe_paged_stash_buffer_size_factor_cuda moe_paged_stash_buffer_size_factor_cpu
            fine_grained_activation_offloading offload_modules min_offloaded_tensor_size delay_offload_until_cuda_graph
            delta_offload_bytes_across_pp_ranks activation_offload_fraction fine_grained_offloading_max_inflight_offloads""",
        "Transformer Engine's grouped and fused experts were not tried": """use_transformer_engine_op_fuser
            use_grouped_gemm_for_shared_expert moe_shared_expert_glu_interleave_size moe_mlp_glu_interleave_size
            moe_single_grouped_weight moe_single_grouped_bias use_fused_weighted_squared_relu""",
    },
    "ddp": {
        "one is all that groups are formed for": "num_distributed_optimizer_instances",
        "megatron-core's FSDP is not supported": """data_parallel_sharding_strategy
            outer_dp_sharding_strategy suggested_communication_unit_size keep_fp8_transpose_cache fsdp_double_buffer
            fsdp_db_use_persist_buf_on_alloc_fail fsdp_all_gather_in_start_param_sync fsdp_manual_registration
            megatron_fsdp_main_params_dtype megatron_fsdp_main_grads_dtype megatron_fsdp_grad_comm_dtype
            megatron_fsdp_use_decoupled_grad megatron_fsdp_cuda_graph_mode
            megatron_fsdp_enable_fine_grained_param_gather megatron_fsdp_max_pool_double_buffer""",
        "MXFP8 weights are not supported": "reuse_grad_buf_for_mxfp8_param_ag",
        "NCCL's user buffers were not tried": "nccl_ub disable_symmetric_registration",
        "the forward step has no schedule to divide": "delay_wgrad_compute",
        "megatron-core does not read it": "gradient_reduce_div_fusion num_buckets",
    },
    "optimizer": {
        "the loop does not start it": "overlap_param_gather_with_optimizer_step",
        "MXFP8 weights are not supported": "reuse_grad_buf_for_mxfp8_param_ag",
        "CUDA graphs of the optimizer are not captured": "optimizer_cuda_graph",
        "the run's log has a clock of its own": "timers barrier_with_L1_time",
        "a run's settings are kept in its own folder": "config_logger_dir",
        "the log has no such figure": "log_num_zeros_in_grad",
        "megatron-core chooses its optimizers for the CPU whatever it says": "use_torch_optimizer_for_cpu_offload",
        "gradients are added in what `ddp.grad_reduce_in_fp32` says": "main_grads_dtype",
        "only Adam and SGD were tried": """use_layer_wise_distributed_optimizer muon_momentum muon_split_qkv muon_nesterov
            muon_scale_mode muon_fp32_matmul_prec muon_coefficient_type muon_num_ns_steps muon_tp_mode
            muon_extra_scale_factor muon_scalar_optimizer lion_beta1 lion_beta2 soap_shampoo_beta soap_precondition_frequency
            soap_use_kl_shampoo adaptive_muon_moment2_method adaptive_muon_beta2 adaptive_muon_eps""",
    },
}
"""By section and reason: fields of which only the default is accepted, on every device."""

GPU_ONLY = {
    "model.use_te_activation_func": "Transformer Engine's activations need a GPU",
    "model.fused_single_qkv_rope": "its kernel is Transformer Engine's",
    "model.fused_residual_rmsnorm": "its kernel is Transformer Engine's",
    "model.cuda_graph_impl": "CUDA captures it",
    "model.gradient_accumulation_fusion": "its kernels are Transformer Engine's",
    "model.cpu_offloading": "Transformer Engine moves activations, and needs a GPU",
    "optimizer.optimizer_cpu_offload": "there is no other device to move states from",
    "profiling.use_nsys_profiler": "it records GPUs",
    "profiling.record_memory_history": "it is the memory of GPUs",
    "diagnostics.gpu_sniff_test": "it measures GPUs",
    "diagnostics.log_straggler": "its clocks are CUDA's events",
}
"""Settings that need a GPU, and the reason."""

ALWAYS_ON_GPUS = {
    "model.masked_softmax_fusion": "the softmax is part of Transformer Engine's attention",
    "model.persist_layer_norm": "Transformer Engine has one kernel for each norm",
}
"""Kernels that cannot be switched off on GPUs, and the reason."""

_DEFAULTS = {
    "model": TransformerConfig,
    "ddp": distributed.DistributedDataParallelConfig,
    "optimizer": OptimizerConfig,
}


def check(config: RunConfig, device: str) -> None:
    """Raise UserError for settings that would fail in the first step, or do nothing."""
    for setting, why in never_supported():
        if _differs(config, setting):
            raise _refusal(config, setting, "here", why)
    for setting, why in GPU_ONLY.items() if device == "cpu" else ():
        if _differs(config, setting):
            raise _refusal(config, setting, "on the CPU", why)
    for setting, why in ALWAYS_ON_GPUS.items() if device == "gpu" else ():
        if getattr(config.model, setting.removeprefix("model."), None) is False:
            raise _refusal(config, setting, "on GPUs", why)


def never_supported() -> Iterator[tuple[str, str]]:
    """Yield each setting of `NEVER` with the reason that it is refused."""
    for section, reasons in NEVER.items():
        for why, names in reasons.items():
            yield from ((f"{section}.{name}", why) for name in names.split())


def _differs(config: RunConfig, setting: str) -> bool:
    """Tell whether a setting differs from its class's default. A model of the user's own may have other defaults, or no such
    field."""
    section, _, name = setting.partition(".")
    part = getattr(config, section)
    if not hasattr(part, name):
        return False
    value, kind = getattr(part, name), part if dataclasses.is_dataclass(part) else _DEFAULTS[section]
    return bool(value != default_of(kind, name)) and not (section == "model" and value == getattr(_finalized(), name))


@functools.cache
def _finalized() -> TransformerConfig:
    """Return megatron-core's defaults after it derived fields from them, as a model that was resolved before has them."""
    return TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)


def _refusal(config: RunConfig, setting: str, where: str, why: str) -> UserError:
    section, _, name = setting.partition(".")
    value = as_text(getattr(getattr(config, section), name))
    return UserError(f"`{setting}` is `{value}`, which does not work {where}: {why}", hint=f"leave `{setting}` out")
