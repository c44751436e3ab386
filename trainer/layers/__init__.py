"""What models need that megatron-core's own layers lack: one module per piece, switched on by fields of `GPTModelProvider`.

A piece changes the spec of a decoder layer before the model is built, or the model after. It works with megatron-core's local
layers and with Transformer Engine's, on every rank of a layout. Knows nothing of Hugging Face.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from trainer.layers.branch_norms import branch_norms
from trainer.layers.clipped import clipped
from trainer.layers.delta_net import attention_alone, delta_nets, net_norm_gradients, with_net
from trainer.layers.embedding import embedding_dropout, embedding_layernorm, position_offset
from trainer.layers.expert_biases import expert_biases
from trainer.layers.expert_groups import expert_groups
from trainer.layers.expert_output import expert_output
from trainer.layers.head_norms import head_norms
from trainer.layers.hybrid import mamba_norms, stack_spec
from trainer.layers.late_norms import late_norms
from trainer.layers.latent_attention import latent_epsilon, latent_gradients, local_attention, plain_queries
from trainer.layers.latent_experts import latent_experts
from trainer.layers.norms import accepted, local_norms
from trainer.layers.output import output_bias
from trainer.layers.output_projection import attention_output_bias
from trainer.layers.parallel_residual import parallel_residual
from trainer.layers.pattern import GATED_DELTA_NET
from trainer.layers.prediction import prediction_block
from trainer.layers.recomputed_bias import recomputed_bias
from trainer.layers.residual_multiplier import residual_multiplier
from trainer.layers.rope import hybrid_rope, own_frequencies, sliding_rope
from trainer.layers.rope_norms import rope_norms
from trainer.layers.routing import own_scoring
from trainer.layers.scores import changed_scores
from trainer.layers.sinks import divided_sinks
from trainer.layers.sparse_attention import shared_choices, sparse_attention
from trainer.layers.spec import copied
from trainer.layers.token_counts import counted_on_device
from trainer.layers.token_order import sorted_once
from trainer.layers.xielu import activation_weights

__all__ = ["adapt_model", "adapt_spec", "attention_alone", "prediction_spec"]

LAYER_PIECES: tuple[Callable[[Any, Any], None], ...] = (
    sparse_attention,
    local_norms,
    local_attention,
    plain_queries,
    changed_scores,
    head_norms,
    parallel_residual,
    attention_output_bias,
    branch_norms,
    residual_multiplier,
    own_scoring,
    latent_experts,
)
"""Functions `(provider, layer)` that change the spec of a decoder layer in place. Each looks at fields of its own."""

MODEL_PIECES: tuple[Callable[[Any, Any], None], ...] = (
    hybrid_rope,
    own_frequencies,
    sliding_rope,
    late_norms,
    clipped,
    position_offset,
    embedding_dropout,
    embedding_layernorm,
    output_bias,
    activation_weights,
    latent_epsilon,
    recomputed_bias,
    latent_gradients,
    net_norm_gradients,
    expert_groups,
    expert_output,
    sorted_once,
    counted_on_device,
    expert_biases,
    divided_sinks,
    rope_norms,
    mamba_norms,
    shared_choices,
)
"""Functions `(provider, model)` that change this rank's chunk of a GPTModel or HybridModel in place."""


def adapt_spec(provider: Any, spec: Any, vp_stage: int | None = None) -> Any:
    """Return the spec of this rank's decoder layers with every piece that the provider's fields switch on.

    Layers that share a spec share its adapted copy; the given spec is not changed, and is that of `attention_alone`.
    """
    spec = delta_nets(provider, spec, vp_stage)
    copies = {id(layer): layer for layer in spec.layer_specs}
    copies = {key: _adapted(provider, layer) for key, layer in copies.items()}
    adapted = [copies[id(layer)] for layer in spec.layer_specs]
    return replace(spec, layer_specs=adapted, layer_norm=accepted(provider, spec.layer_norm))


def _adapted(provider: Any, layer: Any) -> Any:
    layer = copied(layer)
    for piece in LAYER_PIECES:
        piece(provider, layer)
    return layer


def hybrid_spec(provider: Any, layers: Sequence[Any]) -> Any:
    """Return the spec of a hybrid's decoder, from those of a GPT layer of each kind that it has, as `attention_alone` has them,
    with every piece that the provider's fields switch on."""
    has_nets = provider.experimental_attention_variant == GATED_DELTA_NET
    net = _adapted(provider, with_net(provider, layers[0])) if has_nets else None
    return stack_spec(provider, [_adapted(provider, layer) for layer in layers], net)


def prediction_spec(provider: Any, layer: Any, vp_stage: int | None) -> Any:
    """Return the spec of this rank's layers of multi-token prediction, each around a decoder layer of this spec with every piece
    that the provider's fields switch on; None where it has none."""
    return prediction_block(provider, _adapted(provider, layer), vp_stage) if provider.mtp_num_layers else None


def adapt_model(provider: Any, model: Any) -> Any:
    """Return this rank's chunk of a GPTModel or HybridModel with every piece that the provider's fields switch on."""
    for piece in MODEL_PIECES:
        piece(provider, model)
    return model
