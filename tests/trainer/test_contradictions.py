"""Settings that a run carries out in its own way, and settings that contradict others."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from formats.errors import UserError
from tests.trainer import observed, small
from tests.trainer.settings import HOPPER
from tests.trainer.trials import BF16, MUP, SHARDED
from trainer.settings.resolve import resolve

pytestmark = pytest.mark.filterwarnings("ignore")  # megatron-core's own, which commands do not show


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
            names = {parameter: name for chunk in run.chunks for name, parameter in chunk.named_parameters()}
            self.found = {
                names[parameter].removeprefix("module."): (group["max_lr"], group["min_lr"], group["eps"])
                for group in run.parts.optimizer.param_groups
                for parameter in group["params"]
            }

    history = Rates()
    pretrain(observed.settings(**changes), callbacks=[history])
    return history.found


def test_mup_divides_the_learning_rates_of_hidden_matrices_by_the_width(ranks: Any) -> None:
    """A model four times as wide as its base (arXiv:2203.03466, table 8): Adam's rate of a hidden matrix is a quarter."""
    wide = {"model.use_mup": True, "model.mup_base_hidden_size": 4, "optimizer.lr": 0.4, "optimizer.min_lr": 0.04}
    (rates_by_name,) = ranks.run(_rates, 1, wide)
    for name, rates in rates_by_name.items():
        hidden = name.endswith("weight") and "norm" not in name and "embedding" not in name and "output" not in name
        assert rates == pytest.approx((0.1, 0.01, 2.5e-9) if hidden else (0.4, 0.04, 1e-8)), name
    assert sum(rates[0] < 0.2 for rates in rates_by_name.values()) == 2 * 4


def _deterministic(changes: dict[str, Any]) -> list[Any]:
    """What a run in deterministic mode finds, and what is left afterwards."""
    from trainer.loop import pretrain

    enabled: list[Any] = []

    class Watch(small.History):
        def on_step(self, run: Any, step: Any) -> None:
            enabled.append(torch.are_deterministic_algorithms_enabled())

    pretrain(observed.settings(**changes), callbacks=[Watch()])
    names = ("NCCL_ALGO", "NVTE_ALLOW_NONDETERMINISTIC_ALGO", "CUBLAS_WORKSPACE_CONFIG")
    return [enabled, torch.are_deterministic_algorithms_enabled(), [os.environ.get(name) for name in names]]


def test_deterministic_mode_reaches_torch_and_cudas_libraries(ranks: Any) -> None:
    (deterministic,) = ranks.run(_deterministic, 1, {"model.deterministic_mode": True})
    assert deterministic == [[True, True], False, ["Ring", "0", ":4096:8"]]
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


def _waits(changes: dict[str, Any]) -> int:
    """How often a run waits for its device, from the first step on."""
    from trainer.loop import pretrain

    class Watch(small.History):
        waits = 0

        def on_start(self, run: Any) -> None:
            torch.cuda.synchronize = self.wait

        def wait(self, *_: Any) -> None:
            self.waits += 1

    watch = Watch()
    pretrain(observed.settings(**changes), callbacks=[watch])
    return watch.waits


def test_stages_wait_for_batches_of_messages_unless_somebody_knows_better(ranks: Any) -> None:
    stages = {"model.pipeline_model_parallel_size": 2, "model.batch_p2p_comm": True}
    assert all(waits > 0 for waits in ranks.run(_waits, 2, stages))
    assert ranks.run(_waits, 2, {**stages, "model.batch_p2p_sync": False}) == [0, 0]
