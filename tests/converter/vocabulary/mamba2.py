"""Tensors that Megatron stores in sections, a key each, and numbers that it keeps in fp32; a key for each layer."""

from converter.config import Field
from converter.config_hybrid import hybrid_layers
from converter.families import llama
from converter.rules import column_parallel, replicated, row_parallel, sections, under, vocab_parallel

MODELS, ARCHITECTURE = "Mamba 2", "Mamba2ForCausalLM"

MIXER = (
    replicated("mixer.in_proj.layer_norm_weight", "norm.weight", "hidden"),
    column_parallel("mixer.A_log", "mixer.A_log", "mamba_heads", keep_dtype="fp32"),
    column_parallel("mixer.D", "mixer.D", "mamba_heads", keep_dtype="fp32"),
    column_parallel("mixer.dt_bias", "mixer.dt_bias", "mamba_heads"),
    *sections("mixer.in_proj.weight.{z,x,B,C,dt}", "mixer.in_proj.weight",
              ("inner", "inner", "state", "state", "mamba_heads"), "hidden"),
    *sections("mixer.conv1d.weight.{x,B,C}", "mixer.conv1d.weight", ("inner", "state", "state"), 1, "kernel"),
    *sections("mixer.conv1d.bias.{x,B,C}", "mixer.conv1d.bias", ("inner", "state", "state")),
    column_parallel("mixer.norm.weight", "mixer.norm.weight", "inner"),
    row_parallel("mixer.out_proj.weight", "mixer.out_proj.weight", "hidden", "inner"),
)  # fmt: skip
RULES = (
    vocab_parallel("embedding.word_embeddings.weight", "backbone.embeddings.weight", "hidden"),
    *under("decoder.layers.{layer}", "backbone.layers.{layer}", MIXER),
    replicated("decoder.final_norm.weight", "backbone.norm_f.weight", "hidden"),
    llama.RULES[-1],
)


def sizes(s):
    c = s.config
    return {
        "layers": c["num_hidden_layers"], "hidden": c["hidden_size"], "vocab": c["vocab_size"], "mamba_heads": c["num_heads"],
        "inner": c["num_heads"] * c["head_dim"], "state": c["n_groups"] * c["state_size"], "kernel": c["conv_kernel"],
        "mamba_groups": c["n_groups"], "tied": bool(c["tie_word_embeddings"]),
    }  # fmt: skip


CONFIG = (
    Field(
        lambda c: {
            "num_layers": c["num_hidden_layers"],
            "hidden_size": c["hidden_size"],
            "vocab_size": c["vocab_size"],
            "activation_func": "silu",
        },
        lambda _: {},
        sizes,
    ),
    hybrid_layers(lambda config: "M" * config["num_hidden_layers"]),
)
LAYOUTS = ("hybrid",)
WEIGHTS_ONLY = "a HybridModel"
