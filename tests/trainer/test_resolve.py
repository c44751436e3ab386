"""Resolving fills every open field of a run; what it refuses is in `test_checks`."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.enums import AttnBackend

from formats.errors import UserError
from tests.trainer.settings import CP, HOPPER, PP, TP, VPP, resolved, settings
from trainer.settings.resolve import resolve


def test_the_configuration_it_is_given_stays_as_it_is() -> None:
    config = settings()
    before = copy.deepcopy(config)
    answer = resolve(config, world_size=1, device="cpu").config
    assert answer.model.attention_backend == AttnBackend.local
    assert repr(config) == repr(before)


def test_resolving_twice_is_resolving_once() -> None:
    for device, changes in (("cpu", {}), ("gpu", {"mixed_precision": "bf16_with_fp8_current_scaling_mixed", PP: 2, VPP: 2})):
        once = resolved(world_size=4, device=device, train__global_batch_size=16, **changes)
        again = resolve(once.config, world_size=4, device=device, machine=HOPPER if device == "gpu" else None)
        assert again.explanations == ()
        assert repr(again.config) == repr(once.config)


def test_a_cpu_has_none_of_cudas_kernels() -> None:
    model = resolved(device="cpu").config.model
    assert model.use_cpu_initialization
    assert not any(
        (model.masked_softmax_fusion, model.bias_activation_fusion, model.bias_dropout_fusion, model.persist_layer_norm)
    )


def test_copies_and_microbatches_are_counted() -> None:
    answer = resolved(world_size=8, train__global_batch_size=32, train__micro_batch_size=2, **{TP: 2, CP: 2})
    assert (answer.data_parallel_size, answer.num_microbatches) == (2, 8)
    assert answer.config.ddp.overlap_grad_reduce


def test_context_parallel_ranks_alone_reduce_gradients() -> None:
    assert resolved(world_size=2, **{CP: 2}).config.ddp.overlap_grad_reduce


def test_the_distributed_optimizer_is_one_switch() -> None:
    answer = resolved(ddp__use_distributed_optimizer=True)
    assert answer.config.optimizer.use_distributed_optimizer
    assert [choice.why for choice in answer.explanations if choice.setting == "optimizer.use_distributed_optimizer"] == [
        "`ddp.use_distributed_optimizer` and `optimizer.use_distributed_optimizer` are one switch"
    ]


def test_megatron_core_takes_the_schedule_that_is_filled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")  # else megatron-core warns that it does not know
    answer = resolved(train__train_iters=200, scheduler__lr_warmup_fraction=0.1).config
    scheduler, optimizer = answer.scheduler, answer.optimizer
    assert (scheduler.lr_decay_iters, scheduler.lr_warmup_iters, optimizer.min_lr) == (200, 20, 0.0)
    schedule = OptimizerParamScheduler(
        SimpleNamespace(param_groups=[]),
        init_lr=scheduler.lr_warmup_init, max_lr=optimizer.lr, min_lr=optimizer.min_lr, lr_warmup_steps=scheduler.lr_warmup_iters,
        lr_decay_steps=scheduler.lr_decay_iters, lr_decay_style=scheduler.lr_decay_style, start_wd=scheduler.start_weight_decay,
        end_wd=scheduler.end_weight_decay, wd_incr_steps=200, wd_incr_style=scheduler.weight_decay_incr_style,
    )  # fmt: skip
    schedule.step(20)
    assert schedule.get_lr({"max_lr": optimizer.lr, "min_lr": 0.0}) == optimizer.lr
    schedule.step(180)
    assert schedule.get_lr({"max_lr": optimizer.lr, "min_lr": 0.0}) == 0.0


def test_epochs_are_steps_as_soon_as_the_data_says_how_many() -> None:
    config = settings(train__num_epochs=3, train__train_iters=2, scheduler__lr_warmup_iters=5)
    before = resolve(config, world_size=1, device="cpu")
    assert before.warnings == ("`train.num_epochs=3` is converted to steps when a run has read its data; this shows `2` steps",)
    after = resolve(config, world_size=1, device="cpu", steps=30)
    assert (after.config.train.train_iters, after.config.scheduler.lr_decay_iters, after.warnings) == (30, 30, ())
    with pytest.raises(UserError, match=r"`scheduler\.lr_warmup_iters` is `5`, but the schedule ends"):
        resolve(config, world_size=1, device="cpu", steps=4)


@pytest.mark.parametrize(("steps", "expected"), [(1, 0), (2, 1), (10, 1), (150, 1), (151, 2), (1500, 10)])
def test_a_warm_up_that_is_a_share_has_a_step_in_a_short_run_too(steps: int, expected: int) -> None:
    answer = resolved(train__train_iters=steps, scheduler__lr_warmup_fraction=1 / 150).config
    assert answer.scheduler.lr_warmup_iters == expected


def test_a_layout_says_how_many_stages_are_virtual() -> None:
    model = resolved(world_size=2, model__pipeline_model_parallel_layout="Et|t|t|tL", **{PP: 2}).config.model
    assert model.virtual_pipeline_model_parallel_size == 2
    assert model.overlap_p2p_comm


def test_one_virtual_stage_is_none() -> None:
    assert resolved(world_size=2, **{PP: 2, VPP: 1}).config.model.virtual_pipeline_model_parallel_size is None


def test_a_pipeline_that_cannot_be_filled_is_warned_of() -> None:
    assert resolved(world_size=4, train__global_batch_size=2, **{PP: 4}).warnings == (
        "`2` microbatches cannot fill `4` pipeline stages: some GPUs wait; raise the batch size",
    )
    assert resolved(world_size=4, **{PP: 4}).warnings == ()


def test_a_users_own_model_is_checked_in_the_fields_it_has() -> None:
    config = settings(mixed_precision="fp32")
    config.model = SimpleNamespace(tensor_model_parallel_size=2, num_layers=3)
    assert resolve(config, world_size=2, device="cpu").data_parallel_size == 1
    with pytest.raises(UserError, match=r"`3` processes are not divisible by `2`"):
        resolve(config, world_size=3, device="cpu")


def test_a_dataset_of_ones_own_is_not_copied() -> None:
    config = settings()
    config.dataset = SimpleNamespace(sequence_length=64, lock=torch.Generator())
    assert resolve(config, world_size=1, device="cpu").config.dataset is config.dataset


def test_a_run_that_saves_does_so_before_its_end_unless_it_says_how_often():
    def saving(**changes):
        run = resolve(settings(**{f"checkpoint__{name}": value for name, value in changes.items()}), world_size=1, device="cpu")
        checkpoint = run.config.checkpoint
        why = {choice.why for choice in run.explanations if choice.setting.startswith("checkpoint.")}
        return (checkpoint.save_interval, checkpoint.save_interval_in_mins, checkpoint.keep_last), why

    why = {"`checkpoint.save` is set, and no interval between checkpoints"}
    assert saving() == ((None, None, None), set())
    assert saving(save="run") == ((None, 30.0, 5), why)
    assert saving(save="run", keep_last=2) == ((None, 30.0, 2), why)
    assert saving(save="run", save_interval=1000) == ((1000, None, None), set())
    assert saving(save="run", save_interval_in_mins=7.0) == ((None, 7.0, None), set())
