"""Settings of mixtures of experts: what is filled in, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from megatron.core.fusions.fused_bias_geglu import quick_gelu

from formats.errors import UserError
from tests.trainer import observed
from tests.trainer.settings import HOPPER
from tests.trainer.trials import MOE
from trainer.settings import experts
from trainer.settings.resolve import Resolved, resolve

EP2, TP2 = {"model.expert_model_parallel_size": 2}, {"model.tensor_model_parallel_size": 2}
FLEX = {**MOE, "model.moe_token_dispatcher_type": "flex"}


def resolved(*, world_size: int = 1, machine=HOPPER, **changes) -> Resolved:
    config = observed.settings(**{"mixed_precision": "bf16_mixed", **changes})
    return resolve(config, world_size=world_size, device=machine.device, machine=machine)


def refusal(**options) -> str:
    with pytest.raises(UserError) as caught:
        resolved(**options)
    return str(caught.value)


def choices(answer: Resolved) -> dict[str, tuple[object, str]]:
    return {choice.setting: (choice.value, choice.why) for choice in answer.explanations}


def test_a_gpu_groups_experts_and_fuses_permutations() -> None:
    chosen = choices(resolved(**MOE))
    for name in ("moe_grouped_gemm", "moe_permute_fusion"):
        assert chosen[f"model.{name}"] == (True, "a fused kernel")
        assert f"model.{name}" not in choices(resolved())
        assert f"model.{name}" not in choices(resolved(**MOE, **{f"model.{name}": False}))


def test_a_cpu_has_neither() -> None:
    answer = resolved(machine=replace(HOPPER, device="cpu"), **MOE)
    assert choices(answer)["model.moe_grouped_gemm"] == (False, "the CPU has none of CUDA's kernels")
    assert not answer.config.model.moe_permute_fusion


def test_tokens_are_sent_from_all_ranks_to_all() -> None:
    assert observed.settings().model.moe_token_dispatcher_type == "alltoall"


def test_grouped_experts_with_biases_have_no_fused_dropout() -> None:
    biases = {**MOE, "model.add_bias_linear": True}
    assert choices(resolved(**biases))["model.bias_dropout_fusion"] == (False, "grouped experts with biases lack it")
    assert resolved(**biases, **{"model.moe_grouped_gemm": False}).config.model.bias_dropout_fusion


@pytest.mark.parametrize(
    ("changes", "fused"),
    [
        ({}, True),
        ({"model.activation_func_clamp_value": 7.0}, False),
        ({"model.activation_func": quick_gelu, "model.activation_func_clamp_value": 7.0, "model.glu_linear_offset": 1.0}, True),
        ({"model.activation_func": quick_gelu, "model.moe_layer_freq": [0, 1]}, False),
        ({"model.activation_func": quick_gelu, "model.moe_grouped_gemm": False}, False),
    ],
)
def test_an_activation_is_fused_where_a_kernel_computes_the_same(changes, fused) -> None:
    assert bool(resolved(**MOE, **changes).config.model.bias_activation_fusion) == fused


def test_experts_with_tensor_parallelism_divide_the_sequence() -> None:
    chosen = choices(resolved(world_size=2, **MOE, **TP2))
    assert chosen["model.sequence_parallel"] == (True, "experts are trained with tensor parallelism only so")
    assert "model.sequence_parallel" not in choices(resolved(world_size=2, **TP2, **{"train.global_batch_size": 2}))


@pytest.mark.parametrize(
    "changes",
    [
        {"mixed_precision": "bf16_with_fp8_delayed_scaling_mixed"},
        {"model.recompute_granularity": "selective", "model.recompute_modules": ["moe_act"]},
        {"model.recompute_granularity": "selective", "model.recompute_modules": ["moe"]},
    ],
)
def test_a_machine_without_transformer_engine_shows_experts_in_fp8_and_recomputed_ones(changes) -> None:
    assert resolved(machine=replace(HOPPER, capability=None, transformer_engine=None), **MOE, **changes)


def test_fp8_needs_multiples_of_16_in_experts_too() -> None:
    message = refusal(**{**MOE, "model.moe_ffn_hidden_size": 24, "mixed_precision": "bf16_with_fp8_delayed_scaling_mixed"})
    assert message.startswith("precision `bf16_with_fp8_delayed_scaling_mixed` needs multiples of `16` on each rank; ")
    assert "model.moe_ffn_hidden_size is `24` over `1` ranks" in message


@pytest.mark.parametrize("backend", ["deepep", "hybridep"])
def test_a_dispatcher_that_is_not_installed_is_refused_with_what_to_install(backend, monkeypatch) -> None:
    wanted = {**FLEX, **EP2, "model.moe_flex_dispatcher_backend": backend, "world_size": 2}
    message = refusal(**wanted)
    assert message.startswith(
        f"`model.moe_token_dispatcher_type` is `flex` and `model.moe_flex_dispatcher_backend` is `{backend}`, whose package "
        "`deep_ep` is not installed here\n\nhint: install "
    )
    assert message.endswith("set `model.moe_token_dispatcher_type=alltoall`")
    assert experts._PACKAGES[backend] in message
    monkeypatch.setitem(experts._INSTALLED, backend, True)
    resolved(**wanted)


def test_a_machine_without_gpus_may_show_a_run_whose_dispatcher_it_lacks() -> None:
    resolved(world_size=2, machine=replace(HOPPER, capability=None), **FLEX, **EP2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"machine": replace(HOPPER, device="cpu"), **FLEX},
            (
                "`model.moe_token_dispatcher_type` is `flex`, whose kernels need a GPU; this run is on the CPU\n\n"
                "hint: set `model.moe_token_dispatcher_type=alltoall`"
            ),
        ),
        (
            {**FLEX, "model.moe_flex_dispatcher_backend": "ncclep"},
            "`model.moe_flex_dispatcher_backend` is `ncclep`, which is not supported\n\nhint: choose one of: deepep, hybridep",
        ),
        (
            FLEX,
            (
                "`model.moe_token_dispatcher_type` is `flex`, which sends tokens between ranks; "
                "`model.expert_model_parallel_size` is `1` and expert TP is `1`\n\n"
                "hint: set `model.moe_token_dispatcher_type=alltoall`, or `model.expert_model_parallel_size` to 2 or more"
            ),
        ),
    ],
)
def test_a_dispatcher_that_cannot_work_is_refused(options, message) -> None:
    assert refusal(**options) == message


@pytest.mark.parametrize(("name", "value"), [("moe_flex_dispatcher_backend", "hybridep"), ("moe_flex_dispatcher_num_sms", 8)])
def test_settings_of_another_dispatcher_are_refused(name, value) -> None:
    assert refusal(**{**MOE, f"model.{name}": value}) == (
        f"`model.{name}` is `{value}`, and only `model.moe_token_dispatcher_type=flex` of a model with experts reads it\n\n"
        f"hint: leave `model.{name}` out"
    )
