"""A checkpoint of either format as a model that generates: what it says of itself, made into a run of one session."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from formats.errors import UserError
from trainer import device, model, parallel
from trainer.checkpoints import adapters, live
from trainer.checkpoints.contents import describe, tokenizer_of
from trainer.config import RunConfig
from trainer.generation.sampling import Sampling
from trainer.generation.text import Generation, Tell, generate
from trainer.peft.attach import attach
from trainer.settings import checks, overrides
from trainer.settings.resolve import Resolved, resolve

PRECISIONS = {"fp32": "fp32", "bf16": "bf16_mixed", "fp16": "fp16_mixed"}
"""`mixed_precision` for the dtypes that weights may be computed in."""


def make_run(source: str, told: Sequence[str] = (), *, world_size: int, dtype: str | None = None) -> Resolved:
    """A run that holds the checkpoint's model in `world_size` processes, with overrides such as
    `model.tensor_model_parallel_size=2`.

    The dtype is the one given, else fp32 on the CPU and the checkpoint's on a GPU. UserError for what cannot run.
    """
    found = describe(source)
    config = RunConfig(model=model.from_hf_config(found.config), mixed_precision="")
    overrides.apply(config, told)
    where = device.choose(config.dist.device)
    config.mixed_precision = config.mixed_precision or _precision(dtype or ("fp32" if where == device.CPU else found.dtype))
    config.dataset.sequence_length = config.model.seq_length
    config.optimizer.lr = 1.0  # no run resolves without one; nothing is trained
    _check_copies(config.model, world_size)
    config.train.global_batch_size = checks.parallel_size(config.model, checks.PP)
    return resolve(config, world_size=world_size, device=where)


def _precision(dtype: str) -> str:
    if dtype not in PRECISIONS:
        raise UserError(f"the checkpoint's weights are `{dtype}`", hint="choose `--dtype` bf16, fp16 or fp32 to compute in")
    return PRECISIONS[dtype]


def _check_copies(shape: Any, world_size: int) -> None:
    copies = checks.data_parallel_size(shape, world_size)
    if copies > 1:
        one = world_size // copies
        raise UserError(
            f"`{world_size}` processes would hold the model `{copies}` times, and prompts go one after another",
            hint=f"start {one}, or divide the model: `model.{checks.TP}={world_size}`, for example",
        )


def run(
    source: str,
    read_prompts: Callable[[], Sequence[str]],
    *,
    settings: Resolved,
    max_new_tokens: int,
    sampling: Sampling,
    tell: Tell | None,
    done: Callable[[Sequence[Generation], float], None],
) -> None:
    """Load the checkpoint and generate. `read_prompts` is called on every rank with the session open; `tell`, with text as it
    comes, and `done`, with all and the seconds they took, on one."""
    config = settings.config
    where = device.choose(config.dist.device)
    with parallel.session(config, where):
        tokenizer = tokenizer_of(source, config.tokenizer.tokenizer_model)
        prompts = read_prompts()
        chunks = model.build(config.model)
        _fill(chunks, source, config)
        make = partial(generate, chunks, tokenizer, prompts, max_new_tokens=max_new_tokens, sampling=sampling)
        began = time.perf_counter()
        answers = make(tell=tell if parallel.is_logging_rank() else None)
        if parallel.is_logging_rank():
            done(answers, time.perf_counter() - began)


def _fill(chunks: Sequence[Any], source: str, config: RunConfig) -> None:
    """The checkpoint's weights; for one of adapters, those of the model that it names, with the adapters beside them."""
    found = adapters.find(source)
    if found is None:
        live.load(chunks, source)
        return
    if found.base is None:
        raise UserError(f"`{source}` holds adapters and does not say beside which model", hint="merge them: `mbconvert merge`")
    live.load(chunks, found.base.name)
    config.peft = adapters.method_of(found)
    base = adapters.identify(found.base.name, saves=False, resumed=None)
    attach(chunks, config.peft)
    adapters.load(chunks, source, peft=config.peft, base=base)
