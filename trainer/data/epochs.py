"""Read one `.bin`/`.idx` pair as a stream of samples that repeats in epochs; sample `i` does not depend on the stream's length.

megatron-core's GPTDataset shuffles all epochs of a run together, so its order changes with the number of samples. Here each epoch
is a GPTDataset with its own seed. The first epoch has the run's seed, so its order is Megatron-LM's in a run of up to one epoch.
Blends are `blend`'s.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blake3
import numpy as np
import torch
from megatron.core.datasets import gpt_dataset
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split
from torch.utils.data import Dataset

from formats.errors import UserError
from trainer import segments
from trainer.config import DatasetConfig
from trainer.data import cache, consistency

_MAGIC = b"MMIDIDX\x00\x00"
_INDEX_HEADER = struct.Struct("<9sQBQQ")
"""The header of an `.idx`: magic, version, dtype code, sequences, documents + 1 (megatron-core's `_IndexWriter`)."""


_NO_TOKEN = -2  # megatron-core takes -1 for padding


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """The attributes of a tokenizer that megatron-core reads."""

    eod: int
    vocab_size: int
    unique_identifiers: dict[str, str]
    """A part of the key of cached indices: the lengths of the documents. Megatron-LM uses the prefix alone, and reads stale
    indices
    after data was prepared again."""


class Epoch(GPTDataset):
    """The samples of one epoch, each once, shuffled by megatron-core. The class name is a part of the key of cached indices."""

    def __init__(
        self, source: IndexedDataset, numbers: np.ndarray, *, split: Split, config: GPTDatasetConfig, folder: Path
    ) -> None:
        self._folder = folder
        super().__init__(source, source.path_prefix, numbers, None, split, config)

    def _build_document_sample_shuffle_indices(self) -> cache.Arrays:
        samples = self._get_num_tokens_per_epoch() // self.config.sequence_length
        return cache.cached_arrays(self._folder, self.unique_description_hash, len(self.indices) + samples, self._build_indices)

    def _build_indices(self) -> cache.Arrays:
        with _without_save_warning():
            return super()._build_document_sample_shuffle_indices()


@contextmanager
def _without_save_warning() -> Generator[None]:
    """Silence megatron-core's warning that it saves no indices. It would write them on global rank 0 only, and not atomically, so
    it gets no folder; `cache` writes them."""
    logger = logging.getLogger(gpt_dataset.__name__)

    def is_other(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith("Unable to save")

    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


class TooFewSamplesError(UserError):
    """A split has less than one sample."""


class Epochs(Dataset):
    """`samples` samples from one split of one prefix, epoch after epoch; each epoch has each sample once.

    `share` is the split's range of the documents, as fractions. The last tokens of an epoch, too few for a sample, are dropped.
    Raises UserError if the files are unreadable or have less than one sample.
    """

    def __init__(
        self, prefix: str, config: DatasetConfig, *, split: Split, share: tuple[float, float], eod: int | None, vocab_size: int
    ) -> None:
        self._prefix, self._config, self._split, self.samples = prefix, config, split, 0
        self._source = _open_prefix(prefix)
        count = len(self._source.sequence_lengths)
        self._bounds = round(share[0] * count), round(share[1] * count)
        self._vocabulary = Vocabulary(
            eod=_NO_TOKEN if eod is None else eod,
            vocab_size=vocab_size,
            unique_identifiers={
                "documents": f"{self._bounds[0]} to {self._bounds[1]} of {count}",
                "lengths": blake3.blake3(self._source.sequence_lengths.tobytes()).hexdigest(),
            },
        )
        self._open_epochs: dict[int, Epoch] = {}
        self._check_enough(count)
        self.per_epoch = len(self._epoch(0))

    def _check_enough(self, count: int) -> None:
        tokens = int(self._lengths.sum(dtype=np.int64))
        if tokens > self._config.sequence_length:
            return
        raise TooFewSamplesError(
            f"the {self._split.name} split of `{self._prefix}` has {tokens} tokens in {len(self._lengths)} of {count} documents, "
            f"but a sample takes {self._config.sequence_length + 1}",
            hint="change its share in `dataset.split`, use more data, or a smaller `dataset.sequence_length`",
        )

    @property
    def _lengths(self) -> np.ndarray:
        return self._source.sequence_lengths[slice(*self._bounds)]

    def take(self, samples: int) -> Epochs:
        """Set the length to `samples`, and build the indices of all epochs in it if they are cached in files."""
        self.samples = samples
        tokens = int(self._lengths.sum(dtype=np.int64))
        if len(self._lengths) + tokens // self._config.sequence_length >= cache.MIN_CACHED_ENTRIES:
            for number in range(-(-samples // self.per_epoch)):
                self._epoch(number)
        return self

    def until(self, epochs: int) -> int:
        """Return the number of samples in `epochs` epochs."""
        return epochs * self.per_epoch

    def fingerprint(self) -> str:
        """Return a hash of all lengths, the tokens of some documents, and the first sample: see `trainer.data.consistency`."""
        start = self._bounds[0]
        sampled = consistency.spread_indices(len(self._lengths))
        parts = [self._source.get(start + number, length=min(1024, int(self._lengths[number]))) for number in sampled]
        vocabulary = repr(self._vocabulary).encode()
        return consistency.fingerprint(vocabulary, *parts, *([self[0]["tokens"].numpy()] if self.samples else []))

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.samples:
            raise IndexError(index)
        number, position = divmod(int(index), self.per_epoch)
        sample = self._epoch(number)[position]
        self._check_vocabulary(sample)
        if self._config.reset_attention_mask:
            sample["segment_ids"] = segments.document_segment_ids(sample["tokens"], self._vocabulary.eod)
        return sample

    def _check_vocabulary(self, sample: dict[str, torch.Tensor]) -> None:
        """Raise UserError for a token id outside the vocabulary; on a GPU it would be a device-side assertion."""
        greatest = max(int(sample["tokens"].max()), int(sample["labels"].max()))
        if greatest >= self._vocabulary.vocab_size:
            raise UserError(
                f"`{self._prefix}` has the token id {greatest}, but the vocabulary has {self._vocabulary.vocab_size}",
                hint="prepare the data with the model's tokenizer",
            )

    def _epoch(self, number: int) -> Epoch:
        """Return an epoch. Two are kept open: samples are read nearly in order, and there may be very many epochs."""
        if number not in self._open_epochs:
            if len(self._open_epochs) == 2:
                del self._open_epochs[next(iter(self._open_epochs))]
            config, numbers = self._epoch_config(number), np.arange(*self._bounds, dtype=np.int32)
            self._open_epochs[number] = Epoch(self._source, numbers, split=self._split, config=config, folder=self._folder())
        return self._open_epochs[number]

    def _epoch_config(self, number: int) -> GPTDatasetConfig:
        return GPTDatasetConfig(
            random_seed=_seed(self._config.random_seed, number),
            sequence_length=self._config.sequence_length,
            blend=([self._prefix], None),
            split=self._config.split,
            path_to_cache="",  # no cache; None would mean a folder beside the data
            tokenizer=self._vocabulary,
            reset_position_ids=self._config.reset_position_ids,
            reset_attention_mask=False,  # its masks are [sequence, sequence]; see `segment_ids`
            eod_mask_loss=self._config.eod_mask_loss,
            create_attention_mask=False,
        )

    def _folder(self) -> Path:
        return Path(self._config.path_to_cache or f"{self._prefix}.cache")

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the mapped indices, which pickle would copy; the receiving process maps them itself."""
        return {**self.__dict__, "_opened": {}}


def _seed(random_seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence((random_seed, epoch)).generate_state(1)[0]) if epoch else random_seed


def _open_prefix(prefix: str) -> IndexedDataset:
    index, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (index, data):
        if not path.is_file():
            raise UserError(
                f"`{path}` does not exist",
                hint="a blend names prefixes of `.bin`/`.idx` pairs, which `mbtrain prepare-data` makes",
            )
    _check_index(index)
    if not data.stat().st_size:
        raise UserError(f"`{data}` is empty", hint="prepare the data again")
    source = IndexedDataset(prefix)
    expected = int(source.sequence_lengths.sum(dtype=np.int64)) * source.index.dtype_size
    if data.stat().st_size != expected:
        raise UserError(f"`{data}` has {data.stat().st_size} bytes, but its index says {expected}", hint="prepare the data again")
    return source


def _check_index(path: Path) -> None:
    """Raise UserError for an incomplete index; megatron-core would fail with a bare assertion."""
    with path.open("rb") as file:
        head = file.read(_INDEX_HEADER.size)
    if len(head) == _INDEX_HEADER.size:
        magic, version, _, sequences, documents = _INDEX_HEADER.unpack(head)
        size = _INDEX_HEADER.size + 12 * sequences + 8 * documents  # int32 lengths and int64 offsets; int64 ends of documents
        if magic == _MAGIC and version == 1 and path.stat().st_size == size:
            return
    raise UserError(f"`{path}` is not a complete index of Megatron-LM", hint="prepare the data again")
