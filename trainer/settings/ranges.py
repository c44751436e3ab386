"""The range of each numeric setting, whatever the other settings are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from trainer.config import RunConfig
from trainer.settings.rules import Rule, enforce

Row = tuple[Callable[[float], bool], str, str, str]
"""Is the number allowed; the range in words; the hint; the settings, separated by spaces."""

_RANGES: tuple[Row, ...] = (
    (
        lambda number: number >= 1,
        "at least `1`",
        "set `{}=1` or more",
        """model.tensor_model_parallel_size model.pipeline_model_parallel_size model.context_parallel_size
        model.virtual_pipeline_model_parallel_size model.expert_model_parallel_size model.expert_tensor_parallel_size
        train.train_iters train.num_epochs train.global_batch_size train.micro_batch_size train.exit_interval
        validation.eval_interval logger.log_interval checkpoint.save_interval checkpoint.keep_last
        profiling.profile_step_start diagnostics.check_weight_hash_across_dp_replicas_interval
        diagnostics.straggler_minmax_count dataset.sequence_length dataset.pad_to_multiple_of""",
    ),
    (
        lambda number: number >= 0,
        "at least `0`",
        "set `{}=0` or more",
        "train.manual_gc_interval validation.eval_iters scheduler.lr_warmup_iters dataset.num_workers",
    ),
    (
        lambda number: 0 <= number < math.inf,
        "at least `0`, and finite",
        "choose a finite number of at least 0",
        "optimizer.lr optimizer.clip_grad optimizer.weight_decay optimizer.adam_eps",
    ),
    (
        lambda number: 0 <= number < 1,
        "at least `0` and less than `1`",
        "choose a number of at least 0 and less than 1",
        """optimizer.adam_beta1 optimizer.adam_beta2 optimizer.sgd_momentum scheduler.lr_warmup_fraction
        model.hidden_dropout model.attention_dropout""",
    ),
    (
        lambda number: 0 < number < math.inf,
        "greater than `0`, and finite",
        "choose a finite number greater than 0",
        """dist.timeout_minutes dist.step_timeout_minutes train.exit_duration_in_mins
        checkpoint.save_interval_in_mins""",
    ),
)
_OF_A_SHAPE = "model.seq_length model.num_layers model.make_vocab_size_divisible_by"
"""At least 1 in a GPT-shaped model. A model of the user's own may leave them at 0."""


def check(config: RunConfig) -> None:
    """Raise UserError for the first number out of its range. A setting that is None or that a section lacks passes."""
    enforce(_rules(config))


def _rules(config: RunConfig) -> Iterator[Rule]:
    for allowed, words, hint, settings in _rows(config):
        for setting in settings.split():
            number = _value(config, setting)
            broken = number is not None and not allowed(number)
            yield broken, f"`{setting}` is `{number}`; it must be {words}", hint.format(setting)


def _rows(config: RunConfig) -> Iterator[Row]:
    yield from _RANGES
    if hasattr(config.model, "make_vocab_size_divisible_by"):
        yield (*_RANGES[0][:3], _OF_A_SHAPE)
    first = config.profiling.profile_step_start
    yield lambda step: step >= first, f"at least `{first}`", f"set `{{}}={first}` or more", "profiling.profile_step_end"
    # Each pipeline stage adds 100 to the seed, of which numpy takes 32 bits.
    end = 2**32 - 100 * (getattr(config.model, "pipeline_model_parallel_size", None) or 1)
    yield lambda seed: 0 <= seed < end, f"at least `0` and less than `{end}`", "choose another seed", "rng.seed"


def _value(config: RunConfig, setting: str) -> Any:
    section, _, name = setting.partition(".")
    return getattr(getattr(config, section), name, None)
