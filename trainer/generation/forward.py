"""One pass through a model that keeps keys and values, and a live model lent for such passes.

The cache is megatron-core's StaticInferenceContext. With a non-empty cache its attention applies no mask, so the first
pass takes a whole prompt and each later one a single token; rows of different length would need a mask, so there is one
sequence at a time. Knows no text.
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
    """Keys and values of one sequence of at most `length` tokens; each rank holds those of its layers and heads."""
    return StaticInferenceContext(max_batch_size=1, max_sequence_length=length)


def next_logits(chunks: Sequence[Any], tokens: Sequence[int], cache: StaticInferenceContext) -> torch.Tensor | None:
    """Logits [vocabulary] of what follows `tokens`, which follow those in the cache; None but on the last stage.

    Stages hand on their output in turn. megatron-core's schedules are not used: the interleaved one needs as many sequences
    as there are stages.
    """
    inner = unwrap(chunks[-1])
    pipeline = P2PCommunicator(parallel_state.get_pipeline_model_parallel_group(), inner.config)
    shape = (len(tokens), 1, inner.config.hidden_size)
    first = cache.sequence_len_offset
    here = torch.tensor([tokens], device=device.current())
    positions = torch.arange(first, first + len(tokens), device=device.current())[None]
    output = None
    for chunk in chunks:
        inner = unwrap(chunk)
        inner.set_input_tensor(pipeline.recv_forward(shape, inner.pre_process))
        output = chunk(here, positions, None, inference_context=cache, runtime_gather_output=True)
        pipeline.send_forward(output, inner.post_process)
        inner.set_input_tensor(None)
    cache.increment_sequence_len_offset(len(tokens))
    # Rows beyond the vocabulary are padding: how many there are depends on the layout, and none can be chosen.
    return output[0, -1, : inner.config.vocab_size] if inner.post_process else None


def agreed(token: int) -> int:
    """The last rank's token on all ranks: also copies of the model whose sums differ by a rounding go on alike."""
    told = torch.tensor([token], device=device.current())
    dist.broadcast(told, src=dist.get_world_size() - 1)
    return int(told)


@contextmanager
def inference_mode(chunks: Sequence[Any]) -> Iterator[None]:
    """While this is entered the chunks, wrapped or not, generate; afterwards they are as they were. All ranks call this.

    Parameters are gathered, gradients and dropout off, FP8 and FP4 off because a single token is no multiple of their
    blocks, and so is sequence parallelism, which would cut it. UserError for what cannot be switched off.
    """
    _check(unwrap(chunks[0]).config)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(InferenceMode.active())
        stack.enter_context(parameters_gathered([chunk for chunk in chunks if hasattr(chunk, "ddp_config")]))
        stack.enter_context(_changed(chunks))
        yield


def _check(config: Any) -> None:
    for name, on in (("context_parallel_size", config.context_parallel_size > 1), ("tp_comm_overlap", config.tp_comm_overlap)):
        if on:
            raise UserError(
                f"`model.{name}` is `{getattr(config, name)}`, with which no text can be generated",
                hint=f"leave `model.{name}` out, or generate from a checkpoint with `mbtrain generate`",
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
"""Attributes of modules and of their configuration, by what they are while text is generated; the last is what a stage was
handed on in training.

Those of sequence parallelism are those of megatron-core's `set_model_to_sequence_parallel`, which sets them all alike afterwards
and remembers models forever.
"""


@contextmanager
def _changed(chunks: Sequence[Any]) -> Iterator[None]:
    modules = [module for chunk in chunks for module in chunk.modules()]
    configs = {id(config): config for module in modules if (config := getattr(module, "config", None)) is not None}
    before = [(one, name, vars(one)[name]) for one in (*modules, *configs.values()) for name in _names(one)]
    for one, name, _ in before:
        setattr(one, name, _OFF[name])
    try:
        yield
    finally:
        for one, name, value in before:
            setattr(one, name, value)


def _names(one: Any) -> list[str]:
    """What must change; Transformer Engine's modules have an `fp8` of their own, which they set anew at each pass."""
    own = {"fp8", "fp4"} if isinstance(one, torch.nn.Module) else set()
    return [name for name in _OFF.keys() - own if name in vars(one) and vars(one)[name] is not _OFF[name]]
