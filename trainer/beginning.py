"""Where a run's weights come from, and where its checkpoints go. Knows folders and settings, and no step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from formats.errors import UserError
from formats.torch_dist import TRACKER
from trainer.checkpoints import checkpoint, iterations, live
from trainer.config import RunConfig
from trainer.run import say


def first_weights(chunks: Sequence[Any], config: RunConfig, resumed: Path | None) -> None:
    """Weights from where the settings say; random ones only where they name none, and told."""
    told = config.checkpoint
    for path in iterations.leftovers(told.save):
        say(f"note: `{path}` is left of a save that was interrupted; it can be removed")
    if resumed:
        return
    if told.load and not (told.save and _same(told.load, told.save)):
        raise UserError(
            f"`checkpoint.load` is `{told.load}`, where there is no checkpoint to resume",
            hint="to start from weights alone use `checkpoint.pretrained_checkpoint`; a first start needs no `load`",
        )
    if told.save and (Path(told.save) / TRACKER).exists():
        say(f"note: `{told.save}` has checkpoints, and this run starts anew beside them; to resume set `checkpoint.load`")
    source = told.pretrained_checkpoint or getattr(config.model, "pretrained_from", None)
    if source:
        say(str(live.load(chunks, source, note=lambda text: say(f"note: {text}"))))
    else:
        say("weights are random: neither `checkpoint.load` nor `checkpoint.pretrained_checkpoint` names any")


def make_saver(config: RunConfig, travels: Callable[[Path], None], resumed: Path | None) -> checkpoint.Saver:
    """What it would save first may be there already: that of a run that was done."""
    saver = checkpoint.Saver(config, travels, say, last_good=resumed)
    if resumed and saver.root and _same(resumed.parent, saver.root):
        saver.saved_iteration = int(resumed.name.removeprefix("iter_"))
    return saver


def _same(one: str | Path, other: str | Path) -> bool:
    return Path(one).resolve() == Path(other).resolve()
