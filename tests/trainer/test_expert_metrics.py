"""What a run logs of its experts, and what of a router's state survives precision, a resume and another layout."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer import observed, small, witness
from tests.trainer.trials import BIAS, MOE

STEPS, STOPPED = 6, 2
EP2 = {"model.expert_model_parallel_size": 2}
BALANCED = {**BIAS, "model.moe_router_bias_update_rate": 0.05, "model.moe_z_loss_coeff": 0.01, "model.moe_aux_loss_coeff": 0.1}
QUANTILE = {**MOE, "model.moe_aux_loss_coeff": 0.0, "model.moe_router_load_balancing_type": "quantile_balancing",
            "model.moe_router_quantile_balancing_ema": 0.5}  # fmt: skip
GLOBAL = {**MOE, "model.moe_router_load_balancing_type": "global_aux_loss"}
PLAN = {
    "train.train_iters": STEPS,
    "train.global_batch_size": 4,
    "logger.log_interval": 1,
    "scheduler.lr_decay_style": "constant",
}


@dataclass
class Observer(witness.Witness):
    """Also notes the biases of routers, by layer, at the end."""

    biases: dict[int, Any] = field(default_factory=dict)

    def on_end(self, run: Any) -> None:
        super().on_end(run)
        for module in (module for chunk in run.chunks for module in chunk.modules()):
            for name in ("expert_bias", "qb_beta"):
                if getattr(module, name, None) is not None:
                    self.biases[module.layer_number] = getattr(module, name).clone()


def train(changes: dict[str, Any]) -> Observer:
    """Run on this rank."""
    from trainer.loop import pretrain

    seen = Observer()
    pretrain(observed.settings(**{**PLAN, **changes}), callbacks=[seen])
    return seen


def lines(folder: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in records if line["kind"] == "step"]


SEVERAL = {**MOE, "model.moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss", "global_aux_loss"],
           "model.moe_aux_loss_coeff": [0.1, 0.1, 0.1]}  # fmt: skip
RESUMED = {
    "biases, one rank": (1, BALANCED),
    "biases, ep2": (2, {**BALANCED, **EP2}),
    "quantiles, ep2": (2, {**QUANTILE, **EP2}),
    "several losses, ep2": (2, {**SEVERAL, **EP2}),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_has_the_routers_of_the_uninterrupted_one_bit_for_bit(name, ranks, tmp_path):
    world, changes = RESUMED[name]
    whole = ranks.run(train, world, {**changes, "checkpoint.save": str(tmp_path / "whole")})
    settings = {**changes, "checkpoint.save": str(tmp_path / "parts"), "checkpoint.load": str(tmp_path / "parts")}
    ranks.run(train, world, {**settings, "train.exit_interval": STOPPED})
    for uninterrupted, resumed in zip(whole, ranks.run(train, world, settings), strict=True):
        assert resumed.losses == uninterrupted.losses[STOPPED:]
        assert resumed.layers == uninterrupted.layers[STOPPED:]
        assert witness.differences(uninterrupted.left, resumed.left) == []
        assert uninterrupted.biases.keys() == resumed.biases.keys()
        assert all(torch.equal(bias, resumed.biases[layer]) for layer, bias in uninterrupted.biases.items())
        assert all(bias.abs().sum() > 0 for bias in uninterrupted.biases.values())
    assert bool(whole[0].biases) == (changes.get("model.moe_router_load_balancing_type") is not SEVERAL[_KIND])
    assert witness.metrics(tmp_path / "parts") == witness.metrics(tmp_path / "whole")


_KIND = "model.moe_router_load_balancing_type"


SHARDED, BF16 = {"ddp.use_distributed_optimizer": True}, {"mixed_precision": "bf16_mixed"}
OTHERWISE = {
    "ep2 to one rank": ((2, EP2), (1, {})),
    "dp2 to ep2": ((2, {}), (2, EP2)),
    "ep2 to dp2, distributed optimizer": ((2, {**EP2, **SHARDED}), (2, SHARDED)),
    "dp2 to ep2, distributed optimizer": ((2, SHARDED), (2, {**EP2, **SHARDED})),
    "ep2 to one rank, bf16": ((2, {**EP2, **BF16}), (1, BF16)),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_a_run_goes_on_at_another_number_of_expert_parallel_ranks(name, ranks, tmp_path):
    (world, before), (other_world, after) = OTHERWISE[name]
    settings = {**BALANCED, "checkpoint.save": str(tmp_path), "checkpoint.load": str(tmp_path)}
    whole, *_ = ranks.run(train, world, {**BALANCED, **before})
    ranks.run(train, world, {**settings, **before, "train.exit_interval": STOPPED})
    tolerance = 1e-2 if "mixed_precision" in before else 1e-5  # sums in another order, in bf16 or in fp32
    for resumed in ranks.run(train, other_world, {**settings, **after}):
        assert resumed.losses == pytest.approx(whole.losses[STOPPED:], abs=tolerance)
        assert {float(step) for name, step in resumed.left.items() if name.endswith(".step")} == {STEPS}
        if "mixed_precision" not in before:
            assert all(torch.equal(bias, whole.biases[layer]) for layer, bias in resumed.biases.items())


def test_biases_of_routers_stay_in_fp32_where_weights_are_rounded(ranks, tmp_path):
    (start,) = ranks.run(train, 1, {**BALANCED, "model.moe_router_bias_update_rate": 0.0123, "checkpoint.save": str(tmp_path)})
    still = {"model.moe_router_bias_update_rate": 0.0, "checkpoint.pretrained_checkpoint": str(tmp_path)}
    (rounded,) = ranks.run(train, 1, {**BALANCED, **still, "mixed_precision": "bf16_mixed"})
    for layer, bias in start.biases.items():
        assert not torch.equal(bias, bias.bfloat16().float())
        assert torch.equal(bias, rounded.biases[layer])


def test_each_layers_numbers_are_logged_on_request(ranks, tmp_path):
    layers = {**BALANCED, "model.num_layers": 4, "model.moe_layer_freq": [0, 1, 1, 1], "model.moe_per_layer_logging": True}
    two = {**layers, "model.pipeline_model_parallel_size": 2}
    (history,) = ranks.run(
        train, 1, {**layers, "logger.run_dir": str(tmp_path / "one"), "checkpoint.save": str(tmp_path / "start")}
    )
    ranks.run(train, 2, {**two, "logger.run_dir": str(tmp_path / "two")})
    for step, reported in zip(lines(tmp_path / "one"), history.layers, strict=True):
        assert set(step["per_layer"]) == {"load_balancing_loss", "z_loss", "max_expert_load"}
        for name, values in step["per_layer"].items():
            assert len(values) == 4
            assert values[0] == 0.0
            assert all(value > 0 for value in values[1:])
            assert step["layer_metrics"][name] == reported[name] == pytest.approx(sum(values) / 3)
        assert step["expert_loads"][0] == [0.0] * 4
        assert [max(loads) for loads in step["expert_loads"]] == pytest.approx(step["per_layer"]["max_expert_load"], abs=1e-4)
    assert [len(step["per_layer"]["z_loss"]) for step in lines(tmp_path / "two")] == [4] * STEPS
    assert all(step["per_layer"]["z_loss"][3] > 0 for step in lines(tmp_path / "two"))
    assert all([sum(loads) for loads in step["expert_loads"]] == pytest.approx([0, 4, 4, 4], abs=1e-3)
               for step in lines(tmp_path / "two"))  # fmt: skip


@dataclass
class Choices(small.History):
    """Counts, beside the routers, how often tokens choose each expert: [layers, experts] for each microbatch."""

    microbatches: list[torch.Tensor] = field(default_factory=list)

    def on_start(self, run: Any) -> None:
        for module in (module for chunk in run.chunks for module in chunk.modules()):
            if type(module).__name__ == "TopKRouter":
                module.register_forward_hook(self._choose)

    def _choose(self, router: Any, inputs: Any, _output: Any) -> None:
        chosen = (inputs[0] @ router.weight.T).flatten(0, 1).topk(router.topk, dim=-1).indices
        self.microbatches.append(torch.bincount(chosen.flatten(), minlength=router.num_experts))


def choose(changes: dict[str, Any]) -> Choices:
    """Run one step on this rank."""
    from trainer.loop import pretrain

    seen = Choices()
    pretrain(observed.settings(**{**PLAN, "train.train_iters": 1, "validation.eval_iters": 1, **changes}), callbacks=[seen])
    return seen


@pytest.mark.parametrize("padded", [False, True])
def test_tokens_that_experts_have_no_room_for_are_counted(padded, ranks):
    (seen,) = ranks.run(
        choose, 1, {**MOE, "model.moe_expert_capacity_factor": 0.75, "model.moe_pad_expert_input_to_capacity": padded}
    )
    capacity = 0.75 * 16 * 2 / 4  # of the choices of a sequence of 16 tokens, each of which chooses 2 of 4 experts
    chosen = torch.stack(seen.microbatches[: 4 * 2])  # those of the evaluation follow
    dropped = (chosen - capacity).clamp(min=0).sum() / chosen.sum()
    assert seen.layers[0]["dropped_tokens"] == pytest.approx(dropped.item())
    assert dropped > 0


def test_loads_are_those_of_the_steps_tokens_whatever_is_recomputed_or_evaluated(ranks, tmp_path):
    recomputed = {"model.recompute_granularity": "selective", "model.recompute_modules": ["moe"]}
    listed = {"model.moe_per_layer_logging": True, "logger.run_dir": str(tmp_path)}
    (plain,) = ranks.run(choose, 1, {**MOE, **listed})
    (again,) = ranks.run(choose, 1, {**MOE, **recomputed})
    loads = torch.stack(plain.microbatches[: 4 * 2]).view(4, 2, 4).sum(0)
    assert plain.layers[0]["max_expert_load"] == pytest.approx((loads.amax(1) / loads.float().mean(1)).mean().item())
    (step,) = lines(tmp_path)
    over_the_mean = loads / loads.float().mean(1, keepdim=True)
    torch.testing.assert_close(torch.tensor(step["expert_loads"]), over_the_mean, rtol=0, atol=1e-4)
    assert again.layers == plain.layers
    assert "dropped_tokens" not in plain.layers[0]
