"""Whatever ends a run, and whenever, the last good checkpoint is there and the next start goes on from it."""

from __future__ import annotations

import itertools
import random
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from formats.folder import LocalFolder
from formats.torch_dist import TorchDistReader
from tests.models import tree
from tests.trainer import small, witness
from tests.trainer.mortal import Mortal
from trainer.checkpoints import iterations

STEPS = 12
EAGER = {"train__train_iters": STEPS, "checkpoint__save_interval": 1, "checkpoint__keep_last": 2, "train__micro_batch_size": 2}


def _good(root):
    """The checkpoint that a start would resume from, read in full."""
    folder = iterations.latest(str(root))
    assert folder is not None
    reader = TorchDistReader(LocalFolder(folder))
    reader.check(reader.specs)
    for name in reader.container.object_names:
        reader.container.archive(name).pickle()
    reader.close()
    return folder


@pytest.fixture(scope="module")
def uninterrupted(ranks, model_folder):
    plain = {name: value for name, value in EAGER.items() if not name.startswith("checkpoint")}
    return ranks.run(witness.train, 2, str(model_folder()), plain)


@pytest.mark.parametrize(("kind", "rank"), [("sync", 0), ("async", 1)])
def test_kill_9_in_the_middle_of_a_save_leaves_the_last_good_checkpoint(kind, rank, model_folder, tmp_path, uninterrupted):
    root = tmp_path / "run"
    changes = {**EAGER, "checkpoint__save": str(root), "checkpoint__load": str(root)}
    changes |= {"checkpoint__async_save": kind == "async"}
    seed = time.time_ns()
    print("seed", seed)
    drawn = random.Random(seed)
    for number, killed in enumerate([(0, 1), (rank,)]):
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
    output = (tmp_path / "log").read_text()
    for path in left:
        assert f"note: `{path}` is left of a save that was interrupted; it can be removed" in output
    assert f"resumed {good}: step {int(good.name[5:])}, {small.BATCH * int(good.name[5:])} samples consumed" in output
    for whole, resumed in zip(uninterrupted, answers, strict=True):
        assert witness.differences(whole.left, resumed.left) == []


_CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


def _train_and_look(folder, changes, root, kept):
    """Train, and keep a copy of `root` as it is before each change that this process makes there."""
    numbers = itertools.count()
    looking = [True]

    def look(event, arguments):
        if not looking[0] or event not in _CHANGES or not str(arguments[0]).startswith(root):
            return
        if event == "open" and isinstance(arguments[1], str) and "r" in arguments[1]:
            return
        looking[0] = False
        shutil.copytree(root, Path(kept) / f"{next(numbers):04}-{event}")
        looking[0] = True

    sys.addaudithook(look)
    witness.train(folder, changes)
    looking[0] = False


def test_at_no_moment_of_a_save_is_there_no_good_checkpoint(ranks, model_folder, tmp_path):
    """Also where it replaces one of the same step, and where older ones are removed after it."""
    root, kept = tmp_path / "run", tmp_path / "kept"
    changes = {"checkpoint__save": str(root), "checkpoint__load": str(root), "train__train_iters": 6}
    saving = {**changes, "checkpoint__save_interval": 1, "train__exit_interval": 3}
    ranks.run(witness.train, 1, str(model_folder()), saving)
    iterations.put(root / iterations.TRACKER, b"2")  # as if the user wanted to go on from there
    before = {name: tree(root / name) for name in ("iter_0000002", "iter_0000003")}
    ranks.run(_train_and_look, 1, str(model_folder()), {**saving, "checkpoint__keep_last": 1}, str(root), str(kept))
    after = {"iter_0000003": tree(root / "iter_0000003")}
    assert after["iter_0000003"] != before["iter_0000003"]  # its settings are others
    assert not (root / "iter_0000002").exists()
    moments = sorted(kept.iterdir())
    assert len(moments) > 20
    for moment in moments:
        good = _good(moment)
        assert tree(good) in (before[good.name], after.get(good.name))
    assert {_good(moment).name for moment in moments} == {"iter_0000002", "iter_0000003"}


def test_keep_last_removes_only_this_trainers_own_older_checkpoints(ranks, model_folder, tmp_path):
    from converter import hf_to_mcore

    root = tmp_path / "run"
    changes = {"checkpoint__save": str(root), "checkpoint__load": str(root), "checkpoint__save_interval": 2}
    changes |= {"checkpoint__keep_last": 2, "train__train_iters": 6}
    ranks.run(witness.train, 1, str(model_folder()), {**changes, "train__exit_interval": 2})
    hf_to_mcore(model_folder(), tmp_path / "converted", tp=1, pp=1)
    (tmp_path / "converted" / "iter_0000000").rename(root / "iter_0000000")
    (root / "iter_0000009.partial").mkdir()
    (root / "iter_0000009.partial" / iterations.OURS).touch()
    (root / "iter_0000001").mkdir()
    (root / "iter_0000001" / "notes.txt").touch()
    ranks.run(witness.train, 1, str(model_folder()), changes)
    folders = {path.name for path in root.iterdir() if path.is_dir()}
    assert folders == {"iter_0000000", "iter_0000001", "iter_0000009.partial", "iter_0000004", "iter_0000006"}
    assert iterations.latest(str(root)).name == "iter_0000006"


@pytest.mark.parametrize("kind", ["sync", "async", "folder"])
def test_a_save_that_the_disk_refuses_is_told_once_and_the_last_good_checkpoint_stays(kind, ranks, model_folder, tmp_path):
    root = tmp_path / "run"
    changes = {"checkpoint__save": str(root), "checkpoint__load": str(root), "train__exit_interval": 1}
    ranks.run(witness.train, 2, str(model_folder()), changes)
    good = tree(_good(root))
    if kind == "folder":
        (root / "iter_0000002.partial").touch()
    changes |= {"train__exit_interval": 2, "checkpoint__async_save": kind == "async"}
    reports = ranks.run(_without_room, 2, str(model_folder()), changes, 65536 if kind != "folder" else -1)
    assert len({text for text, _ in reports}) == 1
    assert sorted(silent for _, silent in reports) == [False, True]
    text = reports[0][0]
    way_out = "let this user write there" if kind == "folder" else "make room"
    why = "File exists (" if kind == "folder" else "rank 0: `RuntimeError` in `megatron/"
    assert text.startswith(f"saving `{root}/iter_0000002.partial` failed: {why}"), text
    assert f"GB free); the last good checkpoint is `{root}/iter_0000001`\n\nhint: {way_out}" in text
    assert tree(_good(root)) == good


def _without_room(folder, changes, most):
    """What a rank is told where no file may have more than `most` bytes: as on a full disk, a write fails half-way."""
    import resource

    from formats.errors import UserError

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    try:
        witness.train(folder, changes)
    except UserError as error:
        return str(error), error.told
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_byte_that_changed_is_found_where_integrity_is_verified(ranks, model_folder, tmp_path):
    from formats.errors import UserError

    changes = {"checkpoint__save": str(tmp_path), "checkpoint__load": str(tmp_path), "checkpoint__verify_integrity": True}
    ranks.run(witness.train, 1, str(model_folder()), {**changes, "train__exit_interval": 1})
    data = tmp_path / "iter_0000001" / "__0_0.distcp"
    written = bytearray(data.read_bytes())
    written[len(written) // 2] ^= 1
    data.write_bytes(written)
    with pytest.raises(UserError, match=r"a file of it is damaged or cannot be read .*\n\nhint: `mbconvert inspect --check "):
        ranks.run(witness.train, 1, str(model_folder()), changes)


def test_a_clock_saves_and_ends_runs(ranks, model_folder, tmp_path):
    changes = {"checkpoint__save": str(tmp_path / "one"), "checkpoint__save_interval_in_mins": 1e-9, "checkpoint__keep_last": 9}
    ranks.run(witness.train, 2, str(model_folder()), {**changes, "train__train_iters": 5})
    assert len(list((tmp_path / "one").glob("iter_*"))) == 5
    changes["checkpoint__save"] = str(tmp_path / "other")
    (seen, _) = ranks.run(witness.train, 2, str(model_folder()), {**changes, "train__exit_duration_in_mins": 1e-9})
    assert len(seen.losses) == 1


@dataclass
class _Slow(small.FixedTokens):
    """Takes longer to build than the run may take."""

    def build(self, *arguments):
        time.sleep(1.5)
        return super().build(*arguments)


def _two_slow_starts(folder):
    from trainer import clock

    began = time.time() - psutil.Process().create_time()
    age = clock.process_age()
    slow = {"dataset": _Slow(384), "train__exit_duration_in_mins": 1 / 60}
    return (began, age), [len(witness.train(folder, slow).losses) for _ in range(2)]


def test_the_time_that_a_run_may_take_includes_its_start(ranks, model_folder):
    (((began, age), steps),) = ranks.run(_two_slow_starts, 1, str(model_folder()))
    assert steps == [1, 1]
    assert age == pytest.approx(began, abs=2)  # psutil knows when the machine started to a second
