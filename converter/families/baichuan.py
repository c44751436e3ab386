"""Baichuan (remote code): Llama with query, key and value in one tensor. 13B has ALiBi in place of rotary embeddings.

Names are those of `modeling_baichuan.py` in the published repositories, which differ by size and say it nowhere in
`config.json`: 13B are the models of 40 layers. Baichuan 2 normalizes the rows of the output layer at each step.
"""

from typing import Any

from converter.config import Config, Field, count
from converter.config_layers import no_window
from converter.config_parts import dropouts, mlp, rms_norm, sizes
from converter.config_rope import rope
from converter.families import llama
from converter.rules import qkv
from formats.errors import UserError

MODELS = "Baichuan 7B, 13B; of Baichuan 2 the weights alone (remote code)"
ARCHITECTURE = "BaichuanForCausalLM"

PACKED = qkv("self_attention.linear_qkv.weight", "self_attn.W_pack.weight", "hidden")
RULES = llama.decoder(llama.ATTENTION[0], PACKED, llama.ATTENTION[2], *llama.MLP)

_ROPE = rope("default")
_ALIBI = {"position_embedding_type": "alibi", "alibi": {"bias_max": 8.0, "scale": 1.0}, "rope_scaling": False}


def _has_alibi(layers: int) -> bool:
    return layers == 40


def _positions(config: Config) -> dict[str, Any]:
    alibi = _has_alibi(count(config, "num_hidden_layers"))
    return dict(_ALIBI) if alibi else {**_ROPE.to_megatron(config), "alibi": None}


def _written_positions(config: Config) -> dict[str, Any]:
    alibi = config.get("position_embedding_type") == "alibi"
    if alibi != _has_alibi(count(config, "num_layers")):
        raise UserError("models of this family have ALiBi if they have 40 layers, and no others")
    return {} if alibi else _ROPE.to_huggingface(config)


def _length(config: Config) -> dict[str, Any]:
    length = config.get("max_position_embeddings", config.get("model_max_length", 4096))
    return {"seq_length": count({"model_max_length": length}, "model_max_length")}


def _written_length(config: Config) -> dict[str, Any]:
    length = count(config, "seq_length")
    return {"max_position_embeddings": length, "model_max_length": length}


def _normalized(config: Config) -> dict[str, Any]:
    """Baichuan 2 has its own vocabulary, and a weight for a loss that Baichuan 1 has not."""
    second = config.get("z_loss_weight") is not None or config.get("vocab_size") == 125696
    return {"normalized_output_layer": second or None}


def _written_normalized(config: Config) -> dict[str, Any]:
    return {"z_loss_weight": 0} if config.get("normalized_output_layer") else {}


CONFIG = (
    *sizes(groups="", head_dim=""),
    Field(_length, _written_length),
    *dropouts(attention=""),
    *rms_norm(),
    *mlp("silu", gated=True),
    llama.PLAIN_ATTENTION,
    *llama.NO_BIAS,
    Field(_positions, _written_positions),
    no_window("window_size"),
    Field(_normalized, _written_normalized),
)
EXTRAS = llama.EXTRAS
PROVIDER = ("alibi",)
SMALL = {"max_position_embeddings": 256}
