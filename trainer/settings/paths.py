"""The settings of a run that are paths, by their type: `FilePath` and `Blend` of `trainer.config`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from formats.home import expanded

_PATHS, _BLENDS = "FilePath", "Blend"
_OF_MEGATRON = ("config_logger_dir",)
"""Paths among megatron-core's settings, which are plain text there."""


def expand(config: Any) -> None:
    """Change every path of a run that begins with `~` into one in the home directory. UserError where there is none."""
    for section in _sections(config):
        expand_section(section)


def expand_section(section: Any) -> None:
    """The same for one part of a run, such as `RunConfig.dataset`."""
    for field in dataclasses.fields(section):
        value, kind = getattr(section, field.name, None), str(field.type)
        if value is not None and (_PATHS in kind or _BLENDS in kind or field.name in _OF_MEGATRON):
            path = _expanded(value)
            if path != value:
                setattr(section, field.name, path)


def _sections(config: Any) -> Iterator[Any]:
    """The parts that have fields; frozen ones, which only code can make, stay as they are."""
    for field in dataclasses.fields(config):
        section = getattr(config, field.name)
        if dataclasses.is_dataclass(section) and not type(section).__dataclass_params__.frozen:  # type: ignore[attr-defined]
            yield section


def _expanded(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_expanded(path) for path in value]
    return expanded(value) if isinstance(value, str) and value.startswith("~") else value
