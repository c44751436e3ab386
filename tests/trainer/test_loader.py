"""Which samples a rank gets, and when."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from formats.errors import UserError
from tests.trainer.prepared import LENGTH, built, write
from trainer.data.loader import batches
from trainer.data.mock import Mock

pytestmark = pytest.mark.filterwarnings("ignore:Could not determine rank:UserWarning")  # megatron-core's, of a lone process

DATA = Mock(samples=48, sequence_length=LENGTH, vocab_size=1000, seed=1, split=0)


def rows(microbatches):
    return [tuple(row) for batch in microbatches for row in batch["tokens"].tolist()]


def expected(*numbers):
    return [tuple(DATA[number]["tokens"].tolist()) for number in numbers]


def read(**options):
    return list(batches(DATA, **({"consumed": 0, "micro_batch_size": 2, "global_batch_size": 8, "rank": 0, "size": 2} | options)))


def test_a_microbatch_is_stacked_samples():
    first = read()[0]
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in first.items()} == {
        "tokens": (torch.int64, (2, LENGTH)),
        "labels": (torch.int64, (2, LENGTH)),
        "loss_mask": (torch.float32, (2, LENGTH)),
        "position_ids": (torch.int64, (2, LENGTH)),
    }


def test_ranks_share_a_global_batch_as_in_megatron():
    assert rows(read(rank=0)[:4]) == expected(0, 1, 4, 5, 8, 9, 12, 13)
    assert rows(read(rank=1)[:4]) == expected(2, 3, 6, 7, 10, 11, 14, 15)


def test_reading_goes_on_where_it_was_with_other_batch_sizes_and_ranks():
    before = rows(read(rank=0, samples=16)) + rows(read(rank=1, samples=16))
    after = [
        row for rank in range(4) for row in rows(read(consumed=16, micro_batch_size=1, global_batch_size=4, rank=rank, size=4))
    ]
    assert sorted(before + after) == sorted(expected(*range(48)))
    assert sorted(before) == sorted(expected(*range(16)))


def test_resuming_gives_what_would_have_come():
    assert rows(read(consumed=24)) == rows(read())[len(expected(*range(12))) :]


def test_only_whole_global_batches_are_read():
    assert len(rows(read(global_batch_size=20))) == 20
    assert len(rows(read(samples=8))) == 4


def message(**options):
    with pytest.raises(UserError) as error:
        read(**options)
    return str(error.value).split("\n")[0]


def test_too_few_samples_are_an_error_before_the_first_one():
    tail = "but the dataset has `48` in all, and a global batch takes `8`"
    assert message(consumed=40, samples=16) == f"`16` samples are needed after the first `40`, {tail}"
    assert message(consumed=48) == f"`8` samples are needed after the first `48`, {tail}"
    assert message(samples=4) == f"`4` samples are needed after the first `0`, {tail}"
    sizes = "the global batch size `6` is not divisible by the micro batch size `2` times `2` data-parallel ranks"
    assert message(global_batch_size=6) == sizes


def test_processes_that_read_ahead_change_nothing_and_end_with_the_generator(tmp_path):
    prefixes = [write(tmp_path / "a"), write(tmp_path / "b", seed=10)]
    train = built((64, 0, 0), blend=[1, prefixes[0], 1, prefixes[1]])[0]
    options = {"consumed": 4, "micro_batch_size": 2, "global_batch_size": 4, "rank": 0, "size": 1}
    alone = rows(batches(train, **options))
    others = set(multiprocessing.active_children())
    together = batches(train, num_workers=2, **options)
    microbatches = [next(together) for _ in range(10)]
    assert rows(microbatches) == alone[:20]
    workers = set(multiprocessing.active_children()) - others
    assert len(workers) == 2
    together.close()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert set(multiprocessing.active_children()) == others


def test_processes_that_read_ahead_end_with_a_rank_that_is_killed():
    script = Path(__file__).with_name("reading.py")
    with subprocess.Popen([sys.executable, "-W", "ignore", str(script)], stdout=subprocess.PIPE, text=True) as rank:
        workers = [int(number) for number in rank.stdout.readline().split()]
        os.kill(rank.pid, signal.SIGKILL)
    assert len(workers) == 2
    limit = time.monotonic() + 600
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < limit
        time.sleep(0.02)
