"""From a Hugging Face configuration and a layout to this rank's model chunks.

`GPTModelProvider` is megatron-core's TransformerConfig, which validates itself when it is finalized instead of when it is
made, so that recipes, files and overrides can change any of its fields; and the few numbers GPTModel wants beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig

from converter.config import rope_numbers, to_huggingface, to_megatron
from converter.families import find
from trainer import device
from trainer.loss import WithoutPadding

Config = Mapping[str, Any]


class Model(GPTModel):
    """GPTModel whose padded vocabulary rows never enter the softmax."""

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The loss of each token, [batch, sequence], from this rank's logits [sequence, batch, vocabulary rows]."""
        return super().compute_language_model_loss(labels, self.without_padding(logits))

    def without_padding(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits of this rank, or of all ranks gathered, in which no padding can be chosen. Written in place."""
        rows = logits.shape[-1]
        first = 0 if rows == self.vocab_size else parallel_state.get_tensor_model_parallel_rank() * rows
        valid = min(max(self.config.vocab_size - first, 0), rows)
        return logits if valid == rows else WithoutPadding.apply(logits, valid)


@dataclass(kw_only=True)
class GPTModelProvider(TransformerConfig):
    """A GPT-shaped model. Fields may change until `finalize`."""

    num_layers: int = 0
    hidden_size: int = 0
    num_attention_heads: int = 0
    vocab_size: int = 0
    """Tokens that mean something; rows beyond them are padding."""

    seq_length: int = 2048
    """The longest sequence the model was made for."""

    make_vocab_size_divisible_by: int = 128
    """Rows per tensor-parallel rank are padded to a multiple of this."""

    share_embeddings_and_output_weights: bool = False
    position_embedding_type: str = "rope"
    rotary_percent: float = 1.0
    rotary_base: float = 10000.0
    rope_scaling: bool = False
    rope_scaling_factor: float = 8.0
    seq_len_interpolation_factor: float | None = None
    hf_config: dict[str, Any] = field(default_factory=dict)
    """The `config.json` this model is; it travels with checkpoints so that they can be exported."""

    hf_source: str | None = None
    """The folder whose tokenizer and other side files travel with checkpoints."""

    pretrained_from: str | None = None
    """Weights that a run starts from where `checkpoint.pretrained_checkpoint` names none."""

    def __post_init__(self) -> None:
        """Nothing yet: see `finalize`."""

    def finalize(self) -> None:
        """Derive and validate what TransformerConfig does on construction."""
        super().__post_init__()

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: the next multiple of `make_vocab_size_divisible_by` × TP."""
        multiple = self.make_vocab_size_divisible_by * self.tensor_model_parallel_size
        return -(-self.vocab_size // multiple) * multiple

    def provide(self, pre_process: bool, post_process: bool, vp_stage: int | None = None) -> torch.nn.Module:
        """This rank's chunk of the model: the embedding if `pre_process`, the output layer if `post_process`."""
        model = Model(
            self,
            device.layer_spec(self, vp_stage),
            vocab_size=self.padded_vocab_size,
            max_sequence_length=self.seq_length,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=self.share_embeddings_and_output_weights,
            position_embedding_type=self.position_embedding_type,
            rotary_percent=self.rotary_percent,
            rotary_base=self.rotary_base,
            rope_scaling=self.rope_scaling,
            rope_scaling_factor=self.rope_scaling_factor,
            seq_len_interpolation_factor=self.seq_len_interpolation_factor,
            vp_stage=vp_stage,
        )
        return _with_own_rope(model, self.hf_config)


def _with_own_rope(model: GPTModel, config: Config) -> GPTModel:
    """Llama-3.1's scaling with all four numbers of `config.json`; GPTModel takes the factor and fixes the others."""
    rope = rope_numbers(config) if config else {}
    if rope.get("rope_type") != "llama3":
        return model
    embedding = model.rotary_pos_emb
    size = embedding.inv_freq.numel() * 2
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device=embedding.inv_freq.device) / size
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    embedding.inv_freq = embedding._apply_scaling(1.0 / rope["rope_theta"] ** exponents, **{name: rope[name] for name in names})
    return model


def from_hf_config(config: Config, *, source: str | None = None) -> GPTModelProvider:
    """The provider of the model that a `config.json` describes. UserError for a family that is not supported."""
    known = {one.name for one in fields(GPTModelProvider)}
    megatron = to_megatron(find(config.get("model_type")).CONFIG, config)
    activation = {"silu": torch.nn.functional.silu}[megatron.pop("activation_func")]
    window = megatron.pop("window_size", None)
    return GPTModelProvider(
        **{name: value for name, value in megatron.items() if name in known and value is not None},
        activation_func=activation,
        window_size=tuple(window) if window else None,
        hf_config=dict(config),
        hf_source=source,
    )


def described(provider: Any) -> Config:
    """The `config.json` of a model, with what was changed since it was made from one; empty for a model of one's own."""
    config: Config = getattr(provider, "hf_config", None) or {}
    if not config:
        return {}
    family = find(config.get("model_type")).CONFIG
    made_of = to_megatron(family, config)
    plain = {name for name, value in made_of.items() if isinstance(value, int | float) and hasattr(provider, name)}
    plain -= {"hidden_dropout", "attention_dropout"}  # of the training, not of the model
    before, after = (to_huggingface(family, made_of | now) for now in ({}, {name: getattr(provider, name) for name in plain}))
    return {**config, **{name: value for name, value in after.items() if before.get(name) != value}}


def build(provider: Any) -> list[torch.nn.Module]:
    """This rank's chunks, one per virtual pipeline stage, on its device and in the parameters' dtype."""
    stages = parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1
    return [_chunk(provider, stage if stages > 1 else None) for stage in range(stages)]


def _chunk(provider: Any, vp_stage: int | None) -> torch.nn.Module:
    place = {"ignore_virtual": False, "vp_stage": vp_stage}
    model = provider.provide(
        pre_process=parallel_state.is_pipeline_first_stage(**place),
        post_process=parallel_state.is_pipeline_last_stage(**place),
        vp_stage=vp_stage,
    )
    return model.to(device.current())


def sees_data(chunk: Any) -> bool:
    """Does a chunk take tokens, or labels? Those between take what the pipeline hands on; a model of one's own takes all."""
    inner = unwrap(chunk)
    return bool(getattr(inner, "pre_process", True) or getattr(inner, "post_process", True))


def unwrap(chunk: Any) -> Any:
    """The model inside what optimizers and precision wrapped around it."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk
