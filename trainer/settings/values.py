"""Convert values of settings: from what YAML or a command line holds to the annotated type of a field, and back.

Knows annotations and values, not names of settings. Text is looked up in the fixed modules named here only, so that it cannot
name code to run.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin

import torch
from megatron.core import activations
from megatron.core.fusions import fused_bias_geglu
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from formats.dtypes import FLOATS
from trainer.dtypes import TORCH_DTYPES
from trainer.layers import xielu

_ACTIVATIONS = (
    torch.nn.functional,
    types.SimpleNamespace(quick_gelu=fused_bias_geglu.quick_gelu),  # megatron-core has two, and compares with this one
    activations,
    xielu,
)


class MismatchError(Exception):
    """A value does not fit an annotation; `expected` describes what would."""


class NotPlainError(Exception):
    """A value that only Python code can make: a function without a public name, or an object."""


def convert(value: Any, kind: Any) -> Any:
    """Convert a value to the annotated type `kind`. Raises MismatchError where it does not fit.

    An integer fits a float, and so does text such as `3e-4`, which YAML reads as text; enums, dtypes and activation functions are
    given by name; a list fits a tuple. Nothing else is converted.
    """
    if kind is Any:
        return value
    if (origin := get_origin(kind)) in _GENERIC:
        return _GENERIC[origin](value, get_args(kind))
    if kind in _PLAIN:
        return _PLAIN[kind](value)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return _member(value, kind)
    return _kept(value, kind if isinstance(kind, type) else ())


def _kept(value: Any, kinds: Any) -> Any:
    if not isinstance(value, kinds):
        raise MismatchError
    return value


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise MismatchError
    return _number(value, int)


def _float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise MismatchError
    return _number(value, float)


def _number(value: float | str, make: type) -> Any:
    try:
        return make(value)
    except (ValueError, OverflowError):
        raise MismatchError from None


def _dtype(value: Any) -> torch.dtype:
    if isinstance(value, torch.dtype):
        return value
    name = str(value).removeprefix("torch.")
    return _kept(TORCH_DTYPES[name] if name in FLOATS else getattr(torch, name, None), torch.dtype)


def _member(value: Any, kind: type[Enum]) -> Enum:
    if isinstance(value, kind):
        return value
    name = str(value).rpartition(".")[2]
    if name not in kind.__members__:
        raise MismatchError
    return kind[name]


def _union(value: Any, kinds: Sequence[Any]) -> Any:
    for kind in kinds:
        try:
            return convert(value, kind)
        except MismatchError:
            continue
    raise MismatchError


def _literal(value: Any, choices: Sequence[Any]) -> Any:
    for choice in choices:
        if type(choice) is type(value) and choice == value:
            return choice
    raise MismatchError


def _list(value: Any, kinds: Sequence[Any]) -> list[Any]:
    return [convert(item, kinds[0]) for item in _kept(value, (list, tuple))]


def _tuple(value: Any, kinds: Sequence[Any]) -> tuple[Any, ...]:
    items = _kept(value, (list, tuple))
    if kinds[-1:] == (...,):
        return tuple(convert(item, kinds[0]) for item in items)
    if len(items) != len(kinds):
        raise MismatchError
    return tuple(convert(item, kind) for item, kind in zip(items, kinds, strict=True))


def _dict(value: Any, kinds: Sequence[Any]) -> dict[Any, Any]:
    return {convert(key, kinds[0]): convert(item, kinds[1]) for key, item in _kept(value, Mapping).items()}


def _function(value: Any, signature: Sequence[Any]) -> Any:
    """Return an activation function by its name. No other function can be named."""
    if callable(value):
        return value
    if list(signature) != [[torch.Tensor], torch.Tensor]:
        raise MismatchError
    name = str(value).rpartition(".")[2]
    return _kept(activation(name), (types.FunctionType, types.BuiltinFunctionType))


def activation(name: str) -> Any:
    """Return a function of torch or megatron-core by its name; None for one that neither has."""
    functions = (getattr(module, name, None) for module in _ACTIVATIONS if not name.startswith("_"))
    return next((function for function in functions if function is not None), None)


_GENERIC: dict[Any, Callable[[Any, Any], Any]] = {
    Union: _union,
    types.UnionType: _union,
    Literal: _literal,
    list: _list,
    tuple: _tuple,
    dict: _dict,
    Callable: _function,
}
_PLAIN: dict[Any, Callable[[Any], Any]] = {
    bool: lambda value: _kept(value, bool),
    int: _whole,
    float: _float,
    str: lambda value: _kept(value, str),
    type(None): lambda value: _kept(value, type(None)),
    list: lambda value: list(_kept(value, (list, tuple))),
    dict: lambda value: dict(_kept(value, Mapping)),
    torch.dtype: _dtype,
    Callable: lambda value: _function(value, ()),
}
_WORDS = {
    bool: "`true` or `false`",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "null",
    list: "a list",
    dict: "a mapping",
    torch.dtype: "a dtype such as `bf16` or `float32`",
}


def expected(kind: Any) -> str:
    """Describe the values that fit an annotation."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(expected(part) for part in parts))
    if origin is Literal:
        return " or ".join(f"`{part}`" for part in parts)
    if origin in (list, tuple):
        return _expected_list(origin, parts)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return " or ".join(f"`{name}`" for name in kind.__members__)
    if list(parts) == [[torch.Tensor], torch.Tensor]:
        return "the name of a function in `torch.nn.functional`"
    return _WORDS.get(origin or kind, "an object that only Python code can make")


def _expected_list(origin: Any, parts: Sequence[Any]) -> str:
    if origin is tuple and parts[-1:] != (...,):
        return f"a list of {len(parts)}: {', '.join(expected(part) for part in parts)}"
    return "a list" if parts[0] is Any else f"a list, each {expected(parts[0])}"


def plain(value: Any) -> Any:
    """Return a value as numbers, text, lists and mappings, which `convert` turns back into it. Raises NotPlainError where it
    cannot."""
    if value is None or (isinstance(value, (bool, int, float, str)) and not isinstance(value, Enum)):
        return value
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return _name(value)


def _name(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, PipelineParallelLayerLayout):
        return plain(value.input_data)
    name = getattr(value, "__name__", "")
    if name and activation(name) is value:
        return name
    raise NotPlainError
