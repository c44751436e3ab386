"""Classify Megatron's settings: those that change what the weights compute, and those that change how it is computed.

A Hugging Face `config.json` has no field for most of the first kind, and tensors do not show them: with `rotary_interleaved`, the
same names and shapes are another model. `NEUTRAL` lists the values of each that leave a model of our families unchanged; any
other value is refused by name. Sources: `TransformerConfig`, `ModelParallelConfig` and `GPTModel` of megatron-core 0.19,
Megatron-LM's command line, Megatron-Bridge's `GPTModelProvider`. Names in none of the tables are of newer versions or of forks.
Reads no files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from enum import Enum
from math import isclose, sqrt
from typing import Any, NamedTuple, cast

from formats.errors import UserError, format_untrusted

Settings = Mapping[str, Any]


class Effect(Enum):
    """What a setting changes."""

    FUNCTION = "changes what the model computes, and `config.json` has no field for it"
    CONFIG = "is a field of `config.json`, which a family's `CONFIG` maps or refuses"
    DEPENDENT = "has an effect only if another setting of this table enables it"
    EXECUTION = "changes how the model is computed, trained or stored"
    UNKNOWN = "is in no table"


NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "activation_func_clamp_value": (),
    "alibi": (),
    "apply_layernorm_1p": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "attention_multiplier": (),
    "attention_output_gate": (False,),
    "attn_logit_softcapping": (0.0,),
    "clip_qkv": (),
    "embedding_layernorm": (False,),
    "embedding_multiplier": (1.0,),
    "experimental_attention_variant": (),
    "final_logit_softcapping": (0.0,),
    "glu_linear_offset": (0.0,),
    "heterogeneous_block_specs": (False,),
    "heterogeneous_layers_config_encoded_json": ("",),
    "heterogeneous_layers_config_path": ("",),
    "hybrid_attention_ratio": (0.0,),
    "hybrid_layer_pattern": ("",),
    "hybrid_mlp_ratio": (0.0,),
    "hybrid_override_pattern": ("",),
    "high_freq_factor": (4.0,),
    "is_hybrid_model": (False,),
    "layernorm_zero_centered_gamma": (False,),
    "linear_attention_freq": (),
    "logit_scale": (1.0,),
    "logits_scaling": (1.0,),
    "low_freq_factor": (1.0,),
    "moe_output_multiplier": (1.0,),
    "mrope_section": ([],),
    "mtp_num_layers": (0,),
    "multi_latent_attention": (False,),
    "no_rope_freq": (0, []),
    "old_context_len": (8192,),
    "num_experts": (0,),
    "openai_gelu": (False,),
    "output_layer_bias": (False,),
    "parallel_residual": (),
    "position_offset": (0,),
    "post_layernorms": (False,),
    "pre_layernorms": (True,),
    "qk_l2_norm": (False,),
    "qk_l2_norm_with_rope": (False,),
    "qk_layernorm_after_rope": (False,),
    "qk_layernorm_scope": ("head",),
    "query_pre_attn_scalar": (),
    "quick_geglu": (False,),
    "residual_multiplier": (1.0,),
    "retro_add_retriever": (False,),
    "rope_parameters": (),
    "rope_type": ("rope",),
    "rotary_interleaved": (False,),
    "sliding_rope": (),
    "softmax_scale": (),
    "softmax_type": ("vanilla",),
    "spec": (),
    "squared_relu": (False,),
    "use_mup": (False,),
    "window_attn_skip_freq": (0,),
}
"""Settings that change what the model computes, with the values besides null that do not. A few are of forks, of
Megatron-Bridge's other families, and of `mbtrain`."""

_CONFIG = frozenset({
    "activation_func", "add_bias_linear", "add_qkv_bias", "attention_dropout", "ffn_hidden_size", "gated_linear_unit",
    "hidden_dropout", "hidden_size", "init_method_std", "kv_channels", "layernorm_epsilon", "normalization",
    "num_attention_heads", "num_layers", "num_moe_experts", "num_query_groups", "position_embedding_type", "qk_layernorm",
    "rope_scaling", "rope_scaling_factor", "scale_factor", "rotary_base", "rotary_percent", "seq_len_interpolation_factor",
    "seq_length",
    "share_embeddings_and_output_weights", "vocab_size", "window_size",
    # Megatron-LM's own names
    "add_position_embedding", "group_query_attention", "make_vocab_size_divisible_by", "max_position_embeddings", "norm_epsilon",
    "padded_vocab_size", "rotary_seq_len_interpolation_factor", "swiglu", "untie_embeddings_and_output_weights",
    "use_rope_scaling", "use_rotary_position_embeddings",
})  # fmt: skip

_DEPENDENT = re.compile(
    r"^(dsa_|linear_(?!attention_freq)|mamba_|moe_|mtp_|mup_|yarn_|mscale|relative_attention_|retro_"
    r"|(beta_fast|beta_slow|cache_mla_latents|kv_lora_rank|latent_layernorm_epsilon|mla_down_proj_fusion|original_max_position_embeddings|q_lora_rank"
    r"|qk_head_dim|qk_pos_emb_head_dim|rotary_scaling_factor|v_head_dim)$)"
)
"""Settings of sparse attention, linear attention, Mamba, experts, multi-token prediction, muP, YaRN, T5's positions and latent
attention."""

_EXECUTION_ALWAYS = re.compile(
    r"^(account_for|dino_|fp4_|fp8_|fp16_|fp32_|fine_grained|fused_|grpo_|inference_|kitchen_|log_|logits_load_|logits_save_"
    r"|loss_scale|(initial|min)_loss_scale|muon_|overlap_|persist_|no_persist_|reset_|retriever_|rl_|tp_comm_"
    r"|use_(flash|fused|kitchen|te_))|(_fusion|_fusion_impl|_in_fp32|_grad_scale_func|_init_method|_init_method_std)$"
)

_EXECUTION = re.compile(
    r"^(activation_offload|async|autocast|barrier|batch_|checkpoint|ckpt|context_parallel|cp_comm|cpu_offload"
    r"|cross_entropy|cuda_graph|data|ddp_|defer_|delay_|delta_offload|deterministic|disable_|distribute|dist_|enable_"
    r"|ep_overlap|expert_|external_cuda|flash_|fp16|fp32|fp4|fp8|bf16|fsdp_|gradient_|grad_"
    r"|gtp_|hierarchical|init_|initial_|loss_|main_|megatron_fsdp|memory_|microbatch"
    r"|min_offload|mlp_chunks|nccl|no_sync|num_layers_(in|at)_|num_microbatches|offload|optim|param|perform_"
    r"|pipeline_|quant_|recompute_|save_|sequence_parallel|symmetric|tensor_|te_|test_|timer|torch_|train"
    r"|transformer_impl|use_(cpu|ring|grouped|inference|mamba|megatron|dist|nccl|transformer_engine|torch)"
    r"|variable_seq|virtual_|wgrad_|_cpu_offload)"
    r"|(_func|_dtype|_backend|_comm_type|_recipe|_gemm|_mode|_seed|_pool|_precision|_parallel_size|_process_group|_nvls|_sms)$"
)
"""Names of settings for precision, parallelism, kernels, initialization, memory and the training run, unless they contain one of
`_MODEL_WORDS`."""

_EXECUTION_NAMES = frozenset({
    "activation_func_fp8_input_store", "activation_offload_fraction", "apply_query_key_layer_scaling",
    "apply_wd_to_qk_layernorm", "attention_backend", "attention_softmax_in_fp32", "calculate_per_token_loss", "clip_grad",
    "clone_scatter_output_in_embedding", "config_logger_dir", "create_attention_mask_in_dataloader",
    "deallocate_pipeline_outputs", "defer_embedding_wgrad_compute", "dense_grouped_gemm", "embedding_path",
    "ep_overlap_early_attn_memory_release", "experimental_attention_variant_loss_scale_func", "first_last_layers_bf16",
    "generation_config",
    "flash_attention_version",
    "grad_scale_func", "head_lr_mult", "hetereogenous_dist_checkpoint", "hf_model_id", "hf_model_revision",
    "high_priority_a2a_comm_stream", "hybrid_context_parallel", "max_seqlen_per_dp_cp_rank", "memory_efficient_layer_norm",
    "num_microbatches_with_partial_activation_checkpoints", "output_bert_embeddings", "parallel_output", "qk_clip",
    "qk_clip_alpha", "qk_clip_threshold", "restore_modelopt_state", "scatter_embedding_sequence_parallel", "should_pad_vocab",
    "tp_only_amax_red",
    "use_arbitrary_attention_mask", "use_transformer_engine_full_layer_spec", "use_transformer_engine_op_fuser",
})  # fmt: skip
"""Further such names, which match no pattern. QK clipping changes weights during training, and not what they compute."""

_MODEL_WORDS = frozenset({
    "act", "activation", "alibi", "attention", "attn", "bias", "clamp", "embed", "embedding", "embeddings", "experts", "gamma",
    "gate", "gated", "geglu", "gelu", "glu", "hybrid", "interleaved", "layernorm", "logit", "logits", "mult", "multiplier",
    "mup", "nope", "norm", "ntk", "position", "positional", "qk", "relu", "residual", "rmsnorm", "rope", "rotary", "scale",
    "scaling", "sink", "sinks", "softcap", "softcapping", "softmax", "spec", "swiglu", "temperature", "window", "yarn",
})  # fmt: skip
"""A name with one of these words may change what the model computes, whatever its other words are."""

_OFF: tuple[Any, ...] = (None, False, 0, "", [], {})
_FACTOR = re.compile(r"(multiplier|mult|scale|scaling|factor)$")
_LAYER_SPECS = re.compile(
    r"^megatron\.(core\.models\.(gpt|hybrid|mamba)\.|bridge\.models\.(gpt_provider|hybrid\.hybrid_provider|mamba\.mamba_provider)\.)"
)
_BUILT_BY = {
    "_target_": re.compile(r"(^|\.)((GPT|Hybrid|Mamba)ModelProvider|(Llama|CodeLlama|Mistral)\w*Provider\w*)$"),
    "transformer_layer_spec": _LAYER_SPECS,
    "hybrid_stack_spec": _LAYER_SPECS,
    "mamba_stack_spec": _LAYER_SPECS,
}
"""Classes and functions with which Megatron-Bridge builds a model of a supported family."""


class UnsupportedSetting(NamedTuple):
    """A setting that changes what the model computes, or may."""

    name: str
    value: Any
    known: bool
    """Whether it certainly does. If not, its name is in no table."""


def effect_of(name: str) -> Effect:
    """Return what a setting changes, by its name.

    >>> effect_of("rotary_interleaved").name, effect_of("tensor_model_parallel_size").name
    ('FUNCTION', 'EXECUTION')
    """
    if name in NEUTRAL or name in _BUILT_BY:
        return Effect.FUNCTION
    if name in _CONFIG:
        return Effect.CONFIG
    if _DEPENDENT.search(name):
        return Effect.DEPENDENT
    if name in _EXECUTION_NAMES or _EXECUTION_ALWAYS.search(name):
        return Effect.EXECUTION
    if has_model_word(name):
        return Effect.UNKNOWN
    return Effect.EXECUTION if _EXECUTION.search(name) else Effect.UNKNOWN


def has_model_word(name: str) -> bool:
    """Return whether a name looks like a setting of a model rather than of a run."""
    return bool(_MODEL_WORDS.intersection(name.split("_")))


def find_unsupported(settings: Settings, *, only_model_words: bool) -> Iterator[UnsupportedSetting]:
    """Yield the settings that make another model than the plain one of a family, and unknown ones that may.

    `only_model_words`: skip unknown names that do not look like a model's. Megatron-LM's `args` hold all settings of a run.

    >>> [setting.name for setting in find_unsupported({"rotary_interleaved": True, "qk_l2_norm": False}, only_model_words=True)]
    ['rotary_interleaved']
    """
    for name, value in settings.items():
        effect = effect_of(name)
        if name in _BUILT_BY:
            yield from _built_by(name, value)
        elif effect is Effect.FUNCTION and not is_neutral(name, value, settings):
            yield UnsupportedSetting(name, value, known=True)
        elif effect is Effect.UNKNOWN and (has_model_word(name) or not only_model_words) and not _is_off(name, value):
            yield UnsupportedSetting(name, value, known=False)


def _built_by(name: str, value: Any) -> Iterator[UnsupportedSetting]:
    target = cast("Settings", value).get("_target_") if isinstance(value, Mapping) else value
    if isinstance(target, str) and not _BUILT_BY[name].search(target):
        yield UnsupportedSetting(name, target, known=False)


def is_neutral(name: str, value: Any, settings: Settings) -> bool:
    """Return whether a setting of `NEUTRAL` leaves the model unchanged, given the other settings."""
    if value is None or any(_same(value, neutral) for neutral in NEUTRAL[name]):
        return True
    if name == "softmax_scale":
        return _is_default_scale(value, settings)
    if name == "no_rope_freq" and isinstance(value, list):
        return not any(cast("list[Any]", value))
    if name == "window_attn_skip_freq":
        return settings.get("window_size") is None
    return name == "spec" and _is_own_spec(value)


def _is_default_scale(value: Any, settings: Settings) -> bool:
    """Return whether a softmax scale is the default, 1 / √head_dim."""
    hidden, heads, size = (settings.get(name) for name in ("hidden_size", "num_attention_heads", "kv_channels"))
    if size is None and isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        size = hidden // heads
    numbers = isinstance(value, (int, float)) and isinstance(size, int) and size > 0
    return numbers and isclose(value, 1 / sqrt(cast("int", size)), rel_tol=1e-6)


def _is_own_spec(value: Any) -> bool:
    """Return whether Megatron-LM's `--spec MODULE NAME` is of megatron-core's own layers, or `local`: without Transformer
    Engine."""
    parts = cast("list[Any]", value) if isinstance(value, (list, tuple)) else [value]
    return bool(parts) and isinstance(parts[0], str) and (parts[0] == "local" or bool(_LAYER_SPECS.match(f"{parts[0]}.")))


def _is_off(name: str, value: Any) -> bool:
    return any(_same(value, off) for off in _OFF) or (bool(_FACTOR.search(name)) and _same(value, 1))


def _same(value: Any, other: Any) -> bool:
    """Return whether values are equal, also for types that do not support a comparison."""
    return type(value) in (bool, int, float, str, list, dict, type(None)) and value == other


def unsupported_error(setting: UnsupportedSetting, origin: str) -> UserError:
    """Return the error for a setting that `config.json` has no field for. `origin`: where it is recorded."""
    start = f"{origin} has `{setting.name}: {format_untrusted(setting.value)}`"
    if not setting.known:
        return UserError(
            f"{start}, an unknown setting that may change what the model computes",
            hint="if it does not, give the model's `config.json`: `--hf-config DIR`, a folder with that file",
        )
    neutral = " or ".join(f"`{value}`" for value in (*NEUTRAL[setting.name], None)[:2])
    more = "; with zero-centered weights 1 would have to be added to each norm" if setting.name in _ZERO_CENTERED else ""
    return UserError(
        f"{start}, which no `config.json` of a supported family can express: the exported model would compute something else",
        hint=f"a model with `{setting.name}` {neutral} can be exported{more}",
    )


_ZERO_CENTERED = ("apply_layernorm_1p", "layernorm_zero_centered_gamma")
