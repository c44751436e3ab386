"""A way to train few parameters: which modules it changes, and what it makes of each. Knows no particular way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

LINEARS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
"""megatron-core's four linear layers of a transformer layer."""


@dataclass(kw_only=True)
class PEFT:
    """Make a method of your own from this: a dataclass with `transform`. Its fields are settings under `peft`.

    Every parameter of the model is frozen before the first call; what `transform` adds is trained. All ranks call it for the
    modules they hold.
    """

    target_modules: list[str] = field(default_factory=lambda: list(LINEARS))
    """Last names of modules (`linear_qkv`), or whole names with `*` (`*.layers.0.*.linear_qkv`); layers count from 0."""

    exclude_modules: list[str] = field(default_factory=list)
    """The same for modules that are left alone all the same."""

    def transform(self, module: torch.nn.Module, name: str) -> torch.nn.Module:
        """What takes the place of `module`, whose name over all pipeline stages is `name`; it may be the same, changed.

        `trainer.peft.adapter_layer.adapt` adds to a linear layer what sees its input and its output.
        """
        raise NotImplementedError

    def check(self) -> None:
        """UserError for settings that cannot work, before anything starts."""

    def aliases(self, name: str) -> Sequence[str]:
        """What `target_modules` and `exclude_modules` choose from: the names of a module's parts, where it has any; else its
        own."""
        return (name,)

    def rate_multiples(self) -> Mapping[str, float]:
        """By patterns of parameters' names: how many times the learning rate of the others they have."""
        return {}
