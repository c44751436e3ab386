"""What a checkpoint holds of a run, as megatron-core's sharded state dict.

model, model0 …      weights; with `peft`, those that are trained
optimizer            masters and moments (`checkpoint.save_optim`)
rng_state            random states of each rank that draws its own (`checkpoint.save_rng`)
opt_param_scheduler  the schedule
mbtrain              progress, layout, class of optimizer, and what decides the order of samples
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject

from trainer import optim
from trainer.checkpoints import adapters, bucket_padding, random_states
from trainer.checkpoints.other_layout import Names
from trainer.config import CheckpointConfig, RunConfig
from trainer.model import unwrap


@dataclass
class Progress:
    """The steps and samples of a run so far: what a resumed one goes on from, beside tensors."""

    iteration: int = 0
    """Optimizer steps, those that were skipped included."""

    consumed_samples: int = 0
    skipped_steps: int = 0
    """Steps of `iteration` that changed nothing, because fp16 gradients overflowed. The schedule counts the others."""

    interval: dict[str, Any] = field(default_factory=dict)
    """The sums since the last logged line (`trainer.logging.metrics.Interval.state_dict`)."""


@dataclass
class Parts:
    """What a checkpoint holds of a run."""

    chunks: list[Any]
    """Wrapped model chunks."""

    optimizer: Any
    scheduler: Any
    progress: Progress


def content_metadata(checkpoint: CheckpointConfig, *, peft: Any) -> dict[str, Any]:
    """Return the options that megatron-core's modules and optimizers take for the layout of their state."""
    return {
        **(adapters.CONTENT if peft is not None else {}),
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "distrib_optim_sharding_type": checkpoint.optim_sharding,
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def state_dict(
    parts: Parts, config: RunConfig, *, metadata: dict[str, Any], loading: bool, rng: bool = True, names: Names | None = None
) -> dict[str, Any]:
    """Return the sharded state dict of this rank; `loading` leaves out what is read without a template. All ranks call this.

    `names` are those of a checkpoint in another layout than the model's.
    """
    weights = {
        name: _weights(unwrap(chunk), config.peft, metadata)
        for name, chunk in zip(chunk_names(parts.chunks), parts.chunks, strict=True)
    }
    if names is not None:
        weights = {name: names.apply(state) for name, state in weights.items()}
    state: dict[str, Any] = {**weights, "checkpoint_version": 3.0, "iteration": parts.progress.iteration}
    if config.checkpoint.save_optim:
        with bucket_padding.padding_excluded(parts.optimizer, dict(weights), metadata):
            state["optimizer"] = parts.optimizer.sharded_state_dict(dict(weights), is_loading=loading, metadata=metadata)
    if config.checkpoint.save_rng and rng:
        state["rng_state"] = _rng_object()
    if not loading:
        state["opt_param_scheduler"] = parts.scheduler.state_dict()
        state["mbtrain"] = {
            "progress": asdict(parts.progress),
            "layout": layout(),
            "optimizer": optim.kind(parts.optimizer),
            "data": data_identity(config.dataset),
        }
    return state


def chunk_names(chunks: list[Any]) -> list[str]:
    """Return the key of each model chunk: `model`, or `model0`, `model1` … of several."""
    return ["model"] if len(chunks) == 1 else [f"model{number}" for number in range(len(chunks))]


def _weights(chunk: Any, peft: Any, metadata: dict[str, Any]) -> dict[str, Any]:
    weights = chunk.sharded_state_dict(metadata=metadata)
    return weights if peft is None else adapters.only_trained(weights, chunk)


def layout() -> dict[str, int]:
    """Return the parallel sizes: random states are valid only where these are the same."""
    return {
        "TP": parallel_state.get_tensor_model_parallel_world_size(),
        "PP": parallel_state.get_pipeline_model_parallel_world_size(),
        "DP": parallel_state.get_data_parallel_world_size(),
        "CP": parallel_state.get_context_parallel_world_size(),
        "EP": parallel_state.get_expert_model_parallel_world_size(),
        "ETP": parallel_state.get_expert_tensor_parallel_world_size(),
    }


def experts_differ() -> bool:
    """Return whether data-parallel ranks hold different experts, or different parts of them."""
    sizes = layout()
    return sizes["EP"] > 1 or sizes["ETP"] != sizes["TP"]


def data_identity(dataset: Any) -> dict[str, Any]:
    """Return the settings that decide which tokens a sample number stands for; None for those that a dataset section lacks."""
    names = ("sequence_length", "blend", "blend_per_split", "split", "random_seed", "path", "validation_path", "test_path")
    of_examples = ("packed", "pad_to_multiple_of", "chat_template", "prompt_template", "learn", "ignore_fields")
    return {name: getattr(dataset, name, None) for name in (*names, *of_examples)}


def _rng_object() -> ShardedObject:
    """Return the random states, one per pipeline and tensor-parallel rank.

    Data-parallel ranks share them, unless they hold different experts, which draw numbers of their own: then each rank saves its
    own.
    """
    sizes = [parallel_state.get_pipeline_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_world_size()]
    ranks = [parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_tensor_model_parallel_rank()]
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    if experts_differ():
        sizes.append(parallel_state.get_data_parallel_world_size(with_context_parallel=True))
        ranks.append(replica)
        replica = 0
    return ShardedObject("rng_state", [random_states.capture()], tuple(sizes), tuple(ranks), replica_id=replica)
