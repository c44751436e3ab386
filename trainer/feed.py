"""A run's datasets, and this rank's microbatches of them. Knows how long they must be, and nothing of what they hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from megatron.core import parallel_state

from formats.errors import UserError
from trainer import data, device, model
from trainer.checkpoints import checkpoint
from trainer.checkpoints.contents import tokenizer_of_run
from trainer.config import FinetuningDatasetConfig, RunConfig
from trainer.data import once
from trainer.data.chat import sets
from trainer.data.loader import batches
from trainer.run import Run, say
from trainer.tokenizers import Tokenizer


def check(config: RunConfig) -> None:
    """UserError where examples to learn from are not there: known before a model is loaded. To be called on every rank. Whoever
    builds datasets of their own knows what they need."""
    if getattr(type(config.dataset), "build", None) is FinetuningDatasetConfig.build:
        sets.check(config.dataset)


def datasets(config: RunConfig, progress: checkpoint.Progress) -> Sequence[Any]:
    """Long enough for the steps to come, and for those that were made with another batch size."""
    train, iterations = config.train, config.validation.eval_iters
    to_come = max(train.train_iters - progress.iteration, 0) * train.global_batch_size
    evaluated = (1 if iterations is None else iterations) * train.global_batch_size
    made = _build(config, (progress.consumed_samples + to_come, evaluated, evaluated))
    for line in getattr(made[0], "summary", ()):
        say(line)
    epoch = getattr(made[0], "per_epoch", None)
    if epoch and progress.consumed_samples + to_come > epoch:
        say(f"{epoch} samples per epoch: the run has {(progress.consumed_samples + to_come) / epoch:.1f} epochs")
    held_out = (once.once(one, iterations=iterations, global_batch_size=train.global_batch_size) for one in made[1:])
    return made[0], *held_out


def _build(config: RunConfig, samples: tuple[int, int, int]) -> Sequence[Any]:
    return data.build(config.dataset, tokenizer=tokenizer_of_run(config), vocab_size=config.model.vocab_size, samples=samples)


def steps_of_epochs(config: RunConfig) -> int:
    """Optimizer steps in which the training data is gone through `train.num_epochs` times. The last one may go on into the next
    epoch. UserError where the dataset does not say how many samples that takes."""
    check(config)
    epochs, batch = config.train.num_epochs, config.train.global_batch_size
    until = getattr(_build(config, (batch, 0, 0))[0], "until", None)
    if until is None:
        raise UserError(
            f"`train.num_epochs` is `{epochs}`, and the dataset does not say how many samples an epoch has",
            hint="leave it out, and set `train.train_iters`",
        )
    return -(-until(epochs) // batch)


def evaluations(config: RunConfig, dataset: Any) -> int:
    """Global batches of one evaluation of held-out data."""
    if isinstance(dataset, once.Once):
        return len(dataset) // config.train.global_batch_size
    return config.validation.eval_iters or 0


def prompts(run: Run) -> tuple[Tokenizer, Sequence[str | list[int]]] | None:
    """What the model is asked at intervals: texts as it is to see them, or the beginnings of held-out examples, before what is
    learned of them. UserError where there is nothing to ask, or nothing to read the answer with."""
    told = run.config.validation
    if not told.sample_interval:
        return None
    tokenizer = tokenizer_of_run(run.config)
    setting = f"`validation.sample_interval` is `{told.sample_interval}`"
    if tokenizer is None:
        raise UserError(f"{setting}, and there is no tokenizer", hint="name a folder: `tokenizer.tokenizer_model=DIR`")
    beginnings = getattr(run.datasets[1], "beginnings", lambda _: [])
    asked = told.sample_prompts or beginnings(_ASKED)
    if not asked:
        raise UserError(f"{setting}, and there are no prompts", hint="give some: `validation.sample_prompts=[…]`")
    return tokenizer, asked


_ASKED = 2
"""Held-out examples that are begun where no prompts are given."""


def rows_between_stages(config: RunConfig) -> tuple[int, int]:
    """Rows and their length in what pipeline stages hand on: on a GPU, packed rows lie end to end (`trainer.loss`)."""
    rows, length = config.train.micro_batch_size, config.dataset.sequence_length
    return (1, rows * length) if data.is_packed(config.dataset) and device.current().type == "cuda" else (rows, length)


def iterators(run: Run, dataset: Any, *, consumed: int) -> list[Iterator[Any] | None]:
    """One iterator of microbatches per model chunk; None for chunks that see neither tokens nor labels, nor where packed rows
    are divided."""
    config = run.config
    packed = data.is_packed(config.dataset)
    return [
        batches(
            dataset,
            consumed=consumed,
            micro_batch_size=config.train.micro_batch_size,
            global_batch_size=config.train.global_batch_size,
            rank=parallel_state.get_data_parallel_rank(),
            size=parallel_state.get_data_parallel_world_size(),
            num_workers=getattr(config.dataset, "num_workers", 0),
            pin_memory=device.current().type == "cuda",
        )
        if packed or model.sees_data(chunk)
        else None
        for chunk in run.chunks
    ]
