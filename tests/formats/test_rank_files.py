"""Files of ranks, as Megatron-LM wrote them, hold the weights of the `torch_dist` checkpoint of the same state."""

from __future__ import annotations

import argparse
import os
import shutil

import numpy as np
import pytest
import torch

from formats.detect import Format, detect, open_megatron
from formats.errors import UserError
from formats.folder import LocalFolder
from tests.golden.kinds import unpacked

FILE = "model_optim_rng.pt"
NORMS = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_", "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
SIZES = {
    "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "expert_model_parallel_size": 1, "hidden_size": 4,
}  # fmt: skip


def values(folder):
    """All weights; norms of layers without Transformer Engine under that library's names, as `torch_dist` has them."""
    reader, contents = open_megatron(LocalFolder(folder)), {}
    for name, spec in reader.specs.items():
        out = np.empty(spec.shape, spec.dtype)
        reader.read(name, spec.full_region, out)
        fused = next((name.replace(norm, other) for norm, other in NORMS.items() if norm in name), name)
        contents[fused] = (spec.shape, spec.dtype, out.tobytes())
    return contents


@pytest.mark.parametrize(("name", "weights"), [("ranks_tp2_pp2", 15), ("ranks_pp2_vpp2", 27), ("ranks_ep2", 29)])
def test_weights_are_those_of_the_twin(tmp_path, name, weights):
    folder = unpacked(name, tmp_path)
    held = values(folder)
    assert held == values(unpacked(f"{name}_as_torch_dist", tmp_path))
    assert len(held) == weights
    assert detect(LocalFolder(folder)) is Format.RANK_FILES
    reader = open_megatron(LocalFolder(folder))
    assert (reader.has_optimizer, reader.args()["num_layers"]) == (True, weights // 6 if weights == 27 else 2)
    files = {path.relative_to(folder / "iter_0000003").as_posix() for path in folder.rglob("*.pt")}
    assert {*reader.files} == files


def test_any_region_is_that_of_the_whole(tmp_path):
    reader = open_megatron(LocalFolder(unpacked("ranks_tp2_pp2", tmp_path)))
    for name in ("decoder.layers.1.mlp.linear_fc1.weight", "decoder.layers.0.mlp.linear_fc2.weight", "output_layer.weight"):
        spec = reader.specs[name]
        whole = np.empty(spec.shape, spec.dtype)
        reader.read(name, spec.full_region, whole)
        for rows, columns in ((slice(20, 61), slice(3, 31)), (slice(0, 1), slice(0, 32)), (slice(5, 32), slice(15, 17))):
            region = (slice(min(rows.start, spec.shape[0]), min(rows.stop, spec.shape[0])), columns)
            out = np.empty(whole[region].shape, spec.dtype)
            reader.read(name, region, out)
            assert out.tobytes() == whole[region].tobytes()
        assert sum(np.prod([part.stop - part.start for part in chunk.region]) for chunk in reader.chunks(name)) == whole.size


def saved(folder, ranks, **args):
    """A checkpoint of files with these state dicts, by the names of their folders; a list is of model chunks."""
    for name, state in ranks.items():
        chunks = {f"model{number}": chunk for number, chunk in enumerate(state)} if isinstance(state, list) else {"model": state}
        (folder / name).mkdir(parents=True)
        torch.save({"args": argparse.Namespace(**{**SIZES, **args}), "iteration": 1, **chunks}, folder / name / FILE)
    return folder


def without_args(folder):
    """The same files without `args`, as converters of other people write them."""
    for path in folder.glob("mp_rank_*/*.pt"):
        torch.save({"model": torch.load(path, weights_only=False)["model"]}, path)
    return folder


def layer(number, value):
    return {f"decoder.layers.{number}.self_attention.linear_proj.weight": torch.full((4, 4), float(value))}


def test_stages_may_be_uneven_and_a_tied_embedding_is_one_weight(tmp_path):
    embedding = torch.arange(32.0).reshape(8, 4)
    first = {"embedding.word_embeddings.weight": embedding, **layer(0, 0)}
    last = {**layer(0, 1), **layer(1, 2), "output_layer.weight": embedding.clone()}
    sizes = {"pipeline_model_parallel_size": 2, "num_layers": 3, "untie_embeddings_and_output_weights": False}
    folder = saved(tmp_path, {"mp_rank_00_000": first, "mp_rank_00_001": last}, **sizes)
    held = values(folder)
    assert [held[f"decoder.layers.{n}.self_attention.linear_proj.weight"][2] for n in range(3)] == [
        np.full((4, 4), n, np.float32).tobytes() for n in range(3)
    ]
    assert held["embedding.word_embeddings.weight"][2] == embedding.numpy().tobytes()
    assert "output_layer.weight" not in held
    last["output_layer.weight"][5, 1] += 1
    shutil.rmtree(folder)
    with pytest.raises(UserError, match=r"`embedding.word_embeddings.weight` should be the same in `mp_rank_00_000/"):
        values(saved(tmp_path, {"mp_rank_00_000": first, "mp_rank_00_001": last}, **sizes))


def test_virtual_stages_may_be_uneven(tmp_path):
    """Chunks follow one another over all stages before the next: 1 and 2 layers, then 1 and 1."""
    ranks = {"mp_rank_00_000": [layer(0, 0), layer(0, 3)], "mp_rank_00_001": [{**layer(0, 1), **layer(1, 2)}, layer(0, 4)]}
    held = values(saved(tmp_path, ranks, pipeline_model_parallel_size=2, num_layers=5))
    numbers = [np.frombuffer(held[name][2], np.float32)[0] for name in sorted(held)]
    assert numbers == [0, 1, 2, 3, 4]


NORM = {"decoder.final_layernorm.weight": torch.ones(4)}


@pytest.mark.parametrize("args", [True, False])
def test_a_second_number_is_of_stages_or_of_experts(tmp_path, args):
    """`mp_rank_00_001` is told by `args`, and without them by where the last norm is."""
    folders = [f"mp_rank_00_{number:03d}" for number in (0, 1)]
    stages = saved(
        tmp_path / "pp", dict(zip(folders, (layer(0, 0), {**layer(0, 1), **NORM}), strict=True)), pipeline_model_parallel_size=2
    )
    expert = "decoder.layers.0.mlp.experts.local_experts.0.linear_fc2.weight"
    parts = [{**layer(0, 0), **NORM, expert: torch.full((4, 2), float(number))} for number in (0, 1)]
    experts = saved(tmp_path / "ep", dict(zip(folders, parts, strict=True)), expert_model_parallel_size=2, num_experts=2)
    pp, ep = (values(folder if args else without_args(folder)) for folder in (stages, experts))
    assert sorted(pp) == ["decoder.final_layernorm.weight", *layer(0, 0), *layer(1, 0)]
    assert [ep[expert.replace("local_experts.0", str(number))][2] for number in (0, 1)] == [
        np.full((4, 2), number, np.float32).tobytes() for number in (0, 1)
    ]
    if not args:
        shutil.rmtree(tmp_path / "ep" / folders[0])
        with pytest.raises(
            UserError, match=r"`mp_rank_00_000/` is missing\n\nhint: `mp_rank_00_001/model_optim_rng.pt` has no `args`"
        ):
            values(experts)


def test_old_args_without_expert_parallelism_and_a_release(tmp_path):
    ranks = {f"mp_rank_{tp:02d}": layer(0, tp) for tp in (0, 1)}
    saved(tmp_path / "release", ranks, tensor_model_parallel_size=2, expert_model_parallel_size=None)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    ((shape, _, data),) = values(tmp_path).values()
    assert (shape, data) == ((4, 8), np.repeat([[0, 1]], 4, axis=1).repeat(4, axis=0).astype(np.float32).tobytes())


@pytest.mark.parametrize("kind", ["grouped", "transposed"])
def test_experts_of_either_kind_are_numbered_as_in_the_whole_model(tmp_path, kind):
    """`transposed` are megatron-core's GroupedMLP, whose forward views `weight1` as [experts, hidden, rows]."""
    rng = np.random.default_rng(0)
    fc1, fc2 = (torch.from_numpy(rng.standard_normal(shape).astype(np.float32)) for shape in ((4, 6, 4), (4, 4, 3)))
    at, ranks = "decoder.layers.0.mlp.experts.", {}
    for ep in range(2):
        mine = range(2 * ep, 2 * ep + 2)
        grouped = {f"{at}linear_fc{n}.weight{e % 2}": w[e] for e in mine for n, w in ((1, fc1), (2, fc2))}
        weight1, weight2 = (torch.stack([w[e].T for e in mine]) for w in (fc1, fc2))
        turned = {f"{at}weight1": weight1.reshape(4, -1), f"{at}weight2": weight2.reshape(-1, 4)}
        ranks[f"mp_rank_00_{ep:03d}"] = {**layer(0, 0), **(grouped if kind == "grouped" else turned)}
    held = values(saved(tmp_path, ranks, expert_model_parallel_size=2, num_experts=4))
    for e in range(4):
        assert held[f"{at}{e}.linear_fc1.weight"] == ((6, 4), np.float32, fc1[e].numpy().tobytes())
        assert held[f"{at}{e}.linear_fc2.weight"] == ((4, 3), np.float32, fc2[e].numpy().tobytes())


def test_transposed_experts_that_ranks_divide_are_whole_with_gates_first(tmp_path):
    rng = np.random.default_rng(1)
    gate, up, down = (
        torch.from_numpy(rng.standard_normal(shape).astype(np.float32)) for shape in ((2, 6, 4), (2, 6, 4), (2, 4, 6))
    )
    at, ranks = "decoder.layers.0.mlp.experts.", {}
    for tp in range(2):
        mine = slice(3 * tp, 3 * tp + 3)
        weight1 = torch.cat([gate[:, mine], up[:, mine]], dim=1).transpose(1, 2)
        weight2 = down[:, :, mine].transpose(1, 2)
        turned = {f"{at}weight1": weight1.reshape(4, -1), f"{at}weight2": weight2.reshape(-1, 4)}
        ranks[f"mp_rank_{tp:02d}"] = {**layer(0, 0), **turned}
    held = values(saved(tmp_path, ranks, tensor_model_parallel_size=2, num_experts=2))
    for e in range(2):
        assert held[f"{at}{e}.linear_fc1.weight"][2] == torch.cat([gate[e], up[e]]).numpy().tobytes()
        assert held[f"{at}{e}.linear_fc2.weight"][2] == down[e].numpy().tobytes()


def damaged(tmp_path, change):
    folder = unpacked("ranks_tp2_pp2", tmp_path)
    change(folder / "iter_0000003")
    with pytest.raises(UserError) as error:
        values(folder)
    return str(error.value)


def test_a_rank_that_is_missing_or_too_many_is_named(tmp_path):
    gone = damaged(tmp_path / "1", lambda folder: shutil.rmtree(folder / "mp_rank_01_000"))
    assert "should have folders of 4 ranks: `mp_rank_01_000/` is missing" in gone
    more = damaged(tmp_path / "2", lambda folder: (folder / "mp_rank_02_000").mkdir())
    assert "should have folders of 4 ranks: `mp_rank_02_000/` is not one of them" in more
    empty = damaged(tmp_path / "3", lambda folder: (folder / "mp_rank_01_001" / FILE).unlink())
    assert "has no `mp_rank_01_001/model_optim_rng.pt`" in empty


def test_a_rank_of_another_run_is_named_with_both_values(tmp_path):
    other = unpacked("ranks_ep2", tmp_path / "other") / "iter_0000003" / "mp_rank_00_000" / FILE
    message = damaged(tmp_path, lambda folder: shutil.copy(other, folder / "mp_rank_01_001" / FILE))
    assert "`tensor_model_parallel_size` is 2 in `mp_rank_00_000/model_optim_rng.pt` and 1 in `mp_rank_01_001" in message


def test_a_rank_of_another_iteration_or_cut_off_is_named(tmp_path):
    def later(folder):
        path = folder / "mp_rank_01_000" / FILE
        torch.save({**torch.load(path, weights_only=False), "iteration": 5}, path)

    message = damaged(tmp_path / "1", later)
    assert "`iteration` is 3 in `mp_rank_00_000/model_optim_rng.pt` and 5 in `mp_rank_01_000/model_optim_rng.pt`" in message
    short = damaged(tmp_path / "2", lambda folder: os.truncate(folder / "mp_rank_01_001" / FILE, 5000))
    assert "`mp_rank_01_001/model_optim_rng.pt` is not a valid torch archive" in short


def test_a_copy_that_differs_is_named(tmp_path):
    def flip(folder):
        path = folder / "mp_rank_01_000" / FILE
        state = torch.load(path, weights_only=False)
        state["model"]["decoder.layers.0.input_layernorm.weight"][3] += 1
        torch.save(state, path)

    message = damaged(tmp_path, flip)
    assert "`decoder.layers.0.input_layernorm.weight` should be the same in `mp_rank_00_000/" in message


def test_what_is_not_known_is_refused_by_name(tmp_path):
    for number, name in enumerate(("language_model", "language_model.encoder.final_norm.weight")):
        old = saved(tmp_path / f"old{number}", {"mp_rank_00": {name: {}}})
        with pytest.raises(UserError, match="is of a model from before megatron-core"):
            values(old)
    mixer = {**layer(0, 0), "decoder.layers.0.mixer.in_proj.weight": torch.zeros(4, 4)}
    mamba = saved(tmp_path / "mamba", {"mp_rank_00": mixer, "mp_rank_01": mixer}, tensor_model_parallel_size=2)
    with pytest.raises(UserError, match=r"`decoder.layers.0.mixer.in_proj.weight` is of a layer whose division"):
        values(mamba)
    with pytest.raises(UserError, match="hold 1 layers, and their `args` say 3"):
        values(saved(tmp_path / "layers", {"mp_rank_00": layer(0, 0)}, num_layers=3))
    sizes = {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1, "num_experts": 4}
    with pytest.raises(UserError, match="say tensor parallelism 2 and 1 of experts, which is not supported"):
        values(saved(tmp_path / "etp", {"mp_rank_00": layer(0, 0), "mp_rank_01": layer(0, 0)}, **sizes))
    sizes = {"tensor_model_parallel_size": 2, "tensor_parallel_num_weight_shards": 4}
    with pytest.raises(
        UserError, match=r"`tensor_model_parallel_size` 2 and `tensor_parallel_num_weight_shards` 4, which is not supp"
    ):
        values(saved(tmp_path / "gtp", {"mp_rank_00": layer(0, 0), "mp_rank_01": layer(0, 0)}, **sizes))
    at = "decoder.layers.0.mlp.experts.local_experts."
    two = {**layer(0, 0), **{f"{at}{number}.linear_fc2.weight": torch.zeros(4, 2) for number in (0, 1)}}
    with pytest.raises(UserError, match="has 2 experts in a layer, and its `args` say 4 for each rank"):
        values(saved(tmp_path / "experts", {"mp_rank_00": two}, num_experts=4))
    with pytest.raises(UserError, match=r"has experts \[1\], which should count from 0"):
        values(saved(tmp_path / "gap", {"mp_rank_00": {**layer(0, 0), f"{at}1.linear_fc2.weight": torch.zeros(4, 2)}}))
