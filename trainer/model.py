"""Build this rank's model chunks from a Hugging Face configuration and a layout.

`GPTModelProvider` is megatron-core's TransformerConfig, which validates itself when it is finalized instead of when it is
made, so that recipes, files and overrides can change any of its fields; and the few numbers GPTModel wants beside it.

A model of your own: a dataclass made from `ModelProvider`, with `provide(pre_process, post_process, vp_stage)` that answers
any `torch.nn.Module`. With the forward step that comes along, the module is called as `module(tokens, position_ids,
attention_mask, labels=labels)` and answers the loss of each token, [micro batch, sequence]; with a forward step of your own,
as that one does. Precision, data parallelism, saving and resuming need nothing else. Where rows are packed, `attention_mask`
says which tokens do not see which (`trainer.segments`); on a GPU there is megatron-core's `packed_seq_params` instead.

Every tensor-parallel rank then holds the whole module. To divide it, build it of megatron-core's layers and give it the two
things they have: `config`, which is the provider, and `sharded_state_dict`; or make it a `MegatronModule`, which has both.
To cut it into pipeline stages, give it `set_input_tensor` too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal

import torch
from megatron.core import ModelParallelConfig, parallel_state
from megatron.core.enums import ModelType
from megatron.core.transformer import MegatronModule, MLATransformerConfig, TransformerConfig
from megatron.core.transformer.utils import sharded_state_dict_default

from converter.config import to_megatron
from converter.config_parts import described
from converter.families import find
from formats.errors import UserError
from trainer import absent_weights, device, gradient_fusion, language_model
from trainer.config import FilePath
from trainer.settings import refused
from trainer.settings.values import activation

Config = Mapping[str, Any]


@dataclass(kw_only=True)
class ModelProvider(TransformerConfig):
    """What every model needs: layout, precision, and `provide`. Fields may change until `finalize`."""

    num_layers: int = 0
    hidden_size: int = 0
    num_attention_heads: int = 0
    vocab_size: int = 0
    """Tokens of the vocabulary; rows beyond them are padding."""

    def __post_init__(self) -> None:
        """Leave validation to `finalize`."""

    def finalize(self) -> None:
        """Derive and validate the layout; the shape is left to the model."""
        ModelParallelConfig.__post_init__(self)

    def provide(self, pre_process: bool, post_process: bool, vp_stage: int | None = None) -> torch.nn.Module:
        """Return this rank's chunk of the model: the first of the pipeline if `pre_process`, the last if `post_process`."""
        raise NotImplementedError


@dataclass(kw_only=True)
class GPTModelProvider(ModelProvider):
    """A GPT-shaped model, or a hybrid of such layers and others."""

    layout: Literal["gpt", "hybrid"] = "gpt"
    """megatron-core's model that it is built as: `gpt`, GPTModel, or `hybrid`, HybridModel, whose layers are either attention or
    feed-forward, and which computes the same. A run may change from one to the other."""

    hybrid_layer_pattern: str | None = None
    """The kinds of a hybrid's layers, a symbol each, as HybridModel names them: `M` Mamba-2, `*` attention, `-` feed-forward, `E`
    experts; after `/` those of a layer of multi-token prediction. Then `num_layers` counts symbols. None: attention and
    feed-forward in turn, and `num_layers` counts both as one."""

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
    yarn_rotary_scaling_factor: float = 1.0
    yarn_original_max_position_embeddings: int | None = None
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    yarn_mscale: float | None = None
    yarn_mscale_all_dim: float | None = None
    yarn_correction_range_round_to_int: bool = True
    """Numbers of `position_embedding_type=yarn`, as megatron-core names them."""

    rope_parameters: dict[str, Any] | None = None
    """Parameters of rotary embeddings that GPTModel has no arguments for, as transformers names them, without `rope_theta`:
    `longrope` (Phi-3), `dynamic`, and `yarn` over a part of each head (GLM-4.5)."""

    sliding_rope: dict[str, Any] | None = None
    """Parameters of the rotary embeddings of layers whose attention slides, as transformers names them. None: as in the other
    layers. Gemma 3 and OLMo 3 have some."""

    mamba_norm_epsilon: float | None = None
    """Epsilon of the norm after the gate in Mamba layers. None: 1e-5, as megatron-core has it."""

    exact_sequence_length: int | None = None
    """The longest sequence that is computed as transformers does; longer ones are refused. None: any."""

    qk_layernorm_after_rope: bool = False
    """Norm query and key after the rotary embedding, as Hunyuan does, and not before."""

    qk_l2_norm_with_rope: bool = False
    """Apply `qk_l2_norm` in layers with rotary embeddings alone, as Llama 4 does."""

    alibi: dict[str, float] | None = None
    """Bias of attention that grows with distance, in place of positions (with `position_embedding_type=alibi`): `bias_max`, 8 by
    default, from which slopes follow, and `scale`, by which they are multiplied. Bloom, MPT, Baichuan 13B and Falcon RW."""

    clip_qkv: float | None = None
    """Clamp queries, keys and values to the range from its negative to it, as DBRX does. None: do not."""

    attn_logit_softcapping: float | None = None
    """Cap scores of attention at this value by tanh, as Gemma 2 does. On a GPU without flash-attn, all scores are in memory."""

    final_logit_softcapping: float | None = None
    """Cap logits at this value by tanh, as Gemma 2 does."""

    position_offset: int = 0
    """The number of the first position in the learned embeddings of positions: 2 for OPT."""

    embedding_layernorm: bool = False
    """Norm the embeddings of tokens, as Bloom does."""

    embedding_dropout: float | None = None
    """The share of numbers of the embeddings that training drops. None: `hidden_dropout`, as megatron-core does. Phi 2."""

    output_layer_bias: bool = False
    """Add a bias to logits, as Phi, GPT-J and CodeGen do."""

    parallel_residual: str | None = None
    """`one_norm` or `two_norms`: x + attention(norm(x)) + mlp(norm(x)), of one norm or of one each. Falcon, Phi; GPT-NeoX."""

    pre_layernorms: bool = True
    """Norms before attention and the feed-forward part. Without them: OLMo 2."""

    post_layernorms: bool = False
    """Norms after attention and the feed-forward part, before the residual is added. Gemma 2, GLM-4, OLMo 2."""

    residual_multiplier: float = 1.0
    """What the output of attention and of the feed-forward part is multiplied by before the residual is added. Granite."""

    moe_output_multiplier: float = 1.0
    """What the output of a mixture of experts is multiplied by. Cohere averages chosen and shared experts: 0.5."""

    qk_layernorm_scope: str = "head"
    """What `qk_layernorm` normalizes: `head`, each head with one weight for all; `all_heads`, all heads together (OLMo 2);
    `each_head`, each head with a weight of its own (Command R+)."""

    attention_output_bias: bool = False
    """Add a bias to attention's output without `add_bias_linear`, which adds some to routers and experts too. Phi-3.5 MoE."""

    moe_router_scoring: str | None = None
    """How experts are chosen and weighed where `moe_router_score_function` cannot say it: `softmax_with_bias` (ERNIE 4.5) or
    `sparsemixer` (Phi-3.5 MoE)."""

    moe_router_sparsemixer_jitter: float = 0.01
    """How far below the best an expert's logit may be to count in its weight, with `moe_router_scoring=sparsemixer`."""

    moe_router_group_score: int | None = None
    """How many of its best experts a group of experts is rated by (with `moe_router_num_groups`): 1 for DeepSeek-V2, 2 for
    DeepSeek-V3. None: as many as each chosen group contributes, as megatron-core does."""

    bias_activation_fusion: bool | None = None  # type: ignore[assignment]
    bias_dropout_fusion: bool | None = None  # type: ignore[assignment]
    masked_softmax_fusion: bool | None = None  # type: ignore[assignment]
    apply_rope_fusion: bool | None = None  # type: ignore[assignment]
    persist_layer_norm: bool | None = None  # type: ignore[assignment]
    cross_entropy_loss_fusion: bool | None = None  # type: ignore[assignment]
    cross_entropy_fusion_impl: str | None = None  # type: ignore[assignment]
    """Fused kernels: None for what the device has."""

    moe_grouped_gemm: bool | None = None  # type: ignore[assignment]
    """Compute all experts of a rank at once. None for what the device has."""

    moe_permute_fusion: bool | None = None  # type: ignore[assignment]
    """Sort tokens by expert in one kernel. None for what the device has."""

    moe_token_dispatcher_type: Literal["allgather", "alltoall", "flex"] = "alltoall"  # noqa: S105 - no password
    """How tokens reach the ranks of their experts."""

    gradient_accumulation_fusion: bool | None = None  # type: ignore[assignment]
    """Add gradients of weights to the accumulated ones in the matrix products that compute them. None for what the device has."""

    first_last_layers_bf16: bool | None = None  # type: ignore[assignment]
    """None for what `mixed_precision` says."""

    hf_config: dict[str, Any] = field(default_factory=dict)
    """The model's `config.json`, saved with checkpoints so that they can be exported."""

    hf_source: FilePath | None = None
    """The folder whose tokenizer and other side files are saved with checkpoints."""

    pretrained_from: FilePath | None = None
    """Weights that a run starts from where `checkpoint.pretrained_checkpoint` names none."""

    def finalize(self) -> None:
        """Derive and validate what TransformerConfig does on construction."""
        for base_field in fields(TransformerConfig):
            if base_field.default is not None and getattr(self, base_field.name) is None and base_field.default is not MISSING:
                setattr(self, base_field.name, base_field.default)
        # A hybrid has twice as many layers, each with half the branches: weights of their outputs begin as small.
        self.is_hybrid_model = self.hybrid_layer_pattern is not None
        TransformerConfig.__post_init__(self)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: the next multiple of `make_vocab_size_divisible_by` × TP."""
        multiple = self.make_vocab_size_divisible_by * self.tensor_model_parallel_size
        return -(-self.vocab_size // multiple) * multiple

    @property
    def longest_sequence(self) -> int:
        """The longest sequence that the model was made for and that is computed as transformers does."""
        return min(self.seq_length, self.exact_sequence_length or self.seq_length)

    def provide(self, pre_process: bool, post_process: bool, vp_stage: int | None = None) -> torch.nn.Module:
        """Return this rank's chunk of the model, with the embedding if `pre_process` and the output layer if `post_process`."""
        return language_model.make(self, pre_process=pre_process, post_process=post_process, vp_stage=vp_stage)


@dataclass(kw_only=True)
class MLAModelProvider(GPTModelProvider, MLATransformerConfig):
    """A GPT-shaped model with multi-head latent attention: queries, keys and values are projected from a few channels."""

    multi_latent_attention: bool = True
    q_lora_rank: int | None = None  # type: ignore[assignment]
    """Channels that queries are projected from. None: from all."""

    rope_type: str = "rope"
    rotary_scaling_factor: float = 1.0
    latent_layernorm_epsilon: float | None = None
    """Epsilon of the norms between the two projections of queries, and of keys and values. None: `layernorm_epsilon`."""

    def finalize(self) -> None:
        """Derive and validate what MLATransformerConfig does on construction."""
        super().finalize()
        if self.apply_rope_fusion and self.rope_type != "yarn":
            raise ValueError("`apply_rope_fusion` for latent attention works only with `rope_type=yarn`")


_CONVERTED = "its weights can be converted all the same"


def from_hf_config(config: Config, *, source: str | None = None) -> GPTModelProvider:
    """Return the provider of the model that a `config.json` describes. Raises UserError for a family that is not supported, or
    whose weights alone are."""
    family = find(config.get("model_type"))
    if not family.trains:
        raise UserError(f"a `{config['model_type']}` cannot be trained: {family.WEIGHTS_ONLY}", hint=_CONVERTED)
    megatron = {"layout": family.layout, **to_megatron(family.CONFIG, config)}
    provider = MLAModelProvider if megatron.get("multi_latent_attention") else GPTModelProvider
    provider_fields = {provider_field.name for provider_field in fields(provider)}
    explicit = {name: value for name, value in megatron.items() if value is not None}
    for name, value in explicit.items():
        if name not in provider_fields:
            raise UserError(
                f"`{config['model_type']}` with {described(name, value)} cannot be trained: neither "
                "megatron-core nor this trainer computes it",
                hint=_CONVERTED,
            )
    explicit["activation_func"] = activation(explicit["activation_func"])
    if "window_size" in explicit:
        explicit["window_size"] = tuple(explicit["window_size"])
    return provider(**explicit, hf_config=dict(config), hf_source=source)


def build(provider: Any) -> list[torch.nn.Module]:
    """Return this rank's chunks, one per virtual pipeline stage, on its device and in the parameters' dtype.

    Raises UserError where megatron-core refuses the settings.
    """
    with refused.user_errors("model", provider, try_again):
        chunks = [chunk.to(device.current()) for chunk in _chunks(provider)]
    if isinstance(provider, GPTModelProvider) and provider.hf_config:
        absent_weights.freeze(chunks, provider.hf_config, layout=provider.layout)
    return chunks


def try_again(provider: Any) -> None:
    """Build a provider whose fields were changed after it was finalized, on torch's meta device: as it is, or finalized again."""
    try:
        shapes(provider)
    except refused.REFUSALS:
        getattr(provider, "finalize", lambda: None)()
        shapes(provider)


def shapes(provider: Any) -> list[torch.nn.Module]:
    """Return the same chunks on torch's meta device: without memory, in a fraction of a second."""
    with torch.device("meta"):
        return _chunks(provider)


def _chunks(provider: Any) -> list[torch.nn.Module]:
    stages = parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1
    if getattr(provider, "gradient_accumulation_fusion", False):
        gradient_fusion.provide_kernel()
    return [_chunk(provider, stage if stages > 1 else None) for stage in range(stages)]


def _chunk(provider: Any, vp_stage: int | None) -> torch.nn.Module:
    stage = {"ignore_virtual": False, "vp_stage": vp_stage}
    model = provider.provide(
        pre_process=parallel_state.is_pipeline_first_stage(**stage),
        post_process=parallel_state.is_pipeline_last_stage(**stage),
        vp_stage=vp_stage,
    )
    return _as_megatron(model, provider)


def _as_megatron(model: torch.nn.Module, provider: Any) -> torch.nn.Module:
    if all(hasattr(model, name) for name in ("config", "sharded_state_dict", "set_input_tensor")):
        return model
    pipeline = provider.pipeline_model_parallel_size
    if pipeline > 1 and not hasattr(model, "set_input_tensor"):
        raise UserError(
            f"`model.pipeline_model_parallel_size` is `{pipeline}`, but `{type(model).__name__}` cannot be cut into stages",
            hint="give it `set_input_tensor`, as megatron-core's GPTModel has it, or leave the pipeline out",
        )
    return Whole(provider, model)


class Whole(MegatronModule):
    """A module of the user's own with the methods that megatron-core needs. Its weights keep their names, and are replicated."""

    model_type = ModelType.encoder_or_decoder

    def __init__(self, config: Any, module: torch.nn.Module) -> None:
        super().__init__(config)
        self.own = module
        self.pre_process, self.post_process = getattr(module, "pre_process", True), getattr(module, "post_process", True)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        return self.own(*args, **kwargs)

    def set_input_tensor(self, received: Any) -> None:
        """Pass on what the previous stage sent, for modules that are stages."""
        if hasattr(self.own, "set_input_tensor"):
            self.own.set_input_tensor(received)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """Return the module's own sharded state dict, or all of its tensors as replicated."""
        return sharded_state_dict_default(self.own, prefix, sharded_offsets, metadata)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load into the module, whose names the checkpoint has."""
        return self.own.load_state_dict(state_dict, strict=strict, assign=assign)


def sees_data(chunk: Any) -> bool:
    """Tell whether a chunk takes tokens or labels: the first and the last stage do, and every chunk of a model of the user's
    own."""
    inner = unwrap(chunk)
    return bool(getattr(inner, "pre_process", True) or getattr(inner, "post_process", True))


def unwrap(chunk: Any) -> Any:
    """Return the model inside the wrappers of optimizers and precision."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk
