"""CONFIG fields of layout `hybrid`: what megatron-core's HybridModel is told of its layers, and the same for a GPTModel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, cast

from converter.config import Config, Field, Sizes, count, sizes_of, to_huggingface, to_megatron
from converter.config_experts import with_experts
from converter.config_layers import layers_of, marks
from converter.hybrid import FEED_FORWARD, MIXERS, PATTERN, PREDICTION, STAGE
from formats.errors import UserError, format_untrusted

_OF_EACH_LAYER = ("no_rope_freq", "window_attn_skip_freq")
"""Fields with a mark for each layer, which a HybridModel counts as its own."""
_GATED_DELTA_NET, _SPARSE = "gated_delta_net", "dsa"
"""Values of `experimental_attention_variant`."""


def hybrid_layers(pattern: Callable[[Config], str], *, layers: str = "num_hidden_layers") -> Field:
    """Return the field of a family that exists only as HybridModel: `pattern` returns `hybrid_layer_pattern` of a `config.json`,
    a letter for each of Megatron's layers, without `|`; `/` comes before each layer of multi-token prediction.

    It comes after all other fields of layers: `num_layers` is then the number of Megatron's, and the size `layers` the number of
    Hugging Face's, which its field `layers` says. The way back says nothing of either.
    """

    def read(config: Config) -> dict[str, Any]:
        letters = pattern(config)
        return {PATTERN: letters, "num_layers": len(_decoder(letters)), "is_hybrid_model": True}

    return Field(read, lambda _config: {}, lambda sizes: {"layers": count(sizes.config, layers), **_sizes(sizes.megatron)})


def in_layers_of_two(fields: Sequence[Field]) -> Field:
    """Return the field that says of a model in layout `hybrid` what these say of it as a GPTModel."""
    fields = tuple(fields)

    def sizes(before: Sizes) -> dict[str, Any]:
        plain = to_megatron(fields, before.config)
        return {**sizes_of(fields, Sizes(before.config, plain, {})), **_sizes(before.megatron)}

    return Field(
        lambda config: hybrid_fields(to_megatron(fields, config)),
        lambda config: to_huggingface(fields, gpt_fields(config)),
        sizes,
    )


def _sizes(megatron: Config) -> dict[str, Any]:
    return {"pattern": _decoder(megatron[PATTERN]), "hybrid": True, "stacked": False}


def _decoder(pattern: str) -> str:
    """A pattern without stages, and without layers of multi-token prediction."""
    return pattern.partition(PREDICTION)[0].replace(STAGE, "")


def hybrid_fields(gpt: Config) -> dict[str, Any]:
    """Return the fields of a HybridModel that is the same model as a GPTModel of these fields."""
    layers, experts = layers_of(gpt, "num_layers"), gpt.get("num_moe_experts")
    _, linear = marks(gpt, "linear_attention_freq", absent=0)
    sparse = with_experts(gpt) if experts else [False] * layers
    mixer = _mixer(gpt)
    pairs = ["".join(pair) for pair in zip(["G" if mark else mixer for mark in linear], ["E" if mark else "-" for mark in sparse],
                                           strict=True)]  # fmt: skip
    predicted = [mixer + pairs[-1][1:]] * (gpt.get("mtp_num_layers") or 0)  # which have attention
    return {
        **gpt,
        "num_layers": 2 * layers,
        PATTERN: PREDICTION.join(["".join(pairs), *predicted]),
        "is_hybrid_model": True,
        **{name: _twice(gpt, name) for name in _OF_EACH_LAYER if gpt.get(name)},
        **({"moe_layer_freq": 1} if "moe_layer_freq" in gpt else {}),
        **({"linear_attention_freq": None} if "linear_attention_freq" in gpt else {}),
        **({"experimental_attention_variant": None} if gpt.get("experimental_attention_variant") == _GATED_DELTA_NET else {}),
    }


def _mixer(gpt: Config) -> str:
    """The letter of the layers with attention."""
    if gpt.get("experimental_attention_variant") == _SPARSE:
        return "D"
    return "+" if gpt.get("multi_latent_attention") else "*"


def _twice(gpt: Config, name: str) -> list[int]:
    """The marks of layers, of which each is two."""
    each, by_layer = marks(gpt, name, absent=0)
    if each and name == "window_attn_skip_freq":  # each such layer sees everything
        by_layer = [1 - mark for mark in by_layer]
    return list(chain.from_iterable((mark, mark) for mark in by_layer))


def not_computed(hybrid: Config) -> Iterator[str]:
    """Yield what megatron-core's HybridModel does not compute of a model with these fields, though its weights are written."""
    if hybrid.get("parallel_residual"):
        yield (
            "layers of layout `hybrid` come one after another, and this model has attention and the feed-forward part side by "
            "side: no HybridModel computes it, and `mbtrain` refuses it in this layout"
        )
    for name, attribute in (("rope_scaling", "inv_freq"), ("rotary_interleaved", "rotary_interleaved")):
        if hybrid.get(name):
            yield (
                f"megatron-core's HybridModel takes no `{name}`: set `rotary_pos_emb.{attribute}` after building the model, "
                "as `mbtrain` does"
            )


def gpt_fields(hybrid: Config) -> dict[str, Any]:
    """Return the fields of the GPTModel that is the same model as a HybridModel of these; UserError where there is none."""
    layers, *predicted = _checked(hybrid.get(PATTERN)).split(PREDICTION)
    mixers, parts = layers[::2], layers[1::2]
    if len(mixers) != len(parts) or not set(mixers) <= {*MIXERS} - {"M"} or not set(parts) <= {*FEED_FORWARD}:
        raise UserError(f"`{PATTERN}` is `{format_untrusted(layers)}`: not attention and a feed-forward part in turn")
    sparse = [int(letter == "E") for letter in parts]
    return {
        **{name: value for name, value in hybrid.items() if name not in (PATTERN, "is_hybrid_model")},
        "num_layers": len(mixers),
        "mtp_num_layers": len(predicted) or None,
        **{name: hybrid[name][::2] for name in _OF_EACH_LAYER if isinstance(hybrid.get(name), list)},
        **({"moe_layer_freq": 1 if all(sparse) else sparse} if any(sparse) else {}),
        **(_delta_net(mixers) if "G" in mixers else {}),
    }


def _checked(pattern: Any) -> str:
    if not isinstance(pattern, str) or not pattern or not set(pattern) <= {*MIXERS, *FEED_FORWARD, STAGE, PREDICTION}:
        raise UserError(f"`{PATTERN}` is `{format_untrusted(cast('Any', pattern))}`, which should have a letter for each layer")
    return pattern.replace(STAGE, "")


def _delta_net(mixers: str) -> dict[str, Any]:
    return {
        "experimental_attention_variant": _GATED_DELTA_NET,
        "linear_attention_freq": [int(letter == "G") for letter in mixers],
    }
