"""The two layouts of a Megatron checkpoint, and the names of one from the other's.

megatron-core has two classes for language models. In a GPTModel (layout `gpt`) a layer is attention and a feed-forward part; in a
HybridModel (layout `hybrid`) each of them is a layer, which `hybrid_layer_pattern` has a letter for. A GPT model is a HybridModel
too: its layer i is there layer 2·i, which mixes tokens, and layer 2·i + 1, the feed-forward part. Weights have the same shapes
and the same bytes, only names differ. All functions take a name or its template, and know no files.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from dataclasses import replace
from typing import Any

from converter.rules import Rule
from formats.errors import UserError

GPT, HYBRID = "gpt", "hybrid"

PATTERN = "hybrid_layer_pattern"
"""The field of a HybridModel that has a letter for each layer."""

MIXERS, FEED_FORWARD = "*+DGM", "-E"
"""Letters of a pattern: attention, latent attention, sparse attention, gated delta net, Mamba; a dense part, experts."""

STAGE, PREDICTION = "|", "/"
"""What a pattern has between pipeline stages, and before each layer of multi-token prediction."""

_FINAL_LAYERNORM, _FINAL_NORM = "decoder.final_layernorm.", "decoder.final_norm."
_LAYER = re.compile(r"decoder\.layers\.(\d+|\{layer\})\.(.+)")
_HYBRID_LAYER = re.compile(r"decoder\.layers\.(\d+|\{mixer\}|\{mlp\})\.(.+)")
_PREDICTED = re.compile(r"(mtp\.layers\.(?:\d+|\{mtp\}))\.transformer_layer\.(.+)")
_HYBRID_PREDICTED = re.compile(r"(mtp\.layers\.(?:\d+|\{mtp\}))\.mtp_model_layer\.layers\.([01])\.(.+)")
_OF_FEED_FORWARD = ("mlp.", "pre_mlp_layernorm.")


def layout_of(names: Container[str]) -> str:
    """Return the layout of a checkpoint of a whole model by the names of its tensors: the final norm has another in each."""
    return HYBRID if f"{_FINAL_NORM}weight" in names else GPT


def in_hybrid(name: str) -> str:
    """Return the name that a tensor of a GPTModel has in layout `hybrid`.

    >>> in_hybrid("decoder.layers.7.mlp.linear_fc1.weight"), in_hybrid("decoder.layers.{layer}.self_attention.linear_qkv.weight")
    ('decoder.layers.15.mlp.linear_fc1.weight', 'decoder.layers.{mixer}.self_attention.linear_qkv.weight')
    """
    if match := _LAYER.fullmatch(name):
        half = _half(match[2])
        number = ("{mixer}", "{mlp}")[half] if match[1] == "{layer}" else 2 * int(match[1]) + half
        return f"decoder.layers.{number}.{match[2]}"
    if match := _PREDICTED.fullmatch(name):
        return f"{match[1]}.mtp_model_layer.layers.{_half(match[2])}.{match[2]}"
    return _moved(name, _FINAL_LAYERNORM, _FINAL_NORM)


def in_gpt(name: str) -> str:
    """Return the name that a tensor in layout `hybrid` has in a GPTModel: the inverse of `in_hybrid`.

    Raises UserError for a layer that is not the half of one there: of Mamba, or attention after attention.
    """
    if match := _HYBRID_LAYER.fullmatch(name):
        half = _half(match[2])
        if match[1].isdecimal() and int(match[1]) % 2 != half:
            raise UserError(f"`{name}` is of no layer that a GPTModel has: layers there are attention and a feed-forward part")
        number = int(match[1]) // 2 if match[1].isdecimal() else "{layer}"
        return f"decoder.layers.{number}.{match[2]}"
    if match := _HYBRID_PREDICTED.fullmatch(name):
        return f"{match[1]}.transformer_layer.{match[3]}"
    return _moved(name, _FINAL_NORM, _FINAL_LAYERNORM)


def _moved(name: str, module: str, other: str) -> str:
    return other + name.removeprefix(module) if name.startswith(module) else name


def _half(inside: str) -> int:
    """The layer of two that holds a weight of a GPT layer: 0 mixes tokens, 1 is the feed-forward part."""
    return int(inside.startswith(_OF_FEED_FORWARD))


def hybrid_rules(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """Return the rules of a GPT model in layout `hybrid`."""
    return tuple([replace(rule, megatron=in_hybrid(rule.megatron), alias=in_hybrid(rule.alias)) for rule in rules])


def without_stages(pattern: Any) -> Any:
    """Return a pattern without `|`; what is no text stays as it is."""
    return pattern.replace(STAGE, "") if isinstance(pattern, str) else pattern


def with_stages(pattern: str, stages: Iterable[int]) -> str:
    """Return a pattern with `|` between pipeline stages of these numbers of layers.

    >>> with_stages("*-*-/*-", [3, 1])
    '*-*|-/*-'
    """
    layers, *predicted = pattern.replace(STAGE, "").split(PREDICTION)
    parts, first = list[str](), 0
    for count in stages:
        parts.append(layers[first : first + count])
        first += count
    return PREDICTION.join([STAGE.join(parts), *predicted])
