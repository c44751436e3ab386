"""A run starts from the weights of every kind of Megatron checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from converter import mcore_to_hf
from tests.converter import stored_kinds
from tests.golden.kinds import unpacked
from tests.trainer import small

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "vocab_size": 89,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
KINDS = {
    "ranks": (["ranks_tp2_pp2", "ranks_tp2_pp2_as_torch_dist"], {}),
    "dcp": (["torch_dcp", "fsdp_dtensor"], WIDE),
}


def _loaded(folder, sources):
    """The weights of a model, loaded from each source in turn, and the notes there were."""
    from trainer import model, parallel
    from trainer.checkpoints import live
    from trainer.settings.resolve import resolve

    config = resolve(small.settings(Path(folder)), world_size=1, device="cpu").config
    with parallel.session(config, "cpu"):
        chunks = model.build(config.model)
        weights, notes = [], []
        for source in sources:
            live.load(chunks, source, note=notes.append)
            weights.append({name: parameter.detach().clone() for name, parameter in chunks[0].named_parameters()})
    return weights, notes


@pytest.mark.parametrize("case", KINDS)
def test_a_run_starts_from_the_weights_of_each_kind(case, ranks, tmp_path):
    names, changes = KINDS[case]
    folder = tmp_path / "config"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    roots = [unpacked(name, tmp_path) for name in names]
    for name, root in zip(names, roots, strict=True):
        mcore_to_hf(root, tmp_path / name / "hf", hf_config=folder)
    sources = [str(source) for name, root in zip(names, roots, strict=True) for source in (root, tmp_path / name / "hf")]
    ((weights, _),) = ranks.run(_loaded, 1, str(folder), sources)
    for megatron, huggingface in zip(weights[::2], weights[1::2], strict=True):
        assert all((weight == huggingface[name]).all() for name, weight in megatron.items())
    if case == "ranks":
        assert all((weight == weights[2][name]).all() for name, weight in weights[0].items())


def _losses(folder, sources):
    """The first two losses of a run from each source."""
    plan = {"train__train_iters": 2, "scheduler__lr_warmup_iters": 0}
    return [small.train(folder, {**plan, "checkpoint__pretrained_checkpoint": source}).losses for source in sources]


def test_the_first_losses_from_each_kind_are_those_from_its_twin(ranks, model_folder, tmp_path):
    folder = model_folder("gqa")
    kinds = {"twin": stored_kinds.torch_dist, **stored_kinds.MEGATRON}
    sources = [str(store(folder, tmp_path / name)) for name, store in kinds.items()]
    (losses,) = ranks.run(_losses, 1, str(folder), sources)
    assert len(set(losses[0])) == 2
    assert dict(zip(kinds, losses, strict=True)) == dict.fromkeys(kinds, losses[0])


def test_rows_that_a_checkpoint_does_not_count_as_tokens_are_left_out_and_that_is_said(ranks, model_folder, tmp_path):
    folder, kinds = model_folder("gqa"), {"twin": stored_kinds.torch_dist, "zarr": stored_kinds.MEGATRON["zarr"]}
    sources = [str(store(folder, tmp_path / name)) for name, store in kinds.items()]
    (((twin, zarr), notes),) = ranks.run(_loaded, 1, str(folder), sources)
    assert all((value == zarr[name]).all() for name, value in twin.items())
    assert notes == [f"`{sources[1]}` does not say how many of its 512 rows are tokens: those after the model's 384 are left out"]
