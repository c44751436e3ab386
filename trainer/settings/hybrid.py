"""Refuse what a model in the layout `hybrid` would not compute, and patterns that do not fit its other numbers. A model of
the user's own is checked in the fields it has.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from converter.hybrid import PREDICTION, STAGE
from trainer.config import is_packed
from trainer.layers.pattern import ATTENTION, EXPERTS, MAMBA, MLP, has_mamba, is_hybrid
from trainer.layers.sparse_attention import SPARSE
from trainer.settings.checks import CP, TP, parallel_size
from trainer.settings.rules import Rule, enforce

_KINDS = {MAMBA: "Mamba-2", ATTENTION: "attention", MLP: "feed-forward", EXPERTS: "experts"}
_PATTERN = "model.hybrid_layer_pattern"


def check(config: Any) -> None:
    """Refuse, by name, what HybridModel or its Mamba layers cannot do."""
    model, pattern = config.model, getattr(config.model, "hybrid_layer_pattern", None)
    enforce(_switch_rules(model, pattern))
    if pattern is not None:
        enforce(_pattern_rules(model, pattern))
    if is_hybrid(model):
        enforce(_layout_rules(model))
    if has_mamba(model):
        enforce(_mamba_rules(config))


def _switch_rules(model: Any, pattern: str | None) -> Iterator[Rule]:
    switched = getattr(model, "is_hybrid_model", False) and hasattr(model, "hybrid_layer_pattern") and pattern is None
    message = f"`model.is_hybrid_model` is `True`, and `{_PATTERN}` is `None`"
    yield switched, message, "set `model.layout=hybrid`, which says it"


def _pattern_rules(model: Any, pattern: str) -> Iterator[Rule]:
    pattern_text = f"`{_PATTERN}` is `{pattern}`"
    yield (
        not is_hybrid(model),
        f"{pattern_text}, and `model.layout` is `{model.layout}`: GPTModel has no such layers",
        "set `model.layout=hybrid`",
    )
    yield (
        STAGE in pattern,
        f"{pattern_text}, with pipeline stages in it",
        "lay them out with `model.pipeline_model_parallel_layout`",
    )
    yield (
        PREDICTION in pattern,
        f"{pattern_text}: layers of multi-token prediction (`{PREDICTION}`) are not trained",
        "leave them out",
    )
    other = sorted(set(pattern) - set(_KINDS))
    known = ", ".join(f"`{symbol}` {kind}" for symbol, kind in _KINDS.items())
    yield other, f"{pattern_text}: a layer `{''.join(other)}` is not among those of this trainer", f"it may have {known}"
    yield (
        len(pattern) != model.num_layers,
        f"{pattern_text}, which has `{len(pattern)}` layers, and `model.num_layers` is `{model.num_layers}`",
        f"set `model.num_layers={len(pattern)}`",
    )
    yield (
        (EXPERTS in pattern) != bool(model.num_moe_experts),
        f"{pattern_text}, and `model.num_moe_experts` is `{model.num_moe_experts}`",
        f"layers with experts are `{EXPERTS}`",
    )


def _layout_rules(model: Any) -> Iterator[Rule]:
    layout_text, hint = "`model.layout` is `hybrid`", "set `model.layout=gpt`"
    for name, why in (
        ("parallel_residual", "whose attention and feed-forward parts are layers one after another"),
        ("mtp_num_layers", "in which layers of multi-token prediction are not trained"),
    ):
        value = getattr(model, name, None)
        yield value, f"`model.{name}` is `{value}`, and {layout_text}, {why}", hint
    name = "experimental_attention_variant"
    sparse = getattr(model, name, None) == SPARSE
    yield sparse, f"`model.{name}` is `{SPARSE}`, and {layout_text}, in which sparse attention is not built", hint


def _mamba_rules(config: Any) -> Iterator[Rule]:
    model, mamba = config.model, f"`{_PATTERN}` has Mamba layers"
    tensor, context = parallel_size(model, TP), parallel_size(model, CP)
    heads = model.mamba_num_heads or 2 * model.hidden_size // model.mamba_head_dim
    for name, number in (("mamba_num_heads", heads), ("mamba_num_groups", model.mamba_num_groups)):
        yield (
            number % tensor,
            f"`model.{name}` is `{number}`, which is not divisible by `model.{TP}`, `{tensor}`",
            f"set `model.{TP}` to a divisor",
        )
    yield (
        context > 1,
        f"{mamba}, which were not tried with context parallelism (`model.{CP}={context}`)",
        f"set `model.{CP}=1`",
    )
    in_16_bits = config.mixed_precision != "fp32" and config.checkpoint.save and config.checkpoint.save_optim
    yield (
        in_16_bits and not config.ddp.use_distributed_optimizer,
        f"{mamba}, whose `A_log` and `D` are fp32 beside weights in 16 bits: only the distributed optimizer saves their states",
        "set `ddp.use_distributed_optimizer=true`",
    )
    packed = "dataset.packed" if getattr(config.dataset, "packed", False) else "dataset.reset_attention_mask"
    yield (
        is_packed(config.dataset),
        f"{mamba}, whose states go on from one packed example to the next",
        f"set `{packed}=false`",
    )
