"""Runs whose optimizer state megatron-core 0.15 to 0.19.2 would shift, and those runs as they were before that was corrected.

To see tests of such runs fail as they did then, start them with `MBTRAIN_UNMENDED=1`: only here does that mean anything.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

from tests.trainer import witness

UNMENDED = "MBTRAIN_UNMENDED"
STEPS, STOPPED = 4, 2
BUCKETS = {
    "mixed_precision": "bf16_mixed",
    "ddp__use_distributed_optimizer": True,
    "ddp__bucket_size": 10_000,
    "comm_overlap__overlap_grad_reduce": True,
    "train__train_iters": STEPS,
    "train__micro_batch_size": 1,
    "scheduler__lr_warmup_iters": 1,
}
WIDE = {**BUCKETS, "ddp__pad_buckets_for_high_nccl_busbw": True}
"""Shifted on any number of ranks: each bucket is padded to a multiple of 2^16."""


@contextmanager
def as_before() -> Iterator[None]:
    """While this is entered, nothing is corrected, and nothing compared."""
    from trainer.checkpoints import bucket_padding, masters

    with (
        mock.patch.object(bucket_padding, "padding_excluded", side_effect=lambda *_: nullcontext()),
        mock.patch.object(masters, "compared_with_weights", side_effect=lambda *_, **__: nullcontext()),
    ):
        yield


def as_told() -> AbstractContextManager[None]:
    """As before where `MBTRAIN_UNMENDED` asks for it."""
    return as_before() if os.environ.get(UNMENDED) else nullcontext()


def train(folder: str, changes: dict[str, Any]) -> witness.Witness:
    """Run on this rank."""
    with as_told():
        return witness.train(folder, changes)


def in_two(run: Callable[[dict[str, Any]], list[witness.Witness]], folder: Path, *, async_save: bool = False) -> list[tuple]:
    """A run to its end that saves half way, and one that goes on from there: a pair for each rank."""
    saved = {"save": str(folder), "save_interval": STOPPED, "async_save": async_save}
    whole = run({f"checkpoint__{name}": value for name, value in saved.items()})
    (folder / "latest_checkpointed_iteration.txt").write_text(str(STOPPED))
    resumed = run({"checkpoint__load": str(folder)})
    return list(zip(whole, resumed, strict=True))


def differences(whole: witness.Witness, resumed: witness.Witness) -> list[str]:
    """What of the second is not the first from where that was stopped, to the last bit. Random states of experts are another
    matter."""
    steps = {name: (getattr(whole, name)[STOPPED:], getattr(resumed, name)) for name in ("losses", "grad_norms", "rates")}
    left = ({name: value for name, value in run.left.items() if not name.startswith("tracker ")} for run in (whole, resumed))
    different = [f"{name}: {first} and {second}" for name, (first, second) in steps.items() if first != second]
    return different + witness.differences(*left)
