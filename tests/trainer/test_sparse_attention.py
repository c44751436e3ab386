"""Sparse attention (DSA): of packed rows, and where layers take over the tokens that others chose."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from converter import UserError, families
from converter.config import to_huggingface, to_megatron
from tests.converter.family_suite import TOKENS, save_small, small_config
from tests.family_models import build
from tests.megatron_cpu import Ranks
from trainer.model import from_hf_config
from trainer.settings import architecture

SEGMENTS = [[0] * 15 + [1] * 9] * 2


def packed_and_alone(rank, config, tokens, segments):
    """The logits of packed rows, and those of their second segments alone, [batch, tokens, vocabulary]."""
    import torch

    from trainer import cpu_backend
    from trainer.segments import attention_mask

    with cpu_backend.activate(), torch.no_grad():
        (chunk,) = build(config)
        torch.manual_seed(1)
        for parameter in chunk.parameters():
            parameter.normal_(0.0, 0.1)

        def logits(rows, ids):
            positions = torch.arange(rows.shape[1]).expand_as(rows)
            return chunk(rows, positions, attention_mask(ids)).numpy()

        rows, ids = torch.tensor(tokens), torch.tensor(segments)
        first = segments[0].count(0)
        return logits(rows, ids)[:, first:], logits(rows[:, first:].contiguous(), ids[:, first:])


@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa"])
def test_a_packed_segment_has_the_logits_that_it_has_alone(family, ranks, tmp_path):
    config = json.loads((save_small(family, tmp_path, dtype="float32") / "config.json").read_text())
    ((packed, alone),) = Ranks(ranks).run(packed_and_alone, 1, config, TOKENS, SEGMENTS)
    np.testing.assert_allclose(packed, alone, atol=1e-5 * np.abs(alone).max(), rtol=0)


def differing(rank, config, changes):
    """The changes with which the model has other weights, or computes other numbers of the same weights."""
    import torch
    from megatron.core import parallel_state

    from trainer import cpu_backend

    def seen(**fields):
        parallel_state.destroy_model_parallel()
        (chunk,) = build(config, **fields)
        torch.manual_seed(1)
        shapes = [(name, weight.normal_(0.0, 0.3).shape) for name, weight in chunk.named_parameters()]
        tokens = torch.tensor(TOKENS)
        mask = torch.ones(24, 24, dtype=torch.bool).triu(1)[None, None]
        try:
            return shapes, chunk(tokens, torch.arange(24).expand_as(tokens), mask).tolist()
        except AssertionError as error:  # of a package that is not installed
            return str(error)

    with cpu_backend.activate(), torch.no_grad():
        usual = seen()
        return [name for name, value in changes.items() if seen(**{name: value}) != usual]


INDEXER = {
    "dsa_indexer_n_heads": 8, "dsa_indexer_head_dim": 32, "dsa_indexer_topk": 3, "dsa_indexer_topk_freq": 1,
    "dsa_indexer_skip_topk_offset": 1, "dsa_indexer_rope_interleaved": False, "dsa_indexer_rotate_activation": True,
    "dsa_indexer_k_norm_epsilon": 1.0,
}  # fmt: skip


def test_a_field_of_the_indexer_changes_what_is_built_or_computed(ranks):
    config = small_config("glm_moe_dsa").to_dict()
    assert Ranks(ranks).run(differing, 1, config, INDEXER) == [[*INDEXER]]


def stage(rank, config):
    """Build the first or the second half of a model."""
    build(config, pipeline_model_parallel_size=2)


def test_a_stage_that_begins_with_another_s_choice_is_refused(ranks, tmp_path):
    config = small_config("glm_moe_dsa", indexer_types=["full", "full", "shared", "full"]).to_dict()
    with pytest.raises(UserError, match="layer 3 attends to tokens that layer 2 chose, which another pipeline stage has"):
        Ranks(ranks).run(stage, 2, config)


def test_recomputing_layers_that_share_choices_is_refused():
    provider = from_hf_config(small_config("glm_moe_dsa").to_dict())
    provider.recompute_granularity = "full"
    with pytest.raises(UserError, match=r"`model\.dsa_indexer_topk_freq` is `2`, and `model\.recompute_granularity` is `full`"):
        architecture.check(SimpleNamespace(model=provider, dataset=None))


def test_models_whose_indexers_follow_no_step_are_converted_and_not_trained():
    types = ["full", "shared", "full", "full"]
    config = small_config("glm_moe_dsa", indexer_types=types).to_dict()
    family = families.find("glm_moe_dsa")
    assert to_huggingface(family.CONFIG, to_megatron(family.CONFIG, config))["indexer_types"] == types
    with pytest.raises(UserError, match=r"`indexer_types` `.*` cannot be trained"):
        from_hf_config(config)


def test_indexers_are_read_as_transformers_reads_them():
    for changes in ({"index_topk_pattern": "FFSS"}, {"index_topk_freq": 2, "index_skip_topk_offset": 1}, {"index_topk_freq": 3}):
        config = small_config("glm_moe_dsa", **{"indexer_types": None, **changes}).to_dict()
        expected = config.pop("indexer_types")
        family = families.find("glm_moe_dsa")
        assert to_huggingface(family.CONFIG, to_megatron(family.CONFIG, {**config, **changes}))["indexer_types"] == expected
