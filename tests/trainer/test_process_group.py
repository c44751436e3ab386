"""Several runs in one program, and runs in a program that has a process group of its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from formats.errors import UserError
from tests.trainer import small, witness

FEW = {"train__train_iters": 2, "scheduler__lr_warmup_iters": 0, "dist__timeout_minutes": 0.5}


def _twice(folder, changes):
    """The losses of a run, of the same again, and of one that fails between them."""
    seen = [witness.train(folder, changes).losses]
    silent = []
    for _ in range(2):
        try:
            witness.train(folder, {**changes, "checkpoint__load": "nowhere"})
        except UserError as error:
            silent.append(error.told)
    seen.append(witness.train(folder, {**changes, "dist__timeout_minutes": 0.6}).losses)
    return seen, silent


def test_a_program_trains_twice(ranks, model_folder, tmp_path):
    changes = {**FEW, "model__tensor_model_parallel_size": 2, "checkpoint__save": str(tmp_path), "checkpoint__overwrite": True}
    (first, silent), (second, others) = ranks.run(_twice, 2, str(model_folder()), changes)
    assert first == second
    assert first[0] == first[1]
    assert sorted([silent[0], others[0]]) == sorted([silent[1], others[1]]) == [False, True]  # one of two ranks, each time


def _in_a_group(folder, changes, backend, *, named):
    """Trains in a group that this program has made, which torchrun's variables may say nothing of; what is left of it then."""
    import torch
    import torch.distributed as dist

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(backend)
    for name in () if named else ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name)
    own = dist.new_group()
    groups = len(dist.distributed_c10d._world.pg_map)
    losses = [witness.train(folder, changes).losses for _ in range(2)]
    total = torch.tensor([rank + 1.0])
    dist.all_reduce(total)
    dist.all_reduce(total, group=own)
    assert (dist.get_world_size(), total.item()) == (world, 6.0)
    assert len(dist.distributed_c10d._world.pg_map) == groups
    return losses


@pytest.mark.parametrize("named", [True, False])
def test_a_program_with_a_process_group_trains_in_it_and_keeps_it(named, ranks, model_folder):
    (alone,) = ranks.run(witness.train, 1, str(model_folder()), FEW)
    for first, second in ranks.run(_named if named else _unnamed, 2, str(model_folder()), FEW):
        assert first == second == pytest.approx(alone.losses, abs=1e-5)  # fp32 sums over two ranks


def _named(folder, changes):
    return _in_a_group(folder, changes, "gloo", named=True)


def _unnamed(folder, changes):
    return _in_a_group(folder, changes, "cpu:gloo", named=False)


def _refused(folder):
    """What a run says in programs that it cannot train in."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from trainer.loop import pretrain

    messages = []
    for backend in ("fake", "gloo"):
        if backend == "fake":
            from torch.testing._internal.distributed.fake_pg import FakeStore

            dist.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
        else:
            dist.init_process_group("gloo")
            parallel_state.initialize_model_parallel()
        try:
            pretrain(small.settings(Path(folder), **FEW))
        except UserError as error:
            messages.append(str(error))
        dist.destroy_process_group()
    return messages


def test_a_group_that_cannot_be_used_is_an_error(ranks, model_folder):
    (messages,) = ranks.run(_refused, 1, str(model_folder()))
    backends, formed = messages
    assert backends.startswith("this program's process group has the backends `cpu:fake,")
    assert "`, and a run on a CPU needs `cpu:gloo`\n\nhint: call `init_process_group('cpu:gloo,cuda:nccl')`" in backends
    assert formed == (
        "this program has formed megatron-core's model-parallel groups already\n\n"
        "hint: call `parallel_state.destroy_model_parallel()` first: a run forms its own"
    )
