"""Write a model as Megatron-LM's command line, `args`, which its checkpoints hold; `run_config.py` reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from converter.config import Config
from converter.layout import Layout
from converter.model import Model
from converter.pipeline_layout import format_layout
from converter.run_config import RENAMED
from converter.state_dicts import grouped
from formats.pickles import Global, Record
from formats.spec import names_of

CHECKPOINT_VERSION = 3.0
"""Megatron-LM's, since it stores query, key and value by group."""

_TWICE = {"norm_epsilon": "layernorm_epsilon", "max_position_embeddings": "seq_length", "num_experts": "num_moe_experts"}
"""Further names that Megatron-LM has for fields."""


def common_state(arguments: Mapping[str, Any], iteration: int) -> dict[str, Any]:
    """Return what a checkpoint of Megatron-LM has beside its tensors; `args` is a record of `argparse.Namespace`."""
    namespace = Record(Global("argparse", "Namespace"), (), dict(arguments), made_by_call=False)
    return {"args": namespace, "checkpoint_version": CHECKPOINT_VERSION, "iteration": iteration}


def arguments_of(
    megatron: Config,
    model: Model,
    layout: Layout,
    *,
    dtype: np.dtype[Any],
    vocab_multiple: int,
    ckpt_format: str,
    implementation: str,
) -> dict[str, Any]:
    """Return Megatron-LM's arguments for a model. Fields that its command line lacks keep the names of TransformerConfig.

    `megatron`: the model's fields. `dtype`: that of most weights. One rank's vocabulary is padded to a multiple of
    `vocab_multiple` rows.
    """
    return {
        **megatron,
        **{theirs: megatron.get(name) for name, theirs in RENAMED.items()},
        **{theirs: megatron.get(name) for theirs, name in _TWICE.items()},
        **_model(megatron),
        **_parallel(layout),
        "add_position_embedding": True,  # the default, which Megatron-LM compares; `position_embedding_type` says which
        "padded_vocab_size": model.padded_vocab,
        "make_vocab_size_divisible_by": vocab_multiple,
        "tokenizer_type": "HuggingFaceTokenizer",
        "bf16": names_of(dtype).name == "bf16",
        "fp16": names_of(dtype).name == "fp16",
        "transformer_impl": implementation,
        "moe_grouped_gemm": bool(megatron.get("num_moe_experts")) and grouped(implementation),
        "ckpt_format": ckpt_format,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
    }


def _model(megatron: Config) -> dict[str, Any]:
    return {
        "group_query_attention": megatron.get("num_query_groups") != megatron.get("num_attention_heads"),
        "swiglu": bool(megatron.get("gated_linear_unit")) and megatron.get("activation_func") == "silu",
        "untie_embeddings_and_output_weights": not megatron["share_embeddings_and_output_weights"],
        "use_rotary_position_embeddings": megatron.get("position_embedding_type") == "rope",
    }


def _parallel(layout: Layout) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp if layout.vpp > 1 else None,
        "pipeline_model_parallel_layout": None if layout.even else format_layout(layout.stages),
        "context_parallel_size": 1,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp,
    }
