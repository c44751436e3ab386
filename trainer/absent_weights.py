"""Freeze the weights that megatron-core's layers have and the model's family has not: a bias of zeros, a norm of ones.

Trained, they would make another model, which no `config.json` of the family describes and no export could write.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import nested_values

from converter.config import make_model
from converter.families import find
from converter.rules import at, fill, is_layered


def freeze(chunks: list[Any], config: Mapping[str, Any], *, layout: str | None = None) -> None:
    """Let no optimizer see the weights of these chunks that the family of a `config.json` has not."""
    absent = set(keys(config, layout))
    if not absent:
        return
    for chunk in chunks:
        addresses = {
            leaf.data.data_ptr() for leaf in nested_values(chunk.sharded_state_dict()) if getattr(leaf, "key", None) in absent
        }
        for parameter in chunk.parameters():
            if parameter.data_ptr() in addresses:
                parameter.requires_grad = False


def keys(config: Mapping[str, Any], layout: str | None = None) -> Iterator[str]:
    """Yield the keys that these weights have in a checkpoint: without the number of a layer, unless layers differ."""
    family = find(config.get("model_type"), layout)
    model = make_model(family.CONFIG, config)
    for rule in family.RULES:
        for layer in range(model.layers) if is_layered(rule) else (-1,):
            indices = at(model, layer)
            if rule.megatron and rule.when(model, indices) and rule.absent(model, indices):
                yield rule.megatron.replace(".{layer}", "") if model.get("stacked", True) else fill(rule.megatron, indices)
