"""One file per model family, named after Hugging Face's `model_type`. This directory is the registry.

A family file holds `MODELS` (what it was made for, in words), `ARCHITECTURE`, `RULES` (see `converter.rules`) and `CONFIG` (see
`converter.config`), and may hold what `Family` has defaults for. docs/families.md shows how to write one.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache, partial
from importlib import import_module
from typing import Any

from converter.config import Field
from converter.config_hybrid import in_layers_of_two
from converter.hybrid import GPT, HYBRID, hybrid_rules
from converter.rules import Rule, fill, templates
from converter.unsupported_families import REASONS
from formats.errors import UserError, format_untrusted


@dataclass(frozen=True, slots=True)
class Family:
    """What a family file defines."""

    MODELS: str
    ARCHITECTURE: str
    RULES: tuple[Rule, ...]
    CONFIG: tuple[Field, ...]
    EXTRAS: tuple[str, ...] = ()
    """Templates of tensors that a source may hold beside the weights and that pass through untouched."""

    PASSTHROUGH_PREFIXES: tuple[str, ...] = ()
    """What the names of whole parts of a source begin with that pass through untouched: `vision_tower.`."""

    ROOTS: tuple[str, ...] = ()
    """What names may begin with in place of the first of these, which `RULES` and `EXTRAS` are written with. One that ends with
    the first is a prefix of all names."""

    MODULE_ROOT: str = ""
    """What the names of transformers' modules, and PEFT's with them, begin with in place of the first root. Files of models with
    towers have other names than their modules."""

    STACKED: Mapping[str, str] = field(default_factory=dict[str, str])
    """How names of weights of single experts end, and with what in its place where a source has one tensor of all experts."""

    SMALL: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What `config.json` of a small model has otherwise than a Llama's, for the tests that go through all families."""

    PROVIDER: tuple[str, ...] = ()
    """The fields of `mbtrain`'s GPTModelProvider that a model of the family sets and megatron-core does not have."""

    LAYOUTS: tuple[str, ...] = (GPT, HYBRID)
    """The layouts that its models have in Megatron (see `converter.hybrid`). `RULES` and `CONFIG` are those of the first, which
    is the default; layout `hybrid` follows from `gpt`."""

    WEIGHTS_ONLY: str = ""
    """Why `mbtrain` cannot train a model of the family. Its weights are converted all the same."""

    @property
    def trains(self) -> bool:
        """Does `mbtrain` compute what the family does?"""
        return not self.WEIGHTS_ONLY

    @property
    def layout(self) -> str:
        """The layout that `RULES` and `CONFIG` are of."""
        return self.LAYOUTS[0]

    def in_layout(self, layout: str) -> Family:
        """Return the family with the rules and fields of a layout; UserError where its models have none of that name."""
        if layout == self.layout:
            return self
        if layout not in self.LAYOUTS:
            raise UserError(
                f"models of this family ({self.MODELS}) have no layout `{layout}` in Megatron, only `{self.layout}`",
                hint="megatron-core's GPTModel cannot express them; HybridModel can",
            )
        return replace(self, RULES=hybrid_rules(self.RULES), CONFIG=(in_layers_of_two(self.CONFIG),), LAYOUTS=(layout,))

    def rooted(self, names: Container[str]) -> Family:
        """Return the family with the names that a source has: those under the first root under which it has the embedding."""
        under = (self._under(root) for root in self.ROOTS[1:])
        fitting = self if self._embedding in names else next((family for family in under if family._embedding in names), self)
        return replace(fitting, RULES=templates(fitting.RULES, partial(fitting._stacked, names))) if self.STACKED else fitting

    def as_modules(self) -> Family:
        """Return the family with the names of transformers' modules."""
        return self._under(self.MODULE_ROOT) if self.MODULE_ROOT else self

    def stacked_as(self, other: Family) -> Family:
        """Return the family with one tensor of all experts where another, of the same model, has one."""
        pairs = zip(self.RULES, other.RULES, strict=True)
        whole = (
            replace(rule, huggingface=self._whole(rule.huggingface)) if theirs.is_stacked else rule for rule, theirs in pairs
        )
        return replace(self, RULES=tuple(whole))

    def _under(self, root: str) -> Family:
        def moved(name: str) -> str:
            return _moved(name, self.ROOTS[0], root)

        return replace(self, RULES=templates(self.RULES, moved), EXTRAS=tuple(map(moved, self.EXTRAS)))

    def _stacked(self, names: Container[str], template: str) -> str:
        """Return the name of a tensor of all experts in place of a single expert's, if the first such layer has that tensor."""
        whole = self._whole(template)
        return whole if fill(whole, dict.fromkeys(("layer", "mtp", "expert"), 0)) in names else template

    def _whole(self, template: str) -> str:
        """Return the name of a tensor of all experts in place of a single expert's; others as they are."""
        endings = ((single, whole) for single, whole in self.STACKED.items() if template.endswith(single))
        return next((template.removesuffix(single) + whole for single, whole in endings), template)

    @property
    def _embedding(self) -> str:
        return next(rule.huggingface for rule in self.RULES if rule.padded)


def _moved(name: str, first: str, root: str) -> str:
    """A name under another root."""
    if root.endswith(f".{first}"):
        return root.removesuffix(first) + name
    return root + name.removeprefix(first) if name.startswith(first) else name


def names() -> list[str]:
    """Return every supported `model_type`."""
    return list(_names(*__path__))


def find(model_type: Any, layout: str | None = None) -> Family:
    """Return the family of a `model_type` in a layout, or its default one; UserError says why there is none, or lists those."""
    if isinstance(model_type, str) and model_type in REASONS and model_type not in names():
        raise UserError(
            f"`config.json` has the model type `{model_type}`, which is not supported: {REASONS[model_type]}",
            hint="`mbconvert families --all` lists the model types that are converted, and why others are not",
        )
    if model_type not in names():
        raise UserError(
            f"`config.json` has the model type `{format_untrusted(model_type)}`, which is not supported",
            hint=f"supported are: {', '.join(names())}",
        )
    family = _load(import_module(f"{__name__}.{model_type}"))
    return family.in_layout(layout) if layout else family


@cache
def _names(*folders: str) -> tuple[str, ...]:
    return tuple(sorted({module.name for module in pkgutil.iter_modules(folders)}))


@cache
def _load(module: Any) -> Family:
    return Family(**{entry.name: getattr(module, entry.name) for entry in fields(Family) if hasattr(module, entry.name)})
