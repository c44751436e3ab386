"""The spec of layers of multi-token prediction (MTP): megatron-core's, around a decoder layer that the pieces have changed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from trainer.layers.norms import accepted
from trainer.layers.spec import uses_transformer_engine


def prediction_block(provider: Any, layer: Any, vp_stage: int | None) -> Any:
    """Return the spec of this rank's layers of multi-token prediction, around a layer of this spec; None where it has none."""
    block = TransformerBlockSubmodules(layer_specs=[layer])
    spec = get_gpt_mtp_block_spec(provider, block, use_transformer_engine=uses_transformer_engine(layer), vp_stage=vp_stage)
    return spec and replace(spec, layer_specs=[_with_accepted_norms(provider, layer_spec) for layer_spec in spec.layer_specs])


def _with_accepted_norms(provider: Any, spec: Any) -> Any:
    parts = spec.submodules
    norms = {name: accepted(provider, getattr(parts, name)) for name in ("enorm", "hnorm", "layer_norm")}
    return replace(spec, submodules=replace(parts, **norms))
