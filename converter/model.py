"""The few numbers about a model that its weights' arithmetic depends on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """Sizes by the names that rules use for dimensions."""

    layers: int
    hidden: int
    heads: int
    groups: int
    head_dim: int
    ffn: int
    vocab: int
    padded_vocab: int
    tied: bool
    attention_bias: bool = False
    mlp_bias: bool = False

    @property
    def queries(self) -> int:
        """Rows of the query projection, columns of the output projection."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Rows of the key projection, and of the value projection."""
        return self.groups * self.head_dim

    def size(self, dim: str) -> int:
        """A dimension by its name in a rule."""
        return int(getattr(self, dim))
