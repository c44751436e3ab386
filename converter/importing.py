"""What an import writes beside the weights: the run configuration, a record of the conversion, and notes for a person."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from math import prod
from typing import Any

import numpy as np

from converter import run_config
from converter.carried import Luggage
from converter.config import BUILT_IN_ROPE, Config, rope_numbers, to_megatron
from converter.families import Family
from converter.layout import Layout
from converter.model import Model
from converter.plan import Making, Plan
from formats.spec import dtype_name


def documents(family: Family, config: Config, plan: Plan, layout: Layout, *, vocab_multiple: int) -> dict[str, bytes]:
    """`run_config.yaml`."""
    megatron = to_megatron(family.CONFIG, config)
    return {run_config.FILE: run_config.make(megatron, layout, main_dtype(plan), vocab_multiple=vocab_multiple)}


def facts(plan: Plan, *, tensors_in: int) -> dict[str, Any]:
    """What `conversion.json` tells of an import beside its source and its options."""
    return {
        "casts": casts(plan.makings),
        "zero_filled": list(plan.zero),
        "tensors": {"in": tensors_in, "out": len(plan.makings)},
    }


def main_dtype(plan: Plan) -> np.dtype[Any]:
    """The dtype most parameters have."""
    counts: Counter[np.dtype[Any]] = Counter()
    for making in plan.makings:
        counts[making.spec.dtype] += prod(making.spec.shape)
    return counts.most_common(1)[0][0]


def padding(plan: Plan, model: Model) -> dict[str, int]:
    """Tensors whose rows from some number on are padding."""
    padded = (one for one in plan.bound if one.rule.padded and not one.rule.zeros(model))
    return {one.megatron: model.vocab for one in padded}


def casts(makings: Iterable[Making]) -> dict[str, str]:
    """The dtypes that values are cast from, each with what it is cast to."""
    changed = {(copy.dtype, making.spec.dtype) for making in makings for copy in making.copies}
    changed = {(old, new) for old, new in changed if old != new}
    return {dtype_name(old): dtype_name(new) for old, new in sorted(changed, key=str)}


def notes(config: Config, plan: Plan, luggage: Luggage) -> Iterator[str]:
    """What a user should know of this import."""
    if luggage.left_out:
        yield f"left out, not part of the model: {', '.join(luggage.left_out)}"
    for old, new in casts(plan.makings).items():
        yield f"weights are cast from {old} to {new}"
    if plan.zero:
        yield f"{len(plan.zero)} biases that the source does not have are written as zeros (megatron-core has one switch for all)"
    rope = rope_numbers(config)
    told = {name: rope[name] for name in BUILT_IN_ROPE if name in rope}
    if rope["rope_type"] == "llama3" and told != BUILT_IN_ROPE:
        yield (
            f"rope scaling {told} is not what megatron-core's GPTModel builds in ({BUILT_IN_ROPE}): "
            "set `rotary_pos_emb.inv_freq` after building the model"
        )
