"""Ranks leave nothing behind: no process, no thread; and what went wrong on one of them is raised here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from formats.errors import UserError
from tests.ranks import Ranks

CASES = 50
MOST = 60
"""Threads of all rank processes together. gloo keeps three or more for each process group, and a run forms about twenty."""


def threads() -> int:
    """Threads of all processes that descend from this one."""
    return sum(len(list(Path(f"/proc/{pid}/task").iterdir())) for pid in descendants(os.getpid()))


def descendants(pid: int) -> list[int]:
    """Process ids of children and their children."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    return [*children, *(descendant for child in children for descendant in descendants(child))]


def _form_groups(_rank: int) -> int:
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(2)
    return os.getpid()


def test_after_fifty_runs_no_rank_is_left_and_no_thread_of_its_groups(ranks) -> None:
    pids = {pid for _ in range(CASES) for pid in ranks.run(_form_groups, 2)}
    assert len(pids) == 2 * CASES
    assert not pids & set(descendants(os.getpid()))
    assert threads() < MOST


def _fail(error: BaseException) -> None:
    from torch import distributed

    distributed.init_process_group("gloo")
    if distributed.get_rank() == 1:
        raise error
    distributed.barrier()


def test_what_is_wrong_on_one_rank_is_raised_and_not_what_the_others_say_of_its_silence(processes: Ranks) -> None:
    with pytest.raises(UserError, match=r"^there is no `model\.safetensors`\n\nhint: name it$") as caught:
        processes.run(_fail, 2, UserError("there is no `model.safetensors`", hint="name it"))
    assert "on rank 1:" in str(caught.value.__cause__)


def test_a_rank_that_dies_is_named_with_its_exit_code(processes: Ranks) -> None:
    with pytest.raises(RuntimeError, match="rank 0 ended with `3` and no answer"):
        processes.run(os._exit, 1, 3)
