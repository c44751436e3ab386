"""Optimizer state is saved where it belongs, whatever padding is between the buckets of gradients.

`MBTRAIN_UNMENDED=1` shows what was: at step 4 of the dense run a loss of 5.9294 uninterrupted, and resumed one of 6.1191.
"""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest

from formats.errors import UserError
from tests.trainer import shifting, small, witness
from tests.trainer.shifting import BUCKETS, WIDE

SLOW = pytest.mark.slow


def _experts(changes):
    """examples/moe.py, on as many ranks as were started."""
    from examples import moe
    from trainer import pretrain

    config = moe.settings(ep=changes.pop("ep"))
    for name, value in changes.items():
        section, _, setting = name.partition("__")
        setattr(getattr(config, section) if setting else config, setting or section, value)
    config.model.num_moe_experts, config.dist.device = 6, "cpu"
    seen = witness.Witness()
    with shifting.as_told():
        pretrain(config, seen.forward_step, callbacks=[seen])
    return seen


@pytest.fixture
def dense(ranks, model_folder):
    """Train a small Llama on that many ranks."""
    folder = str(model_folder("gqa", num_hidden_layers=2))

    def on(world, settings, function=shifting.train):
        return lambda changes: ranks.run(function, world, folder, {**settings, "train__global_batch_size": world, **changes})

    return on


@pytest.mark.parametrize("async_save", [False, True])
@pytest.mark.parametrize("world", [3, pytest.param(6, marks=SLOW)])
def test_a_resumed_run_with_several_buckets_is_the_uninterrupted_one(world, async_save, dense, tmp_path):
    for pair in shifting.in_two(dense(world, BUCKETS), tmp_path, async_save=async_save):
        assert shifting.differences(*pair) == []


@pytest.mark.parametrize(
    ("world", "ep", "async_save"), [(3, 3, True), pytest.param(6, 2, False, marks=SLOW), pytest.param(6, 2, True, marks=SLOW)]
)
def test_so_is_one_with_experts(world, ep, async_save, ranks, tmp_path):
    """On 6 ranks experts have a data-parallel group of 3, and buckets padded for that."""

    def train(changes):
        return ranks.run(_experts, world, {**BUCKETS, "ep": ep, "train__global_batch_size": world, **changes})

    for pair in shifting.in_two(train, tmp_path, async_save=async_save):
        assert shifting.differences(*pair) == []


def test_buckets_padded_for_the_bandwidth_of_nccl_are_saved_right(dense, tmp_path):
    (pair,) = shifting.in_two(dense(1, WIDE), tmp_path)
    assert shifting.differences(*pair) == []


def _mended():
    """megatron-core as it will be: the method itself leaves the padding out."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    method = DistributedOptimizer.sharded_param_state_fully_reshardable

    def mended(self, *args, **kwargs):
        kept = [buffer.param_index_map for buffer in self.buffers]
        for buffer in self.buffers:
            padded = [stop - start for start, stop in buffer.bucket_indices]
            lost = [whole - bucket.numel_unpadded for whole, bucket in zip(padded, buffer.buckets, strict=True)]
            buffer.param_index_map = {
                parameter: (start - sum(lost[:number]), stop - sum(lost[:number]), number)
                for parameter, (start, stop, number) in buffer.param_index_map.items()
            }
        try:
            return method(self, *args, **kwargs)
        finally:
            for buffer, offsets in zip(self.buffers, kept, strict=True):
                buffer.param_index_map = offsets

    return mock.patch.object(DistributedOptimizer, "sharded_param_state_fully_reshardable", mended)


def _train_mended(folder, changes):
    with _mended():
        return witness.train(folder, changes)


def test_it_stands_aside_where_megatron_core_has_been_mended(dense, tmp_path):
    (pair,) = shifting.in_two(dense(1, WIDE, _train_mended), tmp_path)
    assert shifting.differences(*pair) == []


def _does_not_answer(self, weights, **_):
    """A method of which nothing is known: it looks at the numbers that it is given."""
    return self.get_parameter_state_dp_zero()[0].popitem()[1]["param"].tolist()


class _Corrected:
    """Is megatron-core of that version corrected, if it does not tell where it cuts?"""

    def __init__(self, version):
        self.version, self.answer = version, None

    def on_start(self, run):
        from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

        from trainer import optim
        from trainer.checkpoints import bucket_padding

        ((buffer,),) = (optimizer.buffers for optimizer in optim.distributed(run.parts.optimizer))
        before = buffer.param_index_map
        with (
            mock.patch.object(DistributedOptimizer, "sharded_param_state_fully_reshardable", _does_not_answer),
            mock.patch("importlib.metadata.version", return_value=self.version),
            bucket_padding.padding_excluded(run.parts.optimizer, {}, {"distrib_optim_sharding_type": "fully_reshardable"}),
        ):
            self.answer = buffer.param_index_map != before
        run.stop.request()

    def __getattr__(self, name):
        return lambda *_: None


def _corrected(folder, changes, version):
    from trainer import pretrain

    seen = _Corrected(version)
    pretrain(small.settings(Path(folder), **changes), callbacks=[seen])
    return seen.answer


def test_a_newer_megatron_core_that_does_not_answer_is_believed(ranks, model_folder):
    settings = {**WIDE, "train__train_iters": 1, "scheduler__lr_warmup_iters": 0}
    assert ranks.run(_corrected, 1, str(model_folder("gqa")), settings, "0.20.0") == [False]


def test_an_older_one_that_does_not_answer_is_not_saved_with(ranks, model_folder):
    settings = {**WIDE, "train__train_iters": 1, "scheduler__lr_warmup_iters": 0}
    with pytest.raises(UserError) as error:
        ranks.run(_corrected, 1, str(model_folder("gqa")), settings, "0.19.2")
    assert str(error.value) == (
        "megatron-core 0.19.2 would save optimizer state shifted by the padding of buckets, and cannot be corrected\n\n"
        "hint: save with `checkpoint.optim_sharding=dp_reshardable`, or with `comm_overlap.overlap_grad_reduce=false`"
    )
