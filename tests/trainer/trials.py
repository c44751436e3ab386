"""Trials on the CPU: another value of each setting, and the settings that both runs share."""

from __future__ import annotations

import torch

from tests.trainer.observed import Trial

BF16 = {"mixed_precision": "bf16_mixed"}
MOE = {"model.num_moe_experts": 4, "model.moe_ffn_hidden_size": 16, "model.moe_token_dispatcher_type": "alltoall",
       "model.moe_aux_loss_coeff": 0.1}  # fmt: skip
SHARED = {**MOE, "model.moe_shared_expert_intermediate_size": 16}
GROUPS = {**MOE, "model.num_moe_experts": 8, "model.moe_router_num_groups": 2, "model.moe_router_group_topk": 1,
          "model.moe_router_topk": 2}  # fmt: skip
BIAS = {**MOE, "model.moe_router_enable_expert_bias": True, "model.moe_router_score_function": "sigmoid",
        "model.moe_aux_loss_coeff": 0.0}  # fmt: skip
CAPACITY = {**MOE, "model.moe_expert_capacity_factor": 1.0}
MAMBA = {"model.layout": "hybrid", "model.hybrid_layer_pattern": "M*", "model.mamba_state_dim": 4, "model.mamba_head_dim": 4,
         "model.mamba_num_groups": 1, "model.mamba_num_heads": 4}  # fmt: skip
MUP = {"model.use_mup": True, "model.mup_base_hidden_size": 8}
FULL = {"model.recompute_granularity": "full", "model.recompute_method": "uniform", "model.recompute_num_layers": 1}
SHARDED = {"ddp.use_distributed_optimizer": True}
BUCKETS = {**SHARDED, "comm_overlap.overlap_grad_reduce": True}
SGD = {"optimizer.optimizer": "sgd"}
DECOUPLED = {"optimizer.decoupled_lr": 0.5}
NET = {"model.experimental_attention_variant": "gated_delta_net", "model.linear_attention_freq": [1, 0],
       "model.linear_key_head_dim": 4, "model.linear_value_head_dim": 4, "model.linear_num_key_heads": 2,
       "model.linear_num_value_heads": 4}  # fmt: skip


def zeros(tensor: torch.Tensor) -> torch.Tensor:
    return torch.nn.init.zeros_(tensor)


OBSERVED: dict[str, Trial] = {
    "model.num_layers": Trial(3),
    "model.hidden_size": Trial(32),
    "model.num_attention_heads": Trial(4),
    "model.num_query_groups": Trial(2),
    "model.ffn_hidden_size": Trial(24),
    "model.kv_channels": Trial(4),
    "model.hidden_dropout": Trial(0.5),
    "model.attention_dropout": Trial(0.5),
    "model.layernorm_epsilon": Trial(1e-2),
    "model.add_bias_linear": Trial(True),
    "model.add_qkv_bias": Trial(True),
    "model.gated_linear_unit": Trial(False),
    "model.activation_func": Trial(torch.nn.functional.gelu),
    "model.glu_linear_offset": Trial(1.0),
    "model.activation_func_clamp_value": Trial(0.01),
    "model.softmax_scale": Trial(0.5),
    "model.softmax_type": Trial("off-by-one"),
    "model.rotary_interleaved": Trial(True),
    "model.window_size": Trial((2, 0)),
    "model.window_attn_skip_freq": Trial(2, {"model.window_size": (2, 0)}),
    "model.normalization": Trial("LayerNorm"),
    "model.qk_layernorm": Trial(True),
    "model.qk_l2_norm": Trial(True),
    "model.attention_output_gate": Trial(True),
    "model.experimental_attention_variant": Trial(
        "gated_delta_net", {name: value for name, value in NET.items() if "variant" not in name}
    ),
    "model.linear_attention_freq": Trial(1, NET),
    "model.linear_conv_kernel_dim": Trial(2, NET),
    "model.linear_key_head_dim": Trial(8, NET),
    "model.linear_value_head_dim": Trial(8, NET),
    "model.linear_num_key_heads": Trial(1, NET),
    "model.linear_num_value_heads": Trial(2, NET),
    "model.no_rope_freq": Trial(2),
    "model.init_method": Trial(zeros),
    "model.output_layer_init_method": Trial(zeros),
    "model.init_method_std": Trial(0.5),
    "model.embedding_init_method": Trial(zeros),
    "model.embedding_init_method_std": Trial(0.5),
    "model.use_mup": Trial(True, {"model.mup_base_hidden_size": 8}),
    "model.mup_base_hidden_size": Trial(4, {"model.use_mup": True}),
    "model.mup_embedding_mult": Trial(2.0, MUP),
    "model.mup_output_mult": Trial(2.0, MUP),
    "model.mup_base_head_dim": Trial(2.0, MUP),
    "model.mup_attn_scale_power": Trial(0.5, MUP),
    "model.apply_query_key_layer_scaling": Trial(True),
    "model.attention_softmax_in_fp32": Trial(False, BF16),
    "model.recompute_granularity": Trial("selective"),
    "model.recompute_method": Trial("block", FULL),
    "model.recompute_num_layers": Trial(1, {**FULL, "model.recompute_num_layers": 2, "model.num_layers": 4}),
    "model.recompute_modules": Trial(["mlp"], {"model.recompute_granularity": "selective"}),
    "model.clone_scatter_output_in_embedding": Trial(
        False, {"model.tensor_model_parallel_size": 2, "model.sequence_parallel": True}, 2
    ),
    "model.distribute_saved_activations": Trial(True, {**FULL, "model.tensor_model_parallel_size": 2}, 2),
    "model.calculate_per_token_loss": Trial(True),
    "model.mlp_chunks_for_training": Trial(2),
    "model.deterministic_mode": Trial(True),
    "model.num_moe_experts": Trial(8, MOE),
    "model.moe_layer_freq": Trial(2, MOE),
    "model.moe_ffn_hidden_size": Trial(8, MOE),
    "model.moe_shared_expert_intermediate_size": Trial(8, MOE),
    "model.moe_shared_expert_gate": Trial(True, SHARED),
    "model.moe_shared_expert_overlap": Trial(True, SHARED),
    "model.moe_router_load_balancing_type": Trial("seq_aux_loss", {**MOE, "train.micro_batch_size": 2}),
    "model.moe_router_topk": Trial(3, MOE),
    "model.moe_router_num_groups": Trial(4, GROUPS),
    "model.moe_router_group_topk": Trial(2, GROUPS),
    "model.moe_router_topk_limited_devices": Trial(1, {**MOE, "model.moe_router_num_groups": 2, "model.moe_router_topk": 2}),
    "model.moe_router_pre_softmax": Trial(True, MOE),
    "model.moe_router_topk_scaling_factor": Trial(2.0, {**MOE, "model.moe_router_pre_softmax": True}),
    "model.moe_router_score_function": Trial("sigmoid", MOE),
    "model.moe_router_dtype": Trial("fp32", {**MOE, **BF16}),
    "model.moe_router_enable_expert_bias": Trial(True, {**MOE, "model.moe_router_score_function": "sigmoid"}),
    "model.moe_router_bias_update_rate": Trial(0.5, BIAS),
    "model.moe_router_quantile_balancing_ema": Trial(0.5, {**MOE, "model.moe_router_load_balancing_type": "quantile_balancing"}),
    "model.moe_router_force_load_balancing": Trial(True, MOE),
    "model.moe_router_force_biased": Trial(1.0, MOE),
    "model.moe_aux_loss_coeff": Trial(0.5, MOE),
    "model.moe_z_loss_coeff": Trial(0.5, MOE),
    "model.moe_input_jitter_eps": Trial(0.5, MOE),
    "model.moe_token_dispatcher_type": Trial("allgather", MOE),
    "model.moe_expert_capacity_factor": Trial(0.5, CAPACITY),
    "model.moe_pad_expert_input_to_capacity": Trial(True, CAPACITY),
    "model.moe_token_drop_policy": Trial("position", CAPACITY),
    "model.moe_layer_recompute": Trial(True, MOE),
    "model.mamba_state_dim": Trial(8, MAMBA),
    "model.mamba_head_dim": Trial(8, MAMBA),
    "model.mamba_num_groups": Trial(2, MAMBA),
    "model.mamba_num_heads": Trial(8, MAMBA),
    "model.moe_apply_probs_on_input": Trial(True, {**MOE, "model.moe_router_topk": 1, "model.moe_router_pre_softmax": True}),
    "ddp.grad_reduce_in_fp32": Trial(False, BF16),
    "ddp.use_distributed_optimizer": Trial(True, {}, 2),
    "ddp.check_for_nan_in_grad": Trial(True),
    "ddp.check_for_large_grads": Trial(True),
    "ddp.bucket_size": Trial(100, BUCKETS, 2),
    "ddp.pad_buckets_for_high_nccl_busbw": Trial(True, BUCKETS, 2),
    "ddp.param_name_patterns_for_fp32_local_accumulation": Trial(("all",), {**BF16, "ddp.grad_reduce_in_fp32": False}),
    "ddp.average_in_collective": Trial(True, SHARDED, 2),
    "optimizer.lr": Trial(0.5),
    "optimizer.min_lr": Trial(5e-3),
    "optimizer.decoupled_lr": Trial(0.5),
    "optimizer.decoupled_min_lr": Trial(0.1, DECOUPLED),
    "optimizer.weight_decay": Trial(0.5),
    "optimizer.apply_wd_to_qk_layernorm": Trial(True, {"model.qk_layernorm": True, "optimizer.weight_decay": 0.5}),
    "optimizer.optimizer": Trial("sgd"),
    "optimizer.adam_beta1": Trial(0.1),
    "optimizer.adam_beta2": Trial(0.1),
    "optimizer.adam_eps": Trial(0.1),
    "optimizer.decoupled_weight_decay": Trial(False),
    "optimizer.sgd_momentum": Trial(0.1, SGD),
    "optimizer.use_distributed_optimizer": Trial(True, {}, 2),
    "optimizer.clip_grad": Trial(0.01),
    "optimizer.grad_norm_skip_threshold": Trial(1e-6),
    # The last: megatron-core keeps it for all later runs of a process.
    "ddp.reduce_scatter_with_fp32_accumulation": Trial(True, {**SHARDED, **BF16, "ddp.grad_reduce_in_fp32": False}, 2),
}
"""Settings whose other value changes a run on the CPU."""

PP2 = {"model.pipeline_model_parallel_size": 2, "train.global_batch_size": 4}
THREE = {**PP2, "model.num_layers": 3}
BUILT: dict[str, Trial] = {
    "model.num_layers_in_first_pipeline_stage": Trial(2, THREE, 2),
    "model.num_layers_in_last_pipeline_stage": Trial(2, THREE, 2),
    "model.pipeline_model_parallel_layout": Trial("Ett|tL", THREE, 2),
    "model.account_for_embedding_in_pipeline_split": Trial(True, THREE, 2),
    "model.account_for_loss_in_pipeline_split": Trial(True, THREE, 2),
    "model.expert_tensor_parallel_size": Trial(1, {**MOE, "model.tensor_model_parallel_size": 2}, 2),
}
"""Settings whose other value changes what the first of two ranks builds."""

VPP2 = {**PP2, "model.virtual_pipeline_model_parallel_size": 2, "model.num_layers": 4}
SENT: dict[str, Trial] = {
    "model.variable_seq_lengths": Trial(True, {**PP2, **MOE}),
    "model.deallocate_pipeline_outputs": Trial(True, PP2),
    "model.overlap_p2p_comm_warmup_flush": Trial(True, VPP2),
    "model.microbatch_group_size_per_vp_stage": Trial(4, VPP2),
}
"""Settings whose other value changes what two pipeline stages do."""
