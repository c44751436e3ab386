"""Tiny real models: transformers from a config, a tokenizer trained on the spot, saved as people save them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LLAMA31_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}

BASE = {
    "vocab_size": 384, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
}  # fmt: skip

VARIANTS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 8},
    "mqa": {"num_key_value_heads": 1},
    "tp_above_groups": {"num_key_value_heads": 2},
    "head_dim": {"head_dim": 12},
    "tied": {"tie_word_embeddings": True},
    "padded_vocab": {"vocab_size": 389},
    "rope31": {"rope_parameters": LLAMA31_ROPE},
    "rope_other_numbers": {
        "rope_parameters": {
            **LLAMA31_ROPE,
            "factor": 32.0,
            "low_freq_factor": 1.5,
            "high_freq_factor": 6.0,
            "original_max_position_embeddings": 64,
            "rope_theta": 10000.0,
        }
    },
    "rope_linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "both_biases": {"attention_bias": True, "mlp_bias": True},
}
"""What a Llama can differ in, each against `BASE`."""


def build(variant: str = "gqa", *, family: str = "llama", dtype: str = "float32", seed: int = 0, **changes: Any) -> Any:
    """A model with weights large enough that its logits span several units, and biases that are not zero."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
    }[family]
    torch.manual_seed(seed)
    model = model_class(config_class(**{**BASE, **VARIANTS.get(variant, {}), **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if name.endswith("bias") or "norm" in name else 0.08
            parameter.normal_(1.0 if "norm" in name else 0.0, spread)
    return model.to(getattr(torch, dtype)).eval()


def save(model: Any, folder: Path, *, max_shard_size: str = "5GB", side_files: bool = True) -> Path:
    """Write a model directory as transformers does, with the side files a real one has."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if side_files:
        _tokenizer().save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
        (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}\n")
        (folder / "README.md").write_text("---\nlicense: llama3\n---\n# A model\n")
        (folder / "assets").mkdir()
        (folder / "assets" / "logo.svg").write_bytes(b"<svg/>")
    return folder


def _tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.train_from_iterator([__doc__ or ""] * 4, BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<s>"]))
    return tokenizer


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by relative path."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def model_tree(folder: Path) -> dict[str, bytes]:
    """The same without the record that an export adds."""
    return {name: data for name, data in tree(folder).items() if name != "conversion.json"}


def files_made(folder: Path) -> dict[str, bytes]:
    """The same without the records of how a checkpoint was made, and their hashes."""
    return {name: data for name, data in tree(folder).items() if not name.endswith(("conversion.json", "integrity.json"))}
