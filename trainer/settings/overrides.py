"""Apply overrides from the command line, in Hydra's grammar.

`a.b=v` changes what is there, `+a.b=v` adds a key to a free mapping, `++a.b=v` does either, `~a.b` removes: a setting goes
back to its default. Hydra's own parser reads them. Config groups, sweeps and interpolations have no meaning here and are
errors, and so is every name that is not a setting.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, Sweep
from hydra.errors import HydraException

from formats.errors import UserError, format_untrusted
from trainer.settings.fields import FieldPath, field_path, fits_text, is_section
from trainer.settings.groups import GROUPS

_NEW = (OverrideType.ADD, OverrideType.FORCE_ADD)


def apply(config: Any, overrides: Iterable[str]) -> None:
    """Apply each override to `config` in turn. Raises UserError for one that cannot be parsed or does not fit."""
    parser = OverridesParser.create()
    for text in overrides:
        _apply_one(config, _parsed(parser, text), text)


def _parsed(parser: OverridesParser, text: str) -> Override:
    try:
        override = parser.parse_override(_encoded(text))
    except HydraException as error:
        raise UserError(
            f"cannot read the override `{text}`{_why(text)}",
            hint="write `section.name=value`; text with special characters goes in quotes: `'section.name=\"a=b\"'`",
        ) from error
    _check_meaning(override, text)
    return override


def _why(text: str) -> str:
    """Return the likely reason that an override cannot be parsed; empty where it is unknown."""
    key, equals, value = text.partition("=")
    if not equals:
        return ": it has no `=`"
    if not key.lstrip("+~"):
        return ": no setting is named before the `=`"
    special = next((letter for letter in _QUOTED.sub("", value) if letter in _GRAMMAR), None)
    return f": `{special}` has a meaning of its own in Hydra's grammar" if special else ""


_QUOTED = re.compile(r"""\\.|"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'""")
_GRAMMAR = "=\"'(){}[]:,$"
_FOREIGN = re.compile(_QUOTED.pattern + r"""|[^\x00-\x7f]|[~#&!;<>^`]""")
_ENCODED = re.compile(r"mbtrain_([0-9a-f]+)_letter")


def _encoded(text: str) -> str:
    """Encode the characters of an override's value that Hydra's grammar lacks, such as the `~` of a path, as words that it
    accepts. Quoted text, which may hold any character, is left as it is."""
    key, equals, value = text.partition("=")
    return key + equals + _FOREIGN.sub(lambda match: _in_letters(match[0]) if len(match[0]) == 1 else match[0], value)


def _in_letters(letter: str) -> str:
    return f"mbtrain_{ord(letter):x}_letter"


def _decoded(value: Any) -> Any:
    if isinstance(value, str):
        return _ENCODED.sub(lambda match: chr(int(match[1], 16)), value)
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    if isinstance(value, Mapping):
        return {_decoded(key): _decoded(item) for key, item in value.items()}
    return value


def _check_meaning(override: Override, text: str) -> None:
    value = override.value() if override.value_type else None
    if isinstance(value, Sweep) or override.is_sweep_override():
        shape = "" if not re.search(r"=.*,", text) else _instead_of_commas(override, text)
        raise UserError(f"`{text}` is a sweep over several values, and a run has one", hint=shape or "give one value")
    if override.package is not None or "/" in override.key_or_group:
        raise UserError(f"`{text}` chooses from a config group, and there are none", hint="write `section.name=value`")
    if "${" in text:
        raise UserError(f"`{text}` has an interpolation, which is not followed", hint="write the value itself")


def _instead_of_commas(override: Override, text: str) -> str:
    key, _, value = text.partition("=")
    return f"a list is `{key}=[{value}]`, text with commas `'{key}=\"{value}\"'`" if override.is_choice_sweep() else ""


def _apply_one(config: Any, override: Override, text: str) -> None:
    if override.type == OverrideType.DEL:
        _remove(config, override)
        return
    path = field_path(config, override.key_or_group, new=override.type in _NEW)
    value: Any = _decoded(override.value())
    if (
        override.type == OverrideType.ADD
        and path.value is not None
        and not (isinstance(value, dict) and isinstance(path.value, dict))
    ):
        raise UserError(
            f"cannot add `{path.name}`: it is there, and is `{format_untrusted(path.value)}`",
            hint=f"`{text[1:]}` changes it, `+{text}` does both",
        )
    if isinstance(value, (int, float)) and not isinstance(value, bool) and fits_text(path.kind):
        value = text.partition("=")[2].strip()  # as it was typed: 1e5, not 100000.0
    _assign(config, path, value, new=override.type in _NEW)


def _assign(config: Any, path: FieldPath, value: Any, *, new: bool) -> None:
    """Set a value. A mapping sets the keys that it names, and leaves the rest of a section or of a free mapping as it is."""
    if path.name in GROUPS or not isinstance(value, Mapping) or not (is_section(path.value) or isinstance(path.value, dict)):
        path.set(value)
        return
    for key, setting in value.items():
        _assign(config, field_path(config, f"{path.name}.{key}", new=new), setting, new=new)


def _remove(config: Any, override: Override) -> None:
    path = field_path(config, override.key_or_group)
    value = _decoded(override.value()) if override.value_type is not None else None
    if override.value_type is not None and path.converted(value) != path.value:
        raise UserError(
            f"cannot remove `{path.name}`: it is `{format_untrusted(path.value)}`, not `{format_untrusted(value)}`",
            hint=f"`~{path.name}` removes it whatever it is",
        )
    path.reset()
