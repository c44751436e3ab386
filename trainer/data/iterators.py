"""A run's datasets, and this rank's microbatches of them. Knows how long they must be, and nothing of what they hold."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

from megatron.core import parallel_state

from formats.errors import UserError
from trainer import data, device, model
from trainer.checkpoints import checkpoint
from trainer.checkpoints.contents import tokenizer_of_run
from trainer.config import FinetuningDatasetConfig, RunConfig, is_packed
from trainer.data import consistency, one_epoch
from trainer.data.chat import build
from trainer.data.loader import batches
from trainer.state import DataWait, Run, say
from trainer.tokenizers import Tokenizer


def check(config: RunConfig) -> None:
    """UserError where examples to learn from are not there: known before a model is loaded. To be called on every rank. Whoever
    builds datasets of their own knows what they need."""
    if isinstance(config.dataset, FinetuningDatasetConfig) and not hasattr(config.dataset, "build"):
        build.check(config.dataset)


def datasets(config: RunConfig, progress: checkpoint.Progress, *, tokenizer: Tokenizer | None) -> Sequence[Any]:
    """Long enough for the steps to come, and for those that were made with another batch size."""
    train, iterations = config.train, config.validation.eval_iters
    to_come = max(train.train_iters - progress.iteration, 0) * train.global_batch_size
    evaluated = (1 if iterations is None else iterations) * train.global_batch_size
    made = _build(config, (progress.consumed_samples + to_come, evaluated, evaluated), tokenizer)
    consistency.check_ranks(made, tokenizer)
    for line in getattr(made[0], "summary", ()):
        say(line)
    return made[0], *(_each_once(one, config) for one in made[1:])


def _each_once(held_out: Any, config: RunConfig) -> Any:
    """Of several sets, each."""
    if isinstance(held_out, dict):
        return {name: _each_once(one, config) for name, one in held_out.items()}
    return one_epoch.limit_to_one_epoch(
        held_out, iterations=config.validation.eval_iters, global_batch_size=config.train.global_batch_size
    )


def _build(config: RunConfig, samples: tuple[int, int, int], tokenizer: Tokenizer | None) -> Sequence[Any]:
    return data.build(config.dataset, tokenizer=tokenizer, vocab_size=config.model.vocab_size, samples=samples)


def steps_of_epochs(config: RunConfig) -> int:
    """Optimizer steps in which the training data is gone through `train.num_epochs` times. The last one may go on into the next
    epoch. UserError where the dataset does not say how many samples that takes."""
    check(config)
    epochs, batch = config.train.num_epochs, config.train.global_batch_size
    until = getattr(_build(config, (batch, 0, 0), tokenizer_of_run(config))[0], "until", None)
    if until is None:
        raise UserError(
            f"`train.num_epochs` is `{epochs}`, and the dataset does not say how many samples an epoch has",
            hint="leave it out, and set `train.train_iters`",
        )
    return -(-until(epochs) // batch)


def evaluations(config: RunConfig, dataset: Any) -> int:
    """Global batches of one evaluation of held-out data."""
    if isinstance(dataset, one_epoch.OneEpoch):
        return len(dataset) // config.train.global_batch_size
    return config.validation.eval_iters or 0


def prompts(run: Run, tokenizer: Tokenizer | None) -> tuple[Tokenizer, Sequence[str | list[int]]] | None:
    """What the model is asked at intervals: texts as it is to see them, or the beginnings of held-out examples, before what is
    learned of them. UserError where there is nothing to ask, or nothing to read the answer with."""
    told = run.config.validation
    if not told.sample_interval:
        return None
    setting = f"`validation.sample_interval` is `{told.sample_interval}`"
    if tokenizer is None:
        raise UserError(f"{setting}, and there is no tokenizer", hint="name a folder: `tokenizer.tokenizer_model=DIR`")
    first = next(iter(sets_of(run.datasets[1]).values()), None)
    beginnings = getattr(first, "beginnings", lambda _: [])
    asked = told.sample_prompts or beginnings(_ASKED)
    if not asked:
        raise UserError(f"{setting}, and there are no prompts", hint="give some: `validation.sample_prompts=[…]`")
    return tokenizer, asked


def sets_of(held_out: Any) -> Mapping[str, Any]:
    """Held-out data by name: nothing, one set without a name, or several."""
    return held_out if isinstance(held_out, dict) else {"": held_out} if held_out is not None else {}


_ASKED = 2
"""Held-out examples that are begun where no prompts are given."""


def rows_between_stages(config: RunConfig) -> tuple[int, int]:
    """Rows and their length in what pipeline stages hand on: on a GPU, packed rows lie end to end (`trainer.loss`)."""
    rows, length = config.train.micro_batch_size, config.dataset.sequence_length
    return (1, rows * length) if is_packed(config.dataset) and device.current().type == "cuda" else (rows, length)


def iterators(run: Run, dataset: Any, *, consumed: int) -> list[Iterator[Any] | None]:
    """One iterator of microbatches per model chunk; None for chunks that see neither tokens nor labels, nor where packed rows
    are divided."""
    config = run.config
    packed = is_packed(config.dataset)
    return [
        _timed(
            run.waited,
            batches(
                dataset,
                consumed=consumed,
                micro_batch_size=config.train.micro_batch_size,
                global_batch_size=config.train.global_batch_size,
                rank=parallel_state.get_data_parallel_rank(),
                size=parallel_state.get_data_parallel_world_size(),
                num_workers=getattr(config.dataset, "num_workers", 0),
                pin_memory=device.current().type == "cuda",
            ),
        )
        if packed or model.sees_data(chunk)
        else None
        for chunk in run.chunks
    ]


def _timed(waited: DataWait, found: Generator[Any]) -> Generator[Any]:
    """The same microbatches, with the time that each is waited for added up."""
    with closing(found):
        while True:
            began = time.perf_counter()
            batch = next(found, None)
            waited.seconds += time.perf_counter() - began
            if batch is None:
                return
            yield batch


def close(run: Run) -> None:
    """End the processes that read for a run: at exit, Python would wait for them for ever, since they ignore signals."""
    for one in run.batches or ():
        getattr(one, "close", lambda: None)()  # a callback may have put other iterators there
