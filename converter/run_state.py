"""What a reshard keeps of a training run: the optimizer's state, the schedule, settings, progress and random numbers.

Optimizer state follows the weights: each of its tensors is cut and named as the weight it belongs to. It is always written as
`fully_reshardable`, which megatron-core 0.15 and later load at any layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from converter.masters import ProvenMasters, are_quantized
from converter.plan import TensorPlan
from formats import random_states
from formats.errors import UserError
from formats.iterations import TRAIN_STATE
from formats.megatron_reader import MegatronReader
from formats.optimizer.open import open_optimizer
from formats.optimizer.state import EXP_AVG, FULLY_RESHARDABLE, LOSS_SCALE, MASTER, OptimizerState
from formats.pickles import Record
from formats.random_states import RandomStates
from formats.spec import DTYPES, JoinedReader, Reader, RenamedReader, TensorSpec
from formats.torch_dist import TorchDistReader
from formats.torch_dist_writer import STATE, RunState

_KEPT = (
    "args", "checkpoint_version", "iteration", "opt_param_scheduler", "num_floating_point_operations_so_far", "tokens", "mbtrain",
)  # fmt: skip
"""Fields of a common state that are kept. Others belong to single ranks, or to the program that wrote them."""

_OF_EXPERTS = "is_expert_parallel"
"""A hyper-parameter: is it of experts that have an optimizer of their own?"""

Group = Mapping[str, Any]
"""The hyper-parameters of a parameter group."""

_INSTEAD = "`--weights-only` leaves the state out: training can start from such a checkpoint, and not resume"


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """The optimizer's state of a checkpoint that is resharded."""

    checkpoint: MegatronReader
    """What it is read from."""

    optimizer: OptimizerState
    reader: Reader
    """Reads it, under the names that `fully_reshardable` gives it."""

    @staticmethod
    def of(checkpoint: MegatronReader, optimizer: OptimizerState) -> TrainingRun:
        """Return the run of a checkpoint with this state."""
        return TrainingRun(checkpoint, optimizer, state_reader(optimizer))


def open_run(reader: MegatronReader) -> TrainingRun | None:
    """Return what there is to resume in a checkpoint, None where that is nothing.

    Raises UserError for state that cannot be read, or that lacks the masters of some weights. Masters that do not round to their
    weights are found while they are read.
    """
    optimizer = open_optimizer(reader)
    if not optimizer:
        return None
    if not optimizer.groups:
        reason = reader.unread_trainer() if isinstance(reader, TorchDistReader) else ""
        raise UserError(
            f"`{reader.folder.label}` has optimizer state without the hyper-parameters of its groups"
            + (f": the state of NeMo's trainer is not read: {reason}" if reason else ""),
            hint=_INSTEAD,
        )
    optimizer = optimizer._replace(states={**optimizer.states, MASTER: _masters(reader, optimizer)})
    return TrainingRun.of(reader, optimizer)


def state_reader(optimizer: OptimizerState) -> Reader:
    """Return a reader of all optimizer state: `optimizer.state.exp_avg.WEIGHT`, …"""
    named = [
        RenamedReader(reader, {f"{STATE}{state}.{name}": name for name in reader.specs})
        for state, reader in optimizer.states.items()
    ]
    return JoinedReader(*named)


def _masters(reader: MegatronReader, optimizer: OptimizerState) -> Reader:
    """Return the masters; a weight in fp32 that has none of its own is its own."""
    stored = optimizer.states.get(MASTER)
    trained = optimizer.states[EXP_AVG].specs
    lacking = [name for name in trained if not stored or name not in stored.specs]
    other = [name for name in lacking if reader.specs[name].dtype != DTYPES["fp32"]]
    if other:
        raise UserError(
            f"{len(other)} of {len(trained)} trained weights have no fp32 master in the optimizer state, such as `{other[0]}`, "
            f"which is {reader.specs[other[0]].stored_dtype}",
            hint=_INSTEAD,
        )
    own = RenamedReader(reader, {name: name for name in lacking})
    if not stored:
        return own
    return JoinedReader(stored if are_quantized(reader) else ProvenMasters(stored, reader, instead=_INSTEAD), own)


def refuse_casts(weights: Iterable[TensorPlan]) -> None:
    """Raise UserError for weights in another dtype than their masters round to. Masters in fp32 that are the weights do."""
    for plan in weights:
        if plan.parts[0].dtype not in (plan.spec.dtype, DTYPES["fp32"]):
            raise UserError(
                f"`{plan.spec.name}` would be cast from {plan.parts[0].stored_dtype} to {plan.spec.stored_dtype}, beside the "
                "optimizer state of what it is",
                hint="leave `--dtype` out, or leave the state out with `--weights-only`",
            )


def state_plans(weights: Sequence[TensorPlan], run: TrainingRun) -> list[dict[str, TensorPlan]]:
    """Return for each state the plans of its tensors by the names of the weights: those of the weights under other names."""
    return [
        {
            plan.spec.name: _state_plan(plan, state, reader.specs[plan.parts[0].name])
            for plan in weights
            if plan.parts[0].name in reader.specs
        }
        for state, reader in run.optimizer.states.items()
    ]


def _state_plan(weight: TensorPlan, state: str, stored: TensorSpec) -> TensorPlan:
    """Return the plan of a tensor of optimizer state, which is stored under the name of its weight."""
    made = TensorSpec(f"{STATE}{state}.{weight.spec.name}", weight.spec.shape, stored.dtype)
    return replace(weight, spec=made, parts=(replace(stored, name=f"{STATE}{state}.{stored.name}"),))


def run_state(reader: MegatronReader, run: TrainingRun, sizes: Mapping[str, int], *, padded_vocab: int) -> RunState:
    """Return what of a run is beside its tensors, with these parallel sizes (`tp`, …) and rows of the vocabulary."""
    common = reader.common_state()
    kept = {name: common[name] for name in _KEPT if name in common}
    stored = random_states.open_random_states(run.checkpoint)
    states = {name: read() for name, read in stored.archives.items()} if stored and _fits(stored, sizes) else {}
    settings = {**_megatron_lm(sizes), "padded_vocab_size": padded_vocab, "no_save_rng": not states}
    return RunState(
        common={
            **{name: _with_sizes(value, sizes, settings, rng=bool(states)) for name, value in kept.items()},
            "optimizer": _common_optimizer(run.optimizer, apart=_experts_apart(sizes)),
        },
        random_states=states,
        train_state=reader.folder.get(TRAIN_STATE) if reader.folder.has(TRAIN_STATE) else b"",
    )


def notes_on_run(run: TrainingRun, sizes: Mapping[str, int]) -> Iterator[str]:
    """Yield what a user should know before resuming from a reshard."""
    if run.optimizer.kind != FULLY_RESHARDABLE:
        yield f"optimizer state becomes `{FULLY_RESHARDABLE}`, which a distributed optimizer of megatron-core 0.15 or later loads"
    if are_quantized(run.checkpoint):
        yield "fp32 masters were not compared with the weights, which were in FP8 or FP4 while they were trained"
    if "iteration" not in run.checkpoint.common_state() and not run.checkpoint.folder.has(TRAIN_STATE):
        yield "the step and the schedule are not read from this kind of checkpoint: training counts from step 0"
    elif run.checkpoint.settings:
        yield "the schedule of NeMo's trainer is not read: the settings of the run that goes on say how the learning rate does"
    if reason := _anew(run.checkpoint, sizes):
        yield f"random numbers start anew: {reason} (Megatron-LM: `--no-load-rng`)"


def _anew(reader: MegatronReader, sizes: Mapping[str, int]) -> str:
    """Return why the states of random number generators are left out; nothing where they are not."""
    if random_states.KEY not in reader.contents:
        return "the checkpoint does not hold their states"
    if sizes.get("ep", 1) > 1:
        return "`torch_dist` has no states for each of the ranks that divide experts"
    stored = random_states.open_random_states(reader)
    if not stored:
        return "their states are not read from this kind of checkpoint"
    return "" if _fits(stored, sizes) else "their states are of the ranks of another layout"


def _fits(stored: RandomStates, sizes: Mapping[str, int]) -> bool:
    """Are these states of the ranks of a layout? Ranks that divide experts draw numbers of their own."""
    return (stored.pp, stored.tp, stored.ep) == (sizes["pp"], sizes["tp"], 1) and sizes.get("ep", 1) == 1


def _experts_apart(sizes: Mapping[str, int]) -> bool:
    """Do experts have an optimizer of their own? In megatron-core they do where ranks divide them otherwise than all else."""
    return sizes.get("ep", 1) > 1 or sizes.get("etp", sizes["tp"]) != sizes["tp"]


def _common_optimizer(optimizer: OptimizerState, *, apart: bool) -> dict[Any, Any]:
    """Return the part of the common state that `fully_reshardable` keeps hyper-parameters in. `apart`: see `_experts_apart`."""
    loss_scale = {LOSS_SCALE: dict(optimizer.loss_scale)} if optimizer.loss_scale else {}
    each = [
        {"optimizer": {"param_groups": list(groups)}, "param_state_sharding_type": FULLY_RESHARDABLE, **loss_scale}
        for groups in _optimizers(optimizer.groups, apart=apart)
    ]
    return dict(enumerate(each)) if len(each) > 1 else each[0]


def _optimizers(groups: Sequence[Sequence[Group]], *, apart: bool) -> Sequence[Sequence[Group]]:
    """Return the groups of one optimizer, or of one and that of experts which are `apart`.

    megatron-core tells groups apart by their hyper-parameters, and passes over those that no weight of a run is in.
    """
    if apart == (len(groups) > 1):
        return groups
    if apart:
        return [[{**group, _OF_EXPERTS: experts} for group in groups[0]] for experts in (False, True)]
    together = [{**group, _OF_EXPERTS: False} for each in groups for group in each]
    return [[group for number, group in enumerate(together) if group not in together[:number]]]


def _megatron_lm(sizes: Mapping[str, int]) -> dict[str, Any]:
    """Return the parallel sizes under the names that Megatron-LM's `args` have."""
    return {
        "tensor_model_parallel_size": sizes["tp"],
        "pipeline_model_parallel_size": sizes["pp"],
        "virtual_pipeline_model_parallel_size": sizes["vpp"] if sizes["vpp"] > 1 else None,
        "expert_model_parallel_size": sizes.get("ep", 1),
        "expert_tensor_parallel_size": sizes.get("etp", sizes["tp"]),
        "use_distributed_optimizer": True,
        "ckpt_format": "torch_dist",
    }


def _with_sizes(value: Any, sizes: Mapping[str, int], settings: Mapping[str, Any], *, rng: bool) -> Any:
    """Return a field of the common state with the new sizes: of Megatron-LM's `args` and of mbtrain's record."""
    match value:
        case Record(state={**fields}):
            # Fields that an older `args` has not, too: Megatron-LM asks for random states unless `no_save_rng` says otherwise.
            return Record(value.kind, value.args, {**fields, **settings}, value.made_by_call)
        case {"layout": {**before}, **fields}:
            now = {"TP": sizes["tp"], "PP": sizes["pp"], "EP": sizes.get("ep", 1), "ETP": sizes.get("etp", sizes["tp"])}
            return {**fields, "layout": {**before, **now}, "optimizer": "DistributedOptimizer", "random_states": rng}
        case _:
            return value
