"""Expand `~` in the settings of a run that are paths: those of type `FilePath` or `Blend` of `trainer.config`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from formats.home import expanded

_PATHS, _BLENDS = "FilePath", "Blend"


def expand(config: Any) -> None:
    """Expand a leading `~` in every path of a run, in place. Raises UserError where there is no home directory."""
    for section in _sections(config):
        expand_section(section)


def expand_section(section: Any) -> None:
    """Expand a leading `~` in the paths of one section, such as `RunConfig.dataset`, in place."""
    for field in dataclasses.fields(section):
        value, kind = getattr(section, field.name, None), str(field.type)
        if value is not None and (_PATHS in kind or _BLENDS in kind):
            path = _expanded(value)
            if path != value:
                setattr(section, field.name, path)


def _sections(config: Any) -> Iterator[Any]:
    """Yield the sections. Frozen ones, which only code can make, are left out."""
    for field in dataclasses.fields(config):
        section = getattr(config, field.name)
        if dataclasses.is_dataclass(section) and not type(section).__dataclass_params__.frozen:  # type: ignore[attr-defined]
            yield section


def _expanded(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_expanded(path) for path in value]
    return expanded(value) if isinstance(value, str) and value.startswith("~") else value
