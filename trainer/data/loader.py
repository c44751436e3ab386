"""Load the microbatches of one data-parallel rank from a dataset.

A global batch is `global_batch_size` consecutive samples. Its first microbatches are its first `micro_batch_size` × `size`
samples,
`micro_batch_size` consecutive ones for each rank, and so on: Megatron-LM's order. A batch therefore depends only on the number of
its first sample, and a run resumes at the same sample with another batch size or number of ranks.
"""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from formats.errors import UserError
from trainer.data import parent_watchdog
from trainer.signals import blocked


@dataclass(frozen=True, slots=True, kw_only=True)
class MicrobatchSampler:
    """The sample numbers of one rank's microbatches: `steps` global batches from sample `consumed` on."""

    consumed: int
    steps: int
    micro_batch_size: int
    global_batch_size: int
    rank: int
    size: int

    def __len__(self) -> int:
        return self.steps * self.global_batch_size // (self.micro_batch_size * self.size)

    def __iter__(self) -> Iterator[list[int]]:
        stride = self.micro_batch_size * self.size
        first = self.consumed + self.rank * self.micro_batch_size
        for number in range(len(self)):
            start = first + number * stride
            yield list(range(start, start + self.micro_batch_size))


def batches(
    dataset: Dataset,
    *,
    consumed: int,
    micro_batch_size: int,
    global_batch_size: int,
    rank: int,
    size: int,
    samples: int | None = None,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Generator[dict[str, torch.Tensor]]:
    """Yield the microbatches of data-parallel rank `rank` of `size`: dicts of tensors [micro_batch_size, sequence_length].

    They cover samples `consumed` to `consumed + samples`; by default all whole global batches that are left. Raises UserError at
    the call if the dataset has fewer samples. `num_workers` processes read ahead; they end when the generator is closed, or with
    this process.
    """
    stride = micro_batch_size * size
    if global_batch_size % stride:
        raise UserError(
            f"the global batch size `{global_batch_size}` is not divisible by the micro batch size `{micro_batch_size}` times "
            f"`{size}` data-parallel ranks",
            hint=f"choose a multiple of {stride}",
        )
    num_samples = _count_samples(len(dataset), consumed, samples, global_batch_size)
    order = MicrobatchSampler(
        consumed=consumed,
        steps=num_samples // global_batch_size,
        micro_batch_size=micro_batch_size,
        global_batch_size=global_batch_size,
        rank=rank,
        size=size,
    )
    options = _worker_options(num_workers)
    return _read(DataLoader(dataset, batch_sampler=order, pin_memory=pin_memory, generator=torch.Generator(), **options))


def _count_samples(length: int, consumed: int, samples: int | None, global_batch_size: int) -> int:
    """Return how many samples to read of a dataset of `length`. Raises UserError if it has fewer, or not whole global batches."""
    available = max(length - consumed, 0)
    num_samples = available - available % global_batch_size if samples is None else samples
    if num_samples > available or not num_samples or num_samples % global_batch_size:
        raise UserError(
            f"`{num_samples or global_batch_size}` samples are needed after the first `{consumed}`, but the dataset has "
            f"`{length}` in all, and a global batch takes `{global_batch_size}`",
            hint="use more data, or ask for whole global batches that the data can give",
        )
    return num_samples


def _worker_options(num_workers: int) -> dict[str, Any]:
    """Return the DataLoader's options for its workers.

    They are not forked from this process: its threads (CUDA, NCCL, loggers) may hold locks. A fork server imports the heavy
    libraries once for all workers and uses no GPU.
    """
    if not num_workers:
        return {"num_workers": 0}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trainer.warnings_filter", "trainer.data.splits", "trainer.data.loader"])
    return {"num_workers": num_workers, "multiprocessing_context": context, "worker_init_fn": _init_worker}


def _init_worker(_number: int) -> None:
    parent_watchdog.end_with_parent()
    # megatron-core warns that a worker has no rank.
    warnings.filterwarnings("ignore", "Could not determine rank", UserWarning)


def _read(loader: DataLoader) -> Generator[dict[str, torch.Tensor]]:
    with blocked():
        microbatches = iter(loader)
    yield from microbatches
