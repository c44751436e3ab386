"""Translate options of other trainers into settings: `--tp 2` is `model.tensor_model_parallel_size=2`."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.settings.fields import ALIASES, every_name


def setting(option: str, words: Sequence[str]) -> str | None:
    """Return the setting to write instead of an unknown option among the `words` of a command line; None where none is
    similar."""
    name, _, value = option.lstrip("-").replace("-", "_").partition("=")
    full_name = next((full for short, full in ALIASES.items() if short.rpartition(".")[2] == name), None) or _field(name)
    return f"{full_name}={value or _value(option, words)}" if full_name else None


def _field(name: str) -> str | None:
    from trainer.config import RunConfig  # noqa: PLC0415 - brings torch
    from trainer.model import GPTModelProvider  # noqa: PLC0415

    names = every_name(RunConfig(model=GPTModelProvider()))
    return next((full for full in names if full.rpartition(".")[2] == name), None)


def _value(option: str, words: Sequence[str]) -> str:
    for word, following in zip(words, [*words[1:], ""], strict=True):
        head, equals, value = word.partition("=")
        if head == option:
            return value if equals else following or "true"
    return "…"
