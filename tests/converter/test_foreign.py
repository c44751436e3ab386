"""Checkpoints that megatron-core saved itself, in many ways, come back as Hugging Face models."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import types

import pytest
import torch
from safetensors.torch import load_file

from converter import UserError, hf_to_mcore, inspect, mcore_to_hf
from converter.console import show_report
from converter.execution import Reporter
from formats.folder import LocalFolder
from formats.huggingface import HuggingFaceReader
from tests.megatron_cpu import Shape, save

ARGS = {
    "num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 8, "group_query_attention": True,
    "num_query_groups": 4, "kv_channels": 8, "max_position_embeddings": 256, "norm_epsilon": 1e-5, "normalization": "RMSNorm",
    "swiglu": True, "untie_embeddings_and_output_weights": True, "add_bias_linear": False, "add_qkv_bias": False,
    "position_embedding_type": "rope", "rotary_base": 10000, "rotary_percent": 1.0, "use_rope_scaling": False,
    "attention_dropout": 0.0, "init_method_std": 0.02, "padded_vocab_size": 512, "vocab_size": 389, "qk_layernorm": False,
    "window_size": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def imported(tmp_path_factory, model_folder):
    """A model in fp32 with a vocabulary that needs padding, and its conversion."""
    folder = model_folder("padded_vocab")
    target = tmp_path_factory.mktemp("imported") / "m"
    hf_to_mcore(folder, target, tp=1, pp=1)
    return folder, str(target / "iter_0000000"), json.loads((folder / "config.json").read_text())


def saved_by_megatron(ranks, imported, folder, *, tp=1, pp=1, vpp=None, layout=None, **extra):
    _, iteration, config = imported
    ranks.run(save, tp * pp, Shape(config, tp, pp, vpp, layout), iteration, str(folder), extra)
    return folder


@pytest.mark.parametrize("layout", [(1, 1, None), (2, 1, None), (4, 1, None), (1, 4, None), (2, 2, None), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("singleton", [False, True], ids=["stacked", "per_layer"])
def test_any_layout_stacked_or_per_layer_gives_the_source(ranks, imported, tmp_path, layout, singleton):
    tp, pp, vpp = layout
    saved = saved_by_megatron(ranks, imported, tmp_path / "iter_0000007", tp=tp, pp=pp, vpp=vpp, singleton=singleton)
    mcore_to_hf(saved, tmp_path / "back", hf_config=imported[0])
    expected, actual = (load_file(folder / "model.safetensors") for folder in (imported[0], tmp_path / "back"))
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_uneven_stages_give_the_source(ranks, imported, tmp_path):
    saved = saved_by_megatron(ranks, imported, tmp_path / "iter_0000007", tp=1, pp=2, layout="Et*3|tL")
    mcore_to_hf(saved, tmp_path / "back", hf_config=imported[0])
    assert same_weights(imported[0], tmp_path / "back")


def same_weights(first, second):
    a, b = (
        {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
        for folder in (first, second)
    )
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_weights_alone_are_read_where_optimizer_state_is_present(ranks, model_folder, tmp_path, monkeypatch):
    folder = model_folder("gqa", hidden_size=256, intermediate_size=1024, num_hidden_layers=2)
    hf_to_mcore(folder, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    saved = saved_by_megatron(
        ranks, (folder, str(tmp_path / "m" / "iter_0000000"), config), tmp_path / "iter_0000007", tp=2, pp=2, optimizer=True
    )
    report = inspect(saved)
    assert report.optimizer_state
    read = []

    def counted(*arguments, preadv=os.preadv):
        read.append(preadv(*arguments))
        return read[-1]

    notes = []
    monkeypatch.setattr(os, "preadv", counted)
    mcore_to_hf(saved, tmp_path / "back", hf_config=folder, reporter=Reporter(note=notes.append))
    monkeypatch.undo()
    assert f"optimizer state is not exported: to continue training, keep `{saved}`" in notes
    assert same_weights(folder, tmp_path / "back")
    weights = sum(spec.nbytes for spec in HuggingFaceReader(LocalFolder(folder)).specs.values())
    stored = sum(path.stat().st_size for path in saved.glob("*.distcp"))
    assert stored > 3.9 * weights
    assert sum(read) <= 1.1 * weights


def test_a_megatron_lm_checkpoint_rebuilds_its_config_from_args(ranks, imported, tmp_path):
    saved_by_megatron(ranks, imported, tmp_path / "run" / "iter_0000007", tp=2, args=ARGS)
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("7")
    assert inspect(tmp_path / "run").writer == "Megatron-LM"
    mcore_to_hf(tmp_path / "run", tmp_path / "back")
    assert same_weights(imported[0], tmp_path / "back")
    from transformers import AutoModelForCausalLM

    ids = torch.arange(40)[None]
    with torch.no_grad():
        logits = [
            AutoModelForCausalLM.from_pretrained(path, dtype="auto")(ids).logits for path in (imported[0], tmp_path / "back")
        ]
    assert torch.equal(*logits)


def test_an_older_common_pt_with_enums_in_args_opens(ranks, imported, tmp_path):
    """Before 0.19 megatron-core kept common state in `common.pt`."""
    from megatron.core.transformer.enums import AttnBackend

    saved = saved_by_megatron(ranks, imported, tmp_path / "iter_0000007")
    args = argparse.Namespace(**ARGS, attention_backend=AttnBackend.auto)
    torch.save({"args": args, "iteration": 7, "checkpoint_version": 3.0}, saved / "common.pt")
    assert inspect(saved).writer == "Megatron-LM"
    mcore_to_hf(saved, tmp_path / "back")
    assert same_weights(imported[0], tmp_path / "back")


@pytest.fixture
def schedule(monkeypatch):
    """A class of a fork of Megatron-LM, of a package that is not installed where the checkpoint is read."""
    module = types.ModuleType("ourcompany.megatron.schedules")
    module.Schedule = type("Schedule", (), {"__module__": module.__name__})
    monkeypatch.setitem(sys.modules, "ourcompany", types.ModuleType("ourcompany"))
    monkeypatch.setitem(sys.modules, "ourcompany.megatron", types.ModuleType("ourcompany.megatron"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    made = module.Schedule()
    made.steps = [1, 2]
    return made


def test_a_checkpoint_of_a_fork_is_read_and_inspect_names_its_package(imported, schedule, monkeypatch, tmp_path, capsys):
    saved = tmp_path / "iter_0000007"
    shutil.copytree(imported[1], saved)
    shutil.rmtree(saved / "huggingface")
    for name in ("run_config.yaml", "conversion.json", "integrity.json"):
        (saved / name).unlink()
    torch.save({"args": argparse.Namespace(**ARGS, schedule=schedule), "iteration": 7}, saved / "common.pt")
    monkeypatch.undo()
    assert "ourcompany" not in sys.modules
    report = inspect(saved)
    assert (report.writer, report.unknown_packages) == ("Megatron-LM", ["ourcompany"])
    show_report(report, as_json=False)
    assert "args         names classes of `ourcompany`\n" in capsys.readouterr().out
    mcore_to_hf(saved, tmp_path / "back")
    assert same_weights(imported[0], tmp_path / "back")


def test_trained_weights_follow_the_map_that_travelled(ranks, model_folder, tmp_path):
    folder = model_folder("gqa", max_shard_size="60KB")
    hf_to_mcore(folder, tmp_path / "m", tp=2)
    config = json.loads((folder / "config.json").read_text())
    trained = tmp_path / "trained" / "iter_0000007"
    ranks.run(save, 2, Shape(config, 2), str(tmp_path / "m" / "iter_0000000"), str(trained), {"add": 0.25})
    shutil.copytree(tmp_path / "m" / "iter_0000000" / "huggingface", trained / "huggingface")
    mcore_to_hf(trained, tmp_path / "back")
    for path in folder.iterdir():
        if path.suffix != ".safetensors" and path.is_file():
            assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()
    for path in folder.glob("*.safetensors"):
        before, after = load_file(path), load_file(tmp_path / "back" / path.name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name] + 0.25, after[name]) for name in before)
        length = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        assert (tmp_path / "back" / path.name).read_bytes()[:length] == path.read_bytes()[:length]


def test_biases_that_training_moved_from_zero_are_an_error(ranks, model_folder, tmp_path):
    folder = model_folder("attention_bias")
    hf_to_mcore(folder, tmp_path / "m")
    mcore_to_hf(tmp_path / "m", tmp_path / "back")
    config = json.loads((folder / "config.json").read_text())
    trained = tmp_path / "iter_0000007"
    ranks.run(save, 1, Shape(config), str(tmp_path / "m" / "iter_0000000"), str(trained), {"add": 0.25})
    with pytest.raises(UserError, match=r"`decoder.layers.0.mlp.linear_fc1.bias` is not zero any more"):
        mcore_to_hf(trained, tmp_path / "again", hf_config=folder)
    assert not (tmp_path / "again").exists()


def test_a_bf16_checkpoint_exported_by_a_config_alone_says_bf16(ranks, imported, tmp_path):
    saved = saved_by_megatron(ranks, imported, tmp_path / "iter_0000007", tp=2, bf16=True)
    (tmp_path / "config").mkdir()
    shutil.copy(imported[0] / "config.json", tmp_path / "config")
    mcore_to_hf(saved, tmp_path / "back", hf_config=tmp_path / "config")
    assert {path.name for path in (tmp_path / "back").iterdir()} == {"config.json", "conversion.json", "model.safetensors"}
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"
    source, exported = (load_file(path / "model.safetensors") for path in (imported[0], tmp_path / "back"))
    assert all(torch.equal(source[name].bfloat16(), exported[name]) for name in source)


def test_a_checkpoint_that_says_nothing_of_its_model_asks_for_a_config(ranks, imported, tmp_path):
    saved = saved_by_megatron(ranks, imported, tmp_path / "iter_0000007")
    with pytest.raises(UserError, match=r"says nothing about its model"):
        mcore_to_hf(saved, tmp_path / "back")
