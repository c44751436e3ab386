"""Models that training programs left in chunks of their processes convert as the Hugging Face directory of the same weights.

Oracles: `hf_consolidated`, which torch joined itself, the permutation of torchtitan's `Llama3StateDictAdapter`, PEFT's merge of
the same model from a plain directory."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from benchmarks.convert import make_model
from converter import UserError, adapter_to_mcore, hf_to_mcore, inspect, mcore_to_hf, merge, verify
from converter.adapters.fingerprint import fingerprint
from converter.execution import Reporter
from tests.every_command import SHAPE, make_adapter
from tests.golden.kinds import unpacked
from tests.refusal import refused

KINDS = {
    "fsdp2_flat": "Hugging Face DCP", "fsdp2_safetensors": "Hugging Face safetensors in slices",
    "hf_sharded": "Hugging Face safetensors in slices",
}  # fmt: skip


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """One tiny Llama, saved by torch in several ways by two processes; `config.json` is in the folder above."""
    return unpacked("dcp_hf", tmp_path_factory.mktemp("kinds"))


@pytest.fixture(scope="module")
def config(kinds, tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    shutil.copy(kinds / "config.json", folder)
    return folder


@pytest.fixture(scope="module")
def state(kinds):
    """The weights that all of them hold."""
    return weights(kinds / "hf_consolidated")


def weights(folder):
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def came_back(source, tmp_path, **options):
    notes = []
    hf_to_mcore(source, tmp_path / "m", tp=1, pp=2, reporter=Reporter(note=notes.append), **options)
    mcore_to_hf(tmp_path / "m", tmp_path / "back")
    return weights(tmp_path / "back"), notes


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_gives_the_weights_that_torch_joins(kinds, config, state, tmp_path, name):
    report = inspect(kinds / name, tensors=True)
    assert (report.format, report.tensors, report.optimizer_state) == (KINDS[name], 21, False)
    assert len(report.tensor_list[0]["chunks"]) == 2
    tensors, notes = came_back(kinds / name, tmp_path, hf_config=config)
    assert same(tensors, state)
    assert notes == []
    assert verify(kinds / name, tmp_path / "m").same
    assert verify(kinds / "hf_consolidated", kinds / name).same
    assert {path.name for path in (tmp_path / "back").iterdir()} == {"config.json", "conversion.json", "model.safetensors"}


def optimizer(state):
    return {"state": {name: {"exp_avg": value * 2, "step": torch.ones(())} for name, value in state.items()}}


def test_the_state_of_an_optimizer_is_left_out_and_counted(state, config, tmp_path):
    saved = {"model": state, "optimizer": optimizer(state), "step": 2, "args": {"a": [1, None]}}
    dcp.save(saved, checkpoint_id=tmp_path / "nested", no_dist=True)
    shutil.copy(config / "config.json", tmp_path / "nested")
    assert inspect(tmp_path / "nested").optimizer_state
    tensors, notes = came_back(tmp_path / "nested", tmp_path)
    assert same(tensors, state)
    assert [note.partition(" such as")[0] for note in notes] == ["left out, no weights of the model: 42 tensors"]


def test_folders_of_accelerate_are_read_from_above_and_from_inside(state, config, tmp_path):
    dcp.save({"model": state}, checkpoint_id=tmp_path / "c" / "pytorch_model_fsdp_0", no_dist=True)
    dcp.save({"optimizer": optimizer(state)}, checkpoint_id=tmp_path / "c" / "optimizer_0", no_dist=True)
    shutil.copy(config / "config.json", tmp_path / "c")
    (tmp_path / "c" / "trainer_state.json").write_text("{}")
    for source in (tmp_path / "c", tmp_path / "c" / "pytorch_model_fsdp_0"):
        tensors, notes = came_back(source, tmp_path / "out" / source.name)
        assert same(tensors, state)
        assert notes == []
        assert {"config.json", "trainer_state.json"} <= {
            path.name for path in (tmp_path / "out" / source.name / "back").iterdir()
        }
        assert not list((tmp_path / "out" / source.name).rglob("huggingface/**/*.distcp"))


def test_a_model_of_fsdp_is_a_base_for_merging(tmp_path):
    make_model(tmp_path / "hf", SHAPE)
    make_adapter(tmp_path / "adapter", SHAPE)
    dcp.save(weights(tmp_path / "hf"), checkpoint_id=tmp_path / "dcp", no_dist=True)
    with pytest.raises(UserError, match=r"has no `config.json`, which says what model its tensors are of"):
        merge(tmp_path / "dcp", tmp_path / "adapter", tmp_path / "merged")
    for name in ("hf", "dcp"):
        given = {"hf_config": tmp_path / "hf"} if name == "dcp" else {}
        merge(tmp_path / name, tmp_path / "adapter", tmp_path / f"merged_{name}", **given)
    assert same(weights(tmp_path / "merged_dcp"), weights(tmp_path / "merged_hf"))
    shutil.copy(tmp_path / "hf" / "config.json", tmp_path / "dcp")
    assert fingerprint(tmp_path / "dcp") == fingerprint(tmp_path / "hf")
    for name in ("hf", "dcp"):
        adapter_to_mcore(tmp_path / "adapter", tmp_path / f"adapter_of_{name}", base=tmp_path / name)
    first, second = (sorted((tmp_path / f"adapter_of_{name}").rglob("*.distcp")) for name in ("hf", "dcp"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second] != []


def as_titan(state, *, before_2026, heads=(4, 2)):
    """Return the weights as torchtitan's adapter makes them of transformers'."""
    names = {
        "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
        "model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output" if before_2026 else "lm_head",
    }  # fmt: skip
    made = {}
    for name, value in state.items():
        for count, projection in zip(heads, ("q_proj", "k_proj"), strict=True):
            if projection in name:
                rows, columns = value.shape
                value = value.view(count, 2, rows // count // 2, columns).transpose(1, 2).reshape(rows, columns)  # noqa: PLW2901
        theirs = name
        for ours, other in names.items():
            theirs = theirs.replace(ours, other)
        theirs = theirs.removeprefix("model.")
        if not before_2026:
            for projection in ("wq", "wk", "wv"):
                theirs = theirs.replace(f"attention.{projection}.", f"attention.qkv_linear.{projection}.")
        made[theirs] = value.contiguous()
    return made


@pytest.mark.parametrize("before_2026", [False, True])
def test_torchtitans_llama_is_that_of_transformers(state, config, tmp_path, before_2026):
    titan = as_titan(state, before_2026=before_2026)
    moments = {f"state.{name}.exp_avg": value * 2 for name, value in titan.items()}
    dcp.save({**titan, **moments, "train_state": torch.tensor([2])}, checkpoint_id=tmp_path / "step-2", no_dist=True)
    assert (inspect(tmp_path / "step-2").format, inspect(tmp_path / "step-2").optimizer_state) == ("torchtitan DCP", True)
    save_file(state, tmp_path / "model.safetensors")
    shutil.copy(config / "config.json", tmp_path)
    assert verify(tmp_path / "step-2", tmp_path).same
    tensors, notes = came_back(tmp_path / "step-2", tmp_path, hf_config=config)
    assert same(tensors, state)
    assert len(notes) == 1


def test_torchtitans_names_are_read_for_llama_alone(state, config, tmp_path):
    dcp.save(as_titan(state, before_2026=False), checkpoint_id=tmp_path / "titan", no_dist=True)
    described = json.loads((config / "config.json").read_text())
    for changes, message in (
        ({"model_type": "qwen3"}, "torchtitan's names, which are known for `llama` alone; its `config.json` says `qwen3`"),
        ({"num_attention_heads": 5}, r"`num_attention_heads` is `5`: its rows are not divisible into pairs of as many heads"),
    ):
        (tmp_path / "titan" / "config.json").write_text(json.dumps({**described, **changes}))
        refused(hf_to_mcore, tmp_path / "titan", tmp_path, message)


def test_what_is_stored_as_zstd_streams_is_named(kinds, config, tmp_path):
    refused(hf_to_mcore, kinds / "fsdp2_zstd", tmp_path, r"compressed with zstd \(`\[stream.zstd/1\]`\)", hf_config=config)


def test_a_source_with_its_own_config_takes_no_other(state, config, tmp_path):
    shutil.copy(config / "config.json", tmp_path)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"`--hf-config` is for a source without a `config.json`"):
        hf_to_mcore(tmp_path, tmp_path.with_name("m"), hf_config=config)


def test_a_source_without_weights_or_config_is_named(state, tmp_path):
    dcp.save(state, checkpoint_id=tmp_path / "d", no_dist=True)
    hint = "which says what model its tensors are of\n\nhint: .* `average` and `extend-vocab` also take .* `--hf-config DIR`"
    refused(hf_to_mcore, tmp_path / "d", tmp_path, f"has no `config.json`, {hint}")
    (tmp_path / "s").mkdir()
    save_file(state, tmp_path / "s" / "model.safetensors")
    refused(hf_to_mcore, tmp_path / "s", tmp_path, f"has no `config.json`, {hint}")
    dcp.save({"optimizer": optimizer(state)}, checkpoint_id=tmp_path / "c", no_dist=True)
    refused(hf_to_mcore, tmp_path / "c", tmp_path, "and no layers of a model")


def slices(kinds, folder):
    shutil.copytree(kinds / "hf_sharded", folder)
    return [folder / f"shard-0000{number}-model-00001-of-00001.safetensors" for number in (1, 2)]


def changed(file, change):
    """Change the header of a safetensors file as text, without changing its length."""
    raw = file.read_bytes()
    size = 8 + int.from_bytes(raw[:8], "little")
    header = change(raw[8:size].decode())
    assert len(header) == size - 8
    file.write_bytes(raw[:8] + header.encode() + raw[size:])


def test_slices_that_overlap_leave_gaps_or_disagree_are_named(kinds, config, tmp_path):
    first, second = slices(kinds, tmp_path / "gap")
    changed(second, lambda text: text.replace("[46, 0]", "[47, 0]"))
    message = r"the slices of `lm_head.weight` in 2 files do not tile its shape \[92, 32\]"
    refused(hf_to_mcore, tmp_path / "gap", tmp_path, message, hf_config=config)
    first, second = slices(kinds, tmp_path / "twice")
    shutil.copy(second, tmp_path / "twice" / "shard-00003-model-00001-of-00001.safetensors")
    refused(hf_to_mcore, tmp_path / "twice", tmp_path, "in 3 files do not tile its shape", hf_config=config)
    first, second = slices(kinds, tmp_path / "dtype")
    save_file({name: value.bfloat16() for name, value in load_file(second).items()}, second, metadata=_metadata(second))
    refused(hf_to_mcore, tmp_path / "dtype", tmp_path, "slices of `.*` are fp32 with . dimensions in `shard-00001.*` and bf16",
            hf_config=config)  # fmt: skip
    first, second = slices(kinds, tmp_path / "number")
    first.unlink()
    refused(hf_to_mcore, tmp_path / "number", tmp_path, "lacks `shard-00001-model-….safetensors`, of 2 processes",
            hf_config=config)  # fmt: skip
    first, second = slices(kinds, tmp_path / "last")
    second.unlink()
    refused(hf_to_mcore, tmp_path / "last", tmp_path, r"has shape \[46, 32\]", hf_config=config)
    first, second = slices(kinds, tmp_path / "silent")
    save_file(load_file(second), second)
    refused(hf_to_mcore, tmp_path / "silent", tmp_path, "does not say in `DCP_SHARDING_INFO` which slices it holds",
            hf_config=config)  # fmt: skip
    first, second = slices(kinds, tmp_path / "offset")
    changed(second, lambda text: text.replace("[46, 0]", "[-6, 0]"))
    refused(hf_to_mcore, tmp_path / "offset", tmp_path, r"begins at `\[-6, 0\]`", hf_config=config)


def _metadata(file):
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return opened.metadata()
