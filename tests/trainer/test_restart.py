"""A run that is started again, or in a folder that another run has used: nothing that was saved is lost, and all ranks agree."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from formats.errors import UserError
from tests import models
from tests.trainer import small, witness
from trainer.checkpoints import iterations, resume_point
from trainer.config import CheckpointConfig

SHORT = {"scheduler__lr_warmup_iters": 0, "checkpoint__save_interval": 1}


def _told(folder, changes):
    """The error of a run that cannot start, as this rank sees it; None of one that was done."""
    try:
        witness.train(folder, changes)
    except UserError as error:
        return str(error)
    return None


def _each_told(folder, runs):
    return [_told(folder, changes) for changes in runs]


def _iterations(root):
    return sorted(path.name for path in root.glob("iter_*"))


def _steps(root):
    return {number: models.tree(root / f"iter_{number:07}") for number in range(1, 9) if (root / f"iter_{number:07}").exists()}


@pytest.fixture(scope="module")
def used(ranks, model_folder, tmp_path_factory):
    """A folder in which a run has saved twice. Not to be written into."""
    root = tmp_path_factory.mktemp("used") / "r"
    ranks.run(witness.train, 1, str(model_folder()), {**SHORT, "checkpoint__save": str(root), "train__train_iters": 2})
    return root


@pytest.fixture
def copy(used, tmp_path):
    """The same run somewhere else."""
    return shutil.copytree(used, tmp_path / "r")


def _another_run(root, other):
    shutil.copytree(root, other)
    for path in other.glob("iter_*/mbtrain.yaml"):
        path.write_text(path.read_text().replace(f"# run {iterations.run_of(path.parent)}\n", "# run 0123456789abcdef\n"))
    return other


def test_what_another_run_has_saved_is_not_replaced_unless_that_is_said(ranks, model_folder, copy, tmp_path):
    """Where `save` is a folder of another run, of the weights to start from, or of a copy of them."""
    other, before = _another_run(copy, tmp_path / "other"), models.tree(copy)
    saving = {**SHORT, "checkpoint__save": str(copy), "train__train_iters": 1}
    named = {f"checkpoint__pretrained_{what}": f"{copy}/iter_0000002" for what in ("checkpoint", "adapter")}
    others = [{"rng__seed": 7}, {"checkpoint__load": str(other)}, *({name: value} for name, value in named.items())]
    (messages,) = ranks.run(_each_told, 1, str(model_folder()), [{**saving, **more} for more in others])
    assert messages[:2] == [
        f"`checkpoint.save` is `{copy}`, which holds `iter_0000001` of another run, and this one {begins}: it would overwrite "
        f"that\n\nhint: resume that run with `checkpoint.load={copy}`, save to another folder, or set "
        "`checkpoint.overwrite=true` to replace it"
        for begins in ("starts anew", f"resumes from `{other}/iter_0000002`")
    ]
    assert messages[2:] == [
        f"`checkpoint.save` is `{copy}`, and `checkpoint.{name.partition('__')[2]}` is `{value}`: what is saved would replace it"
        f"\n\nhint: save to another folder; or, to resume the run in that one, set `checkpoint.load={copy}` in place of "
        f"`checkpoint.{name.partition('__')[2]}`"
        for name, value in named.items()
    ]
    assert models.tree(copy) == before


SPELLINGS = {
    "the same": ("base", "base"),
    "relative": ("base", "{here}/base"),
    "with dots": ("base/iter_0000002/..", "{here}/base"),
    "one of its checkpoints": ("base", "{here}/base/iter_0000002"),
    "a file of it": ("base", "base/iter_0000001/mbtrain.yaml"),
    "saved to a link": ("link", "base"),
    "read from a link": ("base", "link"),
    "read from a link to a checkpoint": ("base", "newest"),
    "a link in a link": ("link", "{here}/newest"),
}


@pytest.mark.parametrize("name", ["pretrained_checkpoint", "pretrained_adapter"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_weights_that_a_run_starts_from_are_never_where_it_saves(spelling, name, copy, tmp_path, monkeypatch):
    """However the two are spelled, and also where checkpoints may be overwritten or are resumed."""
    copy.rename(tmp_path / "base")
    (tmp_path / "link").symlink_to("base")
    (tmp_path / "newest").symlink_to("link/iter_0000002")
    monkeypatch.chdir(tmp_path)
    save, source = (text.format(here=tmp_path) for text in SPELLINGS[spelling])
    for more in ({}, {"overwrite": True}, {"load": save}):
        with pytest.raises(UserError) as refused:
            resume_point.find(CheckpointConfig(save=save, **{name: source}, **more))
        assert str(refused.value) == (
            f"`checkpoint.save` is `{save}`, and `checkpoint.{name}` is `{source}`: what is saved would replace it\n\n"
            f"hint: save to another folder; or, to resume the run in that one, set `checkpoint.load={save}` in place of "
            f"`checkpoint.{name}`"
        )


@pytest.mark.parametrize("inside", ["", "/run", "/deep/run"])
def test_nothing_is_saved_inside_a_checkpoint(inside, copy):
    """It would be removed with the checkpoint, and one in the folder itself would be read in place of it."""
    checkpoint = copy / "iter_0000002"
    save = f"{checkpoint}{inside}"
    with pytest.raises(UserError) as refused:
        resume_point.find(CheckpointConfig(save=save, pretrained_checkpoint=str(copy)))
    assert str(refused.value) == (
        f"`checkpoint.save` is `{save}`, which is inside the checkpoint `{checkpoint}`\n\nhint: save to another folder"
    )


def test_a_run_may_save_beside_the_weights_that_it_starts_from_above_and_below_them(ranks, model_folder, copy, tmp_path):
    """In a folder of the model's, or in one that holds the model's folder: no file of the model changes."""
    model = shutil.copytree(model_folder(), tmp_path / "models" / "m")
    before = models.tree(model)
    changes = {**SHORT, "train__train_iters": 2, "checkpoint__keep_last": 1, "checkpoint__pretrained_checkpoint": str(model)}
    for save in (tmp_path / "models", model / "run"):
        ranks.run(witness.train, 1, str(model), {**changes, "checkpoint__save": str(save)})
        assert _iterations(save) == ["iter_0000002"]
    assert {name: value for name, value in models.tree(model).items() if not name.startswith("run/")} == before
    beside = CheckpointConfig(save=str(copy / "run"), pretrained_checkpoint=str(copy))
    assert resume_point.find(beside) is None


def test_overwriting_replaces_the_same_steps_and_prunes_none_of_the_other_run(ranks, model_folder, copy, used):
    changes = {**SHORT, "checkpoint__save": str(copy), "checkpoint__overwrite": True, "checkpoint__keep_last": 1, "rng__seed": 7}
    (copy / "iter_0000002").rename(copy / "iter_0000001.kept")
    shutil.move(copy / "iter_0000001", copy / "iter_0000000")
    shutil.move(copy / "iter_0000001.kept", copy / "iter_0000002")
    ranks.run(witness.train, 1, str(model_folder()), {**changes, "train__train_iters": 3})
    assert _iterations(copy) == ["iter_0000000", "iter_0000003"]  # of the other run, and the newest of this one
    assert models.tree(copy / "iter_0000000") == models.tree(used / "iter_0000001")
    assert (copy / iterations.TRACKER).read_text() == "3"
    lines = (used / "metrics.jsonl").read_text()
    assert lines == (copy / "metrics-1.jsonl").read_text()


def test_a_run_killed_between_a_checkpoints_rename_and_its_tracker_goes_on(ranks, model_folder, copy):
    (copy / iterations.TRACKER).unlink()
    changes = {**SHORT, "checkpoint__save": str(copy), "checkpoint__load": str(copy)}
    (seen,) = ranks.run(witness.train, 1, str(model_folder()), {**changes, "train__train_iters": 3})
    assert len(seen.losses) == 1


def test_a_run_that_loads_from_one_folder_and_saves_to_another_goes_on_in_the_second(ranks, model_folder, used, tmp_path):
    """The same command, started again: as a job that is put back into the queue is."""
    changes = {**SHORT, "checkpoint__load": str(used), "checkpoint__save": str(tmp_path / "b"), "train__train_iters": 6}
    before = models.tree(used)
    (first,) = ranks.run(witness.train, 1, str(model_folder()), {**changes, "train__exit_interval": 4})
    kept = _steps(tmp_path / "b")
    (second,) = ranks.run(witness.train, 1, str(model_folder()), changes)
    assert (len(first.losses), len(second.losses)) == (2, 2)
    assert {number: _steps(tmp_path / "b")[number] for number in kept} == kept
    assert _iterations(tmp_path / "b") == [f"iter_000000{number}" for number in (3, 4, 5, 6)]
    assert models.tree(used) == before


def test_checkpoints_that_name_no_run_are_resumed_and_never_taken_for_one_run(copy, tmp_path):
    """As earlier versions wrote them."""
    for path in copy.glob("iter_*/mbtrain.yaml"):
        path.write_text(path.read_text().partition("\n")[2])
    other = shutil.copytree(copy, tmp_path / "other")
    assert resume_point.find(CheckpointConfig(load=str(copy), save=str(copy))) == copy / "iter_0000002"
    with pytest.raises(UserError, match="of another run"):
        resume_point.find(CheckpointConfig(load=str(other), save=str(copy)))


def _where(folders, blind):
    """What this rank resumes; rank 1 sees nothing of it where it is `blind`, since it looks elsewhere."""
    from trainer import parallel, setup

    config = small.settings(Path(folders["model"]), checkpoint__load="r", checkpoint__save="r")
    os.chdir(folders["elsewhere"] if blind and os.environ["RANK"] == "1" else folders["here"])
    from trainer.settings.resolve import resolve

    with parallel.session(resolve(config, world_size=2, device="cpu").config, "cpu"):
        try:
            return str(setup.find_checkpoint(config.checkpoint))
        except UserError as error:
            return str(error)


def test_ranks_that_do_not_see_the_checkpoint_do_not_start_anew_by_themselves(ranks, model_folder, copy, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    folders = {"model": str(model_folder()), "here": str(copy.parent), "elsewhere": str(tmp_path / "elsewhere")}
    assert ranks.run(_where, 2, folders, False) == ["r/iter_0000002"] * 2
    first, second = ranks.run(_where, 2, folders, True)
    assert first == second
    assert first.startswith("`r/iter_0000002` is to be resumed, and rank 1 on `")
    assert first.endswith("` does not see it\n\nhint: all hosts should share the folder of checkpoints")


def _apart(folder, elsewhere, when):
    """A run into `run` of the working directory, which is another one on rank 1 from a moment on."""
    changes = {"checkpoint__save": "run", "train__exit_interval": 1}

    def leave():
        os.chdir(elsewhere[os.environ["RANK"] == "1"])

    class Leaving(witness.Witness):
        def on_start(self, run):
            leave()

    from trainer.loop import pretrain

    os.chdir(elsewhere[0])
    if when == "before":
        leave()
    seen = Leaving()
    try:
        pretrain(small.settings(Path(folder), **changes), callbacks=[seen])
    except UserError as error:
        return str(error), len(seen.losses)
    return "", len(seen.losses)


@pytest.mark.parametrize("when", ["before", "after"])
def test_folders_that_hosts_do_not_share_are_an_error_and_never_half_a_checkpoint(when, ranks, model_folder, tmp_path):
    hosts = [tmp_path / "one", tmp_path / "other"]
    for host in hosts:
        (host / "run").mkdir(parents=True)
    (first, steps), (second, _) = ranks.run(_apart, 2, str(model_folder()), [str(host) for host in hosts], when)
    assert first == second
    assert steps == (0 if when == "before" else 1)
    what = (
        "hosts do not share `checkpoint.save`, `run`: rank 1 on `"
        if when == "before"
        else "`run/iter_0000001.partial` lacks `__1_"
    )
    assert first.startswith(what), first
    assert first.endswith("\n\nhint: name a folder of a file system that all hosts share, by its absolute path")
    assert [path.name for host in hosts for path in (host / "run").glob("iter_*") if path.suffix != iterations.PARTIAL] == []
    assert not any((host / "run" / iterations.TRACKER).exists() for host in hosts)
    assert [path for host in hosts for path in host.rglob(".shared-*")] == []


def _printed(folder, changes):
    """What the loop printed in a run of two epochs of ten examples, which are five steps; `train_iters` is not used."""
    from tests.trainer.chat.packed import Given
    from trainer.loop import pretrain

    lines: list[str] = []
    dataset = Given(count=10, packed=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.loop.say", lines.append)
        pretrain(small.settings(Path(folder), dataset=dataset, train__num_epochs=2, train__train_iters=1, **SHORT, **changes))
    return lines


def test_a_complete_run_of_epochs_names_the_steps_that_they_came_to(ranks, model_folder, tmp_path):
    changes = {"checkpoint__save": str(tmp_path), "checkpoint__load": str(tmp_path), "validation__eval_iters": 0}
    assert ranks.run(_printed, 1, str(model_folder("gqa")), changes) == [[]]
    assert ranks.run(_printed, 1, str(model_folder("gqa")), changes) == [["training is already complete (step 5 of 5)"]]
    assert _iterations(tmp_path) == [f"iter_{number:07}" for number in range(1, 6)]
