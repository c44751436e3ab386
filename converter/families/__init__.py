"""One file per model family, named after Hugging Face's `model_type`. This directory is the registry.

A family file holds `RULES` (see `converter.rules`), `CONFIG` (see `converter.config`), `EXTRAS` (templates of tensors
that a source may hold beside the weights and that travel untouched) and `MODELS` (what it was made for, in words).
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import Any, Protocol, cast

from converter.config import Field
from converter.rules import Rule
from formats.errors import UserError, format_untrusted


class Family(Protocol):
    """What a family file defines."""

    MODELS: str
    ARCHITECTURE: str
    RULES: tuple[Rule, ...]
    CONFIG: tuple[Field, ...]
    EXTRAS: tuple[str, ...]


def names() -> list[str]:
    """Every supported `model_type`."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find(model_type: Any) -> Family:
    """The family of a `model_type`; UserError lists those there are."""
    if model_type not in names():
        raise UserError(
            f"`config.json` has the model type `{format_untrusted(model_type)}`, which is not supported",
            hint=f"supported are: {', '.join(names())}",
        )
    return cast("Family", import_module(f"{__name__}.{model_type}"))
