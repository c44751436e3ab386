"""A checkpoint in another layout is what an import into that layout makes, and holds what the source holds."""

from __future__ import annotations

import json
import shutil

import blake3
import pytest
import torch
import yaml

from converter import UserError, check, hf_to_mcore, inspect, mcore_to_hf, reshard, verify
from converter.execution import Reporter
from tests import quantized_models
from tests.converter.family_suite import save_small
from tests.converter.test_foreign import ARGS
from tests.converter.test_megatron import check as check_logits
from tests.interrupted import with_extras
from tests.megatron_cpu import Shape, save
from tests.models import files_made, model_tree, tree

ITERATION = "iter_0000000"
RECORDS = {f"{ITERATION}/conversion.json", f"{ITERATION}/integrity.json"}
"""They say what a checkpoint was made of."""

DENSE = {
    "together": ({"tp": 2, "pp": 2}, {}),
    "apart": ({}, {"tp": 4, "pp": 2, "vpp": 2}),
    "to hybrid": ({"tp": 2, "pp": 2}, {"layout": "hybrid", "tp": 4, "pp": 2, "pp_layout": [5, 3]}),
    "from hybrid": ({"layout": "hybrid", "pp": 4}, {"layout": "gpt", "tp": 2}),
    "unevenly": ({"tp": 4}, {"tp": 2, "pp": 2, "pp_layout": [3, 1]}),
}
EXPERTS = {
    "to hybrid": ({"tp": 2, "ep": 2}, {"layout": "hybrid", "tp": 2, "pp": 2}),
    "from hybrid": ({"layout": "hybrid", "pp": 2, "vpp": 2}, {"layout": "gpt", "tp": 2, "ep": 2}),
    "together": ({"tp": 2, "pp": 2, "ep": 2}, {}),
    "apart": ({}, {"tp": 4, "pp": 2, "ep": 2, "etp": 1}),
    "otherwise": ({"ep": 4, "etp": 1}, {"tp": 2, "ep": 2, "etp": 2}),
}
MODELS = {
    "llama": ({"tie_word_embeddings": True, "vocab_size": 389}, DENSE),
    "gemma2": ({}, DENSE),
    "qwen2": ({}, DENSE),  # with biases
    "mixtral": ({}, EXPERTS),
    "deepseek_v3": (None, EXPERTS),  # with a layer of multi-token prediction, which transformers does not save
}
"""What a small model of each family has otherwise, and the layouts that it is resharded from and to."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small model of a family, made once."""
    made = {}

    def make(family):
        if family not in made:
            folder, (changes, _) = tmp_path_factory.mktemp(family) / "hf", MODELS[family]
            made[family] = save_small(family, folder, **changes) if changes is not None else quantized_models.deepseek_v3(folder)
        return made[family]

    return make


@pytest.fixture
def notes():
    return []


@pytest.fixture
def reporter(notes):
    return Reporter(note=notes.append)


@pytest.mark.parametrize(("family", "name"), [(family, name) for family, (_, layouts) in MODELS.items() for name in layouts])
def test_a_reshard_makes_the_files_that_an_import_makes(model, tmp_path, family, name):
    folder, (before, after) = model(family), MODELS[family][1][name]
    hf_to_mcore(folder, tmp_path / "source", **before)
    hf_to_mcore(folder, tmp_path / "expected", **after)
    reshard(tmp_path / "source", tmp_path / "made", verify=True, **after)
    assert files_made(tmp_path / "made") == files_made(tmp_path / "expected")
    assert check(tmp_path / "made").whole
    mcore_to_hf(tmp_path / "made", tmp_path / "back")
    assert model_tree(tmp_path / "back") == model_tree(folder)


@pytest.mark.parametrize(("before", "after"), [("hybrid", "gpt"), ("gpt", "hybrid")])
def test_a_checkpoint_that_only_its_settings_describe_changes_its_layout(model, tmp_path, before, after):
    hf_to_mcore(model("mixtral"), tmp_path / "source", layout=before, pp=2)
    hf_to_mcore(model("mixtral"), tmp_path / "expected", layout=after, ep=2)
    shutil.rmtree(tmp_path / "source" / ITERATION / "huggingface")
    reshard(tmp_path / "source", tmp_path / "made", layout=after, ep=2, verify=True)
    weights = [
        {name: data for name, data in files_made(tmp_path / folder).items() if name.endswith((".distcp", ".metadata"))}
        for folder in ("made", "expected")
    ]
    assert weights[0] == weights[1]
    assert verify(tmp_path / "made", model("mixtral")).same


@pytest.fixture
def source(model_folder, tmp_path):
    """A checkpoint at TP2·PP2, free to be damaged."""
    hf_to_mcore(model_folder("padded_vocab", dtype="bfloat16"), tmp_path / "source", tp=2, pp=2)
    return tmp_path / "source"


def record_of(folder):
    return json.loads((folder / ITERATION / "conversion.json").read_text())


def test_the_record_says_what_the_source_was_made_of_and_hashes_tensors_the_same_at_every_layout(source, tmp_path):
    reshard(source, tmp_path / "one", tp=4)
    reshard(tmp_path / "one", tmp_path / "two", pp=4, make_vocab_size_divisible_by=256)
    before, first, second = map(record_of, (source, tmp_path / "one", tmp_path / "two"))
    assert first["command"] == "reshard"
    assert first["source"]["conversion"] == {name: value for name, value in before.items() if name not in ("files", "blake3")}
    assert second["source"]["conversion"]["source"]["conversion"] == first["source"]["conversion"]
    assert first["blake3"] == second["blake3"]
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(tmp_path / "two" / ITERATION, tmp_path / "all.pt")
    stored = torch.load(tmp_path / "all.pt", weights_only=False)["decoder.layers.mlp.linear_fc1.weight"]
    for layer, tensor in enumerate(stored):
        digest = blake3.blake3(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        assert second["blake3"][f"decoder.layers.{layer}.mlp.linear_fc1.weight"] == digest


def test_without_hashes_there_are_none(source, tmp_path):
    reshard(source, tmp_path / "made", integrity=False)
    assert record_of(tmp_path / "made")["blake3"] is None
    assert not (tmp_path / "made" / ITERATION / "integrity.json").exists()


@pytest.fixture(scope="module")
def imported(tmp_path_factory, model_folder):
    """A model in fp32 with a vocabulary that needs padding, and its conversion."""
    folder, target = model_folder("padded_vocab"), tmp_path_factory.mktemp("imported") / "m"
    hf_to_mcore(folder, target)
    return folder, target / ITERATION, json.loads((folder / "config.json").read_text())


def saved_by_megatron(ranks, imported, target, *, tp=2, pp=2, **extra):
    """What megatron-core itself saves at step 7 of the imported model: nothing says what model it is, but for `args`."""
    _, iteration, config = imported
    ranks.run(save, tp * pp, Shape(config, tp, pp), str(iteration), str(target), extra)
    return target


def tensors_of(iteration, work):
    """All that torch reads of a checkpoint, stacked or not, by key."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(iteration, work)
    stored = torch.load(work, weights_only=False)
    return {name: value for name, value in stored.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("singleton", [False, True], ids=["stacked", "per layer"])
def test_a_checkpoint_of_megatron_core_is_resharded_by_its_args_and_loads_strictly(ranks, imported, tmp_path, singleton):
    notes = []
    saved = saved_by_megatron(ranks, imported, tmp_path / "saved", singleton=singleton, args=ARGS)
    reshard(saved, tmp_path / "made", tp=4, vpp=2, pp=2, verify=True, reporter=Reporter(note=notes.append))
    assert "Megatron-LM's `args` are left out; `run_config.yaml` says what model it is" in notes
    assert (tmp_path / "made" / "latest_checkpointed_iteration.txt").read_text() == "7"
    hf_to_mcore(imported[0], tmp_path / "expected", tp=4, vpp=2, pp=2)
    made, expected = (
        tensors_of(path, tmp_path / "all.pt") for path in (tmp_path / "made/iter_0000007", tmp_path / "expected" / ITERATION)
    )
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], expected[name]) for name in made)
    (tmp_path / "made/iter_0000007").rename(tmp_path / "made" / ITERATION)
    for shape in ((1, 1), (2, 2)):
        check_logits(ranks, Shape(imported[2], *shape), tmp_path / "made", imported[0])


def test_a_checkpoint_that_says_nothing_of_its_model_takes_a_config(ranks, imported, tmp_path):
    saved = saved_by_megatron(ranks, imported, tmp_path / "saved")
    with pytest.raises(UserError, match=r"says nothing about its model.*\n\nhint: .*`--hf-config DIR`"):
        reshard(saved, tmp_path / "made")
    reshard(saved, tmp_path / "made", hf_config=imported[0], tp=2)
    assert verify(tmp_path / "made", imported[0]).same
    with pytest.raises(
        UserError, match=r"has its own `config.json`, beside that of `--hf-config`\n\nhint: leave `--hf-config` out"
    ):
        reshard(tmp_path / "made", tmp_path / "again", hf_config=imported[0])


def test_rows_that_pad_the_vocabulary_are_kept_as_far_as_there_is_room(ranks, imported, tmp_path, notes, reporter):
    """Training changes them, and they count in its loss. 389 tokens are 512 rows at TP2, 1024 at TP8, 389 without padding."""
    saved = saved_by_megatron(ranks, imported, tmp_path / "saved", add=0.5)
    before = tensors_of(saved, tmp_path / "all.pt")["output_layer.weight"]
    assert before.shape[0] == 512
    assert before[389:].all()
    reshard(saved, tmp_path / "made", hf_config=imported[0], tp=8, verify=True, reporter=reporter)
    wide = tensors_of(tmp_path / "made/iter_0000007", tmp_path / "all.pt")["output_layer.weight"]
    assert torch.equal(wide[:512], before)
    assert not wide[512:].any()
    assert not any("rows" in text for text in notes)
    reshard(tmp_path / "made", tmp_path / "bare", make_vocab_size_divisible_by=1, reporter=reporter)
    bare = tensors_of(tmp_path / "bare/iter_0000007", tmp_path / "all.pt")["output_layer.weight"]
    assert torch.equal(bare, before[:389])
    assert "389 tokens are padded to 389 rows; the last 635 of the source's 1024 are left out" in notes


def test_where_the_number_of_tokens_is_unknown_rows_stay_rows(ranks, imported, tmp_path):
    """Megatron-LM's `args` know only the padded vocabulary. What is made of it does not call padding tokens either."""
    args = {**ARGS, "vocab_size": None, "tensor_model_parallel_size": 2, "make_vocab_size_divisible_by": 128}
    saved = saved_by_megatron(ranks, imported, tmp_path / "saved", args={**args, "padded_vocab_size": 512})
    reshard(saved, tmp_path / "made", tp=4)
    assert tensors_of(tmp_path / "made/iter_0000007", tmp_path / "all.pt")["output_layer.weight"].shape[0] == 512
    with pytest.raises(UserError, match="say `padded_vocab_size` `512`, and not how many of these rows are tokens"):
        mcore_to_hf(tmp_path / "made", tmp_path / "back")
    mcore_to_hf(tmp_path / "made", tmp_path / "back", hf_config=imported[0])
    reshard(tmp_path / "made", tmp_path / "again", tp=8)
    settings = yaml.safe_load((tmp_path / "again/iter_0000007/run_config.yaml").read_text())["model"]
    assert (settings["vocab_size"], settings["padded_vocab_size"], settings["tensor_model_parallel_size"]) == (None, 1024, 8)
    assert verify(tmp_path / "back", imported[0]).same


def test_optimizer_state_that_says_too_little_is_left_out_only_on_demand(ranks, imported, tmp_path, notes, reporter):
    saved = saved_by_megatron(ranks, imported, tmp_path / "saved", optimizer=True, args=ARGS)
    with pytest.raises(
        UserError, match=r"has optimizer state without the hyper-parameters of its groups\n\nhint: .*`--weights-only`"
    ):
        reshard(saved, tmp_path / "made")
    reshard(saved, tmp_path / "made", weights_only=True, verify=True, reporter=reporter)
    assert any("tensors that are not weights (such as `optimizer." in text for text in notes)
    assert not inspect(tmp_path / "made").optimizer_state
    assert verify(tmp_path / "made", imported[0]).same


def test_settings_of_the_source_are_kept(source, tmp_path):
    """Those that no `config.json` can say are kept too: they have nothing to do with a layout."""
    path = source / ITERATION / "run_config.yaml"
    document = yaml.safe_load(path.read_text())
    document["model"] |= {"rotary_interleaved": True, "calculate_per_token_loss": True}
    document["train"] = {"train_iters": 5}
    path.write_text(yaml.safe_dump(document))
    reshard(source, tmp_path / "made", tp=4)
    made = yaml.safe_load((tmp_path / "made" / ITERATION / "run_config.yaml").read_text())
    document["model"] |= {"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 1}
    assert made == document


def test_weights_are_cast_on_demand(source, tmp_path, notes, reporter):
    reshard(source, tmp_path / "made", dtype="fp32", verify=True, reporter=reporter)
    assert "weights are cast from bf16 to fp32" in notes
    assert verify(tmp_path / "made", source, cast_to="bf16").same


def test_quantized_weights_come_back_after_a_reshard(model_folder, tmp_path, notes, reporter):
    """Nothing but the record says that numbers are untouched, and it is still known after two reshards."""
    folder = quantized_models.fp8(model_folder("gqa", dtype="bfloat16"), tmp_path / "hf")
    hf_to_mcore(folder, tmp_path / "a", tp=2)
    reshard(tmp_path / "a", tmp_path / "b", pp=2, verify=True)
    reshard(tmp_path / "b", tmp_path / "c", tp=4)
    mcore_to_hf(tmp_path / "c", tmp_path / "back", reporter=reporter)
    assert model_tree(tmp_path / "back") == model_tree(folder)
    reshard(tmp_path / "b", tmp_path / "cast", dtype="fp32")
    mcore_to_hf(tmp_path / "cast", tmp_path / "numbers", reporter=reporter)
    assert any("weights that came quantized are written as plain numbers" in text for text in notes)


def test_tensors_that_megatron_lacks_travel(tmp_path):
    folder = with_extras(tmp_path / "hf", 4000, 8000)
    hf_to_mcore(folder, tmp_path / "a", tp=2, pp=2)
    reshard(tmp_path / "a", tmp_path / "b", tp=4, verify=True)
    mcore_to_hf(tmp_path / "b", tmp_path / "back")
    assert model_tree(tmp_path / "back") == model_tree(folder)


def test_a_tensor_beside_the_weights_that_is_none_of_the_model_is_refused(source, tmp_path):
    from safetensors.torch import save_file

    save_file({"model.norm.weight": torch.zeros(64)}, source / ITERATION / "huggingface" / "extras.safetensors")
    with pytest.raises(
        UserError, match=r"extras.safetensors` holds `model.norm.weight` of shape .64., for which this family has no"
    ):
        reshard(source, tmp_path / "made")


def test_what_fits_no_layout_is_refused_by_name(source, model_folder, tmp_path):
    refused = {
        "tensor-parallel size 3 neither divides the model's 4 query groups": {"tp": 3},
        "5 pipeline ranks × 1 virtual stages are more than the model's 4 layers": {"pp": 5},
        "expert-parallel size 2 needs a model with experts": {"ep": 2},
        "`make_vocab_size_divisible_by` is 0": {"make_vocab_size_divisible_by": 0},
    }
    for message, options in refused.items():
        with pytest.raises(UserError, match=message):
            reshard(source, tmp_path / "made", **options)
    with pytest.raises(UserError, match="is a Hugging Face model, not a Megatron checkpoint\n\nhint: `mbconvert hf-to-mcore`"):
        reshard(model_folder("padded_vocab", dtype="bfloat16"), tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_the_source_and_what_is_at_the_target_are_safe(source, tmp_path):
    before = tree(source)
    with pytest.raises(UserError, match="is the source"):
        reshard(source, source, overwrite=True)
    (tmp_path / "made").mkdir()
    with pytest.raises(UserError, match="already exists"):
        reshard(source, tmp_path / "made")
    assert tree(source) == before
    (tmp_path / "made").rmdir()
    reshard(source, tmp_path / "made", tp=4)
    reshard(source, tmp_path / "made", tp=2, pp=2, overwrite=True)
    assert files_made(tmp_path / "made") == files_made(source)


def test_a_missing_chunk_is_found_before_a_byte_moves(source, tmp_path):
    (source / ITERATION / "__3_0.distcp").unlink()
    with pytest.raises(UserError, match=r"__3_0.distcp"):
        reshard(source, tmp_path / "made")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_checkpoint_of_megatron_bridge_keeps_its_settings(golden, tmp_path):
    """Its `run_config.yaml` has sections and fields that nothing here writes."""
    bridge, name = golden / "bridge_llama_tiny", f"{ITERATION}/run_config.yaml"
    reshard(bridge / "megatron", tmp_path / "made", tp=2, verify=True)
    assert verify(tmp_path / "made", bridge / "hf").same
    before, made = (yaml.safe_load((folder / name).read_text()) for folder in (bridge / "megatron", tmp_path / "made"))
    assert made["model"].pop("tensor_model_parallel_size") == 2
    del before["model"]["tensor_model_parallel_size"]
    assert made == before


@pytest.mark.parametrize("layout", ["gpt", "hybrid"])
def test_there_and_back_is_the_same_files(source, tmp_path, layout):
    reshard(source, tmp_path / "away", layout=layout, tp=4, vpp=2, pp=2)
    assert record_of(tmp_path / "away")["options"]["layout"] == layout
    reshard(tmp_path / "away", tmp_path / "further", pp=4)  # in the layout of its source
    assert record_of(tmp_path / "further")["options"]["layout"] == layout
    reshard(tmp_path / "further", tmp_path / "back", layout="gpt", tp=2, pp=2, make_vocab_size_divisible_by=128)
    assert files_made(tmp_path / "back") == files_made(source)


def test_settings_that_only_the_source_s_own_layout_keeps_are_refused_by_name(source, tmp_path):
    path = source / ITERATION / "run_config.yaml"
    document = yaml.safe_load(path.read_text())
    document["model"]["rotary_interleaved"] = True
    path.write_text(yaml.safe_dump(document))
    with pytest.raises(UserError, match="`rotary_interleaved`"):
        reshard(source, tmp_path / "made", layout="hybrid")
    reshard(source, tmp_path / "made", layout="gpt", tp=4)
