"""megatron-core's two models of language, GPTModel and HybridModel, as a provider describes them."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.hybrid.hybrid_model import HybridModel

from trainer import device, layers
from trainer.layers import pattern
from trainer.layers.output import capped
from trainer.loss import WithoutPadding


class _Vocabulary:
    """What both models do here that megatron-core's do not: padded vocabulary rows never enter the softmax, and logits may be
    capped."""

    config: Any
    vocab_size: int

    def _scale_logits(self, logits: torch.Tensor) -> torch.Tensor:
        return capped(super()._scale_logits(logits), self.config.final_logit_softcapping)  # type: ignore[misc]

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Return the loss of each token, [batch, sequence], from this rank's logits [sequence, batch, vocabulary rows]."""
        return super().compute_language_model_loss(labels, self.without_padding(logits))  # type: ignore[misc]

    def without_padding(self, logits: torch.Tensor) -> torch.Tensor:
        """Mask the padding in the logits of this rank, or of all ranks gathered, in place."""
        rows = logits.shape[-1]
        first = 0 if rows == self.vocab_size else parallel_state.get_tensor_model_parallel_rank() * rows
        valid = min(max(self.config.vocab_size - first, 0), rows)
        return logits if valid == rows else WithoutPadding.apply(logits, valid)


class Model(_Vocabulary, GPTModel):
    """GPTModel with a padded vocabulary."""


class Hybrid(_Vocabulary, HybridModel):
    """HybridModel with a padded vocabulary."""


def make(provider: Any, *, pre_process: bool, post_process: bool, vp_stage: int | None) -> torch.nn.Module:
    """Return this rank's chunk of the model, with the embedding if `pre_process` and the output layer if `post_process`."""
    stage = {"pre_process": pre_process, "post_process": post_process, "vp_stage": vp_stage}
    model = _hybrid(provider, stage) if pattern.is_hybrid(provider) else _gpt(provider, stage)
    model.max_sequence_length = provider.longest_sequence
    return model


def _gpt(provider: Any, stage: dict[str, Any]) -> Any:
    vp_stage, plain = stage["vp_stage"], layers.attention_alone(provider)
    ahead = layers.prediction_spec(provider, device.last_layer_spec(plain), vp_stage) if provider.mtp_num_layers else None
    model = Model(
        provider,
        layers.adapt_spec(provider, device.layer_spec(plain, vp_stage), vp_stage),
        rope_scaling=provider.rope_scaling,
        rope_scaling_factor=provider.rope_scaling_factor,
        mtp_block_spec=ahead,
        **_arguments(provider),
        **stage,
    )
    return layers.adapt_model(provider, model)


def _hybrid(provider: Any, stage: dict[str, Any]) -> Any:
    """Build a HybridModel. Its layers have a configuration that counts them; its own is the provider, which a run changes."""
    counted = pattern.in_hybrid_layers(provider)
    model = Hybrid(
        counted,
        layers.hybrid_spec(counted, device.each_layer_spec(layers.attention_alone(counted))),
        hybrid_layer_pattern=pattern.pattern(provider),
        **_arguments(provider),
        **stage,
    )
    layers.adapt_model(counted, model)
    model.config = provider
    return model


def _arguments(provider: Any) -> dict[str, Any]:
    """Return what both models take."""
    return {
        "vocab_size": provider.padded_vocab_size,
        "max_sequence_length": provider.seq_length + provider.position_offset,
        "share_embeddings_and_output_weights": provider.share_embeddings_and_output_weights,
        "position_embedding_type": "none" if provider.alibi is not None else provider.position_embedding_type,
        "rotary_percent": provider.rotary_percent,
        "rotary_base": provider.rotary_base,
        "seq_len_interpolation_factor": provider.seq_len_interpolation_factor,
    }
