"""From a dataset to one rank's microbatches. Knows how samples are dealt to ranks, and nothing of what they hold.

A global batch is `global_batch_size` samples in a row. Its first microbatches are its first `micro_batch_size` × `size` samples,
`micro_batch_size` in a row for each rank, and so on: Megatron-LM's order. So a batch depends on the number of its first sample
alone, and a run that goes on with other batch sizes or more ranks goes on exactly where it was.
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
class Microbatches:
    """Sample numbers of one rank's microbatches, from sample `consumed` on, over `steps` global batches."""

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
    """Microbatches of data-parallel rank `rank` of `size`, each a dict of tensors `[micro_batch_size, sequence_length]`.

    They are samples `consumed` to `consumed + samples`, and then end; by default as many whole global batches as the dataset
    still has. A dataset with fewer samples is an error now, not on the way: nothing wraps. `num_workers` processes read ahead;
    they end when the generator is closed, or with this process.
    """
    stride = micro_batch_size * size
    if global_batch_size % stride:
        raise UserError(
            f"the global batch size `{global_batch_size}` is not divisible by the micro batch size `{micro_batch_size}` times "
            f"`{size}` data-parallel ranks",
            hint=f"choose a multiple of {stride}",
        )
    there = max(len(dataset) - consumed, 0)
    wanted = there - there % global_batch_size if samples is None else samples
    if wanted > there or not wanted or wanted % global_batch_size:
        raise UserError(
            f"`{wanted or global_batch_size}` samples are wanted after the first `{consumed}`, but the dataset has "
            f"`{len(dataset)}` in all, and a global batch takes `{global_batch_size}`",
            hint="use more data, or ask for whole global batches that the data can give",
        )
    order = Microbatches(
        consumed=consumed,
        steps=wanted // global_batch_size,
        micro_batch_size=micro_batch_size,
        global_batch_size=global_batch_size,
        rank=rank,
        size=size,
    )
    return _read(
        DataLoader(dataset, batch_sampler=order, pin_memory=pin_memory, generator=torch.Generator(), **_processes(num_workers))
    )


def _processes(num_workers: int) -> dict[str, Any]:
    """Not `fork`: this process has threads of CUDA, NCCL and loggers, whose locks would be copied as they are. A fork server
    imports the heavy libraries once for all workers, and never touches a GPU."""
    if not num_workers:
        return {"num_workers": 0}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trainer.warnings_filter", "trainer.data.splits", "trainer.data.loader"])
    return {"num_workers": num_workers, "multiprocessing_context": context, "worker_init_fn": _begin}


def _begin(_number: int) -> None:
    parent_watchdog.end_with_parent()
    # A worker is no rank, and megatron-core need not say so.
    warnings.filterwarnings("ignore", "Could not determine rank", UserWarning)


def _read(loader: DataLoader) -> Generator[dict[str, torch.Tensor]]:
    with blocked():
        reading = iter(loader)
    yield from reading
