"""Layers of multi-token prediction (MTP) that a source's files hold, whether `config.json` names them or not."""

from __future__ import annotations

from collections.abc import Container, Iterable

from converter.model import Model
from converter.rules import Rule, at, by_expert, fill


def names(rules: Iterable[Rule], model: Model, mtp: int) -> set[str]:
    """Return the Hugging Face names of one such layer; none for a family without."""
    indices = at(model, model.layers, mtp=mtp)
    own = [rule for rule in rules if "{mtp}" in rule.megatron and rule.when(model, indices)]
    return {name for number, index in by_expert(own, range(len(own)), indices, model) for name in own[number].names(index)[1]}


def further(rules: Iterable[Rule], model: Model, source: Container[str]) -> set[str]:
    """Return the names of a source's layers beyond those that the model is configured with: they pass through.

    A layer counts if the source has all of its tensors; then a second copy of the model's own belongs to it.
    """
    rules, all_names, mtp = tuple(rules), set[str](), model.get("mtp", 0)
    while (layer := names(rules, model, mtp)) and all(name in source for name in layer):
        copies = (fill(rule.huggingface, at(model, model.layers, mtp=mtp)) for rule in rules if not rule.megatron)
        all_names |= layer | {name for name in copies if name in source}
        mtp += 1
    return all_names
