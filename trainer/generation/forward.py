"""Run forward passes with a KV cache, and switch a model to inference and back.

The cache is megatron-core's StaticInferenceContext. With a non-empty cache its attention applies no mask, so the first pass
takes the whole prompt and each later pass one token. Rows of different lengths would need a mask, so there is one sequence at a
time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.utils import InferenceMode
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from formats.errors import UserError
from trainer import device
from trainer.model import unwrap
from trainer.optim import parameters_gathered


def new_cache(length: int) -> StaticInferenceContext:
    """Return an empty KV cache for one sequence of at most `length` tokens; each rank caches its layers and heads."""
    return StaticInferenceContext(max_batch_size=1, max_sequence_length=length)


def next_logits(chunks: Sequence[Any], tokens: Sequence[int], cache: StaticInferenceContext) -> torch.Tensor | None:
    """Return the logits [vocabulary] of the token after `tokens`, on the last pipeline stage; None on other stages.

    `tokens` are appended to the cache. Stages run in turn. megatron-core's schedules are not used: the interleaved one needs as
    many sequences as stages.
    """
    inner = unwrap(chunks[-1])
    pipeline = P2PCommunicator(parallel_state.get_pipeline_model_parallel_group(), inner.config)
    shape = (len(tokens), 1, inner.config.hidden_size)
    first = cache.sequence_len_offset
    input_ids = torch.tensor([tokens], device=device.current())
    positions = torch.arange(first, first + len(tokens), device=device.current())[None]
    output = None
    for chunk in chunks:
        inner = unwrap(chunk)
        inner.set_input_tensor(pipeline.recv_forward(shape, inner.pre_process))
        output = chunk(input_ids, positions, None, inference_context=cache, runtime_gather_output=True)
        pipeline.send_forward(output, inner.post_process)
        inner.set_input_tensor(None)
    cache.increment_sequence_len_offset(len(tokens))
    # Rows beyond the vocabulary are padding, whose size depends on the layout; they are cut off.
    return output[0, -1, : inner.config.vocab_size] if inner.post_process else None


def broadcast_token(token: int) -> int:
    """Return the last rank's token on all ranks, so that data-parallel ranks continue alike even if their sums are rounded
    differently."""
    shared = torch.tensor([token], device=device.current())
    dist.broadcast(shared, src=dist.get_world_size() - 1)
    return int(shared)


@contextmanager
def inference_mode(chunks: Sequence[Any]) -> Iterator[None]:
    """Switch the chunks, wrapped or not, to inference; restore them at the end. All ranks call this.

    Parameters are gathered, and gradients and dropout are off. FP8 and FP4 are off since one token is not a multiple of their
    block size; sequence parallelism is off since it would split the token. Raises UserError for settings that cannot be switched
    off.
    """
    _check(unwrap(chunks[0]).config)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(InferenceMode.active())
        stack.enter_context(parameters_gathered([chunk for chunk in chunks if hasattr(chunk, "ddp_config")]))
        stack.enter_context(_switched_off(chunks))
        yield


def _check(config: Any) -> None:
    for name, on in (("context_parallel_size", config.context_parallel_size > 1), ("tp_comm_overlap", config.tp_comm_overlap)):
        if on:
            raise UserError(
                f"`model.{name}` is `{getattr(config, name)}`, with which no text can be generated",
                hint=f"leave `model.{name}` out, or generate from a checkpoint with `mbtrain generate`",
            )
    if kind := getattr(config, "experimental_attention_variant", None):
        raise UserError(
            f"`model.experimental_attention_variant` is `{kind}`, with which no text can be generated: megatron-core keeps no "
            "state of it from token to token",
            hint="export it with `mbconvert mcore-to-hf`, and generate with transformers",
        )


_OFF = {
    "training": False,
    "sequence_parallel": False,
    "scatter_to_sequence_parallel": False,
    "reduce_scatter_embeddings": False,
    "fp8": None,
    "fp4": None,
    "input_tensor": None,
}
"""Attributes of modules and their configs, with their values during generation; `input_tensor` is left from the last training
step.

The attributes of sequence parallelism are those of megatron-core's `set_model_to_sequence_parallel`, which is not used because it
restores all modules to one value and keeps models in memory.
"""


@contextmanager
def _switched_off(chunks: Sequence[Any]) -> Iterator[None]:
    modules = [module for chunk in chunks for module in chunk.modules()]
    configs = {id(config): config for module in modules if (config := getattr(module, "config", None)) is not None}
    owners = (*modules, *configs.values())
    before = [(owner, name, vars(owner)[name]) for owner in owners for name in _attributes_to_switch(owner)]
    for owner, name, _ in before:
        setattr(owner, name, _OFF[name])
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def _attributes_to_switch(owner: Any) -> list[str]:
    """Return the attributes to change. Transformer Engine's modules set their own `fp8` at each pass, so it is left alone."""
    quantization = {"fp8", "fp4"} if isinstance(owner, torch.nn.Module) else set()
    return [name for name in _OFF.keys() - quantization if name in vars(owner) and vars(owner)[name] is not _OFF[name]]
