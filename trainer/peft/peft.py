"""The base class of PEFT methods: which modules a method targets, and how it changes each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

LINEARS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
"""The four linear layers of megatron-core's transformer layer."""


@dataclass(kw_only=True)
class PEFT:
    """The base of a method: a dataclass with `transform`, whose fields are settings under `peft`.

    All parameters of the model are frozen before the first call; the parameters that `transform` adds are trained. Each rank
    calls it for its own modules.
    """

    target_modules: list[str] = field(default_factory=lambda: list(LINEARS))
    """Last names of modules (`linear_qkv`), or whole names with `*` (`*.layers.0.*.linear_qkv`); layers count from 0."""

    exclude_modules: list[str] = field(default_factory=list)
    """Modules to leave unchanged although they are targeted; the same patterns."""

    def transform(self, module: torch.nn.Module, name: str) -> torch.nn.Module:
        """Return the replacement of `module`, which may be the module itself, changed. `name` is its name in the whole model.

        `trainer.peft.adapt` adds an adapter to a linear layer.
        """
        raise NotImplementedError

    def check(self) -> None:
        """Raise UserError for invalid settings, before the run starts."""

    def aliases(self, name: str) -> Sequence[str]:
        """Return the names that `target_modules` and `exclude_modules` are matched with: those of a module's parts if it has any,
        else its own."""
        return (name,)

    def rate_multiples(self) -> Mapping[str, float]:
        """Return learning-rate multiples by patterns of parameter names."""
        return {}
