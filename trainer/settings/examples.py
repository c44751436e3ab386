"""What commands share that look at the examples of a run without training on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from formats.errors import UserError

if TYPE_CHECKING:
    from trainer.config import RunConfig
    from trainer.tokenizers import Tokenizer


def for_examples(config: RunConfig) -> None:
    """A recipe that is for documents is one for examples of the same length."""
    from trainer.config import FinetuningDatasetConfig  # noqa: PLC0415

    if not isinstance(config.dataset, FinetuningDatasetConfig):
        config.dataset = FinetuningDatasetConfig(sequence_length=config.dataset.sequence_length)


@contextmanager
def tokenizer_of(config: RunConfig) -> Iterator[Tokenizer]:
    """The one named, else that beside the model's own files, else the one in the checkpoint to start from."""
    from trainer import tokenizers  # noqa: PLC0415

    start = config.checkpoint.pretrained_checkpoint
    found = tokenizers.of_run(config.tokenizer.tokenizer_model, beside=start or getattr(config.model, "hf_source", None))
    if found is not None:
        yield found
    elif start is not None:
        from trainer.generation import checkpoint  # noqa: PLC0415 - seconds to import

        with checkpoint.tokenizer_of(start) as found:
            yield found
    else:
        raise UserError("there is no tokenizer", hint="name a folder that has one: `tokenizer.tokenizer_model=DIR`")
