"""Make Hugging Face directories that have the names and shapes of a model and no numbers: files full of holes.

Any family will do: its rules name the tensors. Needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from converter import families
from converter.config import make_model
from converter.planner import huggingface_tensors
from converter.rules import tied_names
from formats.huggingface import make_index, plan_shards
from formats.spec import DTYPES, TensorSpec

BLOCK = 128
"""Rows and columns that share a scale in FP8 weights, as DeepSeek publishes them."""

DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "torch_dtype": "bfloat16", "vocab_size": 129280,
    "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1, "num_attention_heads": 128, "num_key_value_heads": 128, "n_shared_experts": 1,
    "n_routed_experts": 256, "num_experts_per_tok": 8, "moe_layer_freq": 1, "first_k_dense_replace": 3, "n_group": 8,
    "topk_group": 4, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
    "hidden_act": "silu", "max_position_embeddings": 163840, "rms_norm_eps": 1e-6, "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "attention_bias": False, "attention_dropout": 0.0, "tie_word_embeddings": False,
}  # fmt: skip
"""The `config.json` of DeepSeek-V3."""

SMALL_EXPERTS: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": 16, "hidden_size": 16,
    "intermediate_size": 16, "moe_intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
    "num_hidden_layers": 256, "num_experts": 256, "num_experts_per_tok": 8, "tie_word_embeddings": False,
}  # fmt: skip
"""A mixture of tiny experts, of 198,915 tensors."""

FP8 = {
    "quantization_config": {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK],
    }
}  # fmt: skip


def make_headers(folder: Path, config: Mapping[str, Any], *, shard_bytes: int = 5_000_000_000) -> int:
    """Write a model of holes, in FP8 where `config` says so; return the number of its tensors."""
    tensors = tensors_of(config)
    write_headers(folder, config, tensors, shard_bytes=shard_bytes)
    return len(tensors)


def write_headers(
    folder: Path, config: Mapping[str, Any], tensors: Sequence[TensorSpec], *, shard_bytes: int = 5_000_000_000
) -> None:
    """Write the tensors as files of holes, with their index and `config.json`."""
    folder.mkdir(parents=True)
    shards = plan_shards(tensors, limit=shard_bytes)
    for name, shard in shards.items():
        with (folder / name).open("wb") as file:
            file.write(shard.raw)
            file.truncate(shard.size)
    if len(shards) > 1:
        (folder / "model.safetensors.index.json").write_bytes(make_index(shards))
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def tensors_of(config: Mapping[str, Any]) -> list[TensorSpec]:
    """Return the tensors of a model, in FP8 with scales where `config` says so."""
    return list(_fp8(_tensors(config)) if "quantization_config" in config else _tensors(config))


def _tensors(config: Mapping[str, Any]) -> Iterator[TensorSpec]:
    """Yield the tensors that the family's rules name, and those that files hold a second time (DeepSeek's embedding and head)."""
    family = families.find(config["model_type"])
    model = make_model(family.CONFIG, config)
    enough = dict.fromkeys(map(str, range(1 << 12)), TensorSpec("", (1,), DTYPES["bf16"]))  # for any number of layers
    shapes = dict(huggingface_tensors(family.RULES, model, enough))
    copies = {name: shapes[other] for name, other in tied_names(family.RULES, model).items() if ".layers." in name}
    for name, shape in {**shapes, **copies}.items():
        yield TensorSpec(name, shape, DTYPES["fp32" if name.endswith("_bias") else "bf16"])


def _fp8(tensors: Iterator[TensorSpec]) -> Iterator[TensorSpec]:
    """Yield projections in FP8, each with the scales of its blocks, and the others as they are."""
    for spec in tensors:
        if "_proj" in spec.name and "eh_proj" not in spec.name:
            yield spec.cast(DTYPES["fp8_e4m3"])
            grid = tuple(-(-size // BLOCK) for size in spec.shape)
            yield TensorSpec(f"{spec.name}_scale_inv", grid, DTYPES["fp32"])
        else:
            yield spec
