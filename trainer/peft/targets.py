"""Names of modules and patterns that choose from them. Knows no modules."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from difflib import get_close_matches

from converter.adapters.names import fits
from formats.errors import UserError


def chosen(patterns: Iterable[str], names: Sequence[str]) -> set[str]:
    """The patterns that fit any of a module's names."""
    return {pattern for pattern in patterns if any(fits(pattern, name) for name in names)}


def wanted(name: str, aliases: Sequence[str], targets: Sequence[str], excluded: Sequence[str]) -> list[str]:
    """Which of a module's names, of its parts or its own, are targeted and not excluded. Its own name stands for all."""
    if chosen(excluded, [name]):
        return []
    return [one for one in aliases if chosen(targets, [name, one]) and not chosen(excluded, [one])]


def check_used(setting: str, patterns: Iterable[str], used: Collection[str], names: Collection[str]) -> None:
    """UserError for a pattern that fits no module, with the nearest of the `names` there are."""
    for pattern in patterns:
        if pattern not in used:
            known = names if "." in pattern else {name.rpartition(".")[2] for name in names}
            near = get_close_matches(pattern, sorted(known), 3, cutoff=0.5)
            raise UserError(
                f"`{setting}` has `{pattern}`, and no module of the model is called so",
                hint=f"did you mean {' or '.join(f'`{one}`' for one in near)}?" if near else "`*` stands for any text",
            )
