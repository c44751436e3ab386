"""A model that there is no formula for trains like any other: its log has no FLOPs, and text is not generated from it."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from formats.errors import UserError
from tests.trainer import small
from trainer.checkpoints.contents import describe

EXAMPLE = Path(__file__).parents[2] / "examples" / "model.py"


def _train(save: str) -> list[float]:
    from trainer.loop import pretrain

    config, history = runpy.run_path(str(EXAMPLE), run_name="model")["settings"](steps=6), small.History()
    config.dataset, config.checkpoint.save, config.dist.device = small.FixedTokens(256), save, "cpu"
    config.validation.eval_iters = 0
    pretrain(config, callbacks=[history])
    return history.losses


def test_a_model_without_a_formula_trains_and_its_log_has_no_flops(ranks, tmp_path) -> None:
    (losses,) = ranks.run(_train, 1, str(tmp_path))
    assert losses[-1] < losses[0]
    *_, record = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (record["tflops_per_gpu"], record["mfu"]) == (None, None)
    assert record["tokens_per_second_per_gpu"] > 0


def test_no_text_is_generated_from_experts_that_are_of_no_family_and_the_hint_says_why(ranks, model_folder, tmp_path) -> None:
    experts = {"model__num_moe_experts": 2, "model__moe_ffn_hidden_size": 32, "model__moe_token_dispatcher_type": "alltoall",
               "model__moe_router_pre_softmax": True}  # fmt: skip
    changes = {**experts, "model__hf_config": {}, "model__hf_source": None, "checkpoint__pretrained_checkpoint": None,
               "train__train_iters": 1, "scheduler__lr_warmup_iters": 0, "checkpoint__save": str(tmp_path)}  # fmt: skip
    ranks.run(small.train, 1, str(model_folder("gqa")), changes)
    with pytest.raises(UserError) as refused:
        describe(str(tmp_path))
    assert refused.value.hint == (
        "text is generated from checkpoints with a `config.json`: those of `mbconvert`, and those of `mbtrain` for a model that "
        "a `config.json` describes (not for every mixture of experts, nor for a model of your own)"
    )
