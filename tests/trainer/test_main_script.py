"""A script that trains whenever it is imported is told so before it trains: processes that a run starts import it again."""

from __future__ import annotations

import multiprocessing
import runpy

import pytest

from formats.errors import UserError

BARE = """
from trainer import main_script
from trainer.config import DatasetConfig, RunConfig

def train():
    config = RunConfig(model=None, dataset=DatasetConfig(num_workers={workers}))
    config.checkpoint.save = {save!r}
    main_script.check(config.dataset, config.checkpoint)

"""
CALLS = {
    "bare": "train()\n",
    "in a loop": "for _ in range(2):\n    train()\n",
    "guarded": 'if __name__ == "__main__":\n    train()\n',
    "guarded in a block": 'try:\n    if __name__ == "__main__":\n        train()\nfinally:\n    pass\n',
}


def _said(script, again):
    if again:
        multiprocessing.current_process()._inheriting = True  # as multiprocessing does while it imports a main script
    try:
        runpy.run_path(script, run_name="__main__")
    except UserError as error:
        return str(error)
    return ""


MESSAGE = (
    "`train.py` calls `pretrain` whenever it is imported, and the worker processes of a run import it again\n\n"
    'hint: put the call, and what comes before it, under `if __name__ == "__main__":`'
)


@pytest.mark.parametrize(("workers", "save"), [(2, None), (0, "run"), (0, None)])
def test_a_call_without_a_guard_is_refused_where_processes_are_started(workers, save, ranks, tmp_path):
    for how, call in CALLS.items():
        script = tmp_path / "train.py"
        script.write_text(BARE.format(workers=workers, save=save) + call)
        unguarded = "guarded" not in how and (workers or save)
        assert ranks.run(_said, 1, str(script), False) == [MESSAGE if unguarded else ""], how


def test_a_process_that_imports_the_script_again_is_refused(ranks, tmp_path):
    (tmp_path / "train.py").write_text(BARE.format(workers=0, save=None) + "if True:\n    train()\n")
    (message,) = ranks.run(_said, 1, str(tmp_path / "train.py"), True)
    assert message == MESSAGE
