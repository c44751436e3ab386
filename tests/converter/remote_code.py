"""Small models of families that transformers knows by remote code alone: a twin that it has, under the published names.

Each function renames and joins the twin's tensors with plain slices, as `modeling_*.py` of the repositories takes them apart.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from converter.families import kimi_k2, sarvam_moe

Tensors = dict[str, torch.Tensor]


class Twin(NamedTuple):
    """A family of transformers with the same arithmetic: its `model_type`, its own fields, and the way to the published names."""

    family: str
    fields: dict[str, Any]
    published: Callable[[Tensors], Tensors]


def _renamed(tensors: Tensors, words: dict[str, str]) -> Tensors:
    renamed = {}
    for name, tensor in tensors.items():
        for old, new in words.items():
            name = name.replace(old, new)  # noqa: PLW2901
        renamed[name] = tensor
    return renamed


def _layers(tensors: Tensors) -> int:
    return 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("model.layers."))


def _fused(tensors: Tensors, new: str, join: Callable[..., torch.Tensor], *kinds: str) -> Tensors:
    """The same tensors with query, key and value of each layer joined under a new name."""
    fused = dict(tensors)
    for layer in range(_layers(tensors)):
        for kind in kinds:
            head = f"model.layers.{layer}."
            fused[f"{head}{new}.{kind}"] = join(*(fused.pop(f"{head}self_attn.{letter}_proj.{kind}") for letter in "qkv"))
    return fused


def _stacked(*parts: torch.Tensor) -> torch.Tensor:
    return torch.cat(parts)


def _by_group(*parts: torch.Tensor, groups: int = 4) -> torch.Tensor:
    return torch.cat([part.chunk(groups)[group] for group in range(groups) for part in parts])


def chatglm(tensors: Tensors) -> Tensors:
    fused = _fused(tensors, "self_attention.query_key_value", _stacked, "weight", "bias")
    words = {
        "model.layers.": "transformer.encoder.layers.", "self_attn.o_proj": "self_attention.dense",
        "mlp.gate_up_proj": "mlp.dense_h_to_4h", "mlp.down_proj": "mlp.dense_4h_to_h",
        "model.embed_tokens": "transformer.embedding.word_embeddings", "model.norm": "transformer.encoder.final_layernorm",
        "lm_head": "transformer.output_layer",
    }  # fmt: skip
    return {**_renamed(fused, words), "transformer.rotary_pos_emb.inv_freq": torch.ones(4)}


def baichuan(tensors: Tensors) -> Tensors:
    return _fused(tensors, "self_attn.W_pack", _stacked, "weight")


def internlm2(tensors: Tensors) -> Tensors:
    words = {
        "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
        "model.embed_tokens": "model.tok_embeddings", "lm_head": "output",
    }  # fmt: skip
    return _renamed(_fused(tensors, "attention.wqkv", _by_group, "weight"), words)


def mimo(tensors: Tensors) -> Tensors:
    hidden = len(tensors["model.norm.weight"])
    mtp = {
        "input_proj.weight": torch.ones(hidden, 2 * hidden), "token_layernorm.weight": torch.ones(hidden),
        "self_attn.q_proj.bias": torch.rand(hidden),
    }  # fmt: skip
    return {**tensors, **{f"model.mtp_layers.0.{name}": tensor for name, tensor in mtp.items()}}


def unchanged(tensors: Tensors) -> Tensors:
    return tensors


LING = {"partial_rotary_factor": 0.5, "rope_theta": 10000.0}
"""What Ling has otherwise than Sarvam."""

TWINS = {
    "baichuan": Twin("llama", {"num_key_value_heads": 8}, baichuan),
    "bailing_moe_v2": Twin("sarvam_moe", {**sarvam_moe.SMALL, "rms_norm_eps": 1e-5, **LING}, unchanged),
    "chatglm": Twin("glm", {"head_dim": 16, "rms_norm_eps": 1e-5, "pad_token_id": 0}, chatglm),
    "internlm2": Twin("llama", {}, internlm2),
    "kimi_k2": Twin("deepseek_v3", {**kimi_k2.SMALL}, unchanged),
    "mimo": Twin("qwen2", {}, mimo),
}
"""By `model_type`."""

CODE = 'raise SystemExit("this code must never run")\n'


def config_of(family: str, fields: dict[str, Any]) -> Any:
    """The configuration as transformers holds it without running the repository's code."""
    from transformers import PreTrainedConfig

    kind = type("RemoteConfig", (PreTrainedConfig,), {"model_type": family})
    return kind(**fields)


def publish(family: str, config: dict[str, Any], twin: Path, folder: Path) -> None:
    """Write a repository as people publish it, with code of its own."""
    from converter import families

    auto = {"AutoConfig": f"configuration_{family}.Config", "AutoModelForCausalLM": f"modeling_{family}.Model"}
    config = {
        **{name: value for name, value in config.items() if value is not None},
        "model_type": family,
        "architectures": [families.find(family).ARCHITECTURE],
        "auto_map": auto,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for name in (f"configuration_{family}.py", f"modeling_{family}.py"):
        (folder / name).write_text(CODE)
    tensors = TWINS[family].published(load_file(twin / "model.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def twin_of(folder: Path) -> Path:
    """The folder of the model that transformers computes in place of the one in `folder`."""
    return folder.with_name(f"{folder.name}-twin")
