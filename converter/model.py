"""The named sizes of a model: what the arithmetic of its weights depends on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Model:
    """Sizes by the names that rules use for dimensions, and switches that conditions ask for (`tied`, `attention_bias`).

    A family's CONFIG decides which there are. All have `layers`, `vocab` and `padded_vocab`; `queries` and `keys`, the rows of
    the query and of the key projection, follow from `heads`, `groups` and `head_dim` where they are not given.

    >>> model = Model(layers=2, heads=4, groups=2, head_dim=16)
    >>> model.queries, model.size("keys"), model.size(1)
    (64, 32, 1)
    """

    __slots__ = ("_given", "_sizes")

    def __init__(self, **sizes: Any) -> None:
        self._given: Mapping[str, Any] = sizes
        self._sizes: Mapping[str, Any] = {**_projections(sizes), **sizes}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._sizes:
            raise AttributeError(f"the family's CONFIG gives no size `{name}`")
        return self._sizes[name]

    def __repr__(self) -> str:
        return f"Model({', '.join(f'{name}={value!r}' for name, value in self._given.items())})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Model) and self._sizes == other._sizes

    def __hash__(self) -> int:
        return hash(tuple(sorted(self._sizes)))

    def __contains__(self, name: str) -> bool:
        return name in self._sizes

    def get(self, name: str, default: Any = None) -> Any:
        """Return a size or switch, or `default` where the family has none of that name."""
        return self._sizes.get(name, default)

    @property
    def megatron_layers(self) -> int:
        """The layers that Megatron counts: a HybridModel has one for each letter of its `pattern`."""
        return len(self.get("pattern", "")) or self.layers

    def size(self, dim: str | int) -> int:
        """Return a dimension by its name in a rule; a number is that number."""
        return dim if isinstance(dim, int) else int(getattr(self, dim))

    def replace(self, **sizes: Any) -> Model:
        """Return the model with other sizes."""
        return Model(**{**self._given, **sizes})


def _projections(sizes: Mapping[str, Any]) -> dict[str, int]:
    if not {"heads", "groups", "head_dim"} <= sizes.keys():
        return {}
    return {"queries": sizes["heads"] * sizes["head_dim"], "keys": sizes["groups"] * sizes["head_dim"]}
