"""Overrides from the command line, in Hydra's grammar and with its meaning.

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
from trainer.settings.groups import CHOICES

_NEW = (OverrideType.ADD, OverrideType.FORCE_ADD)


def apply(config: Any, overrides: Iterable[str]) -> None:
    """Change `config` by each override in turn. UserError for one that cannot be read or does not fit."""
    parser = OverridesParser.create()
    for text in overrides:
        _apply_one(config, _parsed(parser, text), text)


def _parsed(parser: OverridesParser, text: str) -> Override:
    try:
        found = parser.parse_override(_spelled(text))
    except HydraException as error:
        raise UserError(
            f"cannot read the override `{text}`{_why(text)}",
            hint="write `section.name=value`; text with special characters goes in quotes: `'section.name=\"a=b\"'`",
        ) from error
    _check_meaning(found, text)
    return found


def _why(text: str) -> str:
    """The commonest reasons; where it is another, the hint must do."""
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
_SPELLED = re.compile(r"mbtrain_([0-9a-f]+)_letter")


def _spelled(text: str) -> str:
    """The override with each letter of its value that Hydra's grammar has not, such as the `~` of a path, spelled in letters
    that it has. Quoted text, in which all letters may stand, stays."""
    key, equals, value = text.partition("=")
    return key + equals + _FOREIGN.sub(lambda found: _in_letters(found[0]) if len(found[0]) == 1 else found[0], value)


def _in_letters(letter: str) -> str:
    return f"mbtrain_{ord(letter):x}_letter"


def _unspelled(value: Any) -> Any:
    if isinstance(value, str):
        return _SPELLED.sub(lambda found: chr(int(found[1], 16)), value)
    if isinstance(value, list):
        return [_unspelled(one) for one in value]
    if isinstance(value, Mapping):
        return {_unspelled(key): _unspelled(one) for key, one in value.items()}
    return value


def _check_meaning(found: Override, text: str) -> None:
    value = found.value() if found.value_type else None
    if isinstance(value, Sweep) or found.is_sweep_override():
        shape = "" if not re.search(r"=.*,", text) else _instead_of_commas(found, text)
        raise UserError(f"`{text}` is a sweep over several values, and a run has one", hint=shape or "give one value")
    if found.package is not None or "/" in found.key_or_group:
        raise UserError(f"`{text}` chooses from a config group, and there are none", hint="write `section.name=value`")
    if "${" in text:
        raise UserError(f"`{text}` has an interpolation, which is not followed", hint="write the value itself")


def _instead_of_commas(found: Override, text: str) -> str:
    key, _, value = text.partition("=")
    return f"a list is `{key}=[{value}]`, text with commas `'{key}=\"{value}\"'`" if found.is_choice_sweep() else ""


def _apply_one(config: Any, found: Override, text: str) -> None:
    if found.type == OverrideType.DEL:
        _remove(config, found)
        return
    here = field_path(config, found.key_or_group, new=found.type in _NEW)
    value: Any = _unspelled(found.value())
    if (
        found.type == OverrideType.ADD
        and here.value is not None
        and not (isinstance(value, dict) and isinstance(here.value, dict))
    ):
        raise UserError(
            f"cannot add `{here.name}`: it is there, and is `{format_untrusted(here.value)}`",
            hint=f"`{text[1:]}` changes it, `+{text}` does both",
        )
    if isinstance(value, (int, float)) and not isinstance(value, bool) and fits_text(here.kind):
        value = text.partition("=")[2].strip()  # as it was written: 1e5, not 100000.0
    _assign(config, here, value, new=found.type in _NEW)


def _assign(config: Any, here: FieldPath, value: Any, *, new: bool) -> None:
    """A mapping changes what it names, and leaves the rest of a section or of a free mapping as it is."""
    if here.name in CHOICES or not isinstance(value, Mapping) or not (is_section(here.value) or isinstance(here.value, dict)):
        here.put(value)
        return
    for key, one in value.items():
        _assign(config, field_path(config, f"{here.name}.{key}", new=new), one, new=new)


def _remove(config: Any, found: Override) -> None:
    here = field_path(config, found.key_or_group)
    value = _unspelled(found.value()) if found.value_type is not None else None
    if found.value_type is not None and here.fitting(value) != here.value:
        raise UserError(
            f"cannot remove `{here.name}`: it is `{format_untrusted(here.value)}`, not `{format_untrusted(value)}`",
            hint=f"`~{here.name}` removes it whatever it is",
        )
    here.reset()
