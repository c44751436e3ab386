"""Where a run's weights come from, and where its checkpoints go. Knows folders and settings, and no step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from converter.adapters.adapter import Base
from formats.errors import UserError
from trainer import parallel
from trainer.checkpoints import adapters, checkpoint, iterations, live, resuming
from trainer.config import FinetuningDatasetConfig, RunConfig
from trainer.peft.attach import attach
from trainer.state import say


def where_to_resume(config: RunConfig) -> Path | None:
    """Return the checkpoint that all ranks resume from, None for a fresh start: rank 0 decides (`resuming.find`).

    Raises UserError on all ranks where one of them does not see that checkpoint.
    """
    told = config.checkpoint
    resumed = parallel.from_first_rank(lambda: resuming.find(told))
    if resumed is None:
        return None
    unseen = parallel.where(not iterations.sees(resumed))
    if unseen:
        raise UserError(
            f"`{resumed}` is to be resumed, and {unseen} does not see it", hint="all hosts should share the folder of checkpoints"
        )
    if resuming.supersedes(resumed, told):
        say(f"note: `{resumed}` went on from `checkpoint.load`, `{told.load}`, and is resumed in its place")
    return resumed


def first_weights(chunks: Sequence[Any], config: RunConfig, resumed: Path | None) -> None:
    """Weights from where the settings say; random ones only where they name none, and told. A resumed run that trains all
    parameters gets them from its checkpoint, later."""
    told = config.checkpoint
    for path in iterations.leftovers(told.save):
        say(f"note: `{path}` is left of a save that was interrupted; it can be removed")
    source = adapters.base_of(config, resumed)
    for text in live.settings_changed(chunks, resumed) if resumed else ():
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
    if resumed and saver.root and resuming.same(resumed.parent, saver.root):
        saver.saved_iteration = int(resumed.name.removeprefix("iter_"))
    return saver
