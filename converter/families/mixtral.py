"""Mixtral: Mistral with a mixture of experts in each layer, whose chosen experts' weights sum to 1."""

from collections.abc import Iterable
from dataclasses import replace

from converter.config import activation, field, fixed, value
from converter.config_experts import SOFTMAX, auxiliary_loss
from converter.config_layers import window
from converter.config_parts import not_computed, routed
from converter.config_rope import rope
from converter.families import llama, mistral
from converter.model import Model
from converter.rules import Indices, Rule, gated_mlp, replicated, row_parallel

MODELS = "Mixtral 8x7B and 8x22B"
ARCHITECTURE = "MixtralForCausalLM"


def moe(
    *,
    router: str = "mlp.gate.weight",
    experts: str = "mlp.experts.{expert}",
    gate: str = "gate_proj",
    up: str = "up_proj",
    down: str = "down_proj",
    norm: str = "post_attention_layernorm.weight",
) -> tuple[Rule, ...]:
    """Return the rules of a mixture of experts, a tensor for each, and of the norm before it, by their names in Hugging Face."""
    return (
        replicated("pre_mlp_layernorm.weight", norm, "hidden"),
        replicated("mlp.router.weight", router, "experts", "hidden"),
        gated_mlp("mlp.experts.{expert}.linear_fc1.weight", f"{experts}.{{{gate},{up}}}.weight", "moe_ffn", "hidden"),
        row_parallel("mlp.experts.{expert}.linear_fc2.weight", f"{experts}.{down}.weight", "hidden", "moe_ffn"),
    )


def shared(
    names: str = "mlp.shared_experts.{gate,up}_proj.weight", down: str = "mlp.shared_experts.down_proj.weight"
) -> tuple[Rule, ...]:
    """Return the rules of experts that every token goes through, all in one."""
    return (
        gated_mlp("mlp.shared_experts.linear_fc1.weight", names, "shared_ffn", "hidden"),
        row_parallel("mlp.shared_experts.linear_fc2.weight", down, "hidden", "shared_ffn"),
    )


def is_sparse(model: Model, indices: Indices) -> bool:
    """Return whether the layer has experts."""
    return indices["layer"] in model.sparse


def is_dense(model: Model, indices: Indices) -> bool:
    """Return whether the layer has a feed-forward part without experts."""
    return indices["layer"] not in model.sparse


def mixed(dense: Iterable[Rule], sparse: Iterable[Rule]) -> tuple[Rule, ...]:
    """Return the rules of layers of which some are dense and others have experts: `config_experts.sparse_layers` says which."""
    return (*(replace(rule, when=is_dense) for rule in dense), *(replace(rule, when=is_sparse) for rule in sparse))


SPARSE = moe(router="block_sparse_moe.gate.weight", experts="block_sparse_moe.experts.{expert}", gate="w1", up="w3", down="w2")
RULES = llama.decoder(*llama.ATTENTION, *SPARSE)
GATED = (activation("silu"), fixed(gated_linear_unit=True))
CONFIG = (
    *mistral.SIZES,
    field("layernorm_epsilon", "rms_norm_eps", default=value(1e-5)),
    rope("default", "linear", "llama3", "yarn", theta=1e6),
    *GATED,
    llama.PLAIN_ATTENTION,
    window("window_size", "sliding_window", default=None),
    *routed(experts="num_local_experts", topk="num_experts_per_tok", ffn="intermediate_size"),
    fixed(moe_router_pre_softmax=False),
    SOFTMAX,
    auxiliary_loss(),
    not_computed("router_jitter_noise", off=0.0),
)
EXTRAS = llama.EXTRAS
SMALL = {"num_local_experts": 4, "num_experts_per_tok": 2}
