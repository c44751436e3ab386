"""Where training tokens come from.

`build` makes the three datasets of a run, `trainer.data.loader.batches` reads them.

A dataset has a length and gives, for each sample number, a dict of tensors `[sequence_length]`: `tokens`, `labels` and
`position_ids` (int64), `loss_mask` (float32: 1 for a label that is learned, else 0). What a sample number stands for depends on
nothing but the data and its seed: not on how many samples are asked for, on batch sizes or on ranks. So a sample number is a
position that one can resume from.

Your own data: in place of `DatasetConfig`, give an object with

- `sequence_length`, and
- `build(tokenizer, vocab_size, samples) -> (train, valid, test)`: three datasets as above, of at least the lengths in `samples`,
  or None where that is 0. `tokenizer` is None where the run has none. In place of one `valid` or `test` there may be a dict of
  several by their names, which are evaluated each by itself.

Rows may hold several examples of which none sees another: then the object has `packed` set, and samples have `segment_ids`
(int32) too, another number for each example in a row and -1 for what fills it up.

A dataset that is gone through in epochs may say so: `per_epoch`, how many samples one has, so that evaluations see each once; and
`until(epochs)`, how many samples that many have, for `train.num_epochs`.

What the training dataset has as `summary`, lines of text, is told before the first step.

It is called on every rank and gives the same there: lengths are compared, and what `fingerprint()` of a dataset returns, a text,
where it has that. With `num_workers` above 0 the datasets are pickled to the processes that read ahead.

This package imports torch only when it builds: the processes of `mbtrain prepare-data` do without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    from trainer.tokenizers import Tokenizer

type HeldOut = Dataset | dict[str, Dataset]
"""One set, or several by their names."""

type Splits = tuple[Dataset | None, HeldOut | None, HeldOut | None]


def is_packed(config: Any) -> bool:
    """Do the samples of this dataset have `segment_ids`?"""
    documents = getattr(config, "blend", None) or getattr(config, "blend_per_split", None)  # mock data has none that end
    return bool(getattr(config, "packed", False) or (documents and getattr(config, "reset_attention_mask", False)))


def build(config: Any, *, tokenizer: Tokenizer | None, vocab_size: int, samples: tuple[int, int, int]) -> Splits:
    """Train, validation and test datasets of as many samples; None where `samples` is 0, or the split has no share of the data.

    To be called on every rank. Raises UserError where the data cannot give them.
    """
    if hasattr(config, "build"):
        return config.build(tokenizer, vocab_size, samples)
    from trainer.data import splits  # noqa: PLC0415 - brings torch and megatron-core

    return splits.build(config, tokenizer=tokenizer, vocab_size=vocab_size, samples=samples)
