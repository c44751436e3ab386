"""Rules that settings must obey, as rows: is the rule broken, the message, and the hint."""

from __future__ import annotations

from collections.abc import Iterable

from formats.errors import UserError

Rule = tuple[object, str, str]
"""True where the rule is broken; the error's message; its hint."""


def enforce(rules: Iterable[Rule]) -> None:
    """Raise UserError for the first broken rule.

    Rules may come from a generator: what follows a broken rule is then not computed, and may rely on it.
    """
    for broken, message, hint in rules:
        if broken:
            raise UserError(message, hint=hint)
