"""Save and resume through megatron-core's `torch_dist` checkpoints.

What a checkpoint holds, and how a run goes on from one at any layout. Where it lies on the disk, and when it counts, is
`iterations`' to know.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException

from formats.errors import UserError
from formats.iterations import TRAIN_STATE, iteration_folder
from trainer import optim
from trainer.checkpoints import adapters, bucket_padding, causes, fp8_states, iterations, masters, random_states
from trainer.config import RunConfig
from trainer.model import unwrap
from trainer.parallel import from_first_rank, on_first_rank
from trainer.signals import held


@dataclass
class Progress:
    """Where a run stands: what a resumed one goes on from, beside tensors."""

    iteration: int = 0
    consumed_samples: int = 0
    skipped_steps: int = 0
    """Steps that changed nothing, because fp16 gradients overflowed."""

    interval: dict[str, Any] = field(default_factory=dict)
    """What was counted since the last line that was told."""


@dataclass
class Parts:
    """What a checkpoint holds of a run."""

    chunks: list[Any]
    """Wrapped model chunks."""

    optimizer: Any
    scheduler: Any
    progress: Progress


@dataclass
class Saver:
    """Writes a run's checkpoints, one at a time, and knows the last good one."""

    config: RunConfig
    travels: Callable[[Path], None]
    """Writes what goes along with the weights into an iteration's folder."""

    say: Callable[[str], None]
    last_good: Path | None = None
    saved_iteration: int | None = None
    _queue: AsyncCallsQueue = field(default_factory=lambda: AsyncCallsQueue(persistent=False))
    _strategy: Any = None
    _writing: Path | None = None
    _saved_at: float = field(default_factory=time.monotonic)

    @property
    def root(self) -> Path | None:
        """Where checkpoints go, if they do."""
        return Path(self.config.checkpoint.save) if self.config.checkpoint.save else None

    @property
    def minutes(self) -> float:
        """Since the last save began."""
        return (time.monotonic() - self._saved_at) / 60

    def save(self, parts: Parts) -> None:
        """Begin a checkpoint of all ranks, and finish it too unless saving is asynchronous.

        Raises UserError on all ranks where it cannot be written; the last good one stays as it is.
        """
        assert self.root is not None
        self.finish()
        progress = deepcopy(parts.progress)
        self._saved_at, self.saved_iteration = time.monotonic(), progress.iteration
        self._writing = partial = iterations.partial(self.root, progress.iteration)
        with self._explained(), held():
            on_first_rank(lambda: iterations.begin(partial))
            with optim.parameters_gathered(parts.chunks):
                request = self._write(parts, partial)
            if request is None:
                self._commit(partial, progress)
                return
            request.add_finalize_fn(lambda: self._commit(partial, progress))
            self._queue.schedule_async_request(request)

    def _write(self, parts: Parts, folder: Path) -> Any:
        told = self.config.checkpoint
        metadata = content(self.config)
        return dist_checkpointing.save(
            state(parts, self.config, metadata=metadata, loading=False),
            str(folder),
            sharded_strategy=self._strategy or self._make_strategy(),
            async_sharded_save=told.async_save,
            async_strategy="mcore",
            content_metadata={name: value for name, value in metadata.items() if name != "dp_cp_group"},
            verify_integrity=told.verify_integrity,
        )

    def _make_strategy(self) -> Any:
        self._strategy = TorchDistSaveShardedStrategy()
        if self.config.checkpoint.fully_parallel_save:
            group = parallel_state.get_data_parallel_group(with_context_parallel=True)
            self._strategy = FullyParallelSaveStrategyWrapper(self._strategy, group)
        return self._strategy

    def _commit(self, partial: Path, progress: Progress) -> None:
        """All ranks have written. UserError on all of them if rank 0 does not see what the others wrote."""
        self._check_whole(partial)

        def act() -> None:
            self.travels(partial)
            torch.save(_train_state(progress), partial / TRAIN_STATE)
            target = iterations.commit(partial, iteration=progress.iteration)
            iterations.prune(target, keep=self.config.checkpoint.keep_last)

        on_first_rank(act)
        self.last_good = partial.with_name(iteration_folder(progress.iteration))
        self.say(f"saved {self.last_good}")

    def _check_whole(self, partial: Path) -> None:
        lacking = from_first_rank(lambda: iterations.lacking(partial))
        if lacking:
            raise UserError(
                f"`{partial}` lacks `{lacking[0]}`, which another rank has written: hosts do not share `checkpoint.save`; "
                f"{self.standing}",
                hint="name a folder of a file system that all hosts share, by its absolute path",
            )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """What the disk says against a save, as one error on all ranks."""
        try:
            yield
        except (CheckpointException, ImportError, OSError) as error:
            assert self._writing is not None
            raise causes.not_saved(error, self._writing, standing=self.standing) from error

    @property
    def standing(self) -> str:
        """Which checkpoint there is to go back to, for messages."""
        return f"the last good checkpoint is `{self.last_good}`" if self.last_good else "no checkpoint was saved yet"

    def poll(self) -> None:
        """Finish an asynchronous save that has been written. All ranks call this at the same steps."""
        self._finalize(blocking=False)

    def finish(self) -> None:
        """Wait for an asynchronous save."""
        self._finalize(blocking=True)

    def _finalize(self, *, blocking: bool) -> None:
        if self._queue.get_num_unfinalized_calls():
            with self._explained():
                self._queue.maybe_finalize_async_calls(blocking=blocking)

    def close(self) -> None:
        """Let go of the writer; what it has not finished stays a leftover."""
        for call in self._queue.async_calls:
            call.async_caller.close(abort=True)


def _train_state(progress: Progress) -> dict[str, torch.Tensor]:
    """Megatron-Bridge's record of progress."""
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


def content(config: RunConfig) -> dict[str, Any]:
    """What megatron-core's modules and optimizers are told of how to lay out their state."""
    return {
        **(adapters.CONTENT if config.peft is not None else {}),
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "distrib_optim_sharding_type": config.checkpoint.optim_sharding,
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def state(parts: Parts, config: RunConfig, *, metadata: dict[str, Any], loading: bool, rng: bool = True) -> dict[str, Any]:
    """Everything a checkpoint holds, as megatron-core's sharded state dict."""
    names = ["model"] if len(parts.chunks) == 1 else [f"model{number}" for number in range(len(parts.chunks))]
    weights = {name: _weights(unwrap(chunk), config, metadata) for name, chunk in zip(names, parts.chunks, strict=True)}
    found: dict[str, Any] = {**weights, "checkpoint_version": 3.0, "iteration": parts.progress.iteration}
    if config.checkpoint.save_optim:
        with bucket_padding.left_out(parts.optimizer, dict(weights), metadata):
            found["optimizer"] = parts.optimizer.sharded_state_dict(dict(weights), is_loading=loading, metadata=metadata)
    if config.checkpoint.save_rng and rng:
        found["rng_state"] = _rng_object()
    if not loading:
        found["opt_param_scheduler"] = parts.scheduler.state_dict()
        found["mbtrain"] = {
            "progress": asdict(parts.progress),
            "layout": layout(),
            "optimizer": optim.kind(parts.optimizer),
            "data": data_identity(config),
        }
    return found


def _weights(chunk: Any, config: RunConfig, metadata: dict[str, Any]) -> dict[str, Any]:
    whole = chunk.sharded_state_dict(metadata=metadata)
    return whole if config.peft is None else adapters.only_trained(whole, chunk)


def layout() -> dict[str, int]:
    """Parallel sizes: random states mean something only where these are the same."""
    return {
        "TP": parallel_state.get_tensor_model_parallel_world_size(),
        "PP": parallel_state.get_pipeline_model_parallel_world_size(),
        "DP": parallel_state.get_data_parallel_world_size(),
        "CP": parallel_state.get_context_parallel_world_size(),
        "EP": parallel_state.get_expert_model_parallel_world_size(),
        "ETP": parallel_state.get_expert_tensor_parallel_world_size(),
    }


def _saved_layout(ours: dict[str, Any]) -> dict[str, int]:
    """Earlier versions saved TP, PP and DP alone, and of experts' random numbers those of one rank for all."""
    saved = ours["layout"]
    return saved if isinstance(saved, dict) else dict(zip(layout(), saved, strict=False))


def _same_layout(saved: dict[str, int]) -> bool:
    now = layout()
    return saved == now or (len(saved) < len(now) and saved.items() <= now.items() and not _experts_differ())


def _experts_differ() -> bool:
    """Do data-parallel ranks hold different (parts of) experts?"""
    now = layout()
    return now["EP"] > 1 or now["ETP"] != now["TP"]


def _shown(sizes: dict[str, int]) -> str:
    """`TP 2, PP 1, DP 4`; of the rarer sizes those that are not 1."""
    return ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1 or name in ("TP", "PP", "DP"))


def data_identity(config: RunConfig) -> dict[str, Any]:
    """What decides which tokens a sample number stands for."""
    names = ("sequence_length", "blend", "blend_per_split", "split", "random_seed", "path", "validation_path", "test_path")
    of_examples = ("packed", "pad_to_multiple_of", "chat_template", "prompt_template", "learn", "ignore_fields")
    return {name: getattr(config.dataset, name, None) for name in (*names, *of_examples)}


def _rng_object() -> ShardedObject:
    """Random states per pipeline and tensor-parallel rank. Data-parallel ranks share them, unless they hold different experts,
    which draw numbers of their own: then each rank saves its own."""
    sizes, place, replica = [], [], parallel_state.get_data_parallel_rank(with_context_parallel=True)
    sizes += [parallel_state.get_pipeline_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_world_size()]
    place += [parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_tensor_model_parallel_rank()]
    if _experts_differ():
        sizes.append(parallel_state.get_data_parallel_world_size(with_context_parallel=True))
        place.append(replica)
        replica = 0
    return ShardedObject("rng_state", [random_states.capture()], tuple(sizes), tuple(place), replica_id=replica)


def resume(parts: Parts, config: RunConfig, folder: Path, *, say: Callable[[str], None]) -> None:
    """Weights, optimizer, schedule, progress and random states of a checkpoint, into a run of any layout.

    Raises UserError where the checkpoint was not written by this trainer, or lacks what the run needs.
    """
    common = dist_checkpointing.load_common_state_dict(str(folder))
    ours = common.get("mbtrain")
    if ours is None:
        raise UserError(
            f"`{folder}` holds weights, but no run of this trainer to resume",
            hint=f"start from its weights with `checkpoint.pretrained_checkpoint={folder.parent}`",
        )
    same_layout = _same_layout(_saved_layout(ours))
    metadata = {**content(config), **common.get("content_metadata", {})}
    if config.checkpoint.save_optim:
        _check_optimizer(parts, ours, metadata["distrib_optim_sharding_type"], folder)
    optim.allocate_state(parts.optimizer)
    wanted = state(parts, config, metadata=metadata, loading=True, rng=same_layout)
    loaded = _load(wanted, folder, config)
    for number, chunk in enumerate(parts.chunks):
        weights = loaded["model" if len(parts.chunks) == 1 else f"model{number}"]
        if config.peft is None:
            with fp8_states.safe_unpickling():
                unwrap(chunk).load_state_dict(weights)
        else:
            adapters.put(chunk, weights)
    if "optimizer" in loaded:
        optim.keep_settings(parts.optimizer, loaded["optimizer"])
        sharding = metadata["distrib_optim_sharding_type"]
        checked = masters.held_against_weights(parts.chunks, parts.optimizer, config, folder, sharding=sharding, say=say)
        with checked, optim.steps_apart(parts.optimizer), torch.no_grad():
            parts.optimizer.load_state_dict(loaded["optimizer"])
    else:
        parts.optimizer.reload_model_params()
    for name, value in ours["progress"].items():
        setattr(parts.progress, name, value)
    # Not `opt_param_scheduler`'s own count, which earlier versions kept in samples.
    parts.scheduler.step(parts.progress.iteration - parts.progress.skipped_steps)
    if "rng_state" in loaded:
        random_states.restore(loaded["rng_state"][0])
    _tell(ours, config, folder, same_layout=same_layout, say=say)


def _load(wanted: dict[str, Any], folder: Path, config: RunConfig) -> dict[str, Any]:
    try:
        return dist_checkpointing.load(
            wanted, str(folder), strict=StrictHandling.RAISE_UNEXPECTED, verify_integrity=config.checkpoint.verify_integrity
        )
    except (dist_checkpointing.core.CheckpointingException, CheckpointException, ValueError) as error:
        raise causes.not_resumed(error, wanted, folder) from error


def _check_optimizer(parts: Parts, ours: dict[str, Any], sharding: str, folder: Path) -> None:
    """Can this run's optimizer take the state that was saved?"""
    if ours["optimizer"] != optim.kind(parts.optimizer):
        raise UserError(
            f"`{folder}` was saved by megatron-core's `{ours['optimizer']}`, this run has `{optim.kind(parts.optimizer)}`",
            hint="resume with `ddp.use_distributed_optimizer` and `mixed_precision` as they were, or start from the weights "
            f"alone: `checkpoint.pretrained_checkpoint={folder.parent}` with another `checkpoint.save`",
        )
    saved, now = _saved_layout(ours), layout()
    if sharding == "dp_reshardable" and (saved["TP"], saved["PP"]) != (now["TP"], now["PP"]):
        raise UserError(
            f"`{folder}` was saved `dp_reshardable` at TP {saved['TP']}, PP {saved['PP']}; this run has TP {now['TP']}, "
            f"PP {now['PP']}",
            hint="resume at the same TP and PP, or save with `checkpoint.optim_sharding=fully_reshardable`",
        )


def _tell(ours: dict[str, Any], config: RunConfig, folder: Path, *, same_layout: bool, say: Callable[[str], None]) -> None:
    progress = ours["progress"]
    say(f"resumed {folder}: step {progress['iteration']}, {progress['consumed_samples']} samples consumed")
    if not same_layout:
        say(f"note: saved at {_shown(_saved_layout(ours))}; now {_shown(layout())}: random numbers start anew")
    for name, value in data_identity(config).items():
        if ours["data"].get(name, value) != value:  # checkpoints from before a setting was there do not say it
            say(f"note: `dataset.{name}` was {ours['data'].get(name)}, now {value}: the samples to come are others")
