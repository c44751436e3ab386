"""Settings that need a GPU: another value changes what is built, which kernels run, or their results.

Left out by `make test`. `test_every_setting` counts the settings that are tried here.
"""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnBackend

from tests.trainer import observed
from tests.trainer.observed import Trial

pytestmark = pytest.mark.gpu

SHAPE = {"model.hidden_size": 128, "model.ffn_hidden_size": 256, "model.seq_length": 128, "dataset.sequence_length": 128,
         "dist.device": "gpu", "mixed_precision": "bf16_mixed"}  # fmt: skip
FP8 = {**SHAPE, "mixed_precision": "bf16_with_fp8_delayed_scaling_mixed", "model.attention_backend": AttnBackend.unfused}
"""Its numbers are the same in each run, since the kernels of its attention add in the same order."""
WIDE_HEADS = {
    **FP8,
    "model.hidden_size": 256,
    "model.attention_backend": AttnBackend.auto,
}  # on Hopper, FP8 attention takes heads of 128 and delayed scaling
SCALED = {**SHAPE, "mixed_precision": "bf16_with_fp8_current_scaling_mixed", "model.num_layers": 4}
FP16 = {**SHAPE, "mixed_precision": "fp16_mixed"}
MOE = {**SHAPE, "model.num_moe_experts": 4, "model.moe_ffn_hidden_size": 128, "model.moe_token_dispatcher_type": "alltoall"}
LARGE = {
    **SHAPE,
    "model.hidden_size": 512,
    "model.ffn_hidden_size": 1024,
    "model.seq_length": 1024,
    "dataset.sequence_length": 1024,
}
"""Transformer Engine offloads nothing that has fewer than 256k elements."""
OFFLOADED = {**LARGE, "model.cpu_offloading": True, "model.cpu_offloading_num_layers": 1}
PRECISE = {**SHAPE, "ddp.use_distributed_optimizer": True, "optimizer.use_precision_aware_optimizer": True}
ON_CPU = {**SHAPE, "ddp.use_distributed_optimizer": True, "optimizer.optimizer_cpu_offload": True,
          "optimizer.optimizer_offload_fraction": 1.0}  # fmt: skip

ON_ONE_GPU: dict[str, Trial] = {
    "model.use_cpu_initialization": Trial(True, SHAPE),
    "model.attention_backend": Trial(AttnBackend.unfused, SHAPE),
    "model.layernorm_zero_centered_gamma": Trial(True, SHAPE),
    "model.bias_activation_fusion": Trial(False, SHAPE),
    "model.bias_dropout_fusion": Trial(False, SHAPE),
    "model.apply_rope_fusion": Trial(False, SHAPE),
    "model.cross_entropy_loss_fusion": Trial(False, SHAPE),
    "model.cross_entropy_fusion_impl": Trial("native", {**SHAPE, "model.cross_entropy_loss_fusion": True}),
    "model.gradient_accumulation_fusion": Trial(False, SHAPE),
    "model.fused_single_qkv_rope": Trial(True, SHAPE),
    "model.fused_residual_rmsnorm": Trial(True, MOE),
    "model.use_te_activation_func": Trial(True, {**SHAPE, "model.bias_activation_fusion": False}),
    "model.disable_parameter_transpose_cache": Trial(True, FP8),
    "model.cpu_offloading": Trial(True, {**LARGE, "model.cpu_offloading_num_layers": 1}),
    "model.cpu_offloading_num_layers": Trial(2, {**OFFLOADED, "model.num_layers": 4}),
    "model.activation_func_fp8_input_store": Trial(True, FP8),
    "model.fp8_margin": Trial(2, FP8),
    "model.fp8_amax_history_len": Trial(2, FP8),
    "model.fp8_amax_compute_algo": Trial("most_recent", {**FP8, "train.global_batch_size": 8}),
    "model.fp8_dot_product_attention": Trial(True, WIDE_HEADS),
    "model.first_last_layers_bf16": Trial(False, SCALED),
    "model.num_layers_at_start_in_bf16": Trial(2, SCALED),
    "model.num_layers_at_end_in_bf16": Trial(2, SCALED),
    "model.moe_grouped_gemm": Trial(False, MOE),
    "model.moe_permute_fusion": Trial(False, MOE),
    "model.moe_latent_size": Trial(64, MOE),
    "model.moe_router_fusion": Trial(True, MOE),
    "model.moe_router_padding_for_quantization": Trial(True, {**MOE, "mixed_precision": FP8["mixed_precision"]}),
    "model.moe_router_padding_for_fp8": Trial(True, {**MOE, "mixed_precision": FP8["mixed_precision"]}),
    "optimizer.use_precision_aware_optimizer": Trial(True, {**SHAPE, "ddp.use_distributed_optimizer": True}),
    "optimizer.store_param_remainders": Trial(False, PRECISE),
    "optimizer.main_params_dtype": Trial(torch.float16, {**PRECISE, "optimizer.store_param_remainders": False}),
    "optimizer.exp_avg_dtype": Trial(torch.bfloat16, PRECISE),
    "optimizer.exp_avg_sq_dtype": Trial(torch.bfloat16, PRECISE),
    "optimizer.loss_scale": Trial(128.0, FP16),
    "optimizer.initial_loss_scale": Trial(256.0, FP16),
    "optimizer.min_loss_scale": Trial(2.0**32, {**FP16, "optimizer.hysteresis": 1}),
    "optimizer.loss_scale_window": Trial(1, {**FP16, "optimizer.initial_loss_scale": 256.0}),
    "optimizer.hysteresis": Trial(1, FP16),
    "optimizer.optimizer_cpu_offload": Trial(True, {**SHAPE, "ddp.use_distributed_optimizer": True}),
    "optimizer.optimizer_offload_fraction": Trial(0.5, ON_CPU),
    "optimizer.overlap_cpu_optimizer_d2h_h2d": Trial(True, ON_CPU),
    "optimizer.pin_cpu_grads": Trial(False, ON_CPU),
    "optimizer.pin_cpu_params": Trial(False, ON_CPU),
}

TP2 = {**SHAPE, "model.tensor_model_parallel_size": 2, "model.sequence_parallel": True, "train.global_batch_size": 8}
OVERLAPPED = {**TP2, "comm_overlap.tp_comm_overlap": True}
ON_TWO_GPUS: dict[str, Trial] = {
    "model.cp_comm_type": Trial("a2a", {**SHAPE, "model.context_parallel_size": 2, "model.num_query_groups": 2}),
    "model.tp_only_amax_red": Trial(True, FP8),
    "model.tp_comm_bulk_wgrad": Trial(False, OVERLAPPED),
    "model.tp_comm_bulk_dgrad": Trial(False, OVERLAPPED),
    "model.tp_comm_overlap_ag": Trial(False, OVERLAPPED),
    "model.tp_comm_overlap_rs": Trial(False, OVERLAPPED),
    "model.tp_comm_overlap_rs_dgrad": Trial(True, {**OVERLAPPED, "model.tp_comm_bulk_dgrad": False,
                                                   "model.tp_comm_bulk_wgrad": False}),
    "model.tp_comm_overlap_disable_qkv": Trial(True, OVERLAPPED),
    "model.tp_comm_overlap_disable_fc1": Trial(True, OVERLAPPED),
}  # fmt: skip


SAME = {
    "train.train_iters": Trial(observed.STEPS, SHAPE),
    "train.global_batch_size": Trial(2, FP8),
    "train.micro_batch_size": Trial(1, MOE),
    "logger.log_interval": Trial(7, OFFLOADED),
}
"""What changes nothing: values that are there already, and a line that two steps do not reach."""

BEFORE, AFTER = 3, 2
"""Runs without and with a value: numbers of a GPU are not the same in each, and what varies counts for nothing."""

PROCESSES, TRIALS_EACH = 12, 4
"""How many processes share the GPU, and how many settings each of them tries at most: a process takes half a minute to start."""


def groups(trials: dict[str, Trial]) -> list[dict[str, Trial]]:
    """Split trials into groups for one process each: settings of the same base stay together, since they share its run."""
    by_base: dict[str, list[str]] = {}
    for setting, trial in trials.items():
        by_base.setdefault(repr(trial.base), []).append(setting)
    parts = [part for settings in by_base.values() for part in itertools.batched(settings, TRIALS_EACH)]
    return [{setting: trials[setting] for setting in part} for part in parts]


def _differences(ranks: Any, trials: dict[str, Trial], world: int = 1) -> list[dict[str, list[str]]]:
    return ranks.run(observed.differences, world, trials, observed.observe_gpu, BEFORE, AFTER)


@pytest.fixture(scope="module")
def changed(ranks: Any) -> dict[str, list[str]]:
    """What each setting that one GPU can try changes."""
    with ThreadPoolExecutor(PROCESSES) as pool:
        results = pool.map(lambda group: _differences(ranks, group), groups(ON_ONE_GPU))
        return {setting: parts for (result,) in results for setting, parts in result.items()}


@pytest.mark.parametrize("setting", ON_ONE_GPU)
def test_a_setting_changes_a_run_on_a_gpu(setting: str, changed: dict[str, list[str]]) -> None:
    assert changed[setting]
    assert {*observed.PARTS, "attributes", "kernels", "memory"}.issuperset(changed[setting])


def test_what_changes_nothing_is_no_change(ranks: Any) -> None:
    assert _differences(ranks, SAME) == [{setting: [] for setting in SAME}]


@pytest.fixture(scope="module")
def changed_on_two(ranks: Any) -> list[dict[str, list[str]]]:
    """What each setting that two GPUs can try changes, on each of them."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    return _differences(ranks, ON_TWO_GPUS, 2)


@pytest.mark.parametrize("setting", ON_TWO_GPUS)
def test_a_setting_changes_a_run_on_two_gpus(setting: str, changed_on_two: list[dict[str, list[str]]]) -> None:
    parts = {part for rank in changed_on_two for part in rank[setting]}
    assert parts
    assert {*observed.PARTS, "attributes", "kernels", "memory"}.issuperset(parts)
