"""Which checkpoint a run goes on from, and whether it may save where it is told to. Reads folders; knows no tensors, no ranks."""

from __future__ import annotations

from pathlib import Path

from formats.errors import UserError
from formats.iterations import TRACKER
from trainer.checkpoints import iterations
from trainer.config import CheckpointConfig


def find(told: CheckpointConfig) -> Path | None:
    """Return the checkpoint to resume from, None for a fresh start.

    It is the newest in `load`, or, where a run that was resumed from `load` has saved in another folder `save` since, the newest
    there: the same command can be started again and again. Raises UserError where the run would lose what is in `save`, or `load`
    holds nothing to resume.
    """
    resumed = iterations.latest(told.load)
    if resumed and told.save and not told.overwrite and _same_run(resumed, further := iterations.latest(told.save)):
        resumed = further
    _check_sources(told)
    _check_place(told, resumed)
    _check_load(told, resumed)
    return resumed


def supersedes(resumed: Path | None, told: CheckpointConfig) -> bool:
    """Is `resumed` in `save`, though `load` is another folder?"""
    return bool(resumed and told.load and not same(resumed.parent, told.load))


def same(one: str | Path, other: str | Path) -> bool:
    """Are these two names of one folder?"""
    return Path(one).resolve() == Path(other).resolve()


def _same_run(one: Path, other: Path | None) -> bool:
    """Were both written by one run? Checkpoints that name no run are of none."""
    return other is not None and iterations.run_of(one) == iterations.run_of(other) != ""


def _check_load(told: CheckpointConfig, resumed: Path | None) -> None:
    if resumed is None and told.load and not (told.save and same(told.load, told.save)):
        raise UserError(
            f"`checkpoint.load` is `{told.load}`, which has no checkpoint to resume from",
            hint="to start from weights alone use `checkpoint.pretrained_checkpoint`; a first start needs no `load`",
        )


def _check_sources(told: CheckpointConfig) -> None:
    """Raise UserError if the weights that a run starts from are where it saves, as a whole folder or as one of its iterations."""
    for name in ("pretrained_checkpoint", "pretrained_adapter"):
        source = getattr(told, name)
        if source and told.save and _is_of(Path(source), Path(told.save)):
            raise UserError(
                f"`checkpoint.save` is `{told.save}`, and `checkpoint.{name}` is `{source}`: what is saved would replace it",
                hint=f"save to another folder; or, to go on with the run in that one, set `checkpoint.load={told.save}` in place "
                f"of `checkpoint.{name}`",
            )


def _is_of(source: Path, root: Path) -> bool:
    """Is it a folder of checkpoints, or in one of its iterations?"""
    source, root = source.resolve(), root.resolve()
    return source == root or any(one.parent == root and iterations.is_name(one.name) for one in (source, *source.parents))


def _check_place(told: CheckpointConfig, resumed: Path | None) -> None:
    """Raise UserError if checkpoints that this run does not go on from are where it saves: it would replace those of the same
    iterations and move the tracker."""
    if told.save is None or told.overwrite or (resumed and same(resumed.parent, told.save)):
        return
    there = [*(path.name for path in iterations.whole(told.save)), *([TRACKER] if (Path(told.save) / TRACKER).exists() else [])]
    if there:
        begins = f"goes on from `{resumed}`" if resumed else "starts anew"
        raise UserError(
            f"`checkpoint.save` is `{told.save}`, which holds `{there[0]}` of another run, and this one {begins}: "
            "it would replace what is there",
            hint=f"go on from there with `checkpoint.load={told.save}`, save to another folder, or set "
            "`checkpoint.overwrite=true` to replace it",
        )
