"""Write `hybrid_keys.json.gz`: what megatron-core's HybridModel asks of a checkpoint with `hybrid_stack_spec`, its own layers of
Transformer Engine's modules.

    PYTHONPATH=PACKAGES python -m tests.golden.make_hybrid_keys

PACKAGES is that of `make_te_keys.py`.
"""

from __future__ import annotations

import gzip
import json
from typing import Any

from tests.golden.make_te_keys import DEEPSEEK, FOLDER, MIXTRAL, QWEN_MOE, SIZES, _prepare, _without_gpu, keys_of

FILE = FOLDER / "hybrid_keys.json.gz"

NETS = {
    "linear_key_head_dim": 16, "linear_value_head_dim": 24, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}  # fmt: skip

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "gpt2": ("gpt2", {"n_layer": 4, "n_embd": 64, "n_head": 4, "n_inner": 160}),
    "qwen2": ("qwen2", {}),
    "mixtral": ("mixtral", MIXTRAL),
    "gpt_oss": ("gpt_oss", MIXTRAL),
    "qwen3": ("qwen3", {}),
    "qwen3_moe, tied, some layers dense": ("qwen3_moe", {**QWEN_MOE, "tie_word_embeddings": True, "mlp_only_layers": [1]}),
    "qwen2_moe": ("qwen2_moe", {**QWEN_MOE, "shared_expert_intermediate_size": 96}),
    "qwen3_next": ("qwen3_next", {**NETS, **QWEN_MOE, "shared_expert_intermediate_size": 96, "mlp_only_layers": [1]}),
    "qwen3_5_text": ("qwen3_5_text", NETS),
    "deepseek_v3": ("deepseek_v3", DEEPSEEK),
    "deepseek_v3 with two further layers": ("deepseek_v3", {**DEEPSEEK, "num_nextn_predict_layers": 2}),
}
"""The family, and what `config.json` has beside `SIZES`."""


def main() -> None:
    """Write the keys of every model."""
    _prepare()
    built: dict[str, Any] = {}
    with _without_gpu():
        for name, (family, changes) in CASES.items():
            built[name] = _keys({"model_type": family, **SIZES, **changes})
    FILE.write_bytes(gzip.compress(json.dumps({"models": built}, separators=(",", ":")).encode(), mtime=0))


def _keys(config: dict[str, Any]) -> dict[str, Any]:
    import torch
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.transformer.module import Float16Module

    from converter import families
    from converter.config import to_megatron
    from tests.hybrid_model import transformer_config
    from trainer.settings.values import activation

    fields = to_megatron(families.find(config["model_type"], "hybrid").CONFIG, config)
    settings = transformer_config(
        {**fields, "activation_func": activation(fields["activation_func"])},
        {"bf16": True, "params_dtype": torch.bfloat16, "perform_initialization": False, "moe_grouped_gemm": True},
    )
    model = HybridModel(
        settings,
        hybrid_stack_spec,
        vocab_size=128,
        max_sequence_length=fields["seq_length"],
        hybrid_layer_pattern=fields["hybrid_layer_pattern"],
        share_embeddings_and_output_weights=fields["share_embeddings_and_output_weights"],
        position_embedding_type=fields["position_embedding_type"] if fields["position_embedding_type"] != "yarn" else "rope",
    )
    return keys_of(config, Float16Module(settings, model))


if __name__ == "__main__":
    main()
