"""Refuse adapters that could not be exported, by the settings of a run that is to train them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from converter.adapters.adapter import Description
from converter.adapters.layout import by_parameter
from converter.adapters.names import PARTS, AdaptedModule, describe_module, is_matrix, module_of, part_names
from converter.model import Model
from converter.plan import list_names
from converter.rules import Rule, at
from formats.errors import UserError


def refuse_unexportable(rules: Sequence[Rule], model: Model, description: Description, *, trains_mtp: bool) -> None:
    """Raise UserError for a targeted module whose adapter PEFT's files cannot hold.

    `rules`: with the names of transformers' modules. `trains_mtp`: whether the run has layers of multi-token prediction.
    """
    parameters = by_parameter(rules)
    for rule, module in _chosen(rules, model, description):
        if "{mtp}" in rule.megatron:
            if trains_mtp:
                raise UserError(
                    f"`peft` targets `{module.module}`, and PEFT has no layers of multi-token prediction",
                    hint="leave them out: `peft.exclude_modules=['mtp.*']`",
                )
        elif rule.flat:
            raise UserError(
                f"`peft` targets `{module.target}`, and the rows of all experts are one matrix, `{module.weights[0]}`, for which "
                "PEFT has one A, not one for each expert",
                hint="leave them out: `peft.exclude_modules=['*.experts.*']`",
            )
        elif description.canonical and (parts := _parts(rule)) and parts != tuple(part_names(rule)):
            raise UserError(
                f"`peft.canonical` makes several adapters of `{module.target}`, but {_contrast(module, parts)}",
                hint="set `peft.canonical=false`",
            )
        elif description.method == "dora" and (rule.is_expert or _last_names(module) & parameters):
            raise UserError(
                f"`peft` targets `{module.target}`, for which PEFT has LoRA alone, as it adapts a parameter there, not a module",
                hint="use `peft=lora`, or leave experts, shared experts and routers out with `peft.exclude_modules`",
            )


def _chosen(rules: Iterable[Rule], model: Model, description: Description) -> Iterator[tuple[Rule, AdaptedModule]]:
    """Yield the targeted modules of all layers, of experts the first, with their rules."""
    for rule in rules:
        if not is_matrix(rule):
            continue
        is_mtp = "{mtp}" in rule.megatron
        for layer in (model.layers,) if is_mtp else range(model.layers):
            indices = at(model, layer)
            if not rule.when(model, indices):  # it may name sizes that the model has not
                continue
            module = describe_module(rule, indices, model)
            parts = PARTS.get(_last(rule), ()) if description.canonical else ()
            if module.is_chosen(description.target_modules, description.exclude_modules, parts=parts):
                yield rule, module


def _parts(rule: Rule) -> tuple[str, ...]:
    """Return the parts of a fused module, each of which `peft.canonical` gives an adapter; nothing for a module that has none, as
    `linear_fc1` without a gate."""
    last = _last(rule)
    return PARTS.get(last, ()) if last != "linear_fc1" or rule.partition_stride > 1 else ()


def _contrast(module: AdaptedModule, parts: Sequence[str]) -> str:
    """Return how the tensors of a module differ from its parts, in words."""
    if len(module.weights) == 1:
        return f"this family has one tensor for all, `{module.weights[0]}`, and PEFT one adapter"
    return f"this family has {len(module.weights)} tensors there, not {len(parts)}: {list_names(module.weights)}"


def _last(rule: Rule) -> str:
    return module_of(rule.megatron).rpartition(".")[2]


def _last_names(module: AdaptedModule) -> set[str]:
    return {module_of(weight).rpartition(".")[2] for weight in module.weights}
