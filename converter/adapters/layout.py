"""Choose how PEFT's files hold an adapter: which tensors, and by which names their configuration requests them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from converter.adapters.adapter import AdapterReader
from converter.adapters.base import PlannedReader
from converter.adapters.experts import Fused, fuse
from converter.adapters.megatron import MegatronAdapter
from converter.adapters.names import WEIGHT, module_of
from converter.adapters.parameters import FusedExperts, fused_experts, in_transformers
from converter.adapters.peft_config import choose_targets
from converter.rules import Rule
from formats.errors import UserError

Experts = Literal["fused", "separate"]
EXPERTS: tuple[Experts, ...] = get_args(Experts)

_TAKEN = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})
"""Last names of modules that PEFT 0.21, with transformers 5, takes for routers and experts of older files wherever they are
(`_MOE_TARGET_MODULE_MAPPING` in its `transformers_weight_conversion.py`): such modules are requested by their parameter."""

_ROUTERS = frozenset({"router"})
"""Routers of GPT-OSS, Granite and Llama 4 are no linear layers in transformers, or return more than one does: PEFT adapts their
parameter alone."""


def by_parameter(rules: Iterable[Rule]) -> frozenset[str]:
    """Return the last names of modules whose adapters PEFT is asked for by their parameter, in a family with experts."""
    experts = [rule for rule in rules if rule.is_expert]
    if not experts:
        return frozenset()
    return _ROUTERS if all(rule.is_stacked for rule in experts) else _TAKEN


@dataclass(frozen=True, slots=True)
class Layout:
    """The tensors of PEFT's file, and the fields of its configuration that request them."""

    adapter: AdapterReader
    targets: Mapping[str, Any]


def lay_out(source: MegatronAdapter, experts: Experts) -> Layout:
    """Return the layout for a checkpoint. `fused`: as transformers 5 has experts; `separate`: a module for each.

    Raises UserError for DoRA of what PEFT has LoRA alone for, and for modules of experts that no program has.
    """
    adapter, others, layers = source.adapter, source.others, source.model.layers
    every = list(fused_experts(source.rules, source.model))
    if not every:
        return Layout(adapter, choose_targets(_modules(adapter.parts), layers=layers, others=others))
    if experts == "separate":
        _refuse_separate(adapter, every)
        _refuse_dora(adapter, {weight for layer in every for names in layer.weights for weight in names})
        return Layout(adapter, choose_targets(_modules(adapter.parts), layers=layers, others=others))
    together, fused = fuse(adapter, PlannedReader(adapter.reader, adapter.tensor_plans), source.rules, source.model)
    names = by_parameter(source.rules)

    def is_parameter(name: str) -> bool:
        """Return whether PEFT is asked for a parameter, not for a module."""
        return not name.endswith(WEIGHT) or module_of(name).rpartition(".")[2] in names

    _refuse_dora(adapter, {name for name in together.parts if is_parameter(name)})
    absent = [in_transformers(f"{name}{WEIGHT}") for name in others]
    absent += [layer.name for layer in every if layer.name not in together.parts]
    targets = _choose_targets([*together.parts], absent, layers, is_parameter)
    return Layout(together, targets | _patterns(fused, adapter))


def _modules(weights: Iterable[str]) -> list[str]:
    return [module_of(weight) for weight in weights]


def _refuse_separate(adapter: AdapterReader, every: Iterable[FusedExperts]) -> None:
    """Raise UserError for an adapter of experts that files have in one tensor."""
    layer = next((layer for layer in every if layer.tensor and not adapter.parts.keys().isdisjoint(layer.weights[0])), None)
    if layer:
        raise UserError(
            f"the checkpoint has adapters for `{layer.name}`, one parameter of all experts, and no program has a module for each "
            "expert in this family",
            hint="`--experts fused`, the default, writes what PEFT and vLLM read",
        )


def _refuse_dora(adapter: AdapterReader, names: Iterable[str]) -> None:
    name = min((name for name in names if name in adapter.parts or not name.endswith(WEIGHT)), default="")
    if name and adapter.description.method == "dora":
        raise UserError(
            f"the checkpoint is a DoRA of `{name}`, for which PEFT has LoRA alone, as it adapts a parameter there, not a module",
            hint="`mbconvert merge` merges it; train with `peft=lora`, or leave experts, shared experts and routers out",
        )


def _choose_targets(
    names: Sequence[str], absent: Sequence[str], layers: int, is_parameter: Callable[[str], bool]
) -> dict[str, Any]:
    """Return the fields that request these weights, some as modules and some as parameters."""
    parameters = sorted(name for name in names if is_parameter(name))
    modules = [module_of(name) for name in names if not is_parameter(name)]
    missing = {_ending(name) for name in absent}
    endings = sorted({_ending(name) for name in parameters})
    chosen = parameters if missing & set(endings) else endings
    others = [module_of(name) for name in absent if not is_parameter(name)]
    empty: dict[str, Any] = {"target_modules": []}
    return {**(choose_targets(modules, layers=layers, others=others) if modules else empty), "target_parameters": chosen}


def _ending(name: str) -> str:
    """`mlp.experts.down_proj` of `model.layers.3.mlp.experts.down_proj`."""
    return re.sub(r"^.*?\.\d+\.", "", name)


def _patterns(fused: Iterable[Fused], adapter: AdapterReader) -> dict[str, Any]:
    """Return the ranks and alphas of parameters whose adapter is that of several weights, with the scale of each."""
    ranks = {
        f"experts.{layer.experts.name.rpartition('.')[2]}": layer.total_rank for layer in fused if layer.total_rank != layer.rank
    }
    description = adapter.description
    alphas = {name: description.scale * (rank**0.5 if description.use_rslora else rank) for name, rank in ranks.items()}
    return {"rank_pattern": ranks, "alpha_pattern": alphas} if ranks else {}
