"""Llama 4, text: one expert of each layer's and a shared one, dense layers between; layers without positions, and the others
normalize queries and keys and attend in chunks."""

from collections.abc import Sequence
from typing import Any, cast

from converter.config import Config, Field, count, counts, fixed, flag, number
from converter.config_experts import sparse_layers
from converter.config_layers import FULL, layers_of, no_rope
from converter.config_parts import dropouts, only, rms_norm, routed, sizes
from converter.config_rope import rope
from converter.families import llama, mixtral
from converter.rules import gated_mlp, replicated, row_parallel
from formats.errors import UserError, format_untrusted

MODELS = "Llama 4, text alone"
ARCHITECTURE = "Llama4ForCausalLM"

DENSE = (
    llama.MLP[0],
    gated_mlp("mlp.linear_fc1.weight", "feed_forward.{gate,up}_proj.weight", "ffn", "hidden"),
    row_parallel("mlp.linear_fc2.weight", "feed_forward.down_proj.weight", "hidden", "ffn"),
)
FC1, FC2 = "mlp.experts.{expert}.linear_fc1.weight", "mlp.experts.{expert}.linear_fc2.weight"
SPARSE = (
    mixtral.moe()[0],
    replicated("mlp.router.weight", "feed_forward.router.weight", "experts", "hidden"),
    gated_mlp(FC1, "feed_forward.experts.gate_up_proj", "moe_ffn", "hidden", transposed=True),
    row_parallel(FC2, "feed_forward.experts.down_proj", "hidden", "moe_ffn", transposed=True),
    *mixtral.shared("feed_forward.shared_expert.{gate,up}_proj.weight", "feed_forward.shared_expert.down_proj.weight"),
)
RULES = llama.decoder(*llama.ATTENTION, *mixtral.mixed(DENSE, SPARSE))


def _sparse(config: Config) -> list[bool]:
    """Layers with experts are listed, or each n-th has some."""
    listed, layers = config.get("moe_layers"), range(layers_of(config))
    if listed is None:
        each = count({_STEP: config.get(_STEP, 1)}, _STEP)
        return [(layer + 1) % each == 0 for layer in layers]
    if not isinstance(listed, list):
        raise UserError(f"`moe_layers` is `{format_untrusted(listed)}`, which should be a list of layers")
    return [layer in listed for layer in layers]


def _write_sparse(sparse: Sequence[bool]) -> dict[str, Any]:
    return {"moe_layers": [layer for layer, is_sparse in enumerate(sparse) if is_sparse]}


def _without_rope(config: Config) -> list[bool]:
    """Layers with positions are marked 1, or each n-th has none."""
    given, layers = config.get("no_rope_layers"), layers_of(config)
    if not given:
        each = count({_INTERVAL: config.get(_INTERVAL, 4)}, _INTERVAL)
        return [(layer + 1) % each == 0 for layer in range(layers)]
    marks = cast("list[Any]", given) if isinstance(given, list) else []
    if len(marks) < layers or any(mark not in (0, 1) for mark in marks):
        raise UserError(f"`no_rope_layers` is `{format_untrusted(given)}`, which should have 0 or 1 for each of {layers} layers")
    return [mark == 0 for mark in marks[:layers]]


_STEP, _INTERVAL, _CHUNK = "interleave_moe_layer_step", "no_rope_layer_interval", "attention_chunk_size"


def _read_length(config: Config) -> dict[str, Any]:
    """Up to a length chunks are whole, and queries of layers without positions are not scaled."""
    without = _without_rope(config)
    chunk = config.get(_CHUNK, 8192)
    _check_types(config, ["chunked_attention" if not is_without and chunk is not None else FULL for is_without in without])
    lengths = [] if chunk is None else [count({_CHUNK: chunk}, _CHUNK)]
    if config.get("attn_temperature_tuning", True):
        lengths.append(count({"floor_scale": config.get("floor_scale", 8192)}, "floor_scale") - 1)
    return {"exact_sequence_length": min(lengths, default=None)}


def _check_types(config: Config, expected: list[str]) -> None:
    listed = config.get("layer_types")
    if listed not in (None, expected):
        raise UserError(
            f"`layer_types` is `{format_untrusted(listed)}`, and by `no_rope_layers` and `{_CHUNK}` it is `{expected}`",
            hint="leave one out",
        )


def _write_length(config: Config) -> dict[str, Any]:
    exact = config.get("exact_sequence_length")
    if exact is None:
        return {_CHUNK: None, "attn_temperature_tuning": False}
    length = number("exact_sequence_length", exact) + 1
    return {_CHUNK: length, "floor_scale": length, "attn_temperature_tuning": True}


_SHARED = "moe_shared_expert_intermediate_size"
CONFIG = (
    *sizes(head_dim_default=128, groups_default=8, ffn="intermediate_size_mlp", positions_default=131072),
    *dropouts(),
    *rms_norm(default=1e-5),
    *mixtral.GATED,
    llama.PLAIN_ATTENTION,
    *llama.NO_BIAS,
    only(attention_bias=False),
    rope("default", "llama3", theta=500000.0),
    fixed(rotary_interleaved=True, qk_l2_norm_with_rope=True, window_size=None),
    no_rope(_without_rope, lambda without: {"no_rope_layers": [1 - mark for mark in without]}),
    flag("qk_l2_norm", "use_qk_norm", default=True),
    Field(_read_length, _write_length),
    *routed(experts="num_local_experts", topk="num_experts_per_tok", ffn="intermediate_size"),
    Field(lambda config: {_SHARED: count(config, "intermediate_size")}, lambda _config: {}),
    counts(shared_ffn=_SHARED),
    sparse_layers(_sparse, _write_sparse),
    fixed(
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=False,
        moe_router_topk_scaling_factor=None,
        moe_router_num_groups=None,
        moe_apply_probs_on_input=True,
    ),
)
EXTRAS = llama.EXTRAS
SMALL = {
    "head_dim": 16, "intermediate_size": 48, "intermediate_size_mlp": 96, "num_local_experts": 4, "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 2, "no_rope_layer_interval": 4, "attention_chunk_size": 64, "floor_scale": 64,
}  # fmt: skip
PROVIDER = ("exact_sequence_length", "qk_l2_norm_with_rope")
