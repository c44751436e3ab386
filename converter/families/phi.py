"""Phi 1, 1.5 and 2: both branches read one norm, part of each head is turned, and logits have a bias."""

from converter.config import fixed
from converter.config_layers import no_window
from converter.config_parts import dropouts, layer_norm, mlp, sizes
from converter.config_rope import partial_rotary, rope
from converter.families.gpt_neox import both, normed
from converter.families.llama import untied
from converter.rules import column_parallel, qkv, row_parallel, under, vocab_parallel

MODELS = "Phi 1, 1.5 and 2"
ARCHITECTURE = "PhiForCausalLM"

LAYER = (
    *normed("input_layernorm.", "input_layernorm"),
    *both(qkv, "self_attention.linear_qkv", "self_attn.{q,k,v}_proj", "hidden"),
    *both(row_parallel, "self_attention.linear_proj", "self_attn.dense", "hidden", "queries"),
    *both(column_parallel, "mlp.linear_fc1", "mlp.fc1", "ffn", "hidden"),
    *both(row_parallel, "mlp.linear_fc2", "mlp.fc2", "hidden", "ffn"),
)
RULES = (
    vocab_parallel("embedding.word_embeddings.weight", "model.embed_tokens.weight", "hidden"),
    *under("decoder.layers.{layer}", "model.layers.{layer}", LAYER),
    *normed("decoder.final_layernorm.", "model.final_layernorm"),
    vocab_parallel("output_layer.weight", "lm_head.weight", "hidden", when=untied, tied_to="model.embed_tokens.weight"),
    vocab_parallel("output_layer.bias", "lm_head.bias"),
)
BIASES = fixed(add_bias_linear=True, add_qkv_bias=False, qk_layernorm=False, parallel_residual="one_norm", output_layer_bias=True)
CONFIG = (
    *sizes(head_dim=""),
    *layer_norm(),
    *dropouts(hidden="resid_pdrop", embedding="embd_pdrop"),
    *mlp("gelu_new", "gelu", gated=False),
    BIASES,
    rope("default", partial=partial_rotary(0.5)),
    no_window("window_size"),
)
PROVIDER = ("parallel_residual", "output_layer_bias")
