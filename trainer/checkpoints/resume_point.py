"""Find the checkpoint that a run resumes from, and check that it may write to `checkpoint.save`. `resume` loads it."""

from __future__ import annotations

from pathlib import Path

from formats.errors import UserError
from formats.iterations import TRACKER
from trainer.checkpoints import iterations
from trainer.config import CheckpointConfig


def find(config: CheckpointConfig) -> Path | None:
    """Return the checkpoint to resume from, None for a fresh start.

    It is the newest in `load`; or the newest in another folder `save`, if a run that was resumed from `load` has saved there
    since: the same command can be started again and again. Raises UserError if the run would overwrite checkpoints in `save`, or
    if `load` holds none to resume.
    """
    resumed = iterations.latest(config.load)
    if resumed and config.save and not config.overwrite and _same_run(resumed, further := iterations.latest(config.save)):
        resumed = further
    _check_sources(config)
    _check_save(config, resumed)
    _check_load(config, resumed)
    return resumed


def supersedes(resumed: Path | None, config: CheckpointConfig) -> bool:
    """Return whether `resumed` is in `save`, though `load` is another folder."""
    return bool(resumed and config.load and not same(resumed.parent, config.load))


def same(first: str | Path, second: str | Path) -> bool:
    """Return whether both paths are one folder."""
    return Path(first).resolve() == Path(second).resolve()


def _same_run(first: Path, second: Path | None) -> bool:
    """Return whether one run wrote both. Checkpoints of earlier versions name no run."""
    return second is not None and iterations.run_of(first) == iterations.run_of(second) != ""


def _check_load(config: CheckpointConfig, resumed: Path | None) -> None:
    if resumed is None and config.load and not (config.save and same(config.load, config.save)):
        raise UserError(
            f"`checkpoint.load` is `{config.load}`, which has no checkpoint to resume from",
            hint="to start from weights alone use `checkpoint.pretrained_checkpoint`; a first start needs no `load`",
        )


def _check_sources(config: CheckpointConfig) -> None:
    """Raise UserError if the weights that a run starts from are where it saves, as a whole folder or as one of its iterations."""
    for name in ("pretrained_checkpoint", "pretrained_adapter"):
        source = getattr(config, name)
        if source and config.save and _is_of(Path(source), Path(config.save)):
            raise UserError(
                f"`checkpoint.save` is `{config.save}`, and `checkpoint.{name}` is `{source}`: what is saved would replace it",
                hint=f"save to another folder; or, to resume the run in that one, set `checkpoint.load={config.save}` in place "
                f"of `checkpoint.{name}`",
            )


def _is_of(source: Path, root: Path) -> bool:
    """Return whether `source` is the folder of checkpoints `root`, or in one of its iterations."""
    source, root = source.resolve(), root.resolve()
    return source == root or any(path.parent == root and iterations.is_name(path.name) for path in (source, *source.parents))


def _check_save(config: CheckpointConfig, resumed: Path | None) -> None:
    """Raise UserError if `save` holds checkpoints of another run: this one would replace those of the same iterations, and the
    tracker."""
    if config.save is None:
        return
    _check_outside(Path(config.save))
    if config.overwrite or (resumed and same(resumed.parent, config.save)):
        return
    tracker = Path(config.save) / TRACKER
    existing = [*(path.name for path in iterations.complete(config.save)), *([TRACKER] if tracker.exists() else [])]
    if existing:
        begins = f"resumes from `{resumed}`" if resumed else "starts anew"
        raise UserError(
            f"`checkpoint.save` is `{config.save}`, which holds `{existing[0]}` of another run, and this one {begins}: "
            "it would overwrite that",
            hint=f"resume that run with `checkpoint.load={config.save}`, save to another folder, or set "
            "`checkpoint.overwrite=true` to replace it",
        )


def _check_outside(root: Path) -> None:
    """Raise UserError if `root` is a checkpoint or inside one: what is saved would be removed with it, or read in place of it."""
    whole = root.resolve()
    checkpoint = next((path for path in (whole, *whole.parents) if iterations.is_name(path.name) and iterations.sees(path)), None)
    if checkpoint:
        raise UserError(
            f"`checkpoint.save` is `{root}`, which is inside the checkpoint `{checkpoint}`", hint="save to another folder"
        )
