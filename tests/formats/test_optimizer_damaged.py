"""State in buckets that is incomplete, mixed from two runs, or of a kind that is not read: each is named."""

from __future__ import annotations

import dataclasses
import io
import pickle

import pytest
import torch

from formats.detect import open_megatron
from formats.errors import UserError
from formats.folder import LocalFolder
from formats.optimizer.open import open_optimizer
from tests.golden.kinds import unpacked

GROUP = "optimizer.distributed.dp_group_idx_"
LABEL = f"{GROUP}0.gbuf_idx_0.dtype_(torch.bfloat16, torch.float32)"


class Checkpoint:
    """An iteration whose index and objects can be changed."""

    def __init__(self, folder):
        self.folder = folder

    def drop(self, part):
        """Remove all tensors and objects with `part` in their names."""
        index = self._index()
        index.state_dict_metadata = {name: entry for name, entry in index.state_dict_metadata.items() if part not in name}
        index.storage_data = {key: info for key, info in index.storage_data.items() if part not in key.fqn}
        self._write(index)

    def change(self, name, change):
        """Change an object: it is stored anew in a file of its own."""
        index = self._index()
        key = next(key for key in index.storage_data if key.fqn == name)
        info = index.storage_data[key]
        data = (self.folder / info.relative_path).read_bytes()[info.offset : info.offset + info.length]
        value = torch.load(io.BytesIO(data), weights_only=False)
        (self.folder / "new.distcp").write_bytes(changed := _saved(change(value)))
        index.storage_data[key] = dataclasses.replace(info, relative_path="new.distcp", offset=0, length=len(changed))
        self._write(index)

    def args(self, **settings):
        """Change Megatron-LM's command line."""

        def change(common):
            vars(common[0]["args"]).update(settings)
            return common

        self.change("common_state/shard_0_1", change)

    def refusal(self):
        with pytest.raises(UserError) as refusal:
            open_optimizer(open_megatron(LocalFolder(self.folder)))
        return refusal.value.args[0]

    def _index(self):
        return pickle.loads((self.folder / ".metadata").read_bytes())

    def _write(self, index):
        (self.folder / ".metadata").write_bytes(pickle.dumps(index))


def _saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@pytest.fixture
def buckets(tmp_path):
    return Checkpoint(next(unpacked("ranks_tp2_pp2_buckets", tmp_path).glob("iter_*")))


@pytest.fixture
def gathered(tmp_path):
    return Checkpoint(next(unpacked("ranks_tp2_pp2_gathered", tmp_path).glob("iter_*")))


def test_a_missing_bucket_is_named(buckets):
    buckets.drop(f"{GROUP}0.gbuf_idx_0.dtype_(torch.bfloat16, torch.float32).bucket_idx_0")
    assert buckets.refusal() == "`args` say TP 2 and PP 2, and 3 groups of ranks have optimizer state"


def test_a_missing_state_is_named(buckets):
    buckets.drop(f"{GROUP}2.gbuf_idx_0.dtype_(torch.bfloat16, torch.float32).bucket_idx_0.exp_avg_sq")
    assert buckets.refusal() == f"`{LABEL.replace('idx_0', 'idx_2', 1)}.bucket_idx_0` lacks `exp_avg_sq`"


def test_a_missing_group_is_named(buckets):
    buckets.drop(f"{GROUP}1.")
    buckets.args(pipeline_model_parallel_size=None)
    assert buckets.refusal() == ("3 groups of ranks have optimizer state, which are not the stages of 2: group 1 is missing")


def test_missing_hyper_parameters_are_named(buckets):
    buckets.drop(f"{GROUP}3.optimizer/")
    assert buckets.refusal() == f"the checkpoint has no `{GROUP}3.optimizer/shard_0_1`, the hyper-parameters of a group of ranks"


def test_hyper_parameters_that_differ_are_named(buckets):
    def change(value):
        value[0]["param_groups"][1]["lr"] = 0.5
        return value

    buckets.change(f"{GROUP}2.optimizer/shard_0_1", change)
    assert buckets.refusal() == (
        f"`lr` of a parameter group is 0.004718583200498814 in `{GROUP}0.optimizer/shard_0_1` "
        f"and 0.5 in `{GROUP}2.optimizer/shard_0_1`"
    )


NO_SIZES = f"`{GROUP}0.per_bucket_numel_unpadded/shard_0_1` does not say the sizes of the buckets of `{LABEL}`"
FEWER = f"the parameters of the model do not fill the 5440 elements of `{LABEL}`: `decoder.layers.0.self_attention"
OTHER = f"`{LABEL}` has buckets of [5504] elements, and `per_bucket_numel_unpadded` says "


@pytest.mark.parametrize(("sizes", "reason"), [
    ([5440], FEWER), ([5504, 64], f"{OTHER}[5504, 64]"), ([6000], f"{OTHER}[6000]"), ([-1], NO_SIZES), ("5504", NO_SIZES),
    (None, NO_SIZES),
])  # fmt: skip
def test_sizes_of_buckets_that_are_not_those_are_named(buckets, sizes, reason):
    def change(value):
        (key,) = value[0][0]
        value[0][0][key] = sizes
        return value

    buckets.change(f"{GROUP}0.per_bucket_numel_unpadded/shard_0_1", change)
    assert buckets.refusal().startswith(reason)


def test_a_model_of_other_layers_is_refused(buckets):
    """As many elements in an order that no model has: nothing in the file but the seams of the chunks says so."""
    index = buckets._index()
    name = f"{LABEL}.bucket_idx_0.param"
    chunks = index.state_dict_metadata[name].chunks
    assert [tuple(chunk.sizes) for chunk in chunks[:2]] == [(768,), (1536,)]
    chunks[0].sizes, chunks[1].sizes = chunks[1].sizes, chunks[0].sizes
    before = tuple(chunks[1].offsets)
    chunks[1].offsets = chunks[0].sizes
    moved = {key: info for key, info in index.storage_data.items() if key.fqn == name and tuple(key.offset) == before}
    for key, info in moved.items():
        index.storage_data[dataclasses.replace(key, offset=chunks[1].offsets)] = info
        del index.storage_data[key]
    buckets._write(index)
    for state in ("exp_avg", "exp_avg_sq"):
        buckets.drop(f"{LABEL}.bucket_idx_0.{state}")
    assert buckets.refusal().startswith(
        f"the parameters of the model do not fill the 5504 elements of `{LABEL}`: `decoder.layers"
    )


def test_weights_divided_further_than_over_ranks_are_refused(buckets):
    buckets.args(tensor_parallel_num_weight_shards=4)
    assert buckets.refusal() == (
        "`tensor_parallel_num_weight_shards` is 4, and the weights are divided over 2 ranks: such state is not read"
    )


def test_a_layer_wise_optimizer_is_refused(buckets):
    buckets.args(use_layer_wise_distributed_optimizer=True)
    assert "is layer-wise (Muon)" in buckets.refusal()


def test_gathered_state_of_other_sizes_is_named(gathered):
    def change(value):
        (content,) = value[0][0].values()
        content["numel_unpadded"] = 5000
        return value

    gathered.change(f"{GROUP}1.param_state/shard_0_1", change)
    assert gathered.refusal() == (
        f"`exp_avg` of `{GROUP}1.param_state/shard_0_1 buffer 0` is [5504] of fp32, which should be 5000 elements of fp32"
    )


def test_gathered_state_from_before_buckets_were_joined_is_refused(gathered):
    gathered.change(f"{GROUP}1.param_state/shard_0_1", lambda _: [{0: {torch.float32: {"param": [torch.zeros(8)]}}}])
    assert "in buckets that are not joined" in gathered.refusal()


def test_gathered_state_of_fewer_groups_is_named(gathered):
    gathered.drop(f"{GROUP}3.param_state")
    assert gathered.refusal() == "`args` say TP 2 and PP 2, and 3 groups of ranks have optimizer state"
