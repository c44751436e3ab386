"""Hunyuan V1 with experts: norms of query and key after they are turned, and an expert that every token goes through."""

from typing import Any, cast

from converter.config import Config, Field, count, counts, field, fixed, value
from converter.config_router import FP32_SCORES
from converter.families import hunyuan_v1_dense, llama, mixtral
from converter.rules import gated_mlp, row_parallel

MODELS = "Hunyuan A13B"
ARCHITECTURE = "HunYuanMoEV1ForCausalLM"

SHARED = (
    gated_mlp("mlp.shared_experts.linear_fc1.weight", "mlp.shared_mlp.{gate,up}_proj.weight", "ffn", "hidden"),
    row_parallel("mlp.shared_experts.linear_fc2.weight", "mlp.shared_mlp.down_proj.weight", "hidden", "ffn"),
)
RULES = llama.decoder(*llama.ATTENTION, *hunyuan_v1_dense.NORMS, *mixtral.moe(router="mlp.gate.wg.weight"), *SHARED)


def _topk(given: Any) -> list[int]:
    listed: list[Any] = cast("list[Any]", given) if isinstance(given, list) and given else [given]
    return [count({"moe_topk": count_of_layer}, "moe_topk") for count_of_layer in listed]


def _read_topk(config: Config) -> dict[str, Any]:
    """Read the number of experts of a token, which may be a list of one for each layer: megatron-core has one for all."""
    numbers = _topk(config.get("moe_topk", 1))
    return {"moe_router_topk": numbers[0], "moe_topk": None if len(set(numbers)) == 1 else numbers}


def _write_topk(config: Config) -> dict[str, Any]:
    numbers = config.get("moe_topk")
    return {"moe_topk": count(config, "moe_router_topk") if numbers is None else _topk(numbers)}


def _read_shared(config: Config) -> dict[str, Any]:
    return dict.fromkeys(("moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"), count(config, "intermediate_size"))


CONFIG = (
    *hunyuan_v1_dense.BODY,
    *mixtral.GATED,
    field("num_moe_experts", "num_experts", default=value(1)),
    Field(_read_topk, _write_topk),
    Field(_read_shared, lambda _config: {}),
    counts(experts="num_moe_experts", moe_ffn="moe_ffn_hidden_size"),
    fixed(moe_router_pre_softmax=False),
    FP32_SCORES,
)
EXTRAS = llama.EXTRAS
SMALL = {"head_dim": 16, "num_experts": 8, "moe_topk": 3}
PROVIDER = hunyuan_v1_dense.PROVIDER
