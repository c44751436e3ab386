"""Communication overlap: chosen, as asked for, or refused."""

from __future__ import annotations

from typing import Any

import pytest

from formats.errors import UserError
from tests.trainer.settings import settings
from trainer.settings import overrides
from trainer.settings.overlap import defaults


def chosen(*, data_parallel: int = 1, device: str = "gpu", **changes: Any) -> dict[str, Any]:
    return _chosen(settings(**changes), data_parallel=data_parallel, device=device)


def _chosen(config: Any, *, data_parallel: int, device: str = "gpu") -> dict[str, Any]:
    choices = defaults(config, data_parallel=data_parallel, device=device)
    assert all(choice.why for choice in choices)
    return {choice.setting: choice.value for choice in choices}


def refusal(**changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        chosen(**changes)
    return str(caught.value)


VIRTUAL = {"model__pipeline_model_parallel_size": 2, "model__virtual_pipeline_model_parallel_size": 2}


def test_one_gpu_overlaps_nothing() -> None:
    assert chosen() == {
        "model.tp_comm_overlap": False,
        "model.overlap_p2p_comm": False,
        "model.batch_p2p_comm": True,
        "ddp.overlap_grad_reduce": False,
        "ddp.overlap_param_gather": False,
        "optimizer.overlap_param_gather": False,
        "ddp.align_param_gather": False,
    }


def test_data_parallel_gpus_overlap_gradients_and_with_the_distributed_optimizer_weights() -> None:
    plain = chosen(data_parallel=2)
    assert (plain["ddp.overlap_grad_reduce"], plain["ddp.overlap_param_gather"]) == (True, False)
    sharded = chosen(data_parallel=2, ddp__use_distributed_optimizer=True)
    assert sharded["ddp.overlap_param_gather"]
    assert sharded["optimizer.overlap_param_gather"]
    assert not sharded["ddp.align_param_gather"]
    assert chosen(data_parallel=2, ddp__use_distributed_optimizer=True, **VIRTUAL)["ddp.align_param_gather"]


def test_a_cpu_overlaps_no_gradients() -> None:
    assert not any(
        value
        for name, value in chosen(data_parallel=2, device="cpu", ddp__use_distributed_optimizer=True).items()
        if name.startswith(("ddp", "optimizer"))
    )


def test_virtual_stages_send_while_they_compute_and_plain_stages_in_batches() -> None:
    virtual = chosen(**VIRTUAL)
    assert (virtual["model.overlap_p2p_comm"], virtual["model.batch_p2p_comm"]) == (True, False)
    plain = chosen(model__pipeline_model_parallel_size=2)
    assert (plain["model.overlap_p2p_comm"], plain["model.batch_p2p_comm"]) == (False, True)


def test_batched_messages_between_two_stages_with_virtual_ones_are_refused() -> None:
    assert refusal(comm_overlap__batch_p2p_comm=True, **VIRTUAL) == (
        "`comm_overlap.batch_p2p_comm=true` gives wrong gradients with `2` pipeline stages and `2` virtual stages: "
        "the previous and the next rank are the same, and batched messages between them are mixed up\n\n"
        "hint: leave it out, and messages overlap with computation"
    )
    assert refusal(comm_overlap__overlap_p2p_comm=False, **VIRTUAL).startswith(
        "`comm_overlap.overlap_p2p_comm=false` gives wrong gradients"
    )


def test_four_stages_with_virtual_ones_may_send_in_batches() -> None:
    four = {**VIRTUAL, "model__pipeline_model_parallel_size": 4}
    asked = chosen(comm_overlap__batch_p2p_comm=True, **four)
    assert (asked["model.overlap_p2p_comm"], asked["model.batch_p2p_comm"]) == (False, True)
    assert refusal(comm_overlap__batch_p2p_comm=True, comm_overlap__overlap_p2p_comm=True, **four) == (
        "`comm_overlap.overlap_p2p_comm` and `comm_overlap.batch_p2p_comm` cannot both be on\n\nhint: leave one of them out"
    )


def test_what_was_asked_for_wins() -> None:
    asked = chosen(data_parallel=2, ddp__use_distributed_optimizer=True, comm_overlap__overlap_grad_reduce=False)
    assert not asked["ddp.overlap_grad_reduce"]
    assert not asked["ddp.overlap_param_gather"]
    assert chosen(data_parallel=2, device="cpu", ddp__overlap_grad_reduce=True)["ddp.overlap_grad_reduce"]


def test_what_was_asked_for_wins_also_where_it_is_megatron_cores_default() -> None:
    config = settings()
    overrides.apply(config, ["ddp.overlap_grad_reduce=false"])
    assert not _chosen(config, data_parallel=2)["ddp.overlap_grad_reduce"]


def test_two_places_that_disagree_are_named() -> None:
    assert refusal(ddp__overlap_grad_reduce=True, comm_overlap__overlap_grad_reduce=False) == (
        "`comm_overlap.overlap_grad_reduce` is `False`, but `ddp.overlap_grad_reduce` is `True`\n\n"
        "hint: leave `ddp.overlap_grad_reduce` out: `comm_overlap` sets it"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"comm_overlap__overlap_param_gather": True},
            (
                "`comm_overlap.overlap_param_gather` needs the distributed optimizer\n\n"
                "hint: set `ddp.use_distributed_optimizer=true`, or leave it out"
            ),
        ),
        (
            {"comm_overlap__overlap_param_gather": True, "ddp__use_distributed_optimizer": True},
            (
                "`comm_overlap.overlap_param_gather` needs `comm_overlap.overlap_grad_reduce`\n\n"
                "hint: set `comm_overlap.overlap_grad_reduce=true`, or leave it out"
            ),
        ),
        (
            {"comm_overlap__overlap_p2p_comm": True, "model__pipeline_model_parallel_size": 2},
            (
                "`comm_overlap.overlap_p2p_comm` needs virtual pipeline stages\n\n"
                "hint: set `model.virtual_pipeline_model_parallel_size`, or leave it out"
            ),
        ),
        (
            {"comm_overlap__tp_comm_overlap": True},
            (
                "`comm_overlap.tp_comm_overlap` cannot be on: one tensor-parallel rank sends nothing\n\n"
                "hint: leave it out; gradients, weights and pipeline messages overlap all the same"
            ),
        ),
    ],
)
def test_what_megatron_core_refuses_is_refused_before_it_starts(changes: dict[str, Any], message: str) -> None:
    assert refusal(**changes) == message


TENSOR = {
    "comm_overlap__tp_comm_overlap": True,
    "model__tensor_model_parallel_size": 2,
    "model__sequence_parallel": True,
    "model__bf16": True,
}


def test_tensor_parallel_messages_overlap_where_they_were_asked_to() -> None:
    assert chosen(**TENSOR)["model.tp_comm_overlap"]
    assert not chosen(**{**TENSOR, "comm_overlap__tp_comm_overlap": None})["model.tp_comm_overlap"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model__sequence_parallel": False}, "it needs `model.sequence_parallel`"),
        ({"model__bf16": False}, "`mixed_precision=bf16_mixed` has no buffers in Transformer Engine"),
        ({"model__fp8": "hybrid", "model__fp8_recipe": "blockwise"}, "has no buffers in Transformer Engine"),
        ({"device": "cpu"}, "there is nothing to overlap with on a CPU"),
    ],
)
def test_what_transformer_engine_cannot_overlap_is_refused_with_its_reason(changes: dict[str, Any], reason: str) -> None:
    assert reason in refusal(**{**TENSOR, **changes})
