"""CONFIG fields of models with Mamba-2 layers: their sizes, what megatron-core fixes of them, and the kinds of layers, one letter
for each (`hybrid_layer_pattern`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import inf
from typing import Any, cast

from converter.config import (
    Config,
    Field,
    Sizes,
    count,
    counts,
    fixed,
    named,
    number,
    one_of,
    sizes_of,
    to_huggingface,
    to_megatron,
)
from converter.config_hybrid import hybrid_layers
from converter.config_parts import only
from converter.hybrid import PATTERN, without_stages
from formats.errors import UserError, format_untrusted
from formats.torch_dist import MOST_LAYERS

MAMBA, ATTENTION, DENSE, SPARSE = "M", "*", "-", "E"
"""Letters of a pattern (`megatron.core.models.hybrid.hybrid_layer_allocation.Symbols`)."""

WORDS = {
    "linear_attention": MAMBA,
    "full_attention": ATTENTION,
    "mlp": DENSE,
    "moe": SPARSE,
    "mamba": MAMBA,
    "attention": ATTENTION,
}
"""What transformers 5 calls these layers, and then what 4 did."""

_SPELLED = {letter: word for word, letter in reversed(WORDS.items())}
_EPSILON, _KERNEL = 1e-5, 4
"""What megatron-core's `MambaMixer` fixes: epsilon of the norm after the gate, tokens that its convolution sees."""


def spelled(pattern: str) -> list[str]:
    """Return the words of transformers 5 for a pattern; UserError for kinds of layers that it has not."""
    unknown = set(pattern) - _SPELLED.keys()
    if unknown:
        raise UserError(f"`{PATTERN}` has `{format_untrusted(min(unknown))}`, which no layer of this family is")
    return [_SPELLED[letter] for letter in pattern]


def letters(name: str, given: Any, known: Mapping[str, str] = WORDS) -> str:
    """Return the pattern that a list of words, the field `name` of `config.json`, stands for; UserError for other words."""
    words = cast("list[Any]", given) if isinstance(given, (list, str)) else []
    unknown = [word for word in words if not isinstance(word, str) or word not in known]
    if not words or unknown or len(words) > MOST_LAYERS:
        raise UserError(
            f"`{name}` has `{format_untrusted(unknown[0] if unknown else given)}`",
            hint=f"layers of this family are {', '.join(known)}",
        )
    return "".join(known[word] for word in words)


def pattern(read: Callable[[Config], str], write: Callable[[str], dict[str, Any]]) -> tuple[Field, ...]:
    """Return the fields of the kinds of layers (see `config_hybrid.hybrid_layers`), after those of their number. `write` returns
    the fields of `config.json` for a pattern."""

    def back(config: Config) -> dict[str, Any]:
        layer_letters = config.get(PATTERN)
        if not isinstance(layer_letters, str) or len(without_stages(layer_letters)) != config.get("num_layers"):
            raise UserError(f"`{PATTERN}` is `{format_untrusted(layer_letters)}`, which should have a letter for each layer")
        return write(without_stages(layer_letters))

    return (
        hybrid_layers(read),
        Field(lambda _config: {}, back),
        fixed(window_size=None),
        named(sparse=lambda model: frozenset(layer for layer, letter in enumerate(model.pattern) if letter == SPARSE)),
    )


def doubled(*fields: Field) -> Field:
    """Return fields of a model of which each layer is two of Megatron's: a mixer, and a feed-forward part or experts."""
    return Field(
        lambda config: to_megatron(fields, config),
        lambda config: to_huggingface(fields, {**config, "num_layers": count(config, "num_layers") // 2}),
        lambda sizes: sizes_of(fields, sizes),
    )


def counted(fields: Iterable[Field], read: Callable[[Config], str], layers: str = "num_hidden_layers") -> Field:
    """Return fields of a model whose `config.json` says the number of layers by their kinds, and perhaps also in `layers`."""
    fields = tuple(fields)

    def whole(config: Config) -> Config:
        number_of = len(read(config))
        one_of({f"`{layers}`": config.get(layers), "the number of layers that have a kind": number_of})
        return {**config, layers: number_of}

    return Field(
        lambda config: to_megatron(fields, whole(config)),
        lambda config: to_huggingface(fields, config),
        lambda sizes: sizes_of(fields, sizes._replace(config=whole(sizes.config))),
    )


def if_any(
    fields: Iterable[Field],
    there: Callable[[Config], bool],
    back: Callable[[Config], bool],
    absent: Config,
    written: Config | None = None,
) -> Field:
    """Return fields that hold only where `there` says so of a `config.json`, and `back` of Megatron's fields. Elsewhere Megatron
    has `absent`, and `config.json` `written`."""
    fields = tuple(fields)

    def sizes(before: Sizes) -> dict[str, Any]:
        return sizes_of(fields, before) if there(before.config) else {}

    return Field(
        lambda config: to_megatron(fields, config) if there(config) else dict(absent),
        lambda config: to_huggingface(fields, config) if back(config) else dict(written or {}),
        sizes,
    )


def mamba(
    *, heads: str, dim: str, groups: str, state: str, kernel: str, expand: str = "", groups_default: int, state_default: int
) -> tuple[Field, ...]:
    """Return the fields of Mamba-2 layers' sizes by their names in `config.json`, and the sizes `mamba_heads`, `mamba_groups`,
    `inner`, `state` and `kernel`.

    `expand` names the field that says how many times the hidden size all heads have together; without one they may have any.
    """

    def read(config: Config) -> dict[str, Any]:
        sizes = {heads: 128, groups: groups_default, state: state_default, **config}
        if count(sizes, heads) % count(sizes, groups):
            raise UserError(f"`{heads}` is {sizes[heads]}, which is not divisible by `{groups}`, {sizes[groups]}")
        return {
            "mamba_num_heads": count(sizes, heads),
            "mamba_head_dim": _head_dim(sizes, heads, dim, expand),
            "mamba_num_groups": count(sizes, groups),
            "mamba_state_dim": count(sizes, state),
        }

    def write(config: Config) -> dict[str, Any]:
        names = {heads: "mamba_num_heads", dim: "mamba_head_dim", groups: "mamba_num_groups", state: "mamba_state_dim"}
        dims = {name: count(config, megatron) for name, megatron in names.items()}
        return {**dims, **({expand: _expansion(dims[heads] * dims[dim], config)} if expand else {})}

    return (
        Field(read, write),
        counts(
            mamba_heads="mamba_num_heads", mamba_groups="mamba_num_groups", mamba_dim="mamba_head_dim", states="mamba_state_dim"
        ),
        named(
            inner=lambda model: model.mamba_heads * model.mamba_dim,
            state=lambda model: model.mamba_groups * model.states,
            kernel=_KERNEL,
        ),
        only(**{kernel: _KERNEL}),
    )


def _head_dim(config: Config, heads: str, dim: str, expand: str) -> int:
    """Return the size of a head. UserError where heads are not `expand` times the hidden size together."""
    if not expand:
        return count({dim: 64, **config}, dim)
    whole, number_of = count({expand: 2, **config}, expand) * count(config, "hidden_size"), count(config, heads)
    given = config.get(dim, "auto")
    size = whole // number_of if given == "auto" else count(config, dim)
    if number_of * size != whole:
        raise UserError(
            f"`{heads}` is {number_of} and `{dim}` `{format_untrusted(given)}`, and `{expand}` times `hidden_size` is {whole}",
            hint="`config.json` is damaged",
        )
    return size


def _expansion(inner: int, config: Config) -> int:
    hidden = count(config, "hidden_size")
    if inner % hidden:
        raise UserError(f"Mamba's heads have {inner} channels together, which is not divisible by the hidden size, {hidden}")
    return inner // hidden


def mixer(
    kinds: Callable[[Config], str],
    *,
    norm: str,
    default: float,
    projection: tuple[str, ...],
    convolution: str,
    function: str = "",
) -> tuple[Field, ...]:
    """Return the fields of what megatron-core's Mamba layers have in every model: a bias of the convolution and none of
    projections, SiLU, and any time step. A model with other projections has no place in Megatron; with limits of time steps, its
    weights are converted and it is not trained. `mamba_norm_epsilon`, of `mbtrain`, is the epsilon (the field `norm`, with its
    default) where megatron-core's layers have another."""

    def fixed_in_megatron(config: Config) -> dict[str, Any]:
        if MAMBA not in kinds(config):
            return dict.fromkeys((EPSILON, LIMIT))
        epsilon = number(norm, config.get(norm, default))
        return {EPSILON: None if epsilon == _EPSILON else epsilon, LIMIT: _limit(config)}

    return (
        only(**dict.fromkeys(projection, False), **{convolution: True}, **({function: "silu"} if function else {})),
        Field(fixed_in_megatron, _written_limit),
    )


EPSILON = "mamba_norm_epsilon"
LIMIT = "time_step_limit"


def _limit(config: Config) -> list[Any] | None:
    """Return the limits of time steps, None for those of any."""
    given: Any = config.get(LIMIT)
    both = [_plain(bound) for bound in cast("list[Any]", given)] if isinstance(given, (list, tuple)) else []
    if given is None or both == [0, inf]:
        return None
    if len(both) != 2 or not all(isinstance(bound, (int, float)) for bound in both):
        raise UserError(f"`{LIMIT}` is `{format_untrusted(given)}`, which should be two numbers")
    return both


def _plain(bound: Any) -> Any:
    """Return a number as Python has it: transformers 5 writes infinity as an object."""
    return inf if bound == {"__float__": "Infinity"} else bound


def _written_limit(config: Config) -> dict[str, Any]:
    return {} if config.get(LIMIT) is None else {LIMIT: config[LIMIT]}
