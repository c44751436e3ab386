"""Names in the state dict of megatron-core's GPTModel, by the layers that it is built of.

`torch_dist` has one name for a weight, whatever the layers. Formats that store state dicts have those of `--transformer-impl`:
layers of Transformer Engine hold the norm before a projection in that projection, and all experts of a rank in one module;
megatron-core's own hold norms and experts in modules of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial

from converter.config import Config
from converter.extra_states import stateful_module
from converter.rules import Indices, Rule, fill
from formats.errors import UserError

TRANSFORMER_ENGINE, LOCAL = IMPLEMENTATIONS = "transformer_engine", "local"
"""Megatron-LM's `--transformer-impl`."""

_EXPERT = ".experts.{expert}."
_FUSED_NORM = ".layer_norm_"
_STATE = "_extra_state"
_OUTPUT, _CORE_ATTENTION = "output_layer", "self_attention.core_attention"


def weight_name(rule: Rule, indices: Indices, implementation: str) -> str:
    """Return the name of a weight, with the numbers of `indices`. Raises UserError where such layers have no name for it.

    >>> from converter.rules import replicated
    >>> norm = replicated("mlp.linear_fc1.layer_norm_weight", "norm.weight", "hidden", alias="pre_mlp_layernorm.weight")
    >>> weight_name(norm, {}, "transformer_engine"), weight_name(norm, {}, "local")
    ('mlp.linear_fc1.layer_norm_weight', 'pre_mlp_layernorm.weight')
    """
    return fill(_template(rule.megatron, rule.alias, implementation), indices)


@cache
def _template(megatron: str, alias: str, implementation: str) -> str:
    name = alias if alias and implementation == LOCAL else megatron
    if implementation == LOCAL and _FUSED_NORM in name:
        raise UserError(
            f"`{name}` is part of a layer of Transformer Engine's: megatron-core's own layers have no name for it",
            hint=f"`--transformer-impl {TRANSFORMER_ENGINE}`",
        )
    before, numbered, after = name.partition(_EXPERT)
    if not numbered:
        return name
    return (
        f"{before}.experts.{after}{{expert}}" if grouped(implementation) else f"{before}.experts.local_experts.{{expert}}.{after}"
    )


def grouped(implementation: str) -> bool:
    """Return whether all experts of a rank are one module, as Megatron-LM's `--moe-grouped-gemm` builds them."""
    return implementation == TRANSFORMER_ENGINE


def empty_states(weights: list[str], megatron: Config, implementation: str, *, last: bool) -> Iterator[str]:
    """Yield the names that have no value in the state dict of a model chunk: modules' states, which are empty without FP8.

    `last`: is it the chunk with the output layer?
    """
    stateful = _own_stateful if implementation == LOCAL else _stateful(megatron)
    modules = dict.fromkeys(module for name in weights if (module := stateful(name)))
    if implementation == TRANSFORMER_ENGINE:
        layers = dict.fromkeys(name.partition(".self_attention.")[0] for name in weights if ".self_attention." in name)
        modules |= dict.fromkeys(f"{layer}.{_CORE_ATTENTION}" for layer in layers)
    if last:
        modules[_OUTPUT] = None
    for module in modules:
        yield f"{module}.{_STATE}"


def _stateful(megatron: Config) -> partial[str | None]:
    return partial(stateful_module, own_head_norms=megatron.get("qk_layernorm_scope", "head") != "head")


def _own_stateful(weight: str) -> str | None:
    """Return the module of a weight that has a state: in megatron-core's own layers, linear ones."""
    module = weight.rpartition(".")[0]
    return module if module.rpartition(".")[2].startswith("linear_") else None
