"""The datasets of a run, and this rank's microbatches of them.

Says how many samples each dataset must have, and how many global batches an evaluation takes; what a sample holds is
`trainer.data`'s to say.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from megatron.core import parallel_state

from formats.errors import UserError
from trainer import data, device, model
from trainer.config import FinetuningDatasetConfig, TrainingConfig, ValidationConfig, is_packed
from trainer.data import consistency, one_epoch
from trainer.data.chat import build
from trainer.data.loader import batches
from trainer.tokenizers import Tokenizer


@dataclass
class DataWait:
    """Seconds that this rank has waited for data in the current step; the loop sets it to 0 when a step begins."""

    seconds: float = 0.0


def check(dataset: Any) -> None:
    """Raise UserError, before a model is loaded, if the files of a fine-tuning dataset cannot be read. All ranks call this.

    A dataset section of one's own is not checked.
    """
    if isinstance(dataset, FinetuningDatasetConfig) and not hasattr(dataset, "build"):
        build.check(dataset)


def datasets(
    dataset: Any,
    *,
    train: TrainingConfig,
    validation: ValidationConfig,
    vocab_size: int,
    tokenizer: Tokenizer | None,
    iteration: int = 0,
    consumed_samples: int = 0,
) -> Sequence[Any]:
    """Build the datasets for training, validation and test of the section `dataset`; None where there is none. All ranks call
    this.

    The first holds the `consumed_samples` of the `iteration` steps so far, whatever their batch size, and those of the steps to
    come. Raises UserError if ranks do not read the same data.
    """
    batch, iterations = train.global_batch_size, validation.eval_iters
    to_come = max(train.train_iters - iteration, 0) * batch
    evaluated = (1 if iterations is None else iterations) * batch
    samples = (consumed_samples + to_come, evaluated, evaluated)
    training, *held_out = data.build(dataset, tokenizer=tokenizer, vocab_size=vocab_size, samples=samples)
    consistency.check_ranks((training, *held_out), tokenizer)
    return training, *(_each_once(dataset_of_split, iterations, batch) for dataset_of_split in held_out)


def _each_once(held_out: Any, iterations: int | None, global_batch_size: int) -> Any:
    """Limit held-out data, or each of several sets, to one epoch."""
    if isinstance(held_out, dict):
        return {name: _each_once(dataset, iterations, global_batch_size) for name, dataset in held_out.items()}
    return one_epoch.limit_to_one_epoch(held_out, iterations=iterations, global_batch_size=global_batch_size)


def steps_of_epochs(dataset: Any, *, train: TrainingConfig, vocab_size: int, tokenizer: Tokenizer | None) -> int:
    """Return the optimizer steps that read the training data `train.num_epochs` times. The last step may read into the next
    epoch.

    Raises UserError if the dataset has no method `until`, which says how many samples that takes.
    """
    check(dataset)
    epochs, batch = train.num_epochs, train.global_batch_size
    training, *_ = data.build(dataset, tokenizer=tokenizer, vocab_size=vocab_size, samples=(batch, 0, 0))
    until = getattr(training, "until", None)
    if until is None:
        raise UserError(
            f"`train.num_epochs` is `{epochs}`, and the dataset does not say how many samples an epoch has",
            hint="leave it out, and set `train.train_iters`",
        )
    return -(-until(epochs) // batch)


def eval_iterations(held_out: Any, *, train: TrainingConfig, validation: ValidationConfig) -> int:
    """Return how many global batches one evaluation of a held-out dataset takes."""
    if isinstance(held_out, one_epoch.OneEpoch):
        return len(held_out) // train.global_batch_size
    return validation.eval_iters or 0


def named_sets(held_out: Any) -> Mapping[str, Any]:
    """Return held-out datasets by name: none, a single one under the name "", or several."""
    return held_out if isinstance(held_out, dict) else {"": held_out} if held_out is not None else {}


def microbatch_shape(dataset: Any, micro_batch_size: int) -> tuple[int, int]:
    """Return the rows and their length of the activations that pipeline stages exchange: on a GPU, packed rows are end to end in
    one row (`trainer.loss`)."""
    length = dataset.sequence_length
    if is_packed(dataset) and device.current().type == "cuda":
        return 1, micro_batch_size * length
    return micro_batch_size, length


def chunk_iterators(
    dataset: Any, section: Any, train: TrainingConfig, *, chunks: Sequence[Any], consumed: int, waited: DataWait
) -> list[Iterator[Any] | None]:
    """Return an iterator over this rank's microbatches of `dataset` for each model chunk, from sample `consumed` on.

    `section` is the dataset's settings. None for chunks between the first and the last pipeline stage, which need no batch unless
    rows are packed. The time that each microbatch is waited for is added to `waited`.
    """
    packed = is_packed(section)

    def read() -> Generator[Any]:
        return batches(
            dataset,
            consumed=consumed,
            micro_batch_size=train.micro_batch_size,
            global_batch_size=train.global_batch_size,
            rank=parallel_state.get_data_parallel_rank(),
            size=parallel_state.get_data_parallel_world_size(),
            num_workers=getattr(section, "num_workers", 0),
            pin_memory=device.current().type == "cuda",
        )

    return [_timed(waited, read()) if packed or model.sees_data(chunk) else None for chunk in chunks]


def _timed(waited: DataWait, microbatches: Generator[Any]) -> Generator[Any]:
    """Yield the same microbatches, and add up the time that each is waited for."""
    with closing(microbatches):
        while True:
            began = time.perf_counter()
            batch = next(microbatches, None)
            waited.seconds += time.perf_counter() - began
            if batch is None:
                return
            yield batch


def close(iterators: Sequence[Any]) -> None:
    """Stop the worker processes of these iterators: they ignore signals, so Python would wait for them at exit for ever."""
    for iterator in iterators:
        getattr(iterator, "close", lambda: None)()  # a callback may have replaced them
