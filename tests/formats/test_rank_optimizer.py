"""Optimizer state in files of ranks is that of the `torch_dist` checkpoint of the same state, bit for bit, or refused by name."""

from __future__ import annotations

import argparse

import numpy as np
import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from formats.detect import open_megatron
from formats.errors import UserError
from formats.folder import LocalFolder
from formats.optimizer.open import open_optimizer
from formats.optimizer.state import EXP_AVG, EXP_AVG_SQ, MASTER, STATES
from tests.formats.test_kinds import values
from tests.golden.kinds import unpacked

FILE, OPTIMIZER = "model_optim_rng.pt", "distrib_optim.pt"
PROJ = "decoder.layers.0.self_attention.linear_proj.weight"
PLAIN, DISTRIBUTED = "ranks_plain_tp2_pp2_tied", "ranks_tp2_pp2"


def opened(folder):
    reader = open_megatron(LocalFolder(folder))
    return reader, open_optimizer(reader)


@pytest.mark.parametrize(("name", "kind", "weights"), [
    (DISTRIBUTED, OPTIMIZER, 15), ("ranks_pp2_vpp2", OPTIMIZER, 27), ("ranks_ep2", OPTIMIZER, 29), (PLAIN, "plain", 14),
    ("ranks_plain_ep2", "plain", 29),
])  # fmt: skip
def test_state_is_that_of_the_twin(tmp_path, name, kind, weights):
    _, optimizer = opened(unpacked(name, tmp_path))
    _, twin = opened(unpacked(f"{name}_as_torch_dist", tmp_path))
    assert (optimizer.kind, optimizer.states.keys(), optimizer.groups) == (kind, {*STATES}, twin.groups)
    for state in STATES:
        held = values(optimizer.states[state])
        assert held == values(twin.states[state])
        assert len(held) == weights


def test_masters_of_many_buckets_round_to_the_weights(tmp_path):
    reader, optimizer = opened(unpacked("ranks_dp3_six_buckets", tmp_path))
    masters, weights = values(optimizer.states[MASTER]), values(reader)
    assert len(masters) == 15
    for name, (_, dtype, data) in weights.items():
        assert np.frombuffer(masters[name][2], np.float32).astype(dtype).tobytes() == data
    assert all(np.frombuffer(data, np.float32).min() >= 0 for *_, data in values(optimizer.states[EXP_AVG_SQ]).values())


class Buffer:
    """Weights of one rank where megatron-core's distributed optimizer puts them, and their state as it is saved."""

    def __init__(self, sizes, *, ranks, bucket, shared=(), before=0):
        self.weights = {name: torch.nn.Parameter(torch.randn(size, dtype=torch.bfloat16)) for name, size in sizes.items()}
        for name in shared:
            self.weights[name].shared_embedding = True
        config = DistributedDataParallelConfig(use_distributed_optimizer=True)
        layout = DistributedOptimizer._compute_per_buffer_param_layout([*self.weights.values()], bucket, ranks, config)
        self.storage = torch.zeros(layout.bucket_indices[-1][1] + before, dtype=torch.bfloat16)[before:]
        whole = torch.randn(3, len(self.storage))
        spans = zip(layout.bucket_indices, layout.per_bucket_numel_unpadded, strict=True)
        kept = torch.cat([torch.arange(start, start + size) for (start, _), size in spans])
        tensors = dict(zip(STATES, whole[:, kept].contiguous().clone(), strict=True), numel_unpadded=len(kept))
        self.optimizer = {"buckets_coalesced": True, 0: {(torch.bfloat16, torch.float32): {**tensors}}}
        ranges = {name: layout.param_index_map[weight][:2] for name, weight in self.weights.items()}
        self.model = {name: self.storage[start:stop] for name, (start, stop) in ranges.items()}
        self.state = {name: whole[:, start:stop] for name, (start, stop) in ranges.items()}

    def save(self, folder, **args):
        sizes = dict.fromkeys(("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size"), 1)
        (folder / "mp_rank_00").mkdir(parents=True)
        groups = {"optimizer": {"param_groups": [{"lr": 0.1, "step": 1}]}}
        content = {"args": argparse.Namespace(**sizes, **args), "iteration": 1, "model": self.model, "optimizer": groups}
        torch.save(content, folder / "mp_rank_00" / FILE)
        torch.save(self.optimizer, folder / "mp_rank_00" / OPTIMIZER)
        return folder


def check(folder, buffer):
    _, optimizer = opened(folder)
    for number, state in enumerate(STATES):
        held = values(optimizer.states[state])
        assert {name: data for name, (*_, data) in held.items()} == {
            name: whole[number].numpy().tobytes() for name, whole in buffer.state.items()
        }


SIZES = {"embedding.word_embeddings.weight": 320, "decoder.final_layernorm.weight": 40, "b": 96, "c": 640, "d": 200, "e": 96}


def test_padding_that_alignment_hides_is_told_by_the_sizes_of_buckets(tmp_path):
    """`e` ends at 96, and the first bucket at 128: as far as alignment would move the next weight."""
    buffer = Buffer(SIZES, ranks=2, bucket=90)
    check(buffer.save(tmp_path / "1", ddp_bucket_size=90, data_parallel_size=2), buffer)
    folder = buffer.save(tmp_path / "2", data_parallel_size=2)
    with pytest.raises(UserError, match=r"buffer `0: bfloat16, float32` in `mp_rank_00/distrib_optim.pt` has 1\d+ elements, and"):
        opened(folder)


@pytest.mark.parametrize("bucket", [None, 250])
def test_a_tied_embedding_has_a_bucket_of_its_own_after_alignment(tmp_path, bucket):
    buffer = Buffer(SIZES, ranks=6, bucket=bucket, shared=["embedding.word_embeddings.weight"])
    args = {"ddp_bucket_size": bucket, "data_parallel_size": 6, "untie_embeddings_and_output_weights": False}
    check(buffer.save(tmp_path, **args), buffer)


def test_frozen_weights_have_no_state(tmp_path):
    """The buffer is part of a larger storage, too."""
    buffer = Buffer(SIZES, ranks=2, bucket=None, before=512)
    buffer.model["frozen"] = torch.zeros(7, dtype=torch.bfloat16)
    check(buffer.save(tmp_path), buffer)


def test_state_of_transposed_experts_is_turned_as_they_are(tmp_path):
    name = "decoder.layers.0.mlp.experts.weight2"
    buffer = Buffer({"decoder.layers.0.input_layernorm.weight": 40, name: 24}, ranks=2, bucket=None)
    buffer.model[name] = buffer.model[name].view(4, 6)
    _, optimizer = opened(buffer.save(tmp_path, num_experts=2, num_layers=1))
    for number, state in enumerate(STATES):
        held, whole = values(optimizer.states[state]), buffer.state[name][number].view(2, 2, 6).transpose(1, 2).numpy()
        for expert in range(2):
            assert held[f"decoder.layers.0.mlp.experts.{expert}.linear_fc2.weight"][2] == whole[expert].tobytes()


def refused(folder, *changes):
    """What is said of a checkpoint of which files were changed: (file, function of its content), or a function of its folder."""
    iteration = folder / "iter_0000003"
    for change in changes:
        if callable(change):
            change(iteration)
            continue
        name, edit = change
        content = torch.load(iteration / name, weights_only=False)
        torch.save(edit(content) or content, iteration / name)
    with pytest.raises(UserError) as error:
        read_all(folder)
    return str(error.value)


def read_all(folder):
    _, optimizer = opened(folder)
    return {state: values(reader) for state, reader in optimizer.states.items()}


def drop(holder, key):
    del holder[key]


def test_a_rank_without_its_state_is_named(tmp_path):
    gone = refused(unpacked(DISTRIBUTED, tmp_path), lambda folder: (folder / "mp_rank_01_000" / OPTIMIZER).unlink())
    assert "has no `mp_rank_01_000/distrib_optim.pt`" in gone
    no_experts = (f"mp_rank_00_001/{OPTIMIZER}", lambda state: [None, None])
    assert "`mp_rank_00_001/distrib_optim.pt` has no state of one" in refused(unpacked("ranks_ep2", tmp_path), no_experts)


def test_masters_that_some_weights_lack_are_named(tmp_path):
    changes = (
        (f"mp_rank_00_00{ep}/{FILE}", lambda content: drop(content["optimizer"][1], "fp32_from_fp16_params")) for ep in (0, 1)
    )
    message = refused(unpacked("ranks_plain_ep2", tmp_path), *changes)
    assert "has `exp_avg` of `decoder.layers.0.mlp.experts.0.linear_fc1.weight`, and no `param`" in message


def test_state_of_another_rank_is_named(tmp_path):
    def swap(folder):
        (folder / "mp_rank_00_001" / OPTIMIZER).write_bytes((folder / "mp_rank_00_000" / OPTIMIZER).read_bytes())

    assert "has 10880 elements, and weights in `mp_rank_00_001/model_optim_rng.pt`" in refused(
        unpacked("ranks_pp2_vpp2", tmp_path), swap
    )


def test_hyper_parameters_that_differ_are_named_with_both_values(tmp_path):
    def faster(content):
        content["optimizer"]["optimizer"]["param_groups"][1]["lr"] = 0.5

    message = refused(unpacked(DISTRIBUTED, tmp_path), (f"mp_rank_01_001/{FILE}", faster))
    assert "`lr` of a parameter group is 0.0047" in message
    assert "`mp_rank_00_000/model_optim_rng.pt` and 0.5 in `mp_rank_01_001/model_optim_rng.pt`" in message


def test_copies_of_state_that_differ_are_named(tmp_path):
    def norm(content):
        content["optimizer"]["optimizer"]["state"][5]["exp_avg"][3] += 1

    def embedding(content):
        content["optimizer"]["fp32_from_fp16_params"][0][-1].data[3, 3] += 1

    names = ("decoder.layers.0.input_layernorm.weight", "embedding.word_embeddings.weight")
    for name, rank, change in zip(names, ("mp_rank_01_000", "mp_rank_01_001"), (norm, embedding), strict=True):
        message = refused(unpacked(PLAIN, tmp_path / name), (f"{rank}/{FILE}", change))
        assert f"`{name}` should be the same in `mp_rank_0" in message


def plain(change):
    """A change of one rank's plain optimizer."""
    return f"mp_rank_00_001/{FILE}", lambda content: change(content["optimizer"])


def flat(change):
    """A change of the flat tensors of one rank's buffer."""
    return f"mp_rank_00_001/{OPTIMIZER}", lambda content: change(next(iter(content[0].values())))


DAMAGE = {
    "no_master": (PLAIN, plain(lambda state: drop(state["fp32_from_fp16_params"][1], -1)), "has no master of `decoder.final_"),
    "no_masters": (PLAIN, plain(lambda state: drop(state, "fp32_from_fp16_params")), "`param` of its part of `decoder.layers.1."),
    "no_moment": (PLAIN, plain(lambda state: drop(state["optimizer"]["state"][2], "exp_avg_sq")), "has no `exp_avg_sq` of its"),
    "too_many": (PLAIN, plain(lambda state: state["optimizer"]["param_groups"][0]["params"].append(0)), "has state of 1 weights"),
    "no_groups": (PLAIN, plain(lambda state: drop(state["optimizer"], "param_groups")), "has no `param_groups`"),
    "no_state": (DISTRIBUTED, flat(lambda state: drop(state, "param")), "has no `param`"),
    "short": (DISTRIBUTED, flat(lambda state: state.update(exp_avg=state["exp_avg"][:-1])), "elements, and should have"),
    "dtype": (DISTRIBUTED, flat(lambda state: state.update(exp_avg=state["exp_avg"].bfloat16())), "only optimizer state in fp32"),
    "old": (
        DISTRIBUTED, (f"mp_rank_00_001/{OPTIMIZER}", lambda state: drop(state, "buckets_coalesced")),
        "as Megatron-LM wrote before February 2024",
    ),
    "three": (DISTRIBUTED, (f"mp_rank_00_001/{OPTIMIZER}", lambda state: [state] * 3), "has 3 optimizers, of which only"),
    "layer_wise": (
        DISTRIBUTED, lambda folder: (folder / "mp_rank_00_000" / "layer_wise_optimizer_0.pt").touch(), "a layer-wise optimizer",
    ),
    "cut_off": (
        DISTRIBUTED, lambda folder: (folder / "mp_rank_01_001" / OPTIMIZER).write_bytes(b"PK" * 5000),
        "`mp_rank_01_001/distrib_optim.pt` is not a valid torch archive",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_state_that_cannot_be_read_is_named(tmp_path, name):
    base, change, message = DAMAGE[name]
    assert message in refused(unpacked(base, tmp_path), change)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_groups_of_one_shape_are_told_by_weight_decay_and_learning_rate(tmp_path, dtype):
    """An embedding as large as a projection, with a learning rate of its own: the order of groups says nothing."""
    shapes = {"embedding.word_embeddings.weight": (4, 4), PROJ: (4, 4), "output_layer.weight": (4, 4), "norm.weight": (4,)}
    model = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    groups = [[PROJ], ["norm.weight"], ["embedding.word_embeddings.weight", "output_layer.weight"]]
    settings = [{"wd_mult": 1.0}, {"wd_mult": 0.0}, {"wd_mult": 1.0, "is_decoupled_lr": True}]
    order = [name for group in groups for name in group]
    state = {i: {key: torch.randn(shapes[name]) for key in (EXP_AVG, EXP_AVG_SQ)} for i, name in enumerate(order)}
    numbered = [
        {"is_decoupled_lr": False, **each, "params": [order.index(n) for n in g]}
        for each, g in zip(settings, groups, strict=True)
    ]
    masters = [[model[name].float() for name in group] for group in groups]
    content = {"optimizer": {"state": state, "param_groups": numbered}, "fp32_from_fp16_params": masters}
    (tmp_path / "mp_rank_00").mkdir()
    content = content if dtype == torch.bfloat16 else content["optimizer"]  # fp32 weights have no masters
    torch.save({"model": model, "optimizer": content, "iteration": 1}, tmp_path / "mp_rank_00" / FILE)
    _, optimizer = opened(tmp_path)
    held = values(optimizer.states[EXP_AVG])
    assert {name: held[name][2] for name in order} == {n: state[i][EXP_AVG].numpy().tobytes() for i, n in enumerate(order)}
    masters_read = values(optimizer.states[MASTER]) if dtype == torch.bfloat16 else values(opened(tmp_path)[0])
    assert all(masters_read[name][2] == model[name].float().numpy().tobytes() for name in order)
    assert (MASTER in optimizer.states) == (dtype == torch.bfloat16)


def test_a_file_that_says_it_has_no_optimizer_has_none(tmp_path):
    (tmp_path / "mp_rank_00").mkdir()
    torch.save({"model": {"norm.weight": torch.ones(4)}, "optimizer": None}, tmp_path / "mp_rank_00" / FILE)
    reader, optimizer = opened(tmp_path)
    assert (reader.has_optimizer, optimizer) == (False, None)
