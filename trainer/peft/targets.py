"""Match module names with the patterns of `target_modules` and `exclude_modules`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from difflib import get_close_matches

from converter.adapters.names import fits
from formats.errors import UserError


def matching_patterns(patterns: Iterable[str], names: Sequence[str]) -> set[str]:
    """Return the patterns that match any of a module's names."""
    return {pattern for pattern in patterns if any(fits(pattern, name) for name in names)}


def targeted_names(name: str, aliases: Sequence[str], targets: Sequence[str], excluded: Sequence[str]) -> list[str]:
    """Return the aliases of a module that are targeted and not excluded; a pattern for `name` applies to all of them.

    >>> targeted_names("layers.0.linear_qkv", ("layers.0.linear_q", "layers.0.linear_k"), ["linear_qkv"], ["linear_k"])
    ['layers.0.linear_q']
    """
    if matching_patterns(excluded, [name]):
        return []
    return [alias for alias in aliases if matching_patterns(targets, [name, alias]) and not matching_patterns(excluded, [alias])]


def check_used(setting: str, patterns: Iterable[str], used: Collection[str], names: Collection[str]) -> None:
    """Raise UserError for a pattern that matches no module, with the most similar of the `names`."""
    for pattern in patterns:
        if pattern not in used:
            candidates = names if "." in pattern else {name.rpartition(".")[2] for name in names}
            near = get_close_matches(pattern, sorted(candidates), 3, cutoff=0.5)
            raise UserError(
                f"`{setting}` has `{pattern}`, which matches no module of the model",
                hint=f"did you mean {' or '.join(f'`{name}`' for name in near)}?" if near else "`*` stands for any text",
            )
