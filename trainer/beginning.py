"""Where a run's weights come from, and where its checkpoints go. Knows folders and settings, and no step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from converter.adapters.description import Base
from formats.errors import UserError
from formats.torch_dist import TRACKER
from trainer.checkpoints import adapters, checkpoint, iterations, live
from trainer.config import CheckpointConfig, FinetuningDatasetConfig, RunConfig
from trainer.peft.attach import attach
from trainer.run import say


def first_weights(chunks: Sequence[Any], config: RunConfig, resumed: Path | None) -> None:
    """Weights from where the settings say; random ones only where they name none, and told. A resumed run that trains all
    parameters gets them from its checkpoint, later."""
    told = config.checkpoint
    for path in iterations.leftovers(told.save):
        say(f"note: `{path}` is left of a save that was interrupted; it can be removed")
    source = adapters.base_of(config, resumed)
    _check_place(told, resumed)
    if resumed is None:
        _check_start(told)
    else:
        for text in live.settings_changed(chunks, resumed):
            say(f"note: {text}")
    if resumed is not None and config.peft is None:
        return
    if source:
        say(str(live.load(chunks, source, note=lambda text: say(f"note: {text}"))))
        return
    if isinstance(config.dataset, FinetuningDatasetConfig) and not told.random_weights:
        raise UserError(
            "fine-tuning needs a model to start from, and `checkpoint.pretrained_checkpoint` is not set",
            hint="name a checkpoint or a Hugging Face directory; `checkpoint.random_weights=true` if random ones are meant",
        )
    say("initializing weights at random (no `checkpoint.load`, no `checkpoint.pretrained_checkpoint`)")


def _check_start(told: CheckpointConfig) -> None:
    if told.load and not (told.save and _same(told.load, told.save)):
        raise UserError(
            f"`checkpoint.load` is `{told.load}`, which has no checkpoint to resume from",
            hint="to start from weights alone use `checkpoint.pretrained_checkpoint`; a first start needs no `load`",
        )


def _check_place(told: CheckpointConfig, resumed: Path | None) -> None:
    """Raise UserError if checkpoints that this run does not go on from are where it saves: it would replace those of the same
    iterations, move the tracker, and `checkpoint.keep_last` would remove the others."""
    if told.save is None or (resumed and _same(resumed.parent, told.save)):
        return
    there = [*(path.name for path in iterations.whole(told.save)), *([TRACKER] if (Path(told.save) / TRACKER).exists() else [])]
    if there:
        begins = f"goes on from `{resumed}`" if resumed else "starts anew"
        raise UserError(
            f"`checkpoint.save` is `{told.save}`, which holds `{there[0]}` of another run, and this run {begins}: "
            "it would replace what is there",
            hint=f"save to another folder, or go on from there: `checkpoint.load={told.save}`",
        )


def what_is_trained(chunks: Sequence[Any], config: RunConfig, resumed: Path | None) -> Base | None:
    """Freeze the model and attach what `peft` trains beside it; answers which model that is. None where all is trained."""
    told = config.checkpoint.pretrained_adapter
    if config.peft is None:
        if told:
            raise UserError(
                f"`checkpoint.pretrained_adapter` is `{told}`, and `peft` is `none`",
                hint="set `peft`, or merge the adapter into its base with `mbconvert merge`",
            )
        return None
    base = adapters.identify(adapters.base_of(config, resumed), config, resumed)
    say(str(attach(chunks, config.peft, seed=config.rng.seed)))
    if resumed:
        adapters.check_same(chunks, resumed)
    elif told:
        say(adapters.load(chunks, told, config, base))
    return base


def make_saver(config: RunConfig, travels: Callable[[Path], None], resumed: Path | None) -> checkpoint.Saver:
    """What it would save first may be there already: that of a run that was done."""
    saver = checkpoint.Saver(config, travels, say, last_good=resumed)
    if resumed and saver.root and _same(resumed.parent, saver.root):
        saver.saved_iteration = int(resumed.name.removeprefix("iter_"))
    return saver


def _same(one: str | Path, other: str | Path) -> bool:
    return Path(one).resolve() == Path(other).resolve()
