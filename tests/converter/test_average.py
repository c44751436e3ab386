"""The average of checkpoints is what torch computes in fp32 and rounds once, whatever their kind."""

from __future__ import annotations

import json
import shutil
import tarfile
from functools import reduce

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from converter import average_checkpoints, hf_to_mcore, reshard, verify
from converter.cli import cli
from converter.execution import Reporter
from formats.errors import UserError
from tests.converter.test_kinds import LLAMA, as_zarr
from tests.golden.kinds import unpacked
from tests.models import build, files_made, save, tree


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three models of one configuration, in bf16 and several files."""
    root = tmp_path_factory.mktemp("models")
    return [save(build("tied", dtype="bfloat16", seed=seed), root / f"model{seed}", max_shard_size="60KB") for seed in range(3)]


@pytest.fixture
def notes():
    return []


@pytest.fixture
def reporter(notes):
    return Reporter(note=notes.append)


def tensors(folder):
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def expected(parts, weights):
    """What torch computes: each tensor in fp32 times its share, summed in order, rounded once."""
    total = sum(weights)
    return {
        name: reduce(torch.add, [part[name].float() * (weight / total) for part, weight in zip(parts, weights, strict=True)]).to(
            parts[0][name].dtype
        )
        for name in parts[0]
    }


def same_bits(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(first[name].view(torch.uint8), second[name].view(torch.uint8)) for name in first)


@pytest.mark.parametrize("weights", [None, [1, 3, 2], [3.0, -1.0, 0.5]])
def test_an_average_of_models_is_torchs_to_the_bit(models, tmp_path, weights):
    summary = average_checkpoints(models, tmp_path / "made", weights=weights, verify=True)
    made = tensors(tmp_path / "made")
    assert same_bits(made, expected([tensors(model) for model in models], weights or [1, 1, 1]))
    assert (summary.command, summary.verified) == ("average", True)
    others = [name for name in tree(models[0]) if not name.endswith(".safetensors")]
    assert {name: tree(tmp_path / "made")[name] for name in others} == {name: tree(models[0])[name] for name in others}


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_each_dtype_is_summed_as_torch_sums_it(models, tmp_path, dtype):
    parts = [tensors(model) for model in models[:2]]
    parts = [{name: value.to(getattr(torch, dtype)) * 1.37 for name, value in part.items()} for part in parts]
    sources = [tmp_path / "a", tmp_path / "b"]
    for source, part in zip(sources, parts, strict=True):
        source.mkdir()
        shutil.copy(models[0] / "config.json", source)
        save_file(part, source / "model.safetensors", {"format": "pt"})
    average_checkpoints(sources, tmp_path / "made", weights=[2, 1])
    wide = torch.float64 if dtype == "float64" else torch.float32
    shares = [2 / 3, 1 / 3]
    made = tensors(tmp_path / "made")
    for name in parts[0]:
        total = parts[0][name].to(wide) * shares[0] + parts[1][name].to(wide) * shares[1]
        assert torch.equal(made[name], total.to(parts[0][name].dtype))


def test_an_average_of_checkpoints_has_the_layout_of_the_first(models, tmp_path, reporter):
    for number, layout in enumerate(({"tp": 2, "pp": 2, "pp_layout": [3, 1]}, {"tp": 4})):
        hf_to_mcore(models[number], tmp_path / str(number), make_vocab_size_divisible_by=32, **layout)
    sources = [tmp_path / "0", tmp_path / "1"]
    summary = average_checkpoints(sources, tmp_path / "made", weights=[1, 3], verify=True, reporter=reporter)
    assert summary.layout == {"tp": 2, "pp": 2, "vpp": 1}
    average_checkpoints(models[:2], tmp_path / "averaged", weights=[1, 3])
    hf_to_mcore(tmp_path / "averaged", tmp_path / "expected", tp=2, pp=2, pp_layout=[3, 1], make_vocab_size_divisible_by=32)
    assert files_made(tmp_path / "made") == files_made(tmp_path / "expected")


def test_a_record_says_what_was_averaged(models, tmp_path):
    average_checkpoints(models[:2], tmp_path / "made", weights=[1, 3])
    record = json.loads((tmp_path / "made" / "conversion.json").read_text())
    assert (record["command"], record["options"]["weights"], record["options"]["from"]) == ("average", [0.25, 0.75], "weights")
    assert [record["source"]["name"], *(source["name"] for source in record["averaged_with"])] == ["model0", "model1"]


@pytest.fixture
def trained(golden, tmp_path):
    """Two checkpoints of Megatron-LM with optimizer state: its own, and one with other masters that torch writes beside it."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    with tarfile.open(golden / "optimizer_state" / "right.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    right, other = tmp_path / "right", tmp_path / "other"
    iteration = next(right.glob("iter_*"))
    dcp_to_torch_save(iteration, tmp_path / "all.pt")
    state = {name: value for name, value in torch.load(tmp_path / "all.pt", weights_only=False).items() if torch.is_tensor(value)}
    torch.manual_seed(0)
    for name in [name for name in state if name.startswith("optimizer.state.param.")]:
        state[name] = state[name] + 0.1 * torch.randn_like(state[name])
        weight = name.removeprefix("optimizer.state.param.")
        state[weight] = state[name].to(state[weight].dtype)
    shutil.copytree(right, other, ignore=shutil.ignore_patterns("*.distcp", ".metadata"))
    checkpoint.save(state, checkpoint_id=other / iteration.name, no_dist=True)
    return right, other


def stored(root, work):
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(next(root.glob("iter_*")), work)
    return {name: value for name, value in torch.load(work, weights_only=False).items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("origin", [None, "master", "weights"])
def test_masters_are_averaged_where_all_have_them(trained, tmp_path, notes, reporter, origin):
    average_checkpoints(trained, tmp_path / "made", weights=[1, 3], values_from=origin, verify=True, reporter=reporter)
    parts, made = [stored(root, tmp_path / "all.pt") for root in trained], stored(tmp_path / "made", tmp_path / "all.pt")
    prefix = "" if origin == "weights" else "optimizer.state.param."
    for name, value in made.items():
        total = sum(part[f"{prefix}{name}"].float() * share for part, share in zip(parts, (0.25, 0.75), strict=True))
        assert torch.equal(value, total.to(parts[0][name].dtype)), name
    assert any("averaged from their fp32 masters" in note for note in notes) == (origin != "weights")
    assert "optimizer state is left out: only weights are averaged" in notes


def test_masters_and_weights_average_to_different_numbers(trained, tmp_path):
    """Else the test above would see nothing."""
    average_checkpoints(trained, tmp_path / "master", weights=[1, 3])
    average_checkpoints(trained, tmp_path / "weights", weights=[1, 3], values_from="weights")
    assert not verify(tmp_path / "master", tmp_path / "weights").same


def test_shifted_masters_are_refused(golden, tmp_path):
    with tarfile.open(golden / "optimizer_state" / "shifted.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    with pytest.raises(UserError, match=r"the fp32 master of `.+` does not round to the weight"):
        average_checkpoints([tmp_path / "shifted"] * 2, tmp_path / "made")
    assert not (tmp_path / "made").exists()
    average_checkpoints([tmp_path / "shifted"] * 2, tmp_path / "made", values_from="weights")
    assert verify(tmp_path / "shifted", tmp_path / "made").same


def test_a_checkpoint_of_ranks_is_averaged_into_its_layout(tmp_path):
    """Halves of the same weights add up to them."""
    root, config = unpacked("ranks_pp2_vpp2", tmp_path), tmp_path / "config"
    config.mkdir()
    small = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "num_hidden_layers": 4}
    (config / "config.json").write_text(json.dumps({**LLAMA, **small}))
    summary = average_checkpoints([root, root], tmp_path / "made", values_from="weights", hf_config=config, verify=True)
    assert summary.layout == {"tp": 1, "pp": 2, "vpp": 2}
    assert verify(root, tmp_path / "made").same


def test_checkpoints_of_different_formats_are_averaged(models, tmp_path):
    for number in range(2):
        hf_to_mcore(models[number], tmp_path / str(number), tp=2)
    zarr = as_zarr(tmp_path / "1" / "iter_0000000", tmp_path / "z" / "iter_0000000")
    average_checkpoints([tmp_path / "0", zarr], tmp_path / "made", weights=[1, 3])
    average_checkpoints(models[:2], tmp_path / "expected", weights=[1, 3])
    assert verify(tmp_path / "made", tmp_path / "expected").same


def changed(model, folder, change):
    """A copy of a model whose tensors and `config.json` a function changed."""
    shutil.copytree(model, folder)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    parts, config = tensors(model), json.loads((folder / "config.json").read_text())
    change(parts, config)
    save_file(parts, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _one_more(parts, _config):
    parts["model.layers.0.more.weight"] = torch.zeros(2)


def _one_shorter(parts, _config):
    parts["model.norm.weight"] = parts["model.norm.weight"][:-1].clone()


def _in_fp32(parts, _config):
    parts["model.norm.weight"] = parts["model.norm.weight"].float()


def _other_base(_parts, config):
    config["rope_parameters"] = {**config["rope_parameters"], "rope_theta": 77.0}


def _other_kind(_parts, config):
    config["model_type"] = "mistral"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_one_more, r"`.*other` holds `model.layers.0.more.weight`, which `.*model0` does not"),
        (_one_shorter, r"`model.norm.weight` has shape \[64\] in `.*model0` and \[63\] in `.*other`"),
        (_in_fp32, r"`model.norm.weight` has dtype bf16 in `.*model0` and fp32 in `.*other`"),
        (_other_base, r"says that `rotary_base` \(`rope_theta`\) is `10000.0`, `.*other`'s `config.json` that it is `77.0`"),
        (_other_kind, r"`.*model0` is a `llama`, `.*other` a `mistral`"),
    ],
)
def test_checkpoints_of_different_models_are_refused(models, tmp_path, change, message):
    other = changed(models[0], tmp_path / "other", change)
    with pytest.raises(UserError, match=message):
        average_checkpoints([models[0], other], tmp_path / "made")
    with pytest.raises(UserError):
        average_checkpoints([other, models[0]], tmp_path / "made")
    assert not list(tmp_path.glob("made*"))


def test_checkpoints_that_record_other_settings_are_refused(models, tmp_path):
    other = changed(models[0], tmp_path / "other", _other_base)
    hf_to_mcore(models[0], tmp_path / "a")
    hf_to_mcore(other, tmp_path / "b")
    with pytest.raises(UserError, match=r"`rotary_base` \(`rope_theta`\) is `10000.0`, `.*b/iter_0000000`'s `config.json`"):
        average_checkpoints([tmp_path / "a", tmp_path / "b"], tmp_path / "made")


def test_integers_are_kept_and_have_to_be_equal(models, tmp_path):
    for name, step in (("a", 1), ("b", 1), ("c", 2)):
        changed(models[0], tmp_path / name, lambda parts, _config, step=step: parts.update(step=torch.tensor(step)))
    average_checkpoints([tmp_path / "a", tmp_path / "b"], tmp_path / "made")
    assert tensors(tmp_path / "made")["step"] == 1
    with pytest.raises(UserError, match=r"`step` \(int64\) differs between `.*a` and `.*c`, and is not averaged"):
        average_checkpoints([tmp_path / "a", tmp_path / "c"], tmp_path / "other")
    assert not list(tmp_path.glob("other*"))


def test_what_a_checkpoint_holds_beside_its_weights_has_to_be_equal(models, tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    for folder, value in (("a", 1.0), ("b", 1.0), ("c", 2.0)):
        model = changed(
            models[0],
            tmp_path / f"{folder}-hf",
            lambda parts, _config, value=value: parts.update({name: torch.tensor([value] * 4)}),
        )
        hf_to_mcore(model, tmp_path / folder)
    average_checkpoints([tmp_path / "a", tmp_path / "b"], tmp_path / "made", verify=True)
    assert verify(tmp_path / "made", tmp_path / "a-hf").same
    with pytest.raises(UserError, match=rf"`{name}` \(fp32\) differs between"):
        average_checkpoints([tmp_path / "a", tmp_path / "c"], tmp_path / "other")


def test_other_side_files_are_said(models, tmp_path, notes, reporter):
    other = changed(models[0], tmp_path / "other", lambda _parts, _config: None)
    (other / "tokenizer.json").write_text("{}")
    average_checkpoints([models[0], other], tmp_path / "made", reporter=reporter)
    (note,) = [note for note in notes if "side files" in note]
    assert note.endswith("whose are taken: `config.json`, `tokenizer.json`")
    assert (tmp_path / "made" / "tokenizer.json").read_bytes() == (models[0] / "tokenizer.json").read_bytes()


def test_a_model_and_a_checkpoint_are_not_averaged(models, tmp_path):
    hf_to_mcore(models[0], tmp_path / "m")
    with pytest.raises(UserError, match=r"is Hugging Face safetensors, `.*m/iter_0000000` is Megatron torch_dist"):
        average_checkpoints([models[0], tmp_path / "m"], tmp_path / "made")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [1, 2, 3]}, "`--weights` has 3 numbers, and there are 2 checkpoints"),
        ({"weights": [1, -1]}, "`--weights 1,-1` add up to 0"),
        ({"weights": [1, float("nan")]}, "`--weights 1,nan` add up to nan"),
        ({"values_from": "master"}, r"`.*model0` has no fp32 masters"),
        ({"values_from": "else"}, "`else`"),
    ],
)
def test_options_that_cannot_be_met_are_refused(models, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        average_checkpoints(models[:2], tmp_path / "made", **options)


def test_an_average_that_the_dtype_cannot_hold_is_refused(models, tmp_path):
    """Shares may be negative, so that it can be larger than every number of the sources."""
    name, sources = "model.layers.1.mlp.down_proj.weight", [tmp_path / "a", tmp_path / "b"]
    for source, value in zip(sources, (60_000.0, -60_000.0), strict=True):
        source.mkdir()
        shutil.copy(models[0] / "config.json", source)
        part = {key: tensor.to(torch.float16) for key, tensor in tensors(models[0]).items()}
        part[name][2, 3] = value
        save_file(part, source / "model.safetensors", {"format": "pt"})
    message = f"`{name}` has numbers that fp16 cannot hold: up to `180000`, and its largest is `65504`"
    with pytest.raises(UserError, match=message):
        average_checkpoints(sources, tmp_path / "made", weights=[2, -1])
    assert not list(tmp_path.glob("made*"))


def test_one_checkpoint_is_no_average(models, tmp_path):
    with pytest.raises(UserError, match="1 checkpoint cannot be averaged"):
        average_checkpoints(models[:1], tmp_path / "made")


def test_masters_that_are_asked_for_have_to_be_there(models, tmp_path):
    for number in range(2):
        hf_to_mcore(models[number], tmp_path / str(number))
    with pytest.raises(UserError, match="has no fp32 masters"):
        average_checkpoints([tmp_path / "0", tmp_path / "1"], tmp_path / "made", values_from="master")


def test_the_command_takes_any_number_of_checkpoints(models, tmp_path):
    answer = CliRunner().invoke(cli, ["average", *map(str, models), str(tmp_path / "made"), "--weights", "1,3,2", "--json"])
    assert json.loads(answer.stdout)["command"] == "average"
    assert same_bits(tensors(tmp_path / "made"), expected([tensors(model) for model in models], [1, 3, 2]))
    wrong = CliRunner().invoke(cli, ["average", *map(str, models), str(tmp_path / "other"), "--weights", "1,x,2"])
    assert (wrong.exit_code, "`1,x,2` is not a list of numbers" in wrong.output) == (2, True)


def test_norms_that_are_spelled_in_two_ways_are_said_with_the_way_out(tmp_path):
    """Files of ranks without Transformer Engine, and the same state as `torch_dist` stores it."""
    (tmp_path / "config").mkdir()
    small = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
    (tmp_path / "config" / "config.json").write_text(json.dumps({**LLAMA, **small}))
    local, fused = (unpacked(name, tmp_path) for name in ("ranks_tp2_pp2", "ranks_tp2_pp2_as_torch_dist"))
    options = {"values_from": "weights", "hf_config": tmp_path / "config"}
    for inputs in ([local, fused], [fused, local]):
        with pytest.raises(UserError) as refused:
            average_checkpoints(inputs, tmp_path / "made", **options)
        at, other = next(local.glob("iter_*")), next(fused.glob("iter_*"))
        assert refused.value.hint == (
            f"`{at}` names norms as layers without Transformer Engine do; `mbconvert reshard {at} DST --weights-only` stores "
            f"them as `{other}` does"
        )
    reshard(local, tmp_path / "renamed", weights_only=True, hf_config=tmp_path / "config", make_vocab_size_divisible_by=32)
    average_checkpoints([tmp_path / "renamed", fused], tmp_path / "made", values_from="weights")
    assert verify(tmp_path / "made", fused).same
