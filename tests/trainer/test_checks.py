"""Runs that cannot start are refused before a process starts, with both values and a hint."""

from __future__ import annotations

from typing import Any

import pytest

from formats.errors import UserError
from tests.trainer.settings import CP, EP, PP, SP, TP, VPP, resolved, settings
from trainer.settings.precision import Machine
from trainer.settings.resolve import resolve

REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "world": (
        {TP: 2, PP: 2, "world_size": 6},
        (
            "`6` processes are not divisible by `4` (TP `2` × PP `2` × CP `1`)\n\n"
            "hint: start 4 processes or a multiple of them, or make the model's parallel sizes smaller"
        ),
    ),
    "experts' world": (
        {EP: 4, "model__num_moe_experts": 4, "world_size": 2},
        (
            "`2` processes are not divisible by `4` (expert TP `1` × EP `4` × PP `1`)\n\n"
            "hint: start a multiple of 4 processes, or change `model.expert_model_parallel_size` or "
            "`model.expert_tensor_parallel_size`"
        ),
    ),
    "expert tensor parallelism without experts": (
        {"model__expert_tensor_parallel_size": 2},
        (
            "`1` processes are not divisible by `2` (expert TP `2` × EP `1` × PP `1`)\n\n"
            "hint: start a multiple of 2 processes, or change `model.expert_model_parallel_size` or "
            "`model.expert_tensor_parallel_size`"
        ),
    ),
    "experts": (
        {EP: 4, "model__num_moe_experts": 6, "world_size": 4},
        (
            "the model's experts, `6`, are not divisible by `model.expert_model_parallel_size`, `4`\n\n"
            "hint: choose one of: 1, 2, 3, 6"
        ),
    ),
    "batch": (
        {"train__global_batch_size": 10, "train__micro_batch_size": 2, "world_size": 4},
        (
            "`train.global_batch_size` is `10`, which is not divisible by `train.micro_batch_size` `2` × DP `4`\n\n"
            "hint: choose a multiple of 8"
        ),
    ),
    "virtual microbatches": (
        {PP: 2, VPP: 2, "train__global_batch_size": 3, "world_size": 2},
        (
            "virtual pipeline stages take microbatches `2` at a time, and a step has `3`\n\n"
            "hint: choose `train.global_batch_size` as a multiple of 2"
        ),
    ),
    "odd heads": (
        {"model__kv_channels": 7},
        "`model.kv_channels` is `7`, and rotary embeddings rotate channels in pairs\n\nhint: choose an even number",
    ),
    "heads": (
        {TP: 3, "world_size": 3},
        (
            "the model's attention heads, `8`, are not divisible by `model.tensor_model_parallel_size`, `3`\n\n"
            "hint: choose one of: 1, 2, 4, 8"
        ),
    ),
    "ffn": (
        {TP: 8, "model__ffn_hidden_size": 100, "world_size": 8},
        (
            "the model's feed-forward channels, `100`, are not divisible by `model.tensor_model_parallel_size`, `8`\n\n"
            "hint: choose one of: 1, 2, 4, 5, 10, 20, 25, 50, 100"
        ),
    ),
    "groups": (
        {TP: 4, "model__num_attention_heads": 12, "model__num_query_groups": 6, "world_size": 4},
        (
            "`model.tensor_model_parallel_size` is `4`, which is neither a divisor nor a multiple of the model's query groups, "
            "`6`\n\nhint: choose one of: 1, 2, 3, 6, or a multiple of 6"
        ),
    ),
    "layers": (
        {PP: 3, "world_size": 3},
        (
            "the model's `4` layers are not divisible by PP `3` × VPP `1` stages\n\n"
            "hint: choose sizes whose product divides them, or lay the stages out with `model.pipeline_model_parallel_layout`"
        ),
    ),
    "virtual without pipeline": (
        {VPP: 2},
        (
            "`model.virtual_pipeline_model_parallel_size` is `2`, but `model.pipeline_model_parallel_size` is `1`\n\n"
            "hint: leave out the virtual stages, or set `model.pipeline_model_parallel_size` to 2 or more"
        ),
    ),
    "long": (
        {"dataset__sequence_length": 512},
        (
            "`dataset.sequence_length` is `512`, longer than the model's `seq_length`, `256`\n\n"
            "hint: set `dataset.sequence_length=256` or less, or `model.seq_length=512` to go beyond it"
        ),
    ),
    "context": (
        {CP: 2, "dataset__sequence_length": 126, "world_size": 2},
        "`dataset.sequence_length` is `126`, which is not divisible by 2 × CP `2`\n\nhint: choose a multiple of 4",
    ),
    "sequence parallel": (
        {TP: 4, SP: True, "dataset__sequence_length": 126, "world_size": 4},
        (
            "`dataset.sequence_length` is `126`, which is not divisible by CP `1` × TP `4`\n\n"
            "hint: choose a multiple of 4, or set `model.sequence_parallel=false`"
        ),
    ),
    "context on the CPU": (
        {CP: 2, "world_size": 2, "device": "cpu"},
        (
            "`model.context_parallel_size` is `2`, which needs a GPU with Transformer Engine; this run is on the CPU\n\n"
            "hint: leave `model.context_parallel_size` out"
        ),
    ),
    "fp8 on the CPU": (
        {"mixed_precision": "bf16_with_fp8_delayed_scaling_mixed", "device": "cpu"},
        (
            "precision `bf16_with_fp8_delayed_scaling_mixed` needs a GPU, and this run is on the CPU\n\n"
            "hint: choose one of: fp32, bf16_mixed"
        ),
    ),
    "fp8 sizes": (
        {"mixed_precision": "bf16_with_fp8_delayed_scaling_mixed", TP: 4, "model__ffn_hidden_size": 96, "world_size": 4},
        (
            "precision `bf16_with_fp8_delayed_scaling_mixed` needs multiples of `16` on each rank; "
            "model.ffn_hidden_size is `96` over `4` ranks\n\nhint: choose a multiple of 64, or `mixed_precision=bf16_mixed`"
        ),
    ),
    "fp8 tokens": (
        {"mixed_precision": "bf16_with_fp8_delayed_scaling_mixed", "dataset__sequence_length": 100},
        (
            "precision `bf16_with_fp8_delayed_scaling_mixed` needs multiples of `16` on each rank; "
            "sequence × micro batch is `100` over `1` ranks\n\nhint: choose a multiple of 16, or `mixed_precision=bf16_mixed`"
        ),
    ),
    "micro batch": (
        {"train__micro_batch_size": 0},
        "`train.micro_batch_size` is `0`; it must be at least `1`\n\nhint: set `train.micro_batch_size=1` or more",
    ),
    "tensor size": (
        {TP: 0},
        (
            "`model.tensor_model_parallel_size` is `0`; it must be at least `1`\n\n"
            "hint: set `model.tensor_model_parallel_size=1` or more"
        ),
    ),
    "keep": (
        {"checkpoint__keep_last": 0},
        "`checkpoint.keep_last` is `0`; it must be at least `1`\n\nhint: set `checkpoint.keep_last=1` or more",
    ),
    "evaluation": (
        {"validation__eval_iters": -1},
        "`validation.eval_iters` is `-1`; it must be at least `0`\n\nhint: set `validation.eval_iters=0` or more",
    ),
    "save": (
        {"checkpoint__save_interval": 10},
        (
            "`checkpoint.save_interval` is `10`, but `checkpoint.save` is not set\n\n"
            "hint: name the folder for checkpoints: `checkpoint.save=DIRECTORY`"
        ),
    ),
    "learning rate": (
        {"optimizer__lr": None},
        "`optimizer.lr` is not set\n\nhint: set the highest learning rate, for example `optimizer.lr=3e-4`",
    ),
    "lowest learning rate": (
        {"optimizer__min_lr": 0.01},
        "`optimizer.min_lr` is `0.01`, but `optimizer.lr` is `0.001`\n\nhint: choose `optimizer.min_lr` from 0 to `optimizer.lr`",
    ),
    "warm-up": (
        {"scheduler__lr_warmup_iters": 100},
        (
            "`scheduler.lr_warmup_iters` is `100`, but the schedule ends after `scheduler.lr_decay_iters`: `100`\n\n"
            "hint: shorten the warm-up or lengthen the run"
        ),
    ),
    "warm-up twice": (
        {"scheduler__lr_warmup_iters": 5, "scheduler__lr_warmup_fraction": 0.1},
        "`scheduler.lr_warmup_iters` is `5` and `scheduler.lr_warmup_fraction` is `0.1`\n\nhint: leave one of them out",
    ),
    "WSD": (
        {"scheduler__lr_decay_style": "WSD"},
        (
            "`scheduler.lr_decay_style` is `WSD`, but `scheduler.lr_wsd_decay_iters` is `None`\n\n"
            "hint: set how many steps the decay at the end takes, from 1 to 100"
        ),
    ),
    "weight decay": (
        {"scheduler__end_weight_decay": 0.5},
        (
            "`scheduler.start_weight_decay` is `0.01` and `scheduler.end_weight_decay` is `0.5`, "
            "with `scheduler.weight_decay_incr_style=constant`\n\n"
            "hint: weight decay may grow with `linear` or `cosine`, and stays equal with `constant`"
        ),
    ),
    "megatron-core's own": (
        {"model__moe_router_topk": 1},
        (
            "megatron-core refuses `model.moe_router_topk=1`\n\n"
            "hint: leave `model.moe_router_topk` out, or change what it depends on"
        ),
    ),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_cannot_run_is_refused_with_both_numbers_and_a_way_out(what: str) -> None:
    changes, message = REFUSALS[what]
    with pytest.raises(UserError) as caught:
        resolved(**changes)
    ours, _, theirs = str(caught.value).partition("\n\nmegatron-core 0.19.2 says")
    assert ours == message
    assert bool(theirs) == message.startswith("megatron-core refuses")


def test_a_gpu_without_transformer_engine_has_no_context_parallelism() -> None:
    with pytest.raises(UserError, match="Transformer Engine is not installed"):
        resolve(settings(**{CP: 2}), world_size=2, device="gpu", machine=Machine("gpu", capability=(9, 0)))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("optimizer__lr", float("nan")),
        ("optimizer__clip_grad", -1.0),
        ("optimizer__adam_beta1", 2.0),
        ("optimizer__adam_eps", -1.0),
        ("optimizer__sgd_momentum", 1.0),
        ("scheduler__lr_warmup_iters", -1),
        ("scheduler__lr_warmup_fraction", -1.0),
        ("model__num_layers", 0),
        ("model__seq_length", 0),
        ("model__make_vocab_size_divisible_by", 0),
        ("model__attention_dropout", 2.0),
        ("dataset__sequence_length", 0),
        ("dataset__sequence_length", -1),
        ("dataset__num_workers", -1),
        ("rng__seed", -1),
        ("rng__seed", 2**32),
        ("dist__timeout_minutes", 0.0),
        ("train__exit_duration_in_mins", -1.0),
        ("checkpoint__save_interval_in_mins", 0.0),
    ],
)
def test_a_number_out_of_its_range_is_named(setting: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"`{setting.replace('__', '.')}` is `{value}`"):
        resolved(device="cpu", checkpoint__save="somewhere", **{setting: value})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"optimizer__optimizer": "adamz"}, "`optimizer.optimizer` is `adamz`"),
        ({"optimizer__optimizer": "sgd", "ddp__use_distributed_optimizer": True}, "`optimizer.optimizer` is `sgd`"),
        ({"ddp__use_megatron_fsdp": True}, "`ddp.use_megatron_fsdp` is not supported"),
    ],
)
def test_an_optimizer_that_cannot_run_is_found_before_the_start(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        resolved(device="cpu", **changes)


def test_packed_rows_divide_among_context_ranks_one_at_a_time() -> None:
    from trainer.config import FinetuningDatasetConfig

    options = {"dataset": FinetuningDatasetConfig(sequence_length=128), "model__context_parallel_size": 2}
    assert resolve(settings(**options), world_size=2, device="gpu").config.dataset.pad_to_multiple_of == 4
    with pytest.raises(UserError, match=r"`train.micro_batch_size` is `2`, and CP `2` ranks split packed rows"):
        resolve(settings(**options, train__micro_batch_size=2), world_size=2, device="gpu")
