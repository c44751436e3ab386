"""Bamba: Mamba-2 layers and a few of attention, whose heads are turned by half; each layer is two of Megatron's, a mixer and a
feed-forward part."""

from collections.abc import Iterable
from dataclasses import replace
from types import NoneType
from typing import Any, cast

from converter.config import Config, fixed
from converter.config_layers import layers_of
from converter.config_mamba import ATTENTION, DENSE, MAMBA, doubled, mamba, mixer, pattern
from converter.config_parts import dropouts, mlp, only, rms_norm, sizes
from converter.config_rope import partial_rotary, rope
from converter.families import llama, mamba2
from converter.rules import Condition, Rule, replicated, under
from formats.errors import UserError, format_untrusted

MODELS = "Bamba 9B"
ARCHITECTURE = "BambaForCausalLM"


def mixes(letter: str) -> Condition:
    """Return the condition that the mixer of a layer is of the kind with this letter."""
    return lambda model, indices: model.pattern[indices["mixer"]] == letter


def feeds(letter: str) -> Condition:
    """Return the condition that the other half of a layer is of the kind with this letter."""
    return lambda model, indices: model.pattern[indices["mlp"]] == letter


def mixers(letter: str, rules: Iterable[Rule]) -> Iterable[Rule]:
    """Return the rules of mixers of one kind: Megatron's layers of even numbers."""
    return under("decoder.layers.{mixer}", "model.layers.{layer}", rules, when=mixes(letter))


def feeding(letter: str, rules: Iterable[Rule]) -> Iterable[Rule]:
    """Return the rules of what follows a mixer, of one kind: Megatron's layers of odd numbers."""
    return under("decoder.layers.{mlp}", "model.layers.{layer}", rules, when=feeds(letter))


def decoder(*layers: Rule, norm: str) -> tuple[Rule, ...]:
    """Return the rules of a model whose layers have these, and whose last norm has this name."""
    first, *_, last = llama.decoder()
    return (first, *layers, replicated("decoder.final_norm.weight", norm, "hidden"), last)


FEEDING = (
    replace(llama.MLP[0], huggingface="pre_ff_layernorm.weight"),
    *(replace(rule, huggingface=rule.huggingface.replace("mlp.", "feed_forward.")) for rule in llama.MLP[1:]),
)
RULES = decoder(
    *mixers(MAMBA, mamba2.mixing("input_layernorm.weight", "mamba")),
    *mixers(ATTENTION, llama.ATTENTION),
    *feeding(DENSE, FEEDING),
    norm="model.final_layernorm.weight",
)

_ATTENDING = "attn_layer_indices"


def _kinds(config: Config) -> str:
    layers, given = layers_of(config), config.get(_ATTENDING)
    attending = cast("list[Any]", [] if given is None else given)
    if not isinstance(given, (list, NoneType)) or any(number not in range(layers) for number in attending):
        raise UserError(f"`{_ATTENDING}` is `{format_untrusted(given)}`, which should be numbers of layers below {layers}")
    return "".join((ATTENTION if layer in attending else MAMBA) + DENSE for layer in range(layers))


def _written_kinds(pattern: str) -> dict[str, Any]:
    mixing = pattern[::2]
    if set(pattern[1::2]) - {DENSE} or set(mixing) - {ATTENTION, MAMBA} or len(pattern) % 2:
        raise UserError(
            f"`hybrid_layer_pattern` is `{format_untrusted(pattern)}`: each layer of this family is a mixer and a `-`"
        )
    return {_ATTENDING: [layer for layer, letter in enumerate(mixing) if letter == ATTENTION] or None}


MAMBA_SIZES = mamba(
    heads="mamba_n_heads", dim="mamba_d_head", groups="mamba_n_groups", state="mamba_d_state", kernel="mamba_d_conv",
    expand="mamba_expand", groups_default=1, state_default=256,
)  # fmt: skip
NO_BIAS = fixed(add_bias_linear=False, add_qkv_bias=False, qk_layernorm=False)
CONFIG = (
    doubled(*sizes(groups_default=8, positions_default=262144)),
    *pattern(_kinds, _written_kinds),
    *dropouts(),
    *rms_norm(default=1e-5),
    *mlp("silu", gated=True),
    *MAMBA_SIZES,
    *mixer(_kinds, norm="rms_norm_eps", default=1e-5, projection=("mamba_proj_bias",), convolution="mamba_conv_bias"),
    NO_BIAS,
    only(attention_bias=False, mlp_bias=False),
    rope("default", partial=partial_rotary(0.5)),
)
LAYOUTS = ("hybrid",)
SMALL = {
    "attn_layer_indices": [1], "num_hidden_layers": 2, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 2,
    "mamba_d_state": 16, "mamba_expand": 2, "mamba_chunk_size": 8, "rms_norm_eps": 0.01,
}  # fmt: skip
PROVIDER = mamba2.PROVIDER
