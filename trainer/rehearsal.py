"""A run's model built beforehand, by one process that plays each of several: what megatron-core refuses only when it builds is
refused before processes start.

On the CPU, where it takes a fraction of a second and no memory; Transformer Engine's layers want a GPU to be built.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from trainer import device, model, parallel
from trainer.config import RunConfig
from trainer.model import GPTModelProvider
from trainer.settings import refused


def rehearse(config: RunConfig, *, world_size: int) -> None:
    """Build the chunks of the first and of the last of `world_size` ranks, on torch's meta device. UserError where
    megatron-core refuses the settings of the model.

    A model of the user's own is built by its own code, which may do more than that: it is left alone.
    """
    if not isinstance(config.model, GPTModelProvider) or dist.is_initialized():
        return
    for rank in sorted({0, world_size - 1}):
        with as_rank(rank, world_size, config.model), refused.user_errors("model", config.model, model.try_again):
            model.shapes(config.model)


@contextmanager
def as_rank(rank: int, world_size: int, provider: Any) -> Iterator[None]:
    """While entered, megatron-core's process groups are those of one rank among `world_size` that do not exist, and models
    are built of its own layers, as on the CPU."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: PLC0415 - registers torch's `fake` backend

    with warnings.catch_warnings(), device.backend(device.CPU), device.environment_restored():
        warnings.filterwarnings("ignore", module="megatron")
        dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
        try:
            parallel.form_groups(provider, timeout_minutes=1, gloo=False)
            parallel.seed(0)
            yield
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()
