"""DeepSeek-V2: DeepSeek-V3 with scores by a softmax, and groups of experts rated by their best expert."""

from typing import Any

from converter.config import Config, Field, field, fixed, value
from converter.config_latent import latent, latent_rope
from converter.config_parts import not_computed, sizes, trained_with
from converter.config_router import FP32_SCORES, best_groups, dense_first, shared_multiple
from converter.families import deepseek_v3, llama, mixtral
from formats.errors import UserError, format_untrusted

MODELS = "DeepSeek-V2, V2.5, V2-Lite, Coder-V2"
ARCHITECTURE = "DeepseekV2ForCausalLM"

RULES = llama.decoder(*deepseek_v3.ATTENTION, *mixtral.mixed(llama.MLP, (*mixtral.moe(), *mixtral.shared())))


def _choice() -> Field:
    """Return the field of how experts are chosen: of all (`greedy`), or in the groups with the best experts."""
    of_all, in_groups, name = "greedy", "group_limited_greedy", "topk_method"
    groups = best_groups(None, None, best=1)

    def read(config: Config) -> dict[str, Any]:
        method = config.get(name, of_all)
        if method not in (of_all, in_groups):
            raise UserError(f"`{name}` is `{format_untrusted(method)}`", hint=f"it may be {of_all} or {in_groups}")
        return groups.to_megatron(config if method == in_groups else {**config, "n_group": None})

    def write(config: Config) -> dict[str, Any]:
        fields = groups.to_huggingface(config)
        if fields["n_group"] == 1:
            return {name: of_all, "n_group": None, "topk_group": None}
        return {name: in_groups, **fields}

    return Field(read, write)


CONFIG = (
    *sizes(head_dim=""),
    *deepseek_v3.SIZES,
    *latent(q_lora=1536, kv_lora=512, plain=128, turned=64),
    latent_rope("default", "yarn"),
    dense_first(0),
    fixed(moe_router_score_function="softmax", moe_router_enable_expert_bias=False, moe_router_pre_softmax=True),
    FP32_SCORES,
    field("moe_router_topk_scaling_factor", "routed_scaling_factor", default=value(1.0)),
    _choice(),
    *shared_multiple(2),
    not_computed("norm_topk_prob", off=False),
    trained_with(scoring_func="softmax"),
)
EXTRAS = llama.EXTRAS
SMALL = {
    **{name: value for name, value in deepseek_v3.SMALL.items() if name != "num_nextn_predict_layers"},
    "topk_method": "group_limited_greedy", "topk_group": 2, "num_experts_per_tok": 4, "routed_scaling_factor": 4.0,
}  # fmt: skip
PROVIDER = deepseek_v3.PROVIDER
