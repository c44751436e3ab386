"""Refuse to capture steps as a CUDA graph where one would compute something else, or cannot be captured.

A graph repeats what the GPU did in one step. It knows nothing of numbers that the CPU decides: random states, tokens sent to
other ranks, scales of losses.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trainer.config import captures_steps, is_packed
from trainer.settings.rules import Rule, enforce

SETTING = "model.cuda_graph_impl"
_TILE = 128
"""Tokens of a tile of attention in bf16. Captured rows of 32, 48, 64, 96, 192 and 1000 tokens failed on an H100 with Transformer
Engine 2.20, of 128 and 512 tokens did not, and packed rows of any length did not."""

_ALIGNED = 8
"""Rows of an adapter's matrices in bf16, of which torch's grouped product takes multiples."""


def check(config: Any, *, world_size: int) -> None:
    """Raise UserError where `model.cuda_graph_impl` is set and a run of `world_size` processes cannot have it."""
    if getattr(config.model, "cuda_graph_impl", "none") != "none":
        enforce(_rules(config, world_size))


def _rules(config: Any, world_size: int) -> Iterator[Rule]:
    model, leave = config.model, f"leave `{SETTING}` out"
    message = f"`{SETTING}` is `{model.cuda_graph_impl}`"
    yield (
        not captures_steps(model),
        f"{message}, and graphs of single layers are not captured",
        f"set `{SETTING}=full_iteration`, or leave it out",
    )
    for name, why in (
        *_parallel(world_size),
        *_random(config),
        *_precision(config),
        *_rows(config),
        *_others(config),
        *_experts(config),
    ):
        yield True, f"{message}, which does not go with {name}: {why}", f"{leave}, or change the other"


def _parallel(world_size: int) -> Iterator[tuple[str, str]]:
    if world_size > 1:
        yield f"`{world_size}` processes", "the messages of several GPUs were not tried in a graph"


def _random(config: Any) -> Iterator[tuple[str, str]]:
    names = ("hidden_dropout", "attention_dropout", "embedding_dropout", "moe_input_jitter_eps", "recompute_granularity",
             "moe_router_force_load_balancing")  # fmt: skip
    why = "each step has random numbers of its own, whose states the CPU sets"
    for name in names:
        if value := getattr(config.model, name, None):
            yield f"`model.{name}={value}`", why
    if dropout := getattr(config.peft, "dropout", 0):
        yield f"`peft.dropout={dropout}`", why


def _precision(config: Any) -> Iterator[tuple[str, str]]:
    if any(getattr(config.model, name, None) for name in ("fp8", "fp4", "fp16")):
        yield f"`mixed_precision={config.mixed_precision}`", "the CPU decides when scales change"


def _rows(config: Any) -> Iterator[tuple[str, str]]:
    length = getattr(config.dataset, "sequence_length", 0)
    if length % _TILE and not is_packed(config.dataset) and config.mixed_precision != "fp32":
        why = f"Transformer Engine's attention ends in an illegal memory access where rows of tokens are not divisible by {_TILE}"
        yield f"`dataset.sequence_length={length}`", why


def _others(config: Any) -> Iterator[tuple[str, str]]:
    for section, name, why in (
        ("model", "mtp_num_layers", "the losses of layers of multi-token prediction were not tried"),
        ("model", "cpu_offloading", "activations on their way to the CPU were not tried"),
        ("ddp", "check_for_nan_in_grad", "the CPU looks at gradients within the step"),
        ("ddp", "check_for_large_grads", "the CPU looks at gradients within the step"),
    ):
        if value := getattr(getattr(config, section), name, None):
            yield f"`{section}.{name}={value}`", why


def _experts(config: Any) -> Iterator[tuple[str, str]]:
    model = config.model
    if not getattr(model, "num_moe_experts", None):
        return
    if config.peft is None:
        yield "experts whose weights are trained", "Transformer Engine needs the numbers of their tokens on the CPU"
    rank = getattr(config.peft, "dim", 0)
    if rank % _ALIGNED:
        yield f"`peft.dim={rank}`", f"torch multiplies all experts at once where it is a multiple of {_ALIGNED}"
    for name in ("add_bias_linear", "moe_expert_capacity_factor", "moe_router_padding_for_quantization"):
        if value := getattr(model, name, None):
            yield f"`model.{name}={value}`", "the CPU needs the numbers of tokens of each expert"
    if (kind := getattr(model, "moe_token_dispatcher_type", "alltoall")) != "alltoall":
        yield f"`model.moe_token_dispatcher_type={kind}`", "the CPU needs the numbers of tokens of each expert"
