"""Save checkpoints of all ranks through megatron-core's `torch_dist` writer.

`state_dict` says what a checkpoint holds, and `iterations` where it is on the disk and when it counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException

from formats.errors import UserError
from formats.iterations import TRAIN_STATE, iteration_folder
from trainer import optim
from trainer.checkpoints import causes, iterations, state_dict
from trainer.checkpoints.state_dict import Parts, Progress
from trainer.collectives import from_first_rank, on_first_rank
from trainer.config import RunConfig
from trainer.signals import blocked


@dataclass
class Saver:
    """Write a run's checkpoints, one at a time, and remember the last good one. All ranks call each method."""

    config: RunConfig
    write_side_files: Callable[[Path], None]
    """Writes the side files into an iteration's folder, on rank 0."""

    say: Callable[[str], None]
    last_good: Path | None = None
    saved_iteration: int | None = None
    _queue: AsyncCallsQueue = field(default_factory=lambda: AsyncCallsQueue(persistent=False))
    _strategy: Any = None
    _writing: Path | None = None
    _saved_at: float = field(default_factory=time.monotonic)

    @property
    def root(self) -> Path | None:
        """The folder of checkpoints; None if nothing is saved."""
        return Path(self.config.checkpoint.save) if self.config.checkpoint.save else None

    @property
    def minutes(self) -> float:
        """Minutes since the last save began."""
        return (time.monotonic() - self._saved_at) / 60

    @property
    def last_good_text(self) -> str:
        """The last good checkpoint, for messages."""
        return f"the last good checkpoint is `{self.last_good}`" if self.last_good else "no checkpoint was saved yet"

    def save(self, parts: Parts) -> None:
        """Begin a checkpoint of all ranks, and finish it too unless saving is asynchronous.

        Raises UserError on all ranks if it cannot be written; the last good one is not changed.
        """
        assert self.root is not None
        self.finish()
        progress = deepcopy(parts.progress)
        self._saved_at, self.saved_iteration = time.monotonic(), progress.iteration
        self._writing = partial = iterations.partial(self.root, progress.iteration)
        with self._user_errors(), blocked():
            on_first_rank(lambda: iterations.begin(partial))
            with optim.parameters_gathered(parts.chunks):
                request = self._write(parts, partial)
            if request is None:
                self._commit(partial, progress)
                return
            request.add_finalize_fn(lambda: self._commit(partial, progress))
            self._queue.schedule_async_request(request)

    def _write(self, parts: Parts, folder: Path) -> Any:
        metadata = state_dict.content_metadata(self.config.checkpoint, peft=self.config.peft)
        return dist_checkpointing.save(
            state_dict.state_dict(parts, self.config, metadata=metadata, loading=False),
            str(folder),
            sharded_strategy=self._strategy or self._make_strategy(),
            async_sharded_save=self.config.checkpoint.async_save,
            async_strategy="mcore",
            content_metadata={name: value for name, value in metadata.items() if name != "dp_cp_group"},
            verify_integrity=self.config.checkpoint.verify_integrity,
        )

    def _make_strategy(self) -> Any:
        self._strategy = TorchDistSaveShardedStrategy()
        if self.config.checkpoint.fully_parallel_save:
            group = parallel_state.get_data_parallel_group(with_context_parallel=True)
            self._strategy = FullyParallelSaveStrategyWrapper(self._strategy, group)
        return self._strategy

    def _commit(self, partial: Path, progress: Progress) -> None:
        """Complete a checkpoint that all ranks have written. Raises UserError on all ranks if rank 0 does not see their files."""
        self._check_complete(partial)

        def act() -> None:
            self.write_side_files(partial)
            torch.save(_train_state(progress), partial / TRAIN_STATE)
            target = iterations.commit(partial, iteration=progress.iteration)
            iterations.prune(target, keep=self.config.checkpoint.keep_last)

        on_first_rank(act)
        self.last_good = partial.with_name(iteration_folder(progress.iteration))
        self.say(f"saved {self.last_good}")

    def _check_complete(self, partial: Path) -> None:
        missing = from_first_rank(lambda: iterations.missing_files(partial))
        if missing:
            raise UserError(
                f"`{partial}` lacks `{missing[0]}`, which another rank has written: hosts do not share `checkpoint.save`; "
                f"{self.last_good_text}",
                hint="name a folder of a file system that all hosts share, by its absolute path",
            )

    @contextmanager
    def _user_errors(self) -> Iterator[None]:
        """Raise errors of the disk and of the writer as one UserError on all ranks."""
        try:
            yield
        except (CheckpointException, ImportError, OSError) as error:
            assert self._writing is not None
            raise causes.not_saved(error, self._writing, last_good=self.last_good_text) from error

    def poll(self) -> None:
        """Finish an asynchronous save whose files are written. All ranks call this at the same steps."""
        self._finalize(blocking=False)

    def finish(self) -> None:
        """Wait for an asynchronous save."""
        self._finalize(blocking=True)

    def _finalize(self, *, blocking: bool) -> None:
        if self._queue.get_num_unfinalized_calls():
            with self._user_errors():
                self._queue.maybe_finalize_async_calls(blocking=blocking)

    def close(self) -> None:
        """Stop the writer. A save that is not finished stays incomplete on the disk."""
        for call in self._queue.async_calls:
            call.async_caller.close(abort=True)


def _train_state(progress: Progress) -> dict[str, torch.Tensor]:
    """Return Megatron-Bridge's record of progress."""
    counts = {
        "step": progress.iteration,
        "consumed_train_samples": progress.consumed_samples,
        "skipped_train_samples": 0,
        "consumed_valid_samples": 0,
    }
    return {
        **{name: torch.tensor(number) for name, number in counts.items()},
        "floating_point_operations_so_far": torch.tensor(0.0),
        **{name: torch.tensor(False) for name in ("do_train", "do_valid", "do_test")},
    }
