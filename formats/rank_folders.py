"""The files of model-parallel ranks in a checkpoint of Megatron-LM: which there should be, and what each holds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, cast

from formats.errors import UserError, format_untrusted
from formats.folder import Folder
from formats.pickles import Record
from formats.spec import is_size
from formats.torch_zip import OpenArchive

FILE, OPTIMIZER_FILE = "model_optim_rng.pt", "distrib_optim.pt"
"""What the folder of a rank holds: the second only with a distributed optimizer."""

_FOLDER = re.compile(r"mp_rank_([0-9]{2,9})(?:_([0-9]{3,9}))?(?:_([0-9]{3,9}))?/")
_MODEL = re.compile(r"model[0-9]{0,4}")
_SIZES = {
    "tensor_model_parallel_size": "TP", "pipeline_model_parallel_size": "PP", "expert_model_parallel_size": "EP",
}  # fmt: skip
_SAME = (*_SIZES, "num_layers", "hidden_size", "num_experts", "expert_tensor_parallel_size")
"""Settings in which the files of one run agree."""


_SHARDS = {
    "tensor_model_parallel_size": "tensor_parallel_num_weight_shards",
    "expert_tensor_parallel_size": "expert_tensor_parallel_num_weight_shards",
}
_MOST_RANKS = 1 << 16

_LAST = re.compile(r"decoder\.final_(layer)?norm\..*")


@dataclass(frozen=True, slots=True, order=True)
class Rank:
    """A place in tensor, pipeline and expert parallelism."""

    tp: int
    pp: int
    ep: int


@dataclass(frozen=True, slots=True)
class RankFile:
    """An opened file. `models` are the state dicts of its model chunks."""

    name: str
    archive: OpenArchive
    state: Mapping[str, Any]
    models: tuple[Mapping[str, Any], ...]

    @property
    def folder(self) -> str:
        """The folder of the rank, with its slash."""
        return self.name.removesuffix(FILE)


def is_rank_folder(name: str) -> bool:
    """Is this the name of a folder of one rank, with its slash?"""
    return bool(_FOLDER.fullmatch(name))


def open_ranks(folder: Folder) -> dict[Rank, RankFile]:
    """Open the file of every rank. Raises UserError for one that is missing, of another run, or not of megatron-core's models."""
    names = [name for name in folder.children() if is_rank_folder(name)]
    first = _open(folder, names[0])
    ranks = _ranks(names, first)
    missing = [name for name in ranks if name not in names]
    if missing or len(names) != len(ranks):
        other = next((name for name in names if name not in ranks), "")
        raise UserError(
            f"`{folder.label}` should have folders of {len(ranks)} ranks: "
            + (f"`{missing[0]}` is missing" if missing else f"`{other}` is none of them"),
            hint=f"copy the checkpoint again; `args` in `{first.name}` say how many there are"
            if args_of(first)
            else f"`{first.name}` has no `args`: how many there are is told by the folders' names",
        )
    files = {rank: first if name == names[0] else _open(folder, name) for name, rank in ranks.items()}
    for file in files.values():
        _check_run(first, file)
    _check_experts(first)
    _check_shards(first)
    return files


def _check_experts(file: RankFile) -> None:
    """Raise UserError where experts are divided otherwise than all else: their ranks are then not those of the folders."""
    settings = args_of(file)
    tp, etp = (settings.get(name) for name in ("tensor_model_parallel_size", "expert_tensor_parallel_size"))
    if settings.get("num_experts") and etp not in (None, tp):
        raise UserError(
            f"`args` in `{file.name}` say tensor parallelism {format_untrusted(tp)} and {format_untrusted(etp)} of experts, "
            "which is not supported",
            hint="load it in Megatron-LM and save it with `--ckpt-format torch_dist`",
        )


def _check_shards(file: RankFile) -> None:
    """Raise UserError for weights that are divided further than by tensor parallelism (megatron-core's GTP)."""
    settings = args_of(file)
    for ranks, shards in _SHARDS.items():
        size, number = settings.get(ranks), settings.get(shards)
        if number is not None and size is not None and number != size:
            raise UserError(
                f"`args` in `{file.name}` say `{ranks}` {format_untrusted(size)} and `{shards}` {format_untrusted(number)}, "
                "which is not supported (GTP)",
                hint="load it in Megatron-LM and save it with `--ckpt-format torch_dist`",
            )


def _ranks(names: list[str], first: RankFile) -> dict[str, Rank]:
    """Return the folder of each rank, by the sizes in `args`; without these by the numbers in the names."""
    tp, pp, ep = _sizes(names, first)
    if tp * pp * ep > _MOST_RANKS:
        raise UserError(f"the folders of ranks should be {tp} · {pp} · {ep}, and there are {len(names)}")
    return {
        f"mp_rank_{rank.tp:02d}" + (f"_{rank.pp:03d}" if pp > 1 else "") + (f"_{rank.ep:03d}" if ep > 1 else "") + "/": rank
        for rank in (Rank(*numbers) for numbers in product(range(tp), range(pp), range(ep)))
    }


def _sizes(names: list[str], first: RankFile) -> tuple[int, int, int]:
    settings = args_of(first)
    tp, pp, ep = (settings.get(name) for name in _SIZES)
    sizes: list[Any] = [tp, pp, 1 if ep is None and tp is not None else ep]  # older ones know no expert parallelism
    if all(is_size(size) and 0 < size <= len(names) for size in sizes):
        return sizes[0], sizes[1], sizes[2]
    if settings and sizes[:2] != [None, None]:
        given = ", ".join(f"{word} {format_untrusted(size)}" for word, size in zip(_SIZES.values(), sizes, strict=True))
        raise UserError(f"`args` in `{first.name}` say {given}, and there are {len(names)} folders of ranks")
    return _sizes_of_names(names, first)


def _sizes_of_names(names: list[str], first: RankFile) -> tuple[int, int, int]:
    """Return the sizes that the names of folders count. A lone second number is of expert parallelism if the first file has the
    norm after all layers, which is in the last stage of a pipeline."""
    numbers = [match.groups(default="0") for name in names if (match := _FOLDER.fullmatch(name))]
    tp, second, third = (1 + max(int(each[place]) for each in numbers) for place in range(3))
    if third == 1 and any(_LAST.fullmatch(name) for model in first.models for name in model):
        return tp, 1, second
    return tp, second, third


def _open(folder: Folder, name: str) -> RankFile:
    file = f"{name}{FILE}"
    if not folder.has(file):
        raise UserError(f"`{folder.label}` has no `{file}`", hint="copy the checkpoint again")

    archive = open_archive(folder, file)
    state: Any = archive.pickle()
    if not isinstance(state, dict):
        raise UserError(f"`{file}` is not a dictionary", hint="the file is of another program")
    known = _named(cast("dict[Any, Any]", state))
    return RankFile(file, archive, known, tuple(_models(known, file)))


def open_archive(folder: Folder, file: str) -> OpenArchive:
    """Open a large archive that is a file of its own, of which parts are read in place."""

    def fetch(offset: int, length: int) -> bytes:
        data = bytearray(length)
        folder.read_into(file, offset, memoryview(data))
        return bytes(data)

    return OpenArchive(fetch, folder.size(file), source=file)


def _models(state: Mapping[str, Any], file: str) -> list[Mapping[str, Any]]:
    keys = sorted((key for key in state if _MODEL.fullmatch(key)), key=lambda key: int(key[5:] or 0))
    models: list[Any] = [state[key] for key in keys]
    if not models or not all(isinstance(model, dict) for model in models):
        raise UserError(f"`{file}` has no `model`", hint="it is no checkpoint of Megatron-LM")
    models = [_named(model) for model in models]
    if any(name.startswith("language_model") for model in models for name in model):
        raise UserError(
            f"`{file}` is of a model from before megatron-core (`language_model`), which is not supported",
            hint="convert it with Megatron-LM's `tools/checkpoint/convert.py --loader legacy --saver core` first",
        )
    return models


def _named(values: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the items whose keys are names: those of a damaged pickle may be anything."""
    return {key: value for key, value in values.items() if isinstance(key, str)}


def args_of(file: RankFile) -> Mapping[str, Any]:
    args = file.state.get("args")
    return args.fields if isinstance(args, Record) else {}


def _settings(file: RankFile) -> dict[str, Any]:
    return {"iteration": file.state.get("iteration"), **{name: args_of(file).get(name) for name in _SAME}}


def _check_run(first: RankFile, other: RankFile) -> None:
    """Raise UserError where two files do not agree on what run they are of."""
    ours, theirs = _settings(first), _settings(other)
    for name, value in ours.items():
        if value != theirs[name]:
            raise UserError(
                f"`{name}` is {format_untrusted(value)} in `{first.name}` and {format_untrusted(theirs[name])} in `{other.name}`",
                hint="the files are of two runs",
            )
    if len(first.models) != len(other.models):
        raise UserError(f"`{first.name}` has {len(first.models)} model chunks, `{other.name}` {len(other.models)}")
