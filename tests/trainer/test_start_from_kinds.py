"""A run starts from the weights of every kind of Megatron checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from converter import mcore_to_hf
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
    """The weights of a model, loaded from each source in turn."""
    from trainer import model, parallel
    from trainer.checkpoints import live
    from trainer.settings.resolve import resolve

    config = resolve(small.settings(Path(folder)), world_size=1, device="cpu").config
    with parallel.session(config, "cpu"):
        chunks = model.build(config.model)
        weights = []
        for source in sources:
            live.load(chunks, source)
            weights.append({name: one.detach().clone() for name, one in chunks[0].named_parameters()})
    return weights


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
    (weights,) = ranks.run(_loaded, 1, str(folder), sources)
    for megatron, huggingface in zip(weights[::2], weights[1::2], strict=True):
        assert all((one == huggingface[name]).all() for name, one in megatron.items())
    if case == "ranks":
        assert all((one == weights[2][name]).all() for name, one in weights[0].items())
