"""Mamba-2: layers of state spaces alone, whose weights Megatron stores in sections. megatron-core fixes some of what
`config.json` may say of them."""

from typing import Any

from converter.config import Config, Field, field, fixed, required, switches, value
from converter.config import counts as sizes_by_name
from converter.config_layers import layers_of
from converter.config_mamba import MAMBA, mamba, mixer, pattern
from converter.config_parts import rms_norm
from converter.families import llama
from converter.rules import Rule, column_parallel, replicated, row_parallel, sections, under, vocab_parallel
from formats.errors import UserError

MODELS = "Mamba 2, Codestral Mamba"
ARCHITECTURE = "Mamba2ForCausalLM"


def mixing(norm: str, module: str) -> tuple[Rule, ...]:
    """Return the rules of a Mamba-2 layer and the norm before it, by their names in Hugging Face. Each section is divided among
    ranks on its own: of a head its gate, its input and its time step, and of a group its input and output matrices."""
    return (
        replicated("mixer.in_proj.layer_norm_weight", norm, "hidden", alias="norm.weight"),
        *sections("mixer.in_proj.weight.{z,x,B,C,dt}", f"{module}.in_proj.weight",
                  ("inner", "inner", "state", "state", "mamba_heads"), "hidden"),
        *sections("mixer.conv1d.weight.{x,B,C}", f"{module}.conv1d.weight", ("inner", "state", "state"), 1, "kernel"),
        *sections("mixer.conv1d.bias.{x,B,C}", f"{module}.conv1d.bias", ("inner", "state", "state")),
        column_parallel("mixer.dt_bias", f"{module}.dt_bias", "mamba_heads"),
        column_parallel("mixer.A_log", f"{module}.A_log", "mamba_heads", keep_dtype="fp32"),
        column_parallel("mixer.D", f"{module}.D", "mamba_heads", keep_dtype="fp32"),
        column_parallel("mixer.norm.weight", f"{module}.norm.weight", "inner"),
        row_parallel("mixer.out_proj.weight", f"{module}.out_proj.weight", "hidden", "inner"),
    )  # fmt: skip


def backbone(*layers: Rule) -> tuple[Rule, ...]:
    """Return the rules of a model whose layers have these."""
    return (
        vocab_parallel("embedding.word_embeddings.weight", "backbone.embeddings.weight", "hidden"),
        *layers,
        replicated("decoder.final_norm.weight", "backbone.norm_f.weight", "hidden"),
        vocab_parallel(
            "output_layer.weight", "lm_head.weight", "hidden", when=llama.untied, tied_to="backbone.embeddings.weight"
        ),
    )


RULES = backbone(*under("decoder.layers.{layer}", "backbone.layers.{layer}", mixing("norm.weight", "mixer")))


def _all_mamba(config: Config) -> str:
    return MAMBA * layers_of(config)


def _write_layers(letters: str) -> dict[str, Any]:
    if set(letters) - {MAMBA}:
        raise UserError(f"`hybrid_layer_pattern` is `{letters}`; this family has Mamba layers alone, `{MAMBA}`")
    return {}


def _no_heads(config: Config) -> dict[str, Any]:
    """Return the numbers of attention's heads, which megatron-core asks every model for: those of Mamba."""
    return dict.fromkeys(("num_attention_heads", "num_query_groups"), config.get("num_heads", 128))


CONFIG = (
    required("num_layers", "num_hidden_layers"),
    required("hidden_size", "hidden_size"),
    required("vocab_size", "vocab_size"),
    sizes_by_name(layers="num_layers", hidden="hidden_size", vocab="vocab_size"),
    field("init_method_std", "initializer_range", default=value(0.1)),
    field("share_embeddings_and_output_weights", "tie_word_embeddings", default=value(False)),
    switches(tied="share_embeddings_and_output_weights"),
    *rms_norm("layer_norm_epsilon", default=1e-5),
    *pattern(_all_mamba, _write_layers),
    *mamba(heads="num_heads", dim="head_dim", groups="n_groups", state="state_size", kernel="conv_kernel", expand="expand",
           groups_default=8, state_default=128),
    *mixer(_all_mamba, norm="layer_norm_epsilon", default=1e-5, projection=("use_bias",), convolution="use_conv_bias",
           function="hidden_act"),
    Field(_no_heads, lambda _config: {}),
    fixed(
        activation_func="silu", gated_linear_unit=False, add_bias_linear=False, num_moe_experts=None,
        position_embedding_type="none", attention_dropout=0.0, hidden_dropout=0.0,
    ),
)  # fmt: skip
LAYOUTS = ("hybrid",)
SMALL = {
    "head_dim": 16, "num_heads": 8, "expand": 2, "n_groups": 2, "state_size": 16, "chunk_size": 8, "layer_norm_epsilon": 0.01,
}  # fmt: skip
PROVIDER = ("mamba_norm_epsilon",)
