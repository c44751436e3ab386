"""CONFIG fields of rotary embeddings, as transformers 5 writes them (`rope_parameters`) and as 4 did (`rope_scaling`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import log
from typing import Any, NamedTuple, cast

from converter.config import Config, Field, agreeing, count, number, object_of, one_of, positive
from formats.errors import UserError, format_untrusted

BUILT_IN_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What megatron-core's GPTModel fixes for Llama-3.1's scaling (`RotaryEmbedding._apply_scaling`)."""

_FIELDS = ("rope_parameters", "rope_scaling")
_ORIGINAL = "original_max_position_embeddings"


def partial_rotary(default: float, name: str = "partial_rotary_factor") -> Field:
    """Return the field of the share of each head that is turned. `name` is the field's in `config.json` of transformers 4."""

    def read(config: Config) -> dict[str, Any]:
        part = _partial(config, name)
        return {"rotary_percent": default if part is None else number(name, part)}

    return Field(read, lambda config: {name: number("rotary_percent", config.get("rotary_percent", 1.0))})


def _whole_heads(config: Config) -> dict[str, Any]:
    part = _partial(config, "partial_rotary_factor")
    if part not in (None, 1):
        raise UserError(f"`partial_rotary_factor` is `{format_untrusted(part)}`, but models of this family turn whole heads")
    return {"rotary_percent": 1.0}


WHOLE_HEADS = Field(_whole_heads, lambda config: agreeing(config, {"rotary_percent": 1.0}))


def _partial(config: Config, name: str) -> Any:
    inside = {f"`partial_rotary_factor` in `{field}`": _object(config, field).get("partial_rotary_factor") for field in _FIELDS}
    return one_of({**inside, f"`{name}`": config.get(name)})


def rope(*kinds: str, theta: float = 10000.0, partial: Field = WHOLE_HEADS, default: Config | None = None) -> Field:
    """Return the field of rotary embeddings, scaled in one of the given kinds.

    `theta` is the base where `config.json` has none; `default` the parameters where it has none at all; `partial` the field of
    the share of heads that is turned.
    """

    def read(config: Config) -> dict[str, Any]:
        share = partial.to_megatron(config)
        numbers = rope_numbers(config, theta=theta, default=default)
        return {**share, **_read(numbers, config, kinds, own_yarn=share["rotary_percent"] < 1)}

    def write(config: Config) -> dict[str, Any]:
        base, scaling = number("rotary_base", config.get("rotary_base", theta)), _written(config, kinds)
        if default is not None:  # which transformers would take where there is a base alone
            return {_FIELDS[0]: {"rope_theta": base, **(scaling or {"rope_type": "default"})}, **partial.to_huggingface(config)}
        return {"rope_theta": base, "rope_scaling": scaling, **partial.to_huggingface(config)}

    return Field(read, write)


def rope_by_type(*kinds: str, theta: float, sliding: str = "rope_theta", sliding_theta: float | None = None) -> Field:
    """Return the field of rotary embeddings that differ between layers that slide and those that do not.

    `sliding` names the field of transformers 4 for the base of layers that slide, which are never scaled there; `theta` and
    `sliding_theta` are the bases where `config.json` has none. Megatron's fields say what the full layers have, `sliding_rope`
    what the others have if that is not the same.
    """

    def read(config: Config) -> dict[str, Any]:
        full = rope_numbers(config, theta=theta, layers="full_attention")
        other = _sliding_numbers(config, sliding, theta if sliding_theta is None else sliding_theta)
        return {
            **_whole_heads(config), **_whole_heads(full), **_whole_heads(other),
            **_read(full, config, kinds),
            "sliding_rope": None if other == full else _read_alone(other),
        }  # fmt: skip

    def write(config: Config) -> dict[str, Any]:
        scaling = _written(config, kinds) or {"rope_type": "default"}
        full = {"rope_theta": number("rotary_base", config.get("rotary_base", theta)), **scaling}
        other = config.get("sliding_rope") or full
        return {"rope_parameters": {"full_attention": full, "sliding_attention": other}}

    return Field(read, write)


def _sliding_numbers(config: Config, name: str, theta: float) -> dict[str, Any]:
    """Return the parameters of layers that slide: those of their own, or the base in the field `name` without a scaling."""
    if any(isinstance(numbers, dict) for numbers in _object(config, "rope_parameters").values()):
        return rope_numbers(config, theta=theta, layers="sliding_attention")
    base = config.get(name)
    return {"rope_type": "default", "rope_theta": number(name, theta if base is None else base)}


def _read_alone(numbers: Config) -> dict[str, Any]:
    if numbers["rope_type"] != "default":
        raise _unknown_kind(numbers["rope_type"], ("default",), "of layers that slide ")
    return {name: numbers[name] for name in ("rope_type", "rope_theta")}


class _Kind(NamedTuple):
    """A kind of rotary embedding: what it is computed from beside `rope_theta`, and its fields in Megatron."""

    needs: tuple[str, ...]
    read: Callable[[Config, Config], dict[str, Any]]
    """Of its parameters and the whole `config.json`."""

    write: Callable[[Config], dict[str, Any] | None]
    """Of Megatron's fields; None where these are of another kind."""


def _read_yarn(numbers: Config, config: Config) -> dict[str, Any]:
    original = _factor(numbers, _ORIGINAL)
    factor = (
        number("factor", count(config, "max_position_embeddings") / original) if numbers["factor"] is None else numbers["factor"]
    )
    return {
        "position_embedding_type": "yarn",
        "yarn_rotary_scaling_factor": float(factor),
        "yarn_original_max_position_embeddings": original,
        "yarn_beta_fast": float(numbers.get("beta_fast") or 32),
        "yarn_beta_slow": float(numbers.get("beta_slow") or 1),
        **_read_mscale(numbers, factor),
        "yarn_correction_range_round_to_int": bool(numbers.get("truncate", True)),
    }


def _read_mscale(numbers: Config, factor: float) -> dict[str, Any]:
    """Return what the attention's factor follows from: (0.1 · mscale · ln factor + 1) / (0.1 · mscale_all_dim · ln factor + 1).

    Source: `_yarn_get_concentration_factor` of megatron-core, `_compute_yarn_parameters` of transformers.
    """
    attention, mscale, all_dim = (numbers.get(name) for name in ("attention_factor", "mscale", "mscale_all_dim"))
    if attention is not None and factor > 1:
        return {"yarn_mscale": (number("attention_factor", attention) - 1) / (0.1 * log(factor)), "yarn_mscale_all_dim": 0.0}
    both = bool(mscale and all_dim)
    return {"yarn_mscale": mscale if both else None, "yarn_mscale_all_dim": all_dim if both else None}


def signed(name: str, given: Any) -> Any:
    """Return a number that may be below 0, or None: `yarn_mscale` is where the attention's factor is below 1."""
    if given is None:
        return None
    return -number(name, -given) if isinstance(given, (int, float)) and given < 0 else number(name, given)


def _write_yarn(config: Config) -> dict[str, Any] | None:
    if config.get("position_embedding_type") != "yarn":
        return _write_own("yarn")(config)
    factor = positive("yarn_rotary_scaling_factor", config.get("yarn_rotary_scaling_factor"))
    mscale, all_dim = (signed(name, config.get(name)) for name in ("yarn_mscale", "yarn_mscale_all_dim"))
    numbers = {
        "rope_type": "yarn",
        "factor": factor,
        _ORIGINAL: config.get("yarn_original_max_position_embeddings"),
        "beta_fast": config.get("yarn_beta_fast"),
        "beta_slow": config.get("yarn_beta_slow"),
    }
    if mscale is not None and all_dim:
        numbers |= {"mscale": mscale, "mscale_all_dim": all_dim}
    elif mscale is not None:
        numbers["attention_factor"] = round(0.1 * mscale * log(factor) + 1, 12)
    if config.get("yarn_correction_range_round_to_int") is False:
        numbers["truncate"] = False
    return numbers


def _read_own(numbers: Config, config: Config) -> dict[str, Any]:
    """Return the parameters as they are: GPTModel has no arguments for them. `dynamic` and `longrope` are other ones beyond the
    original length."""
    original = numbers.get(_ORIGINAL, config.get("max_position_embeddings"))
    kept = {name: value for name, value in numbers.items() if name not in ("rope_theta", "partial_rotary_factor")}
    if numbers["rope_type"] in ("longrope", "yarn") and numbers.get("factor") is None:
        kept["factor"] = number("factor", count(config, "max_position_embeddings") / positive(_ORIGINAL, original))
    return {"rope_parameters": kept, "exact_sequence_length": None if numbers["rope_type"] == "yarn" else original}


def _write_own(kind: str) -> Callable[[Config], dict[str, Any] | None]:
    def write(config: Config) -> dict[str, Any] | None:
        parameters: Any = config.get("rope_parameters")
        numbers = cast("dict[str, Any]", parameters) if isinstance(parameters, dict) else {}
        return dict(numbers) if numbers.get("rope_type") == kind else None

    return write


def _read_nothing(_numbers: Config, _config: Config) -> dict[str, Any]:
    return {}


def _write_nothing(_config: Config) -> dict[str, Any] | None:
    return None


def _read_llama3(numbers: Config, _config: Config) -> dict[str, Any]:
    return {"rope_scaling": True, "rope_scaling_factor": numbers["factor"]}


def _write_llama3(config: Config) -> dict[str, Any] | None:
    if not config.get("rope_scaling"):
        return None
    factor = number("rope_scaling_factor", config.get("rope_scaling_factor", 8.0))
    return {"rope_type": "llama3", "factor": factor, **BUILT_IN_ROPE}


def _read_linear(numbers: Config, _config: Config) -> dict[str, Any]:
    return {"seq_len_interpolation_factor": numbers["factor"]}


def _write_linear(config: Config) -> dict[str, Any] | None:
    factor = config.get("seq_len_interpolation_factor")
    return {"rope_type": "linear", "factor": factor} if factor else None


_KINDS: dict[str, _Kind] = {
    "default": _Kind((), _read_nothing, _write_nothing),
    "linear": _Kind(("factor",), _read_linear, _write_linear),
    "llama3": _Kind(("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL), _read_llama3, _write_llama3),
    "yarn": _Kind(("factor", _ORIGINAL), _read_yarn, _write_yarn),
    "dynamic": _Kind(("factor",), _read_own, _write_own("dynamic")),
    "longrope": _Kind(("short_factor", "long_factor", _ORIGINAL), _read_own, _write_own("longrope")),
}


def _read(numbers: Config, config: Config, kinds: Iterable[str], *, own_yarn: bool = False) -> dict[str, Any]:
    """Return Megatron's fields; with `own_yarn`, `yarn` as the trainer's, for megatron-core turns whole heads by its own."""
    name = numbers["rope_type"]
    if name not in kinds:
        raise _unknown_kind(name, kinds)
    kind = _KINDS[name]
    for key in kind.needs:
        _factor(numbers, key)
    start = {"rotary_base": numbers["rope_theta"], "position_embedding_type": "rope", "rope_scaling": False}
    return {**start, **(_read_own if own_yarn and name == "yarn" else kind.read)(numbers, config)}


def _unknown_kind(name: Any, kinds: Iterable[str], which: str = "") -> UserError:
    return UserError(
        f"`config.json` has {which}rope type `{format_untrusted(name)}`, which megatron-core cannot do for this family",
        hint=f"supported are: {', '.join(kinds)}",
    )


def _written(config: Config, kinds: Iterable[str]) -> dict[str, Any] | None:
    """Return `rope_scaling` for Megatron's fields; UserError for a kind that the family has not."""
    for name, kind in _KINDS.items():
        fields = kind.write(config)
        if fields is not None:
            if name not in kinds:
                raise UserError(f"the rotary embedding is of the kind `{name}`, which is not among this family's")
            return fields
    return agreeing(config, {"position_embedding_type": "rope"}) or None


def _factor(numbers: Config, name: str) -> Any:
    """Return a number above 0 that a scaling needs, or a list of them, as transformers does; else raise UserError."""
    factor: Any = numbers.get(name)
    if name not in numbers:
        raise UserError(
            f"`config.json` has rope type `{numbers['rope_type']}` without `{name}`",
            hint="transformers refuses that too: take the scaling's numbers from the original model",
        )
    if name == "factor" and factor is None and numbers["rope_type"] == "yarn":
        return None  # transformers takes the ratio of both lengths
    for each in cast("list[Any]", factor) if isinstance(factor, list) else [factor]:
        positive(name, each)
    return cast("Any", factor)


def rope_numbers(config: Config, *, theta: float = 10000.0, layers: str = "", default: Config | None = None) -> dict[str, Any]:
    """Return the rotary embedding parameters of a `config.json`, as transformers 5 writes them (`rope_parameters`) or as 4 did
    (`rope_theta` and `rope_scaling`). UserError where both are there and say different things.

    `theta` is the base where it has none; `layers` the word of `layer_types` whose parameters these are, where layers differ;
    `default` the parameters where it has none at all.
    """
    objects = {name: section for name in _FIELDS if (section := _object(config, name, layers))}
    read = {name: _numbers_of(section, config, name, theta) for name, section in objects.items()}
    if not read:
        return _numbers_of(default or {}, {} if default else config, "rope_scaling", theta)
    new, *old = read.values()
    for key in _computed_from(new) if old else ():
        if new.get(key) != old[0].get(key):
            raise UserError(
                f"`config.json` has `rope_parameters`, by which `{key}` is `{format_untrusted(new.get(key))}`, and "
                "`rope_scaling`, by "
                f"which it is `{format_untrusted(old[0].get(key))}`",
                hint="the first is of transformers 5, the second, with `rope_theta` beside it, of 4: leave one out",
            )
    return new


def _object(config: Config, name: str, layers: str = "") -> Config:
    section = object_of(config, name)
    return section[layers] if layers and isinstance(section.get(layers), dict) else section


def _computed_from(numbers: Config) -> Iterable[str]:
    kind = _KINDS.get(numbers["rope_type"])
    return "rope_type", "rope_theta", *(kind.needs if kind else sorted(numbers))


def _numbers_of(section: Config, config: Config, field: str, default_theta: float) -> dict[str, Any]:
    """Return the parameters in one field of `config.json`, with those outside it that belong to them."""
    nested = next((key for key, value in section.items() if isinstance(value, dict)), None)
    if nested is not None:
        raise UserError(
            f"`{field}` has parameters of their own for `{format_untrusted(nested)}` layers, which megatron-core cannot "
            "do for this family"
        )
    numbers = dict(section)
    numbers["rope_type"] = one_of({f"`type` in `{field}`": numbers.pop("type", None), "`rope_type`": section.get("rope_type")})
    kind: Any = numbers["rope_type"] or "default"
    if not isinstance(kind, str):
        raise UserError(f"the rope type in `{field}` is `{format_untrusted(kind)}`, which should be a word")
    numbers["rope_type"] = _OTHER_NAMES.get(kind, kind)
    theta = one_of({f"`rope_theta` in `{field}`": section.get("rope_theta"), "`rope_theta`": config.get("rope_theta")})
    numbers["rope_theta"] = number("rope_theta", default_theta if theta is None else theta)
    if _ORIGINAL in _KINDS.get(numbers["rope_type"], _KINDS["default"]).needs:
        numbers[_ORIGINAL] = _original_length(section, config, field)
    return numbers


_OTHER_NAMES = {"su": "longrope", "deepseek_yarn": "yarn"}
"""What earlier configurations, or those of other code, call a kind."""


def _original_length(section: Config, config: Config, field: str) -> Any:
    """Return the length of sequences before the scaling: as transformers, the present one where there is none."""
    length = one_of({f"`{_ORIGINAL}` in `{field}`": section.get(_ORIGINAL), f"`{_ORIGINAL}`": config.get(_ORIGINAL)})
    return number(_ORIGINAL, config.get("max_position_embeddings", 2048) if length is None else length)
