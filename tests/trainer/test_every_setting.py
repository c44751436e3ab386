"""Every field of megatron-core's configurations that a run accepts is carried out, or refused by name.

A field counts as carried out where another value changes the built model, the optimizer or the step (`OBSERVED`; on a GPU, the
trials of `test_gpu_settings`), or where a test is about it (`NAMED`). All others must be refused.
"""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import distributed
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnBackend

from formats.errors import UserError
from tests.trainer import observed, small
from tests.trainer.observed import Trial
from tests.trainer.settings import HOPPER
from tests.trainer.test_gpu_settings import ON_ONE_GPU, ON_TWO_GPUS
from trainer.settings import unsupported
from trainer.settings.resolve import resolve

pytestmark = pytest.mark.filterwarnings("ignore")  # megatron-core's own, which commands do not show

KINDS = {
    "model": TransformerConfig,
    "ddp": distributed.DistributedDataParallelConfig,
    "optimizer": OptimizerConfig,
}
EVERY = [f"{section}.{one.name}" for section, kind in KINDS.items() for one in dataclasses.fields(kind) if one.name[0] != "_"]


BF16 = {"mixed_precision": "bf16_mixed"}
MOE = {"model.num_moe_experts": 4, "model.moe_ffn_hidden_size": 16, "model.moe_token_dispatcher_type": "alltoall",
       "model.moe_aux_loss_coeff": 0.1}  # fmt: skip
SHARED = {**MOE, "model.moe_shared_expert_intermediate_size": 16}
GROUPS = {**MOE, "model.num_moe_experts": 8, "model.moe_router_num_groups": 2, "model.moe_router_group_topk": 1,
          "model.moe_router_topk": 2}  # fmt: skip
BIAS = {**MOE, "model.moe_router_enable_expert_bias": True, "model.moe_router_score_function": "sigmoid",
        "model.moe_aux_loss_coeff": 0.0}  # fmt: skip
CAPACITY = {**MOE, "model.moe_expert_capacity_factor": 1.0}
MUP = {"model.use_mup": True, "model.mup_base_hidden_size": 8}
FULL = {"model.recompute_granularity": "full", "model.recompute_method": "uniform", "model.recompute_num_layers": 1}
SHARDED = {"ddp.use_distributed_optimizer": True}
BUCKETS = {**SHARDED, "comm_overlap.overlap_grad_reduce": True}
SGD = {"optimizer.optimizer": "sgd"}
DECOUPLED = {"optimizer.decoupled_lr": 0.5}


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
    "model.moe_router_load_balancing_type": Trial("seq_aux_loss", MOE),
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

DECIDED: dict[str, Any] = {
    "model.attention_backend": AttnBackend.flash,
    "model.use_cpu_initialization": False,
    "model.masked_softmax_fusion": True,
    "model.bias_activation_fusion": True,
    "model.bias_dropout_fusion": True,
    "model.apply_rope_fusion": True,
    "model.persist_layer_norm": True,
    "model.cross_entropy_loss_fusion": True,
}
"""Settings that say which kernels compute. A CPU has one for each, and a run tells why; on a GPU, those that are not tried in
`test_gpu_settings` have one as well, which is Transformer Engine's."""

_TRANSFORMERS = "test_parity.py::test_the_curve_is_that_of_transformers_and_adamw"
_GPUS = "test_gpu.py::test_layouts_over_two_gpus_leave_one_gpus_curve_no_further_than_bf16_leaves_that_of_fp32"
_OVERLAP = "test_overlap.py::test_data_parallel_gpus_overlap_gradients_and_with_the_distributed_optimizer_weights"
_HERE = "test_every_setting.py::"
NAMED: dict[str, str] = {
    "model.tensor_model_parallel_size": _TRANSFORMERS,
    "model.pipeline_model_parallel_size": _TRANSFORMERS,
    "model.virtual_pipeline_model_parallel_size": _TRANSFORMERS,
    "model.sequence_parallel": _GPUS,
    "model.context_parallel_size": _GPUS,
    "model.expert_model_parallel_size": "peft/test_experts.py::test_experts_are_trained_the_same_wherever_they_lie",
    "model.disable_bf16_reduced_precision_matmul": _HERE + "test_products_in_bf16_are_summed_as_precisely_as_somebody_asks",
    "model.tp_comm_overlap": "test_gpu.py::test_fp8_overlaps_tensor_parallel_messages",
    "model.overlap_p2p_comm": "test_overlap.py::test_virtual_stages_send_while_they_compute_and_plain_stages_in_batches",
    "model.batch_p2p_comm": "test_overlap.py::test_four_stages_with_virtual_ones_may_send_in_batches",
    "ddp.overlap_grad_reduce": _OVERLAP,
    "ddp.overlap_param_gather": _OVERLAP,
    "ddp.align_param_gather": _HERE + "test_gathering_is_aligned_where_somebody_asks_for_it",
    "optimizer.overlap_param_gather": _OVERLAP,
}
"""Settings that a test is about."""


def other(field: dataclasses.Field[Any]) -> Any:
    """A value that is not a field's default."""
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if isinstance(default, bool):
        return not default
    if isinstance(default, torch.dtype):
        return torch.float16
    if isinstance(default, (int, float)):
        return default + 2
    return [2] if isinstance(default, (list, tuple)) else "other" if isinstance(default, str) else 2


COVERED = {*OBSERVED, *BUILT, *SENT, *NAMED, *DECIDED, *ON_ONE_GPU, *ON_TWO_GPUS}
REFUSED = [setting for setting in EVERY if setting not in COVERED]


@pytest.mark.parametrize("setting", REFUSED)
def test_a_field_that_nothing_carries_out_is_refused_by_name(setting: str) -> None:
    section, _, name = setting.partition(".")
    (field,) = (one for one in dataclasses.fields(KINDS[section]) if one.name == name)
    config = observed.settings(**{setting: other(field)})
    with pytest.raises(UserError) as refused:
        resolve(config, world_size=1, device="gpu", machine=HOPPER)
    assert f"`{setting}`" in str(refused.value) or f"`{setting}=" in str(refused.value)


def test_no_field_is_both_refused_and_carried_out() -> None:
    refused = {setting for setting, _ in unsupported.never_supported()}
    assert not refused & COVERED
    assert refused <= set(EVERY)
    assert set(EVERY) >= COVERED


@pytest.fixture(scope="module")
def changed(ranks: Any) -> dict[str, list[str]]:
    """For each setting that one process can try, what it changes."""
    (found,) = ranks.run(_changes, 1, OBSERVED, BUILT)
    return found


def _changes(run: dict[str, Trial], built: dict[str, Trial]) -> dict[str, list[str]]:
    return observed.differences(run) | observed.differences(built, observed.build)


@pytest.mark.slow
@pytest.mark.parametrize("setting", [*OBSERVED, *BUILT])
def test_a_setting_changes_what_is_built_or_done(setting: str, changed: dict[str, list[str]]) -> None:
    assert changed[setting]
    assert set(changed[setting]) <= set(observed.PARTS)


@pytest.fixture(scope="module")
def plain(ranks: Any) -> Any:
    """What two ranks do with the settings that a trial has both times, by their text."""
    made: dict[str, Any] = {}

    def make(base: dict[str, Any]) -> Any:
        if repr(base) not in made:
            made[repr(base)] = ranks.run(observed.observe, 2, base)
        return made[repr(base)]

    return make


@pytest.mark.parametrize("setting", SENT)
def test_a_setting_changes_what_pipeline_stages_do(setting: str, ranks: Any, plain: Any) -> None:
    trial = SENT[setting]
    before, found = plain(trial.base), ranks.run(observed.observe, 2, {**trial.base, setting: trial.value})
    assert not any("error" in one for one in [*found, *before]), found
    assert [one["operations"] for one in found] != [one["operations"] for one in before]


@pytest.mark.parametrize("setting", DECIDED)
def test_a_kernel_that_a_cpu_lacks_is_told_of(setting: str) -> None:
    answer = resolve(observed.settings(**{setting: DECIDED[setting]}), world_size=1, device="cpu")
    (why,) = [choice.why for choice in answer.explanations if choice.setting == setting]
    assert why == "the CPU has none of CUDA's kernels"


@pytest.mark.parametrize("setting", NAMED)
def test_the_test_that_is_named_for_a_setting_is_there(setting: str) -> None:
    file, _, test = NAMED[setting].partition("::")
    assert re.search(rf"^def {test}\(", (Path(__file__).parent / file).read_text(), re.MULTILINE)


def test_gathering_is_aligned_where_somebody_asks_for_it() -> None:
    changes = {**SHARDED, "ddp.align_param_gather": True}
    answer = resolve(observed.settings(**changes, mixed_precision="bf16_mixed"), world_size=2, device="gpu", machine=HOPPER)
    assert (answer.config.ddp.overlap_param_gather, answer.config.ddp.align_param_gather) == (True, True)
    with pytest.raises(UserError) as refused:
        resolve(observed.settings(**changes), world_size=2, device="cpu")
    assert str(refused.value) == (
        "`ddp.align_param_gather` is `True`, but `ddp.overlap_param_gather` is `False`\n\n"
        "hint: leave `ddp.align_param_gather` out: it follows from `comm_overlap.overlap_param_gather`"
    )


def test_products_in_bf16_are_summed_as_precisely_as_somebody_asks() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    try:
        resolve(observed.settings(**BF16), world_size=1, device="cpu")
        assert matmul.allow_bf16_reduced_precision_reduction == before
        resolve(observed.settings(**BF16, **{"model.disable_bf16_reduced_precision_matmul": True}), world_size=1, device="cpu")
        assert not matmul.allow_bf16_reduced_precision_reduction
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before


def _rates(changes: dict[str, Any]) -> dict[str, tuple[float, float, float]]:
    """Of each parameter: its highest and lowest learning rate, and Adam's epsilon."""
    from trainer.loop import pretrain

    class Rates(small.History):
        def on_start(self, run: Any) -> None:
            names = {one: name for chunk in run.chunks for name, one in chunk.named_parameters()}
            self.found = {
                names[one].removeprefix("module."): (group["max_lr"], group["min_lr"], group["eps"])
                for group in run.parts.optimizer.param_groups
                for one in group["params"]
            }

    history = Rates()
    pretrain(observed.settings(**changes), callbacks=[history])
    return history.found


def test_mup_divides_the_learning_rates_of_hidden_matrices_by_the_width(ranks: Any) -> None:
    """A model four times as wide as its base (arXiv:2203.03466, table 8): Adam's rate of a hidden matrix is a quarter."""
    wide = {"model.use_mup": True, "model.mup_base_hidden_size": 4, "optimizer.lr": 0.4, "optimizer.min_lr": 0.04}
    (found,) = ranks.run(_rates, 1, wide)
    for name, rates in found.items():
        hidden = name.endswith("weight") and "norm" not in name and "embedding" not in name and "output" not in name
        assert rates == pytest.approx((0.1, 0.01, 2.5e-9) if hidden else (0.4, 0.04, 1e-8)), name
    assert sum(rates[0] < 0.2 for rates in found.values()) == 2 * 4


def _deterministic(changes: dict[str, Any]) -> list[Any]:
    """What a run in deterministic mode finds, and what is left afterwards."""
    from trainer.loop import pretrain

    found: list[Any] = []

    class Watch(small.History):
        def on_step(self, run: Any, step: Any) -> None:
            found.append(torch.are_deterministic_algorithms_enabled())

    pretrain(observed.settings(**changes), callbacks=[Watch()])
    names = ("NCCL_ALGO", "NVTE_ALLOW_NONDETERMINISTIC_ALGO", "CUBLAS_WORKSPACE_CONFIG")
    return [found, torch.are_deterministic_algorithms_enabled(), [os.environ.get(name) for name in names]]


def test_deterministic_mode_reaches_torch_and_cudas_libraries(ranks: Any) -> None:
    (found,) = ranks.run(_deterministic, 1, {"model.deterministic_mode": True})
    assert found == [[True, True], False, ["Ring", "0", ":4096:8"]]
    (without,) = ranks.run(_deterministic, 1, {})
    assert without == [[False, False], False, [None, None, None]]


def _with_tree() -> None:
    os.environ["NCCL_ALGO"] = "Tree"
    _deterministic({"model.deterministic_mode": True})


def test_what_gives_other_bits_each_time_is_refused_in_deterministic_mode(ranks: Any) -> None:
    with pytest.raises(UserError) as refused:
        ranks.run(_with_tree, 1)
    assert str(refused.value) == (
        "`model.deterministic_mode` is `True`, and the environment has `NCCL_ALGO=Tree`\n\n"
        "hint: unset `NCCL_ALGO`, or set it to `Ring`"
    )
    both = {"model.deterministic_mode": True, "model.cross_entropy_loss_fusion": True, **BF16}
    with pytest.raises(UserError, match=r"so is `model\.cross_entropy_loss_fusion`, which gives other bits each time"):
        resolve(observed.settings(**both), world_size=1, device="gpu", machine=HOPPER)


LARGE = {"model.hidden_size": 128, "model.ffn_hidden_size": 256, "model.seq_length": 128, "dataset.sequence_length": 128}

CONTRADICTIONS = {
    "average": (
        {
            "ddp.average_in_collective": True,
            "ddp.use_distributed_optimizer": True,
            "dataset": small.FixedTokens(64, sequence_length=16),
        },
        (
            "`ddp.average_in_collective` is `True`, but gradients are divided by the tokens that count in the global batch "
            "(`model.calculate_per_token_loss`)\n\nhint: leave `ddp.average_in_collective` out"
        ),
    ),
    "width": (
        {**MUP, "model.mup_width_mult": 3.0},
        (
            "`model.mup_width_mult` is `3.0`, but it follows from `model.hidden_size` and `model.mup_base_hidden_size`: `2.0`\n\n"
            "hint: leave `model.mup_width_mult` out"
        ),
    ),
    "kernel": (
        {"model.gradient_accumulation_fusion": True},
        (
            "`model.gradient_accumulation_fusion` is `True`, and APEX, which has its kernel, is not installed\n\n"
            "hint: leave `model.gradient_accumulation_fusion` out"
        ),
    ),
    "output layer": (
        {"model.fp8_output_proj": True, "mixed_precision": "bf16_with_fp8_delayed_scaling_mixed", **LARGE},
        (
            "`model.fp8_output_proj` is `True`, which needs MXFP8; `mixed_precision` is `bf16_with_fp8_delayed_scaling_mixed`\n\n"
            "hint: leave `model.fp8_output_proj` out, or set `mixed_precision=bf16_with_mxfp8_mixed`"
        ),
    ),
    "residual connection": (
        {"model.fp32_residual_connection": True, **BF16},
        (
            "`model.fp32_residual_connection` is `True`, which does not work here: layers take what the residual connection "
            "carries in the precision of their weights\n\nhint: leave `model.fp32_residual_connection` out"
        ),
    ),
    "offloaded weights": (
        {"model.cpu_offloading_activations": False, "model.cpu_offloading_weights": True, "model.cpu_offloading": True},
        (
            "`model.cpu_offloading_activations` is `False`, which does not work here: Transformer Engine offloads no weights "
            "without activations\n\nhint: leave `model.cpu_offloading_activations` out"
        ),
    ),
    "messages": (
        {"model.pipeline_dtype": torch.float16, **BF16},
        (
            "`model.pipeline_dtype` is `torch.float16`, but `mixed_precision=bf16_mixed` makes it `torch.bfloat16`\n\n"
            "hint: leave `model.pipeline_dtype` out, or choose another `mixed_precision`"
        ),
    ),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_settings_that_would_silently_lose_are_refused(case: str) -> None:
    changes, message = CONTRADICTIONS[case]
    with pytest.raises(UserError) as refused:
        resolve(observed.settings(**changes), world_size=1, device="gpu", machine=HOPPER)
    assert str(refused.value) == message
