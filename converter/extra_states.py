"""Which of a model's modules have an `_extra_state` in a checkpoint: facts of megatron-core 0.19 with Transformer Engine.

Modules of Transformer Engine have one; those that megatron-core or `mbtrain` write themselves have none.
"""

from __future__ import annotations

import re
from collections.abc import Collection

_STATELESS = re.compile(
    r"(.*\.)?(word_embeddings|position_embeddings|router|shared_experts"
    r"|embedding\.layernorm|activation_func"  # of mbtrain
    r"|mixer|mixer\.norm|conv1d"  # of Mamba
    r"|self_attention)"  # of gated delta nets, which hold weights themselves
)
_HEAD_NORMS = re.compile(r".*\.[qk]_layernorm")
_SECTION = re.compile(r"(.*)\.(?:weight|bias)\.\w+")
"""The name of a part of a weight that megatron-core stores in sections: `in_proj.weight.z`."""


def stateful_module(weight: str, *, hybrid: bool = False, own_head_norms: bool = False) -> str | None:
    """Return the module of a weight that has an `_extra_state`; None where it has none.

    `hybrid`: of a HybridModel, whose output layer has one. `own_head_norms`: norms of query and key are `mbtrain`'s, with other
    weights than one for all heads.

    >>> stateful_module("decoder.layers.mlp.linear_fc2.weight"), stateful_module("decoder.layers.mlp.router.weight")
    ('decoder.layers.mlp.linear_fc2', None)
    """
    section = _SECTION.fullmatch(weight)
    module = section[1] if section else weight.rpartition(".")[0]
    if _STATELESS.fullmatch(module) or (module == "output_layer" and not hybrid):
        return None
    return None if own_head_norms and _HEAD_NORMS.fullmatch(module) else module


def weightless_modules(weights: Collection[str], *, hybrid: bool) -> tuple[str, ...]:
    """Return the modules with an `_extra_state` and no weight: the output layer of a HybridModel that is tied to the embedding.

    >>> weightless_modules(["embedding.word_embeddings.weight"], hybrid=True)
    ('output_layer',)
    """
    return ("output_layer",) if hybrid and "output_layer.weight" not in weights else ()
