"""Precision names: what they set, what they refuse."""

from __future__ import annotations

import copy

import pytest
import torch

from formats.errors import UserError
from tests.trainer.settings import HOPPER, settings
from trainer.settings import overrides, precision, yaml_io
from trainer.settings.precision import Machine

pytestmark = pytest.mark.filterwarnings("ignore:full scope is deprecated:UserWarning")  # megatron-core's own default


def refusal(function, *args) -> str:
    with pytest.raises(UserError) as caught:
        function(*args)
    return str(caught.value)


@pytest.mark.parametrize("name", precision.PRECISIONS)
def test_megatron_core_accepts_what_each_name_sets(name: str) -> None:
    config = settings(ddp__use_distributed_optimizer=True, optimizer__use_distributed_optimizer=True)
    precision.apply(name, config)
    config.model.finalize()
    config.optimizer.__post_init__()
    config.ddp.__post_init__()
    assert config.optimizer.params_dtype == config.model.params_dtype == config.model.pipeline_dtype
    assert (config.model.bf16, config.model.fp16) == (config.optimizer.bf16, config.optimizer.fp16)
    assert config.ddp.fp8_param_gather == config.model.fp8_param


def test_applying_a_name_twice_changes_nothing_the_second_time() -> None:
    config = settings()
    assert precision.apply("bf16_with_fp8_current_scaling_mixed", config)
    config.model.finalize()
    before = copy.deepcopy(config.ddp)
    assert precision.apply("bf16_with_fp8_current_scaling_mixed", config) == []
    assert config.ddp == before


def test_eight_bit_weights_are_for_those_who_ask_and_have_the_distributed_optimizer() -> None:
    config = settings(ddp__use_distributed_optimizer=True)
    precision.apply("bf16_with_fp8_delayed_scaling_mixed", config)
    assert not config.model.fp8_param
    config = settings(ddp__fp8_param_gather=True)
    assert "`ddp.fp8_param_gather` is `True`" in refusal(precision.apply, "bf16_with_fp8_delayed_scaling_mixed", config)
    config = settings(ddp__use_distributed_optimizer=True, ddp__fp8_param_gather=True)
    precision.apply("bf16_with_fp8_delayed_scaling_mixed", config)
    assert config.model.fp8_param
    assert config.ddp.fp8_param_gather


def test_a_starting_value_yields_to_the_users() -> None:
    config = settings(model__fp8_amax_history_len=16)
    precision.apply("bf16_with_fp8_delayed_scaling_mixed", config)
    assert (config.model.fp8_amax_history_len, config.model.fp8_amax_compute_algo) == (16, "max")


@pytest.mark.parametrize("given", ["overrides", "document"])
def test_a_starting_value_yields_to_the_users_also_where_that_is_megatron_cores_default(given: str) -> None:
    name, config = "bf16_with_fp8_delayed_scaling_mixed", settings()
    if given == "overrides":
        overrides.apply(config, ["model.fp8_amax_compute_algo=most_recent", "ddp.grad_reduce_in_fp32=false"])
    else:
        yaml_io.apply(config, {"model": {"fp8_amax_compute_algo": "most_recent"}, "ddp": {"grad_reduce_in_fp32": False}})
    for copied in (config, copy.deepcopy(config)):
        precision.apply(name, copied)
        assert (copied.model.fp8_amax_compute_algo, copied.ddp.grad_reduce_in_fp32) == ("most_recent", False)
    overrides.apply(config, ["~model.fp8_amax_compute_algo"])
    precision.apply(name, config)
    assert config.model.fp8_amax_compute_algo == "max"


def test_a_field_set_to_something_else_is_a_contradiction() -> None:
    assert refusal(precision.apply, "bf16_mixed", settings(model__fp8="hybrid")) == (
        "`model.fp8` is `hybrid`, but `mixed_precision=bf16_mixed` makes it `None`\n\n"
        "hint: leave `model.fp8` out, or choose another `mixed_precision`"
    )
    assert refusal(precision.apply, "fp32", settings(optimizer__params_dtype=torch.bfloat16)) == (
        "`optimizer.params_dtype` is `torch.bfloat16`, but `mixed_precision=fp32` makes it `torch.float32`\n\n"
        "hint: leave `optimizer.params_dtype` out, or choose another `mixed_precision`"
    )


def test_an_unknown_precision_suggests_the_nearest() -> None:
    assert refusal(precision.requires, "bf16-mixd") == "there is no precision `bf16-mixd`\n\nhint: did you mean `bf16_mixed`?"


def test_the_cpu_has_fp32_and_bf16() -> None:
    cpu = Machine("cpu")
    precision.check("fp32", cpu)
    precision.check("bf16_mixed", cpu)
    assert refusal(precision.check, "fp16_mixed", cpu) == (
        "precision `fp16_mixed` needs a GPU, and this run is on the CPU\n\nhint: choose one of: fp32, bf16_mixed"
    )


@pytest.mark.parametrize("name", ["bf16_with_mxfp8_mixed", "bf16_with_nvfp4_mixed"])
def test_hopper_refuses_what_needs_blackwell(name: str) -> None:
    assert refusal(precision.check, name, HOPPER) == (
        f"precision `{name}` needs a GPU of compute capability `10.0` or higher; this one has `9.0`\n\n"
        "hint: this GPU can do: fp32, bf16_mixed, fp16_mixed, bf16_with_fp8_delayed_scaling_mixed, "
        "bf16_with_fp8_current_scaling_mixed, bf16_with_fp8_subchannel_scaling_mixed"
    )


@pytest.mark.parametrize("name", [name for name in precision.PRECISIONS if name.startswith("bf16_with_fp8")])
def test_hopper_does_every_kind_of_fp8(name: str) -> None:
    precision.check(name, HOPPER)


def test_a_missing_or_old_transformer_engine_is_named() -> None:
    name = "bf16_with_fp8_subchannel_scaling_mixed"
    assert refusal(precision.check, name, Machine("gpu", capability=(9, 0), cuda="13.0")) == (
        f"precision `{name}` needs Transformer Engine `2.3` or newer, which is not installed\n\n"
        "hint: `pip install 'mbtools[gpu]'`, or choose `mixed_precision=bf16_mixed`"
    )
    assert refusal(precision.check, name, Machine("gpu", capability=(9, 0), transformer_engine="2.3.0", cuda="12.8")) == (
        f"precision `{name}` needs CUDA `12.9` or newer; this is `12.8`\n\n"
        "hint: install a newer CUDA, or choose `mixed_precision=bf16_mixed`"
    )


def test_a_machine_that_this_process_cannot_see_is_checked_where_it_runs() -> None:
    precision.check("bf16_with_nvfp4_mixed", Machine("gpu"))
