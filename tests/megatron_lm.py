"""Megatron-LM's own trainer on the CPU: it loads a checkpoint with all that a run resumes from, and takes training steps."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from tests.megatron_cpu import Shape

STEPS, TOKENS = 5, 16
"""Further training steps, and the length of a sequence."""


class Arguments(argparse.Namespace):
    """Megatron-LM's arguments; those that are not given are None."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


@dataclass(frozen=True)
class Run:
    """A model, its optimizer, and the schedule of its rates."""

    chunks: list[Any]
    optimizer: Any
    scheduler: Any
    arguments: Arguments


@dataclass(frozen=True)
class State:
    """What a rank goes on from."""

    iteration: int
    operations: float
    consumed_samples: int
    scheduler: dict[str, Any]
    groups: list[dict[str, Any]]
    """The hyper-parameters of the optimizer's groups."""

    tensors: dict[str, list[Any]]
    """Masters (`param`), moments and weights."""

    random_numbers: list[float]
    """The next of Python, of numpy, of torch, and of megatron-core's generator for tensor-parallel ranks."""


def resumed(_rank: int, shape: Shape, root: str) -> tuple[State, list[tuple[float, ...]]]:
    """Load a checkpoint with the arguments that it was saved with, but for the shape's layout, and train on. Fails if the
    checkpoint lacks anything. Answers what was loaded, and what each further step said."""
    from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
    from megatron.training import checkpointing, global_vars

    from trainer import cpu_backend
    from trainer.optim import allocate_state, steps_apart

    arguments = _arguments(shape, root)
    init_num_microbatches_calculator(0, None, arguments.global_batch_size, 1, arguments.data_parallel_size, False)
    timers = mock.patch.object(global_vars, "_GLOBAL_TIMERS", mock.MagicMock())
    with cpu_backend.activate(), timers, mock.patch.object(global_vars, "_GLOBAL_ARGS", arguments):
        run = _made(shape, arguments)
        allocate_state(run.optimizer)
        with steps_apart(run.optimizer):
            loaded = checkpointing.load_checkpoint(run.chunks, run.optimizer, run.scheduler, strict=True)
        return _state(run, *loaded), [_step(run, loaded[0] + number) for number in range(STEPS)]


def _arguments(shape: Shape, root: str) -> Arguments:
    import torch.distributed as dist
    from megatron.core import dist_checkpointing

    number = int(Path(root, "latest_checkpointed_iteration.txt").read_text())
    saved = dist_checkpointing.load_common_state_dict(f"{root}/iter_{number:07d}")["args"]
    copies = dist.get_world_size() // (shape.tp * shape.pp)
    return Arguments(**{
        **vars(saved), "load": root, "ckpt_format": "torch_dist", "use_dist_ckpt": True, "use_distributed_optimizer": True,
        "tensor_model_parallel_size": shape.tp, "pipeline_model_parallel_size": shape.pp, "data_parallel_size": copies,
        "world_size": dist.get_world_size(), "finetune": False, "ckpt_fully_parallel_load": False,
        "dist_ckpt_strictness": "raise_unexpected", "seq_length": TOKENS, "micro_batch_size": 1,
    })  # fmt: skip


def _made(shape: Shape, arguments: Arguments) -> Run:
    """A model that trains in bf16, its distributed optimizer, and a schedule that the checkpoint's replaces."""
    import torch
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.core.transformer.module import Float16Module

    from tests import megatron_cpu

    chunks = megatron_cpu.build(shape)
    for chunk in chunks:
        chunk.config.bf16, chunk.config.pipeline_dtype = True, torch.bfloat16
        if chunk.post_process:
            chunk.output_layer.gather_output = False  # a rank's loss is of its own part of the vocabulary
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    chunks = [DistributedDataParallel(chunk.config, ddp, Float16Module(chunk.config, chunk)) for chunk in chunks]
    rates = {"lr": arguments.lr, "min_lr": arguments.min_lr, "weight_decay": arguments.weight_decay}
    optimizer = get_megatron_optimizer(OptimizerConfig(bf16=True, use_distributed_optimizer=True, **rates), chunks)
    scheduler = OptimizerParamScheduler(
        optimizer, init_lr=0.0, max_lr=1.0, min_lr=0.5, lr_warmup_steps=0, lr_decay_steps=7, lr_decay_style="linear",
        start_wd=0.0, end_wd=0.0, wd_incr_steps=7, wd_incr_style="constant", use_checkpoint_opt_param_scheduler=True,
        override_opt_param_scheduler=False,
    )  # fmt: skip
    return Run(chunks, optimizer, scheduler, arguments)


def _state(run: Run, iteration: int, operations: float) -> State:
    inner = [part.optimizer for part in getattr(run.optimizer, "chained_optimizers", [run.optimizer])]
    groups = [group for part in inner for group in part.param_groups]
    states = [(master, part.state[master]) for part in inner for group in part.param_groups for master in group["params"]]
    tensors = {
        "param": [master for master, _ in states],
        **{name: [state[name] for _, state in states] for name in ("exp_avg", "exp_avg_sq")},
        "weights": [value for chunk in run.chunks for value in chunk.parameters()],
    }
    return State(
        iteration=iteration,
        operations=operations,
        consumed_samples=run.arguments.consumed_train_samples,
        scheduler=run.scheduler.state_dict(),
        groups=[{name: value for name, value in group.items() if name != "params"} for group in groups],
        tensors={name: [value.detach().clone() for value in values] for name, values in tensors.items()},
        random_numbers=_draw(),
    )


def _draw() -> list[float]:
    import random

    import numpy as np
    import torch
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    drawn, tracker = [random.random(), float(np.random.rand()), torch.rand(()).item()], get_cuda_rng_tracker()
    with tracker.fork() if tracker.is_initialized() else nullcontext():
        return [*drawn, torch.rand(()).item()]


def _step(run: Run, iteration: int) -> tuple[float, ...]:
    """Take a training step; answers the loss on the last stage, the norm of the gradients, and the rate of the next step."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.training import training

    config, forward_backward = run.chunks[0].config, get_forward_backward_func()
    config.finalize_model_grads_func, config.grad_scale_func = finalize_model_grads, run.optimizer.scale_loss
    losses, skipped, *_, norm, _, _ = training.train_step(
        _forward, [None] * len(run.chunks), run.chunks, run.optimizer, run.scheduler, config, forward_backward, iteration
    )
    assert not skipped
    return (*(value.item() for value in losses.values()), norm, run.optimizer.param_groups[0]["lr"])


def _forward(_data: Any, model: Any) -> tuple[Any, Any]:
    import torch

    tokens, positions = torch.arange(TOKENS + 1)[None] * 5 % 89, torch.arange(TOKENS)[None]
    mask = torch.triu(torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool), 1)
    output = model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:])
    return output, lambda losses: (losses.mean(), {"loss": losses.mean().detach()})
