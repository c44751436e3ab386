"""Whatever ends a run, and whenever, the last good checkpoint is there and the next start goes on from it."""

from __future__ import annotations

import itertools
import random
import shutil
import sys
import time
from pathlib import Path

import pytest

from formats.folder import LocalFolder
from formats.torch_dist import TorchDistReader
from tests.models import tree
from tests.trainer import small, witness
from tests.trainer.mortal import Mortal
from trainer import iterations

STEPS = 12
EAGER = {"train__train_iters": STEPS, "checkpoint__save_interval": 1, "checkpoint__keep_last": 2, "train__micro_batch_size": 2}


def _good(root):
    """The checkpoint that a start would resume from, read in full."""
    found = iterations.latest(str(root))
    assert found is not None
    reader = TorchDistReader(LocalFolder(found))
    reader.check(reader.specs)
    for name in reader.container.object_names:
        reader.container.object(name)
    reader.close()
    return found


@pytest.fixture(scope="module")
def uninterrupted(ranks, model_folder):
    return ranks.run(witness.train, 2, str(model_folder()), EAGER)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_kill_9_at_any_moment_of_a_save_leaves_the_last_good_checkpoint(kind, model_folder, tmp_path, uninterrupted):
    root = tmp_path / "run"
    changes = {**EAGER, "checkpoint__save": str(root), "checkpoint__load": str(root)}
    changes |= {"checkpoint__async_save": kind == "async"}
    seed = time.time_ns()
    print("seed", seed)
    drawn = random.Random(seed)
    for number, killed in enumerate([(0, 1), (0,), (1,)]):
        run = Mortal(model_folder(), changes, world=2, log=tmp_path / f"log{number}")
        before = iterations.latest(str(root))
        run.until(lambda before=before: (root / iterations.TRACKER).exists() and iterations.latest(str(root)) != before)
        run.until(lambda: iterations.leftovers(str(root)))
        time.sleep(drawn.uniform(0, 0.05))
        run.kill(*killed)
        good, left = _good(root), iterations.leftovers(str(root))
        assert all(path.name == f"{path.stem}.partial" for path in left)
        assert good.name >= "iter_0000001"
    last = Mortal(model_folder(), changes, world=2, log=tmp_path / "log")
    answers = last.wait()
    said = (tmp_path / "log").read_text()
    for path in left:
        assert f"note: `{path}` is left of a save that was interrupted; it can be removed" in said
    assert f"resumed {good}: step {int(good.name[5:])}, {small.BATCH * int(good.name[5:])} samples consumed" in said
    for one, other in zip(uninterrupted, answers, strict=True):
        assert witness.differences(one.left, other.left) == []
