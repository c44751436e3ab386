"""A model that there is no formula for trains like any other: its log has no FLOPs, and text is not generated from it."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest

from formats.errors import UserError
from tests.trainer import small
from trainer.checkpoints.contents import describe
from trainer.model import GPTModelProvider


@dataclass(kw_only=True)
class Ahead(GPTModelProvider):
    """A provider of the user's own, whose model predicts one token more (megatron-core's multi-token prediction)."""

    mtp_num_layers: int | None = 1
    is_hybrid_model: bool = True  # of a kind that there is no formula for

    def provide(self, pre_process: bool, post_process: bool, vp_stage: int | None = None) -> Any:
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec

        from trainer import device

        spec = device.layer_spec(self, vp_stage)
        return GPTModel(
            self, spec, vocab_size=self.padded_vocab_size, max_sequence_length=self.seq_length, pre_process=pre_process,
            post_process=post_process, position_embedding_type="rope",
            mtp_block_spec=get_gpt_mtp_block_spec(self, spec, use_transformer_engine=False),
        )  # fmt: skip


def _train(folder: str, save: str) -> list[float]:
    from trainer.loop import pretrain

    config = small.settings(Path(folder), checkpoint__pretrained_checkpoint=None, train__train_iters=6, checkpoint__save=save)
    own = {one.name: getattr(config.model, one.name) for one in fields(config.model) if one.init}
    config.model, history = Ahead(**{**own, "mtp_num_layers": 1, "hf_config": {}, "hf_source": None}), small.History()
    pretrain(config, callbacks=[history])
    return history.losses


def test_a_model_without_a_formula_trains_and_its_log_has_no_flops(ranks, model_folder, tmp_path) -> None:
    (losses,) = ranks.run(_train, 1, str(model_folder("gqa")), str(tmp_path))
    assert losses[-1] < losses[0]
    *_, record = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (record["tflops_per_gpu"], record["mfu"]) == (None, None)
    assert record["tokens_per_second_per_gpu"] > 0


def test_no_text_is_generated_from_experts_and_the_hint_says_why(ranks, model_folder, tmp_path) -> None:
    experts = {"model__num_moe_experts": 2, "model__moe_ffn_hidden_size": 32, "model__moe_token_dispatcher_type": "alltoall"}
    changes = {**experts, "model__hf_config": {}, "model__hf_source": None, "checkpoint__pretrained_checkpoint": None,
               "train__train_iters": 1, "scheduler__lr_warmup_iters": 0, "checkpoint__save": str(tmp_path)}  # fmt: skip
    ranks.run(small.train, 1, str(model_folder("gqa")), changes)
    with pytest.raises(UserError) as refused:
        describe(str(tmp_path))
    assert refused.value.hint == (
        "text is generated from checkpoints with a `config.json`: those of `mbconvert`, and those of `mbtrain` for a model that "
        "a `config.json` describes (not for a mixture of experts, or a model of your own)"
    )
