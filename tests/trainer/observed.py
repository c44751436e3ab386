"""What a run is made of and does, so that two runs can be compared: what a setting changes, if it changes anything.

Each run is two steps of a tiny model on the CPU. Several ranks are one process of a process group that torch makes up: what the
others would send is not there, and what this rank builds, computes and sends is.
"""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from formats.errors import UserError
from tests.trainer import small
from trainer.config import RunConfig
from trainer.model import GPTModelProvider
from trainer.settings.defaults import note_explicit

STEPS = 2
PARTS = ("model", "optimizer", "buffers", "step", "operations")
"""What counts as a change. `attributes`, what each module keeps of its settings, counts on GPUs alone: there, what a module of
Transformer Engine does with them is done by kernels that torch sees nothing of."""


class Operations(TorchDispatchMode):
    """Notes torch's operations in their order, those of backward passes and of process groups included."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.noted.append(str(function))
        return function(*args, **(kwargs or {}))


@dataclass
class Observer(small.History):
    """A callback that notes what there is before the first step, and after the last."""

    seen: dict[str, Any] = field(default_factory=dict)

    def on_start(self, run: Any) -> None:
        self.seen["model"] = [str(chunk) for chunk in run.chunks], _tensors(run)
        self.seen["attributes"] = [
            {name: value for name, value in vars(module).items() if isinstance(value, (bool, int, float, str))}
            for chunk in run.chunks
            for module in chunk.modules()
        ]
        self.seen["optimizer"] = _optimizer(run.parts.optimizer)
        self.seen["buffers"] = [
            (buffer.param_dtype, buffer.grad_dtype, len(buffer.buckets), buffer.numel, buffer.gradient_scaling_factor)
            for chunk in run.chunks
            for buffer in chunk.buffers
        ]

    def on_end(self, run: Any) -> None:
        self.seen["step"] = self.losses, self.grad_norms, self.rates, _tensors(run), _optimizer(run.parts.optimizer)


def _tensors(run: Any) -> list[tuple[Any, ...]]:
    named = [pair for chunk in run.chunks for pair in (*chunk.named_parameters(), *chunk.named_buffers())]
    return [(name, tuple(tensor.shape), tensor.dtype, tensor.double().sum().item()) for name, tensor in named]


def _optimizer(outer: Any) -> list[Any]:
    states: list[Any] = []
    for optimizer in getattr(outer, "chained_optimizers", [outer]):
        groups = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
        scaler = getattr(optimizer, "grad_scaler", None)
        states.append(
            (type(optimizer).__name__, type(optimizer.optimizer).__name__, repr(groups), scaler and scaler.state_dict())
        )
    return states


def settings(**changes: Any) -> RunConfig:
    """A run of two steps of a tiny model, in fp32 on the CPU; `changes` are settings by their names, with a dot."""
    model = GPTModelProvider(
        num_layers=2, hidden_size=16, num_attention_heads=2, num_query_groups=1, ffn_hidden_size=32, vocab_size=64, seq_length=16,
        make_vocab_size_divisible_by=8, normalization="RMSNorm", gated_linear_unit=True, add_bias_linear=False,
        activation_func=torch.nn.functional.silu, hidden_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    config = RunConfig(model=model, mixed_precision="fp32")
    config.dataset.sequence_length, config.dataset.num_workers = 16, 0
    config.train.train_iters, config.train.global_batch_size, config.train.micro_batch_size = STEPS, 2, 1
    config.train.manual_gc_interval, config.validation.eval_iters = 0, 0
    config.optimizer.lr, config.dist.device = 1e-2, "cpu"
    for name, value in changes.items():
        section, _, setting = name.partition(".")
        part = getattr(config, section) if setting else config
        assert hasattr(part, setting or section), name
        setattr(part, setting or section, value)
        note_explicit(part, setting or section)
    return config


@contextmanager
def made_up(world: int) -> Iterator[None]:
    """This process as rank 0 of `world`, the others of which are not there."""
    if world == 1:
        yield
        return

    from trainer import process_group
    from trainer.data import consistency

    start, group = dist.init_process_group, dist.new_group
    alone = {"rank": 0, "world_size": world, "store": dist.HashStore()}
    named = {"RANK": 0, "WORLD_SIZE": world, "LOCAL_RANK": 0, "MASTER_ADDR": "nowhere", "MASTER_PORT": 1}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in named.items():
            patch.setitem(os.environ, name, str(value))
        patch.setattr(dist, "init_process_group", lambda *_, **__: start("fake", **alone))
        patch.setattr(process_group, "_rendezvous", lambda _: (dist.HashStore(), 0))
        patch.setattr(consistency, "check_ranks", lambda *_: None)  # nobody else reads
        patch.setattr(dist, "new_group", lambda *args, **options: group(*args, **{**options, "backend": "fake"}))
        yield


def observe(changes: dict[str, Any], world: int = 1) -> dict[str, Any]:
    """Run on this rank. What was built, what was done, and what came of it, each by a name; or the error."""
    from trainer.loop import pretrain

    observer, operations = Observer(), Operations()
    try:
        with made_up(world), operations:
            pretrain(settings(**changes), callbacks=[observer])
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        _leave()
    return {**{part: observer.seen[part] for part in PARTS[:-1]}, "operations": operations.noted}


def observe_gpu(changes: dict[str, Any], _world: int) -> dict[str, Any]:
    """The same on this rank's GPU: its kernels and copies too (not calls of CUDA, which vary), its memory, and what each module
    keeps of its settings."""
    from torch.profiler import ProfilerActivity, profile

    from trainer.loop import pretrain

    observer = Observer()
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            pretrain(settings(**changes), callbacks=[observer])
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        _leave()
    kernels = {event.key: event.count for event in profiled.key_averages() if not re.match("cu(da)?[A-Z]", event.key)}
    return {**observer.seen, "kernels": kernels, "memory": torch.cuda.max_memory_allocated()}


def build(changes: dict[str, Any], world: int) -> dict[str, Any]:
    """What the first of `world` ranks builds, without memory; or the error."""
    from trainer import model, rehearsal
    from trainer.settings.resolve import resolve

    try:
        provider = resolve(settings(**changes), world_size=world, device="cpu").config.model
        with rehearsal.as_rank(0, world, provider):
            return {"model": [str(chunk) for chunk in model.shapes(provider)]}
    except UserError as error:
        return {"error": str(error)}


def _leave() -> None:
    """Let go of what a run that failed has left."""
    from megatron.core import num_microbatches_calculator, parallel_state

    num_microbatches_calculator.destroy_num_microbatches_calculator()
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


@dataclass(frozen=True)
class Trial:
    """Another value of a setting, what else is set both times, and how many ranks there are."""

    value: Any
    base: dict[str, Any] = field(default_factory=dict)
    world: int = 1


Look = Callable[[dict[str, Any], int], dict[str, Any]]
Leaves = dict[tuple[Any, ...], Any]
_VARIES, _ABSENT = object(), object()


def differences(trials: dict[str, Trial], look: Look = observe, before: int = 2, after: int = 1) -> dict[str, list[str]]:
    """For each setting: which parts of what `look` sees are other ones with its value than without; or the error.

    `before` and `after` are how many runs there are without and with it. What is not the same in all of them counts for nothing.
    """
    seen: dict[str, Leaves] = {}
    changed: dict[str, list[str]] = {}
    for setting, trial in trials.items():
        base = repr((trial.base, trial.world))
        if base not in seen:
            look(trial.base, trial.world)  # what a process does once is done
            seen[base] = _common([look(trial.base, trial.world) for _ in range(before)])
            assert ("error",) not in seen[base] or look is build, seen[base]  # some layouts can be built only with the value
        with_it = _common([look({**trial.base, setting: trial.value}, trial.world) for _ in range(after)])
        changed[setting] = [with_it["error",]] if ("error",) in with_it else _changed(seen[base], with_it)
    return changed


def _common(looks: list[dict[str, Any]]) -> Leaves:
    """Numbers, texts and types by their path; `_VARIES` where they are not the same in all runs."""
    runs = [dict(_leaves(look)) for look in looks]
    common: Leaves = {}
    for path in {path for run in runs for path in run}:
        values = [run.get(path, _ABSENT) for run in runs]
        common[path] = values[0] if all(value == values[0] for value in values) else _VARIES
    return common


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if not isinstance(value, (dict, list, tuple)):
        yield path, value
        return
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _leaves(item, (*path, key))


def _changed(before: Leaves, after: Leaves) -> list[str]:
    """Return the parts with a leaf that another one has taken the place of, or that is there on one side only."""
    pairs = {path: (before.get(path, _ABSENT), after.get(path, _ABSENT)) for path in {**before, **after}}
    return sorted({str(path[0]) for path, pair in pairs.items() if _VARIES not in pair and pair[0] != pair[1]} - {"error"})
