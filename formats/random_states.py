"""Read the states of random number generators, in the archives that `torch_dist` has of them: one for each rank of its layout.

What is in them is left to the program that wrote them. Layout: Megatron-LM 0.19's `checkpointing.py` (`get_rng_state`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from formats.megatron_reader import MegatronReader
from formats.object_names import ObjectName
from formats.rank_files import RankFilesReader
from formats.rank_folders import RankFile
from formats.torch_dist import TorchDistReader
from formats.torch_zip import object_archive

KEY = "rng_state"
"""What Megatron-LM and megatron-core call them."""

_OBJECT = re.compile(rf"{KEY}/shard_([0-9]{{1,6}})\.([0-9]{{1,6}})_([0-9]{{1,6}})\.([0-9]{{1,6}})")


@dataclass(frozen=True, slots=True)
class RandomStates:
    """The states of all ranks, and the layout of these."""

    pp: int
    tp: int
    ep: int
    archives: Mapping[ObjectName, Callable[[], bytes]]
    """Each is read when it is called."""


def open_random_states(reader: MegatronReader) -> RandomStates | None:
    """Return the states that a checkpoint holds, None where there are none, or in a way that is not read."""
    if isinstance(reader, TorchDistReader):
        return _of_objects(reader)
    return _of_files(reader) if isinstance(reader, RankFilesReader) else None


def _of_objects(reader: TorchDistReader) -> RandomStates | None:
    layout, archives = (0, 0), dict[ObjectName, Callable[[], bytes]]()
    for name in reader.container.object_names:
        if match := _OBJECT.fullmatch(name):
            pp, tp, *sizes = map(int, match.groups())
            layout = sizes[0], sizes[1]
            archives[ObjectName(KEY, (pp, tp), layout)] = partial(_stored, reader, name)
    return RandomStates(*layout, 1, archives) if archives else None


def _stored(reader: TorchDistReader, name: str) -> bytes:
    return reader.container.archive(name).data()


def _of_files(reader: RankFilesReader) -> RandomStates | None:
    """Return the states in files of ranks; of several expert-parallel ranks those of one."""
    layout = 1 + max(rank.pp for rank in reader.ranks), 1 + max(rank.tp for rank in reader.ranks)
    if any(KEY not in file.state for file in reader.ranks.values()):
        return None
    archives = {ObjectName(KEY, (rank.pp, rank.tp), layout): partial(_archived, file) for rank, file in reader.ranks.items()}
    return RandomStates(*layout, 1 + max(rank.ep for rank in reader.ranks), archives)


def _archived(file: RankFile) -> bytes:
    return object_archive([file.archive.resolved(file.state[KEY])])
