"""From a recipe and a place to run it to a job: an sbatch script, or a NeMo-Run experiment.

`Job` is what both have in common. Launching knows the command line of `mbtrain pretrain` and nothing of training.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from formats.errors import UserError

if TYPE_CHECKING:
    from trainer.config import CheckpointConfig

STOP_BEFORE = 300
"""Seconds between the signal to stop and the end: a step, and a checkpoint of a large model to a shared disk."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is run, on how many machines, for how long. UserError for what a batch system could not read."""

    program: tuple[str, ...]
    """Arguments of `python` on every rank: see `pretraining`."""

    name: str
    nodes: int = 1
    gpus_per_node: int = 8
    """Also the processes per node."""

    time: str = "04:00:00"
    partition: str | None = None
    account: str | None = None
    container: str | None = None
    mounts: str | None = None
    """What the container sees of the disks: `/data:/data,/home/me`."""

    env: Mapping[str, str] = field(default_factory=dict)
    stop_before: int = STOP_BEFORE

    def __post_init__(self) -> None:
        for name in ("name", "time", "partition", "account", "container", "mounts"):
            value = getattr(self, name)
            if value is not None and not re.fullmatch(r"[\w.,:;/@+=%#-]+", value):
                raise UserError(
                    f"`{value}` cannot be a job's {name}", hint="use letters, digits and . , : ; / @ + = % # - _, without spaces"
                )
        for name in self.env:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise UserError(f"`{name}` is not a name of an environment variable", hint="--env NAME=VALUE")


def resumable(checkpoint: CheckpointConfig, overrides: tuple[str, ...]) -> tuple[str, ...]:
    """Return the settings of a job that is put back into the queue: started again with them, it goes on from its last checkpoint.

    `told` is what they come to. Raises UserError where nothing would be saved, or each start would begin anew.
    """
    if checkpoint.save is None:
        raise UserError(
            "`checkpoint.save` is not set: when its time is up, the job would have saved nothing",
            hint="name a folder that all nodes share: `checkpoint.save=DIRECTORY`",
        )
    if checkpoint.overwrite:
        raise UserError(
            "`checkpoint.overwrite` is `True`: a job that is put back into the queue would begin anew each time",
            hint="leave it out, and save to a new folder",
        )
    if checkpoint.load:
        return overrides
    words = [word.partition("=")[2] for word in overrides if _SAVE.match(word)]
    return *overrides, f"checkpoint.load={words[-1] if words else _quoted(checkpoint.save)}"


_SAVE = re.compile(r"\+{0,2}checkpoint\.save=")


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "\\'") + "'"


def pretrain_program(recipe: str, overrides: tuple[str, ...]) -> tuple[str, ...]:
    """The program that trains `recipe` with `key=value` settings."""
    return ("-m", "trainer", "pretrain", recipe, *overrides)
