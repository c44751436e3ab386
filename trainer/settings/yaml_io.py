"""Write a run's settings as a YAML document, and read them back.

A document holds values only: no classes, no functions, no code. Settings that only Python code can make are left out, and named
in a comment. Knows YAML; names are resolved by `fields`, values by `values`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from formats.errors import UserError, format_untrusted
from formats.faults import fault, position
from trainer.settings.fields import FieldPath, annotations, field_path, is_section
from trainer.settings.groups import GROUPS, name_of
from trainer.settings.values import NotPlainError, plain

_YAML = "it should be YAML: `section:`, then `  name: value`"
_DEEPEST = 64
"""Levels of nesting: without a limit, PyYAML spends minutes on a file of opening brackets."""

_HYDRA = ("_target_", "_call_", "_partial_", "_args_", "_recursive_", "_convert_")


def dump(config: Any, *, made: Any = None) -> str:
    """Return every setting of a run as YAML, section by section, each sorted by name.

    Comments at the end name the settings that YAML cannot hold; with `made`, the configuration that this one was resolved from,
    only those that are explicit there. `load` and `apply` onto the same recipe give an equal run.
    """
    document, unnamed = as_mapping(config)
    set_by_somebody = unnamed if made is None else as_mapping(made)[1]
    return to_yaml(document) + "".join(f"# `{name}` is set in Python code\n" for name in unnamed if name in set_by_somebody)


def to_yaml(document: Mapping[str, Any]) -> str:
    """Return a document as YAML text."""
    return yaml.safe_dump(dict(document), sort_keys=False, allow_unicode=True, width=120)


def changes(config: Any, *others: Any) -> dict[str, Any]:
    """Return the settings that differ between these configurations, with the values of the first."""
    first, *others_mapped = (as_mapping(run)[0] for run in (config, *others))
    return _changes(first, others_mapped)


def _changes(mapping: Mapping[str, Any], others: list[dict[str, Any]], depth: int = 1) -> dict[str, Any]:
    """Compare sections setting by setting; a mapping inside a section is one value."""
    changed: dict[str, Any] = {}
    for key, value in mapping.items():
        theirs = [other.get(key, _ABSENT) for other in others]
        if depth and isinstance(value, dict) and all(isinstance(other, dict) for other in theirs):
            if inner := _changes(value, theirs, depth - 1):
                changed[key] = inner
        elif any(other != value for other in theirs):
            changed[key] = value
    return changed


_ABSENT = object()


def as_mapping(config: Any) -> tuple[dict[str, Any], list[str]]:
    """Return the settings as nested mappings of plain values, and the names of those that only code can make."""
    unnamed: list[str] = []
    return _section(config, "", unnamed, sort=False), unnamed


def _section(section: Any, prefix: str, unnamed: list[str], *, sort: bool = True) -> dict[str, Any]:
    names = annotations(type(section))
    mapping: dict[str, Any] = {}
    for name in sorted(names) if sort else names:
        value = getattr(section, name)
        if f"{prefix}{name}" in GROUPS:
            mapping[name] = _group(name, value, unnamed)
            continue
        if is_section(value):
            mapping[name] = _section(value, f"{prefix}{name}.", unnamed)
            continue
        try:
            mapping[name] = plain(value)
        except NotPlainError:
            unnamed.append(f"{prefix}{name}")
    return mapping


def _group(setting: str, value: Any, unnamed: list[str]) -> Any:
    """Return a config group's choice: its name and settings, or the settings alone for a class without a name."""
    name = name_of(setting, value)
    if name is None:
        unnamed.append(setting)
    if not is_section(value):
        return name
    return ({"name": name} if name else {}) | _section(value, f"{setting}.", unnamed)


def load(text: str, *, source: str = "the document") -> dict[str, Any]:
    """Parse a YAML document; an empty one gives an empty mapping.

    Raises UserError, naming `source`, for invalid YAML, a duplicate key, an alias or a merge key.
    """
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth = _check_event(event, depth)
        _check_duplicates(yaml.compose(text, Loader=yaml.SafeLoader))
        document = yaml.safe_load(text)
    except _UnsupportedError as error:
        raise UserError(f"`{source}` is not readable: {error.args[0]}", hint=_YAML) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"`{source}` is not readable: {_why(error)}", hint=_YAML) from error
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise UserError(
            f"`{source}` is `{format_untrusted(document)}`, it should be sections with settings", hint="start with `train:`"
        )
    return document


class _UnsupportedError(ValueError):
    """YAML that settings do not use."""


def _why(error: Exception) -> str:
    """Describe a parser's error; for a tag, which may name code, by its position alone."""
    if isinstance(error, yaml.constructor.ConstructorError) and error.problem_mark:
        return f"{position(error)} has a tag or a key that no setting has"
    return fault(error)


def _check_event(event: Any, depth: int) -> int:
    """Return the nesting depth after a parser's event. Refuses deep nesting, and aliases and merge keys: values that refer to
    each other can grow without end when they are written out."""
    depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
    if depth > _DEEPEST:
        raise _UnsupportedError(f"it is nested deeper than {_DEEPEST} levels")
    if isinstance(event, yaml.AliasEvent) or (isinstance(event, yaml.ScalarEvent) and event.value == "<<"):
        raise _UnsupportedError(f"line {event.start_mark.line + 1} has an alias or a merge key; write the values out")
    return depth


def _check_duplicates(node: Any) -> None:
    """Refuse a key that occurs twice in a mapping: PyYAML would silently take the last value."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_duplicates(item)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: set[str] = set()
    for key, value in node.value:
        if str(key.value) in seen:
            raise _UnsupportedError(f"line {key.start_mark.line + 1}: duplicate key `{key.value}`")
        seen.add(str(key.value))
        _check_duplicates(value)


def apply(config: Any, document: Mapping[str, Any]) -> list[str]:
    """Set what the document says. Returns the names that were ignored: Hydra's own, such as `_target_`.

    A section that is null changes nothing. A free mapping (`model.hf_config`) or a list replaces the old value as a whole. Raises
    UserError for an unknown name or a value of another type.
    """
    return _apply_section(config, document, "")


def _apply_section(config: Any, document: Mapping[str, Any], prefix: str) -> list[str]:
    ignored: list[str] = []
    for key, value in document.items():
        name = f"{prefix}{key}"
        if key in _HYDRA:
            ignored.append(name)
            continue
        path = field_path(config, name)
        if path.name in GROUPS:
            ignored += _apply_group(path, value)
        elif is_section(path.value):
            ignored += _apply_section(config, _settings(path, value), f"{path.name}.")
        else:
            path.set(_named(value))
    return ignored


def _apply_group(path: FieldPath, value: Any) -> list[str]:
    if value is None:
        return []
    ignored = [key for key in value if key in _HYDRA] if isinstance(value, Mapping) else []
    path.set({key: setting for key, setting in value.items() if key not in _HYDRA} if ignored else value)
    return [f"{path.name}.{key}" for key in ignored]


def _settings(path: FieldPath, value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {} if value is None else path.converted(value)


def _named(value: Any) -> Any:
    """Read Megatron-Bridge's spelling of a function or dtype, `{_target_: torch.bfloat16, _call_: false}`, as its name."""
    if isinstance(value, Mapping) and value.get("_call_") is False and set(value) == {"_target_", "_call_"}:
        return value["_target_"]
    return value
