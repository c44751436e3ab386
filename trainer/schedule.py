"""The schedule of learning rate and weight decay: megatron-core's, in applied steps.

Which rate a step has does not depend on batch sizes, so a resumed run may change them. (Megatron-LM counts samples.)
"""

from __future__ import annotations

from typing import Any

from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, get_canonical_lr_for_logging

from trainer.config import SchedulerConfig


def make_scheduler(
    optimizer: Any, config: OptimizerConfig, schedule: SchedulerConfig, *, train_iters: int
) -> OptimizerParamScheduler:
    """Return the scheduler of a run of `train_iters` steps, before its first step."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=schedule.lr_warmup_init,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=schedule.lr_warmup_iters,
        lr_decay_steps=schedule.lr_decay_iters,
        lr_decay_style=schedule.lr_decay_style,
        start_wd=schedule.start_weight_decay,
        end_wd=schedule.end_weight_decay,
        wd_incr_steps=train_iters,
        wd_incr_style=schedule.weight_decay_incr_style,
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
        wsd_decay_steps=schedule.lr_wsd_decay_iters,
        lr_wsd_decay_style=schedule.lr_wsd_decay_style,
    )


def learning_rate(optimizer: Any) -> float:
    """Return the rate of the step that follows, for the log: that of most parameters."""
    return get_canonical_lr_for_logging(optimizer.param_groups) or 0.0


def resume(scheduler: OptimizerParamScheduler, *, iteration: int, skipped_steps: int) -> None:
    """Advance a new scheduler to step `iteration`, of which `skipped_steps` changed nothing.

    The count in a checkpoint's `opt_param_scheduler` is not used: earlier versions counted samples.
    """
    scheduler.step(iteration - skipped_steps)
