"""CONFIG fields of layers that attend differently: sliding windows, layers without positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from converter.config import Config, Field, agreeing, count
from formats.errors import UserError, format_untrusted
from formats.torch_dist import MOST_LAYERS

FULL, SLIDING = "full_attention", "sliding_attention"
"""Words of `layer_types`."""

Types = Callable[[Config], Sequence[str]]
"""What `layer_types` is where a `config.json` does not have it."""


def layers_of(config: Config, name: str = "num_hidden_layers") -> int:
    """Return the number of layers; UserError for more than any list of layers should be made for."""
    layers = count(config, name)
    if layers > MOST_LAYERS:
        raise UserError(f"`{name}` is {layers}, more layers than any model has", hint="the configuration is damaged")
    return layers


def all_full(config: Config) -> list[str]:
    """Return the types of layers that all see every token before one."""
    return [FULL] * layers_of(config)


def one_full_in(default: int | str, *, name: str = "sliding_window_pattern") -> Types:
    """Return the types of layers of which each n-th sees all tokens before one and the others slide.

    `name` is the field of n, which may be a pattern of letters too: `LLLG`. `default` is n where it is absent.
    """

    def types(config: Config) -> list[str]:
        step, layers = config.get(name, default), layers_of(config)
        if isinstance(step, str) and step and set(step) <= {"L", "G"}:
            return [SLIDING if step[layer % len(step)] == "L" else FULL for layer in range(layers)]
        each = count({name: step}, name)
        return [FULL if (layer + 1) % each == 0 else SLIDING for layer in range(layers)]

    return types


def layer_types(config: Config, default: Types) -> list[str]:
    """Return the type of each layer. UserError where `layer_types` is damaged, or contradicts the fields that it follows from."""
    listed = config.get("layer_types")
    if listed is None:
        return list(default(config))
    types = cast("list[Any]", listed) if isinstance(listed, list) else []
    if len(types) != layers_of(config) or any(word not in (FULL, SLIDING) for word in types):
        raise UserError(
            f"`layer_types` is `{format_untrusted(listed)}`, which should have `{FULL}` or `{SLIDING}` for each of "
            f"{layers_of(config)} layers"
        )
    named = [name for name in _PATTERNS if config.get(name) is not None]
    expected = list(default(config)) if named else types
    if types != expected:
        layer = next(layer for layer, pair in enumerate(zip(types, expected, strict=True)) if pair[0] != pair[1])
        raise UserError(
            f"`config.json` says two things: layer {layer} has `{types[layer]}` in `layer_types`, and by `{named[0]}` it is "
            f"`{expected[layer]}`",
            hint="loaders differ in which they take: leave one out",
        )
    return types


_PATTERNS = ("sliding_window_pattern", "use_sliding_window")
"""Fields that `layer_types` follows from in some families. transformers writes `_sliding_window_pattern` too, and never reads it:
it is 6 whatever the layers of a Gemma 3 are."""


def window_pattern(
    types: Types,
    *,
    huggingface: str = "sliding_window",
    default: int | None = None,
    unused: int | None = None,
    switch: str = "",
    pattern: Callable[[Sequence[str]], dict[str, Any]] = lambda _types: {},
) -> Field:
    """Return the field of layers of which some attend in a sliding window: `window_size` and `window_attn_skip_freq`.

    `types` is `layer_types` where it is absent, and `pattern` returns the fields of `config.json` that it computes them from.
    `unused` is what the field of the window has where no layer slides: null, unless transformers refuses that. `switch` names a
    field without which no layer slides.
    """

    def read(config: Config) -> dict[str, Any]:
        slides = [word == SLIDING for word in layer_types(config, types)]
        tokens = config.get(huggingface, default) if any(slides) else None
        if any(slides) and tokens is None:
            raise UserError(f"`layer_types` has `{SLIDING}`, and `{huggingface}` is `None`", hint="the configuration is damaged")
        return {
            "window_size": None if tokens is None else [count({huggingface: tokens}, huggingface) - 1, 0],
            "window_attn_skip_freq": [int(slide) for slide in slides] if any(slides) and not all(slides) else None,
        }

    def write(config: Config) -> dict[str, Any]:
        tokens = seen(config.get("window_size"))
        each, slides = marks(config, "window_attn_skip_freq", absent=int(tokens is not None))
        if each:  # megatron-core: each such layer sees everything
            slides = [1 - slide for slide in slides]
        types = [SLIDING if slide else FULL for slide in slides]
        shown = unused if tokens is None else tokens
        return {huggingface: shown, "layer_types": types, **({switch: tokens is not None} if switch else {}), **pattern(types)}

    return Field(read, write)


def no_rope(read: Callable[[Config], Sequence[bool]], write: Callable[[Sequence[int]], dict[str, Any]] | None = None) -> Field:
    """Return the field of layers without rotary embeddings, `no_rope_freq`. `read` says of each layer whether it has none.

    `write` returns the fields of `config.json` for a list of 1 (none) and 0; without it, they follow from other fields.
    """

    def there(config: Config) -> dict[str, Any]:
        without = [int(is_without) for is_without in read(config)]
        return {"no_rope_freq": without if any(without) else None}

    def back(config: Config) -> dict[str, Any]:
        _, without = marks(config, "no_rope_freq", absent=0)
        return write(without) if write else {}

    return Field(there, back)


def marks(config: Config, name: str, *, absent: int) -> tuple[bool, list[int]]:
    """Return a field of Megatron's that has 0 or 1 for each layer, or a number n for each n-th: whether it is such a number, and
    the marks of all layers. `absent` is the mark without the field. UserError for anything else."""
    given, layers = config.get(name), layers_of(config, "num_layers")
    if given in (None, 0, []):
        return False, [absent] * layers
    if isinstance(given, int):
        return True, [int((layer + 1) % given == 0) for layer in range(layers)]
    listed = list(cast("Sequence[Any]", given)) if isinstance(given, (list, tuple)) else []
    if len(listed) != layers or any(mark not in (0, 1) for mark in listed):
        raise UserError(f"`{name}` is `{format_untrusted(given)}`, which should have 0 or 1 for each of {layers} layers")
    return False, listed


def seen(window: Any) -> int | None:
    """Return the tokens that a window of Megatron's shows, the present one included; None without a window."""
    match window:
        case None:
            return None
        case [int(before), 0] | (int(before), 0):
            return before + 1
        case _:
            raise UserError("`window_size` is not a window over what comes before a token")


def window(megatron: str, huggingface: str, *, default: int | None, switch: str = "") -> Field:
    """Return the field of sliding attention: Hugging Face counts the tokens seen, the current one included; Megatron those before
    it. `switch` names a field without which no layer slides."""

    def read(config: Config) -> dict[str, Any]:
        tokens = config.get(huggingface, default) if not switch or config.get(switch) else None
        _check_sliding(config, huggingface, tokens)
        return {megatron: None if tokens is None else [count({huggingface: tokens}, huggingface) - 1, 0]}

    def write(config: Config) -> dict[str, Any]:
        tokens = seen(config.get(megatron))
        return {huggingface: tokens, **({switch: tokens is not None} if switch else {})}

    return Field(read, write)


def no_window(megatron: str) -> Field:
    """Return the field of attention over all tokens before one, in every layer."""

    def read(config: Config) -> dict[str, Any]:
        _check_layers(config, "full_attention")
        return {megatron: None}

    return Field(read, lambda config: agreeing(config, {megatron: None}))


def _check_sliding(config: Config, name: str, tokens: Any) -> None:
    if tokens is not None and config.get("use_sliding_window") is False:
        raise UserError(
            f"`config.json` says two things: `use_sliding_window` is `False`, `{name}` is `{format_untrusted(tokens)}`",
            hint=f"transformers' models of this family look at `{name}` alone: set it to null if there is no window",
        )
    _check_layers(config, "full_attention" if tokens is None else "sliding_attention")


def _check_layers(config: Config, expected: str) -> None:
    """Raise UserError for layers that attend in another way than the rest of `config.json` says."""
    listed = config.get("layer_types")
    other = next((kind for kind in cast("list[Any]", listed) if kind != expected), None) if isinstance(listed, list) else None
    if other is not None:
        raise UserError(
            f"`layer_types` has `{format_untrusted(other)}`, but models of this family have `{expected}` in all layers",
            hint="is `model_type` right?",
        )
