"""Types that the dataset builders share: a stream of samples, held-out sets, and the datasets of the three splits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch.utils.data import Dataset

type HeldOut = Dataset | dict[str, Dataset]
"""One dataset, or several by name; each of several is evaluated by itself."""

type Splits = tuple[Dataset | None, HeldOut | None, HeldOut | None]
"""Train, validation and test."""


class SampleStream(Protocol):
    """Samples by number. Sample `i` is the same whatever the number of samples that is read."""

    def take(self, samples: int) -> Any:
        """Set the length to `samples`."""
        ...

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return sample `index`."""
        ...

    def fingerprint(self) -> str:
        """Return a hash of the data; `trainer.data.consistency` compares it among ranks."""
        ...
