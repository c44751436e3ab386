"""Name the settings that megatron-core's assertions are about.

The setting behind an assertion is found by repeating the call with each changed setting reset to its default. megatron-core's own
message follows the hint; its text is stable, since the version is pinned.
"""

from __future__ import annotations

import copy
import dataclasses
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from formats.errors import UserError, format_untrusted
from formats.faults import code_location, fault
from trainer.settings.values import NotPlainError, plain

REFUSALS = (
    ValueError, AssertionError, RuntimeError, ImportError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError,
    NotImplementedError,
)  # fmt: skip
"""Exceptions that megatron-core and torch raise for settings that do not work together."""

_SHAPE = ("num_layers", "hidden_size", "num_attention_heads", "vocab_size")


@contextmanager
def user_errors(name: str, part: Any, attempt: Callable[[Any], object]) -> Iterator[None]:
    """Turn what megatron-core raises inside this context into a UserError that names settings of `part`, the section `name`.

    `attempt` repeats the failing call with a changed copy of `part`.
    """
    try:
        yield
    except REFUSALS as error:
        if _has_user_code(error):
            raise
        raise refusal(name, part, attempt, error) from error


@contextmanager
def user_errors_in_first_step() -> Iterator[None]:
    """Turn an assertion of megatron-core in a model's first step into a UserError: it is about a setting that nothing checked
    before. Other exceptions, such as out of memory or a fault in a user's own code, pass unchanged."""
    try:
        yield
    except (AssertionError, ValueError, NotImplementedError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        if "/megatron/core/" not in frames[-1].filename or _has_user_code(error):
            raise
        raise UserError(
            "megatron-core refuses settings of this run in its first step",
            hint=f"compare them with the recipe's: `mbtrain show`\n\n{_megatron_message(error)}",
        ) from error


def _has_user_code(error: Exception) -> bool:
    """Tell whether code of the user's own is in the traceback, which must then stay visible."""
    known_folders = (str(Path(__file__).parents[2]), *sysconfig.get_paths().values())
    tests = str(Path(__file__).parents[2] / "tests")
    files = {frame.filename for frame in traceback.extract_tb(error.__traceback__)}
    return any(name.startswith((tests, "<")) or not name.startswith(known_folders) for name in files)


def refusal(name: str, part: Any, attempt: Callable[[Any], object], error: Exception) -> UserError:
    """Return the UserError for settings with which `attempt` fails with `error`."""
    culprits = {f"{name}.{field}": value for field, value in _culprits(part, attempt).items()}
    listed = " and ".join(f"`{setting}={as_text(value)}`" for setting, value in list(culprits.items())[:4])
    if not culprits:
        message, hint = f"megatron-core refuses the settings under `{name}`", "compare them with a recipe's: `mbtrain show`"
    elif len(culprits) == 1:
        message, hint = f"megatron-core refuses {listed}", f"leave `{next(iter(culprits))}` out, or change what it depends on"
    else:
        message, hint = f"megatron-core refuses {listed} together", "leave one of them out"
    return UserError(message, hint=f"{hint}\n\n{_megatron_message(error)}")


def as_text(value: Any) -> str:
    """Format a setting's value as in a YAML file."""
    try:
        return format_untrusted(plain(value))
    except NotPlainError:
        return format_untrusted(value)


def _megatron_message(error: Exception) -> str:
    try:
        program = f"megatron-core {version('megatron-core')}"
    except PackageNotFoundError:
        program = "megatron-core"
    location = code_location(error.__traceback__)
    words = str(error).strip().partition("\n")[0][:300] or fault(error)
    return f"{program} says{f' ({location})' if location else ''}: {words}"


def _culprits(part: Any, attempt: Callable[[Any], object]) -> dict[str, Any]:
    """Return the settings whose reset to the default makes `attempt` succeed, each by itself."""
    return {name: value for name, value in _changed(part).items() if _works(part, {name: default_of(part, name)}, attempt)}


def _changed(part: Any) -> dict[str, Any]:
    if not dataclasses.is_dataclass(part):
        return {}
    fields = (field for field in dataclasses.fields(part) if field.init and field.name[0] != "_" and field.name not in _SHAPE)
    values = ((field.name, getattr(part, field.name, None)) for field in fields)
    return {name: value for name, value in values if _differs(value, default_of(part, name))}


def _differs(value: Any, default: Any) -> bool:
    return default is not dataclasses.MISSING and bool(value != default)


def default_of(part: Any, name: str) -> Any:
    """Return a field's default, of a dataclass or an instance."""
    field = next(field for field in dataclasses.fields(part) if field.name == name)
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _works(part: Any, changes: Mapping[str, Any], attempt: Callable[[Any], object]) -> bool:
    candidate = copy.copy(part)
    for name, value in changes.items():
        setattr(candidate, name, value)
    try:
        attempt(candidate)
    except REFUSALS:
        return False
    return True
