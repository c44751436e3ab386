"""Generate text from a checkpoint of either format: derive a run from its description, load the weights, and generate."""

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
from trainer.generation.text import Generation, TextCallback, generate
from trainer.peft.attach import attach
from trainer.settings import checks, overrides
from trainer.settings.resolve import Resolved, resolve

PRECISIONS = {"fp32": "fp32", "bf16": "bf16_mixed", "fp16": "fp16_mixed"}
"""`mixed_precision` by the dtype to compute in."""


def make_run(source: str, settings: Sequence[str] = (), *, world_size: int, dtype: str | None = None) -> Resolved:
    """Return a run with the checkpoint's model in `world_size` processes and overrides such as
    `model.tensor_model_parallel_size=2`.

    The default dtype is fp32 on the CPU and the checkpoint's on a GPU. Raises UserError for settings that cannot run.
    """
    description = describe(source)
    config = RunConfig(model=model.from_hf_config(description.config), mixed_precision="")
    if adapter := adapters.find(source):
        config.model.layout = adapter.layout
    overrides.apply(config, settings)
    run_device = device.choose(config.dist.device)
    config.mixed_precision = config.mixed_precision or _precision(
        dtype or ("fp32" if run_device == device.CPU else description.dtype)
    )
    config.dataset.sequence_length = config.model.longest_sequence
    config.optimizer.lr = 1.0  # required by `resolve`; nothing is trained
    _check_copies(config.model, world_size)
    config.train.global_batch_size = checks.parallel_size(config.model, checks.PP)
    return resolve(config, world_size=world_size, device=run_device)


def _precision(dtype: str) -> str:
    if dtype not in PRECISIONS:
        raise UserError(f"the checkpoint's weights are `{dtype}`", hint="choose `--dtype` bf16, fp16 or fp32 to compute in")
    return PRECISIONS[dtype]


def _check_copies(provider: Any, world_size: int) -> None:
    copies = checks.data_parallel_size(provider, world_size)
    if copies > 1:
        needed = world_size // copies
        raise UserError(
            f"`{world_size}` processes would hold `{copies}` copies of the model, and prompts run one after another",
            hint=f"start {needed}, or shard the model: `model.{checks.TP}={world_size}`, for example",
        )


def run(
    source: str,
    read_prompts: Callable[[], Sequence[str]],
    *,
    settings: Resolved,
    max_new_tokens: int,
    sampling: Sampling,
    tell: TextCallback | None,
    done: Callable[[Sequence[Generation], float], None],
) -> None:
    """Load the checkpoint and generate. `read_prompts` is called on every rank, inside the session. `tell`, with new text, and
    `done`, with all generations and the seconds they took, are called on one rank, on the calling thread."""
    config = settings.config
    with parallel.session(config, device.choose(config.dist.device)):
        tokenizer = tokenizer_of(source, config.tokenizer.tokenizer_model)
        prompts = read_prompts()
        chunks = model.build(config.model)
        _load_weights(chunks, source)
        generate_all = partial(generate, chunks, tokenizer, prompts, max_new_tokens=max_new_tokens, sampling=sampling)
        began = time.perf_counter()
        generations = generate_all(tell=tell if parallel.is_logging_rank() else None)
        if parallel.is_logging_rank():
            done(generations, time.perf_counter() - began)


def _load_weights(chunks: Sequence[Any], source: str) -> None:
    """Load the checkpoint's weights; for a checkpoint of adapters, the weights of its base model and the adapters."""
    adapter = adapters.find(source)
    if adapter is None:
        live.load(chunks, source)
        return
    if adapter.base is None:
        raise UserError(f"`{source}` has adapters and does not name their base model", hint="merge them: `mbconvert merge`")
    live.load(chunks, adapter.base.name)
    method = adapters.method_of(adapter)
    base = adapters.identify(adapter.base.name, saves=False, resumed=None)
    attach(chunks, method)
    adapters.load(chunks, source, peft=method, base=base)
