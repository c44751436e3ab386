"""Build a run's model before processes start, in one process that acts as several ranks, so that settings which megatron-core
refuses only when it builds are refused early.

On torch's meta device that takes a fraction of a second and no memory. Only for runs on CPUs: Transformer Engine's layers need a
GPU to be built.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from trainer import device, model, parallel
from trainer.model import GPTModelProvider
from trainer.settings import refused


def rehearse(provider: Any, *, world_size: int) -> None:
    """Build the chunks of the first and the last of `world_size` ranks, on torch's meta device.

    Raises UserError if megatron-core refuses the settings of the model. A provider of one's own is not called: it may do more
    than build.
    """
    if not isinstance(provider, GPTModelProvider) or dist.is_initialized():
        return
    for rank in sorted({0, world_size - 1}):
        with as_rank(rank, world_size, provider), refused.user_errors("model", provider, model.try_again):
            model.shapes(provider)


@contextmanager
def as_rank(rank: int, world_size: int, provider: Any) -> Iterator[None]:
    """Act as one rank of `world_size` inside this context: megatron-core's process groups use torch's fake backend, and models
    are built of its own layers, as on the CPU."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: PLC0415 - registers torch's `fake` backend

    with warnings.catch_warnings(), device.backend(device.CPU), device.layers_restored():
        warnings.filterwarnings("ignore", module="megatron")
        dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
        try:
            parallel.form_groups(provider, timeout_minutes=1, gloo=False)
            parallel.seed(0)
            yield
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()
