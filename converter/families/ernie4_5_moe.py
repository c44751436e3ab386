"""ERNIE 4.5 with experts: a bias moves their choice, and their softmax weighs them. Its layers of multi-token prediction pass
through."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from converter.config import Config, count, fixed
from converter.config_experts import auxiliary_loss, sparse_layers
from converter.config_layers import layers_of, no_window
from converter.config_parts import dropouts, only, rms_norm, routed, sizes, trained_with
from converter.config_rope import rope
from converter.config_router import FP32_SCORES, shared_multiple
from converter.families import deepseek_v3, llama, mixtral
from converter.model import Model
from converter.rules import Indices
from formats.errors import UserError, format_untrusted

MODELS = "ERNIE 4.5 21B-A3B, 300B-A47B, text"
ARCHITECTURE = "Ernie4_5_MoeForCausalLM"


def _shared(model: Model, indices: Indices) -> bool:
    return model.shared_ffn > 0 and mixtral.is_sparse(model, indices)


BIAS = replace(deepseek_v3.BIAS, huggingface="mlp.moe_statics.e_score_correction_bias", huggingface_shape=(1, "experts"))
SHARED = tuple(replace(rule, when=_shared) for rule in mixtral.shared())
RULES = llama.decoder(*llama.ATTENTION, *mixtral.mixed(llama.MLP, (*mixtral.moe(), BIAS)), *SHARED)

_PLACES = {"moe_layer_start_index": 1, "moe_layer_end_index": -1, "moe_layer_interval": 1}
"""Fields of the first and the last layer with experts, and of how many layers follow from one to the next; with defaults."""


def _read_layers(config: Config) -> list[bool]:
    start, end, interval = (config.get(name, default) for name, default in _PLACES.items())
    for name, value in zip(_PLACES, (start, end, interval), strict=True):
        if not isinstance(value, int):
            raise UserError(f"`{name}` is `{format_untrusted(value)}`, which should be a whole number")
    layers, interval = layers_of(config), count({"moe_layer_interval": interval}, "moe_layer_interval")
    last = layers - 1 if end == -1 else end
    return [start <= layer <= last and (layer + 1) % interval == 0 for layer in range(layers)]


def _write_layers(sparse: Sequence[bool]) -> dict[str, Any]:
    layers = len(sparse)
    with_experts = [layer for layer, is_sparse in enumerate(sparse) if is_sparse] or [layers]
    first, last = with_experts[0], with_experts[-1] if with_experts[0] < layers else layers - 1
    interval = with_experts[1] - first if len(with_experts) > 1 else 1
    described = dict(zip(_PLACES, (first, last, interval), strict=True))
    if _read_layers({**described, "num_hidden_layers": layers}) != list(sparse):
        raise UserError(f"layers {with_experts} have experts, which no start, end and interval say")
    return described


CONFIG = (
    *sizes(groups_default=4, positions_default=131072, tied=True),
    *rms_norm(default=1e-5),
    *dropouts(attention=""),
    *mixtral.GATED,
    *llama.NO_BIAS,
    fixed(add_qkv_bias=False, qk_layernorm=False, rotary_interleaved=True),
    rope("default", "linear", "llama3", theta=5e5),
    no_window("window_size"),
    *routed(experts="moe_num_experts", topk="moe_k", ffn="moe_intermediate_size"),
    sparse_layers(_read_layers, _write_layers),
    *shared_multiple(2, name="moe_num_shared_experts"),
    fixed(
        moe_router_scoring="softmax_with_bias", moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True,
        moe_router_pre_softmax=True,
    ),
    FP32_SCORES,
    only(use_bias=False),
    trained_with(moe_norm_min=1e-12),
    auxiliary_loss(),
)  # fmt: skip
EXTRAS = llama.EXTRAS
PASSTHROUGH_PREFIXES = ("model.mtp_",)
SMALL = {
    "moe_num_experts": 8, "moe_k": 3, "moe_intermediate_size": 48, "moe_num_shared_experts": 2, "moe_layer_start_index": 1,
    "moe_layer_interval": 1,
}  # fmt: skip
PROVIDER = ("moe_router_scoring",)
