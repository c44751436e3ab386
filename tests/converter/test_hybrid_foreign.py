"""Checkpoints of a HybridModel that others wrote, and damaged ones; what is refused and what is noted of layout `hybrid`."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from converter import Reporter, UserError, families, hf_to_mcore, inspect_checkpoint, mcore_to_hf, side_files
from converter.config import make_model
from converter.hybrid import in_gpt, with_stages
from converter.planner import to_huggingface
from formats.folder import LocalFolder
from formats.torch_dist import TorchDistReader
from tests import hybrid_model
from tests.converter.family_suite import save_small
from tests.converter.test_foreign import ARGS
from tests.models import model_tree

ITERATION = "iter_0000000"
PATTERN = "*-*-*-*-"


@pytest.fixture(scope="module")
def source(model_folder):
    return model_folder("padded_vocab")


@pytest.fixture
def hybrid(source, tmp_path):
    hf_to_mcore(source, tmp_path / "m", layout="hybrid")
    return tmp_path / "m"


def saved_by_megatron(ranks, source, hybrid, target, args):
    config, sizes = json.loads((source / "config.json").read_text()), {"pipeline_model_parallel_size": 2}
    model = config, with_stages(PATTERN, [3, 5]), sizes
    ranks.run(hybrid_model.save, 2, model, str(hybrid / ITERATION), str(target), args)
    return target


def same_tensors(first, second):
    left, right = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_a_hybrid_model_s_own_checkpoint_rebuilds_its_config_from_args(ranks, source, hybrid, tmp_path):
    args = {
        **ARGS,
        "num_layers": 8,
        "hybrid_layer_pattern": "*-*|-*-*-",
        "spec": ["megatron.core.models.hybrid.hybrid_layer_specs"],
    }
    saved = saved_by_megatron(ranks, source, hybrid, tmp_path / "iter_0000007", args)
    assert inspect_checkpoint(saved).layers_as == "hybrid"
    mcore_to_hf(saved, tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["num_hidden_layers"] == 4
    assert same_tensors(tmp_path / "back", source)
    mcore_to_hf(saved, tmp_path / "given", hf_config=source)
    assert same_tensors(tmp_path / "given", source)


def test_run_config_alone_says_what_a_hybrid_model_is(source, hybrid, tmp_path):
    shutil.rmtree(hybrid / ITERATION / side_files.FOLDER)
    for name in ("conversion.json", "integrity.json"):
        (hybrid / ITERATION / name).unlink()
    mcore_to_hf(hybrid, tmp_path / "back")
    assert same_tensors(tmp_path / "back", source)
    file = hybrid / ITERATION / "run_config.yaml"
    document = yaml.safe_load(file.read_text())
    document["model"]["hybrid_layer_pattern"] = "*-*-*--*"
    file.write_text(yaml.safe_dump(document))
    with pytest.raises(UserError, match="not attention and a feed-forward part in turn"):
        mcore_to_hf(hybrid, tmp_path / "no")
    with pytest.raises(UserError, match=r"says that `hybrid_layer_pattern` is `\*-\*-\*-\*-`, `run_config.yaml` that it is"):
        mcore_to_hf(hybrid, tmp_path / "no", hf_config=source)


def test_a_layer_that_is_missing_is_named_as_the_hybrid_model_counts_it(source, hybrid):
    family, config = families.find("llama", "hybrid"), json.loads((source / "config.json").read_text())
    specs = TorchDistReader(LocalFolder(hybrid / ITERATION)).specs
    left = {name: spec for name, spec in specs.items() if not name.startswith("decoder.layers.5.")}
    with pytest.raises(UserError, match=r"the checkpoint lacks `decoder\.layers\.5\.mlp\.linear_fc1\.layer_norm_weight`"):
        to_huggingface(family.RULES, make_model(family.CONFIG, config), left, dtype="keep")


@pytest.mark.parametrize("name", ["decoder.layers.3.self_attention.linear_proj.weight", "decoder.layers.2.mlp.linear_fc2.weight"])
def test_a_layer_that_is_no_half_of_one_has_no_name_in_a_gpt_model(name):
    with pytest.raises(UserError, match="is of no layer that a GPTModel has"):
        in_gpt(name)


def test_a_family_that_is_hybrid_alone_has_no_layout_gpt(tmp_path):
    assert families.find("mamba2").layout == "hybrid"
    (tmp_path / "hf").mkdir()
    save_file({"backbone.embeddings.weight": torch.zeros(4, 4)}, tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "config.json").write_text(json.dumps({"model_type": "mamba2"}))
    with pytest.raises(
        UserError, match=r"models of this family \(Mamba 2, Codestral Mamba\) have no layout `gpt` in Megatron, only `hybrid`"
    ):
        hf_to_mcore(tmp_path / "hf", tmp_path / "m", layout="gpt")


NOTED = {
    "phi": "this model has attention and the feed-forward part side by side: no HybridModel computes it",
    "helium": "HybridModel takes no `rotary_interleaved`: set `rotary_pos_emb.rotary_interleaved`",
    "cwm": "HybridModel takes no `rope_scaling`: set `rotary_pos_emb.inv_freq`",
}


@pytest.mark.parametrize("family", NOTED)
def test_what_no_hybrid_model_computes_is_noted_and_its_weights_travel(family, tmp_path):
    source, notes, as_gpt = save_small(family, tmp_path / "hf"), list[str](), list[str]()
    hf_to_mcore(source, tmp_path / "m", layout="hybrid", tp=2, pp=2, reporter=Reporter(note=notes.append))
    hf_to_mcore(source, tmp_path / "gpt", reporter=Reporter(note=as_gpt.append))
    assert any(NOTED[family] in note for note in notes), notes
    assert not any("HybridModel" in note for note in as_gpt)
    mcore_to_hf(tmp_path / "m", tmp_path / "back")
    assert model_tree(tmp_path / "back") == model_tree(source)
