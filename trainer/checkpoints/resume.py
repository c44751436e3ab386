"""Resume a run from a checkpoint, at any layout. Which checkpoint that is, `resume_point` decides."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException

from formats.errors import UserError
from trainer import optim, schedule
from trainer.checkpoints import adapters, causes, fp8_states, masters, optimizer_parts, other_layout, random_states, state_dict
from trainer.checkpoints.state_dict import Parts
from trainer.config import RunConfig
from trainer.model import unwrap


def resume(parts: Parts, config: RunConfig, folder: Path, *, say: Callable[[str], None]) -> None:
    """Load weights, optimizer, schedule, progress and random states of a checkpoint into `parts`. All ranks call this.

    Raises UserError if the checkpoint was not written by this trainer, or lacks what the run needs.
    """
    common = dist_checkpointing.load_common_state_dict(str(folder))
    saved = common.get("mbtrain")
    if saved is None:
        raise UserError(
            f"`{folder}` holds weights, but no run of this trainer to resume",
            hint=f"start from its weights with `checkpoint.pretrained_checkpoint={folder.parent}`",
        )
    same_layout = _is_same_layout(_saved_layout(saved)) and saved.get("random_states", True)
    metadata = {**state_dict.content_metadata(config.checkpoint, peft=config.peft), **common.get("content_metadata", {})}
    sharding = metadata["distrib_optim_sharding_type"]
    if config.checkpoint.save_optim:
        _check_optimizer(parts, saved, sharding, folder)
    optim.allocate_state(parts.optimizer)
    names = other_layout.names_of(folder, config.model, peft=config.peft, sharding=sharding)
    sharded_state = state_dict.state_dict(parts, config, metadata=metadata, loading=True, rng=same_layout, names=names)
    loaded = _load(sharded_state, folder, verify_integrity=config.checkpoint.verify_integrity)
    _take_weights(parts.chunks, loaded, config.peft)
    if "optimizer" in loaded:
        loaded["optimizer"] = optimizer_parts.fit(optim.each(parts.optimizer), loaded["optimizer"], common.get("optimizer", {}))
    _take_optimizer(parts, loaded, folder, peft=config.peft, sharding=sharding, say=say)
    for name, value in saved["progress"].items():
        setattr(parts.progress, name, value)
    schedule.resume(parts.scheduler, iteration=parts.progress.iteration, skipped_steps=parts.progress.skipped_steps)
    if "rng_state" in loaded:
        random_states.restore(loaded["rng_state"][0])
    if names is not None:
        say(f"note: `{folder}` was saved in the layout `{'hybrid' if names.hybrid else 'gpt'}`")
    _report(saved, config.dataset, folder, same_layout=same_layout, say=say)


def _load(sharded_state: dict[str, Any], folder: Path, *, verify_integrity: bool) -> dict[str, Any]:
    try:
        return dist_checkpointing.load(
            sharded_state, str(folder), strict=StrictHandling.RAISE_UNEXPECTED, verify_integrity=verify_integrity
        )
    except (dist_checkpointing.core.CheckpointingException, CheckpointException, ValueError) as error:
        raise causes.not_resumed(error, sharded_state, folder) from error


def _take_weights(chunks: list[Any], loaded: dict[str, Any], peft: Any) -> None:
    for name, chunk in zip(state_dict.chunk_names(chunks), chunks, strict=True):
        if peft is None:
            with fp8_states.safe_unpickling():
                unwrap(chunk).load_state_dict(loaded[name])
        else:
            adapters.put(chunk, loaded[name])


def _take_optimizer(
    parts: Parts, loaded: dict[str, Any], folder: Path, *, peft: Any, sharding: str, say: Callable[[str], None]
) -> None:
    """Load the optimizer's state, with this run's settings. Without a saved state, masters are made from the weights."""
    if "optimizer" not in loaded:
        parts.optimizer.reload_model_params()
        return
    optim.keep_settings(parts.optimizer, loaded["optimizer"])
    compared = masters.compared_with_weights(parts.chunks, parts.optimizer, folder, peft=peft, sharding=sharding, say=say)
    with compared, optim.steps_apart(parts.optimizer), torch.no_grad():
        parts.optimizer.load_state_dict(loaded["optimizer"])


def _check_optimizer(parts: Parts, saved: dict[str, Any], sharding: str, folder: Path) -> None:
    """Raise UserError if this run's optimizer cannot load the saved state."""
    if saved["optimizer"] != optim.kind(parts.optimizer):
        raise UserError(
            f"`{folder}` was saved by megatron-core's `{saved['optimizer']}`, this run has `{optim.kind(parts.optimizer)}`",
            hint="resume with `ddp.use_distributed_optimizer` and `mixed_precision` as they were, or start from the weights "
            f"alone: `checkpoint.pretrained_checkpoint={folder.parent}` with another `checkpoint.save`",
        )
    before, current = ({**_NO_EXPERTS, **sizes} for sizes in (_saved_layout(saved), state_dict.layout()))
    differ = [name for name in ("TP", "PP", "EP") if before[name] != current[name]]
    if sharding == "dp_reshardable" and differ:
        names = [name for name in ("TP", "PP", "EP") if name != "EP" or name in differ]
        saved_text, current_text = (", ".join(f"{name} {sizes[name]}" for name in names) for sizes in (before, current))
        raise UserError(
            f"`{folder}` was saved `dp_reshardable` at {saved_text}; this run has {current_text}",
            hint=f"resume at the same {' and '.join(names)}, or save with `checkpoint.optim_sharding=fully_reshardable`",
        )


_NO_EXPERTS = {"EP": 1}
"""What earlier versions did not save."""


def _saved_layout(saved: dict[str, Any]) -> dict[str, int]:
    """Return the sizes at which a checkpoint was saved. Earlier versions saved TP, PP and DP alone, and of the random numbers of
    experts those of one rank for all."""
    sizes = saved["layout"]
    return sizes if isinstance(sizes, dict) else dict(zip(state_dict.layout(), sizes, strict=False))


def _is_same_layout(saved: dict[str, int]) -> bool:
    current = state_dict.layout()
    return saved == current or (
        len(saved) < len(current) and saved.items() <= current.items() and not state_dict.experts_differ()
    )


def _format_layout(sizes: dict[str, int]) -> str:
    """Format as `TP 2, PP 1, DP 4`; other sizes are named where they are not 1."""
    return ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1 or name in ("TP", "PP", "DP"))


def _report(saved: dict[str, Any], dataset: Any, folder: Path, *, same_layout: bool, say: Callable[[str], None]) -> None:
    """Print where the run goes on, and what is not as it was."""
    progress = saved["progress"]
    say(f"resumed {folder}: step {progress['iteration']}, {progress['consumed_samples']} samples consumed")
    if not same_layout:
        before, current = _format_layout(_saved_layout(saved)), _format_layout(state_dict.layout())
        say(f"note: saved at {before}; now {current}: random numbers start anew")
    for name, value in state_dict.data_identity(dataset).items():
        if saved["data"].get(name, value) != value:  # checkpoints from before a setting was there do not say it
            say(f"note: `dataset.{name}` was {saved['data'].get(name)}, now {value}: the samples to come are others")
