"""Datasets: the sources of training tokens.

`build` makes the three datasets of a run; `trainer.data.loader.batches` reads them.

A dataset has a length and returns, for a sample number, a dict of tensors `[sequence_length]`: `tokens`, `labels` and
`position_ids` (int64), `loss_mask` (float32; 1 for a label that counts, else 0). A sample number always means the same sample:
it depends on the data and its seed, not on the number of samples, the batch size or the ranks. Runs resume from a sample number.

To use data of your own, replace `DatasetConfig` by an object with

- `sequence_length`, and
- `build(tokenizer, vocab_size, samples) -> (train, valid, test)`: three datasets as above with at least the lengths in `samples`,
  or None where that length is 0. `tokenizer` is None if the run has none. `valid` and `test` may each be a dict of datasets by
  name; each of these is evaluated by itself.

Rows may hold several examples that do not attend to each other. The object then has `packed` set, and each sample has
`segment_ids` (int32): a different number for each example in the row, and -1 for padding.

A dataset that repeats in epochs may define `per_epoch`, the number of samples in an epoch, so that an evaluation sees each sample
once; and `until(epochs)`, the number of samples in that many epochs, for `train.num_epochs`.

If the training dataset has `summary`, a sequence of lines, these are printed before the first step.

Every rank calls `build` and must get the same data. They compare lengths and, if a dataset has `fingerprint()`, its result (str).
With `num_workers` above 0, datasets are pickled and sent to the worker processes.

This package imports torch only inside `build`; the workers of `mbtrain prepare-data` do not import it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.data.interface import Splits
    from trainer.tokenizers import Tokenizer


def build(config: Any, *, tokenizer: Tokenizer | None, vocab_size: int, samples: tuple[int, int, int]) -> Splits:
    """Return the train, validation and test datasets, with `samples` samples each.

    A split is None if its number in `samples` is 0, or if it has no share of the data. Every rank calls this. Raises UserError
    if the data cannot give that many.

    >>> from trainer.config import DatasetConfig
    >>> train, _, _ = build(DatasetConfig(sequence_length=4), tokenizer=None, vocab_size=10, samples=(1, 0, 0))  # mock data
    >>> {name: list(tensor.shape) for name, tensor in train[0].items()}
    {'tokens': [4], 'labels': [4], 'loss_mask': [4], 'position_ids': [4]}
    """
    if hasattr(config, "build"):
        return config.build(tokenizer, vocab_size, samples)
    from trainer.config import FinetuningDatasetConfig  # noqa: PLC0415 - imports torch and megatron-core
    from trainer.data import splits  # noqa: PLC0415
    from trainer.data.chat import build as chat  # noqa: PLC0415

    builder: Any = chat if isinstance(config, FinetuningDatasetConfig) else splits
    return builder.build(config, tokenizer=tokenizer, vocab_size=vocab_size, samples=samples)
