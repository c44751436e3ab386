"""The protocol that every reader of a Megatron checkpoint follows, whatever the checkpoint's format.

`formats/detect.py` chooses the reader; nothing else needs to know its class.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

from formats.chunks import Chunk
from formats.folder import FileRef, Folder
from formats.spec import Reader


class MegatronReader(Reader, Protocol):
    """An opened iteration. `specs` are its weights, one name per layer. Methods may be called from several threads."""

    settings: FileRef | None
    """NeMo's description of the model; None in checkpoints of other programs."""

    @property
    def folder(self) -> Folder:
        """The iteration's folder, also where the checkpoint's root was opened."""
        ...

    @property
    def files(self) -> Collection[str]:
        """The files that hold tensors and objects, relative to `folder`."""
        ...

    @property
    def index_files(self) -> Collection[str]:
        """The files that say what is stored where, relative to `folder`."""
        ...

    @property
    def others(self) -> Sequence[str]:
        """Names of the tensors that are not weights: optimizer state, random number generators, …"""
        ...

    @property
    def has_optimizer(self) -> bool: ...

    @property
    def contents(self) -> Collection[str]:
        """The first words of the names of everything that is no weight: `rng_state`, `opt_param_scheduler`, `args`, …"""
        ...

    def args(self) -> Mapping[str, Any]:
        """Return Megatron-LM's command line, empty where the checkpoint has none. Classes are inert records."""
        ...

    def common_state(self) -> Mapping[str, Any]:
        """Return what the trainer saved beside the tensors (`args`, `iteration`, …). Classes are inert records."""
        ...

    def check(self, names: Iterable[str] | None = None) -> None:
        """Raise UserError if chunks of these weights (default: all) are missing, overlap or run past their files.

        Reads no data.
        """
        ...

    def chunks(self, name: str) -> Sequence[Chunk]:
        """Return the chunks that hold a weight. Where layers are stacked, those that hold its layer."""
        ...
