"""The files of model-parallel ranks in a checkpoint of Megatron-LM: which there should be, and what each holds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple, cast

from formats.errors import UserError, format_untrusted
from formats.folder import Folder
from formats.pickles import Record
from formats.spec import is_size
from formats.torch_zip import OpenArchive

FILE, OPTIMIZER_FILE = "model_optim_rng.pt", "distrib_optim.pt"
"""What the folder of a rank holds: the second only with a distributed optimizer."""

NEMO_FILE = "model_weights.ckpt"
_FOLDER = re.compile(r"mp_rank_([0-9]{2,9})(?:_([0-9]{3,9}))?(?:_([0-9]{3,9}))?/")
_NEMO_FOLDER = re.compile(r"tp_rank_([0-9]{2,9})_pp_rank_([0-9]{3,9})/")
_NEMO_ROOTS = ("model.module.", "model.")
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
    """A rank's numbers in tensor, pipeline and expert parallelism."""

    tp: int
    pp: int
    ep: int


class RankFile(NamedTuple):
    """An opened file. `models` are the state dicts of its model chunks."""

    name: str
    archive: OpenArchive
    state: Mapping[str, Any]
    models: tuple[Mapping[str, Any], ...]

    @property
    def folder(self) -> str:
        """The folder of the rank, with its slash."""
        return self.name[: self.name.rfind("/") + 1]


def is_rank_folder(name: str) -> bool:
    """Return whether this is the name of a folder of one rank, with its slash, or of NeMo's file of the only rank."""
    return bool(_FOLDER.fullmatch(name) or _NEMO_FOLDER.fullmatch(name)) or name == NEMO_FILE


def open_ranks(folder: Folder) -> dict[Rank, RankFile]:
    """Open the file of every rank. Raises UserError for one that is missing, of another run, or not of megatron-core's models."""
    names = [name for name in folder.children() if is_rank_folder(name)]
    if names[0] == NEMO_FILE or folder.has(f"{names[0]}{NEMO_FILE}"):
        return _open_nemo(folder, names)
    first = _open(folder, names[0])
    ranks = _ranks(names, first)
    missing = [name for name in ranks if name not in names]
    if missing or len(names) != len(ranks):
        other = next((name for name in names if name not in ranks), "")
        raise UserError(
            f"`{folder.label}` should have folders of {len(ranks)} ranks: "
            + (f"`{missing[0]}` is missing" if missing else f"`{other}` is not one of them"),
            hint=f"copy the checkpoint again; `args` in `{first.name}` say how many there are"
            if args_of(first)
            else f"`{first.name}` has no `args`: the names of the folders say how many there are",
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
    ranks = (Rank(*numbers) for numbers in product(range(tp), range(pp), range(ep)))
    return {folder_of(rank, pp=pp, ep=ep): rank for rank in ranks}


def folder_of(rank: Rank, *, pp: int, ep: int) -> str:
    """Return the folder of a rank, with a slash at its end. `pp` and `ep` are the sizes of pipeline and expert parallelism.

    >>> folder_of(Rank(1, 2, 0), pp=4, ep=1)
    'mp_rank_01_002/'
    """
    return f"mp_rank_{rank.tp:02d}" + (f"_{rank.pp:03d}" if pp > 1 else "") + (f"_{rank.ep:03d}" if ep > 1 else "") + "/"


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
    tp, second, third = (1 + max(int(each[axis]) for each in numbers) for axis in range(3))
    if third == 1 and any(_LAST.fullmatch(name) for model in first.models for name in model):
        return tp, 1, second
    return tp, second, third


def _open(folder: Folder, name: str) -> RankFile:
    file = f"{name}{FILE}"
    archive, known = _archive(folder, file)
    return RankFile(file, archive, known, tuple(_models(known, file)))


def _open_nemo(folder: Folder, names: list[str]) -> dict[Rank, RankFile]:
    """Open NeMo's files of ranks, each the state dict of a model under `model.` or `model.module.`, and nothing else."""
    files: dict[Rank, RankFile] = {}
    for name in names:
        match = _NEMO_FOLDER.fullmatch(name) or _FOLDER.fullmatch(name)
        numbers = [int(number) for number in (match.groups() if match else ()) if number]
        tp, pp = (*numbers, 0, 0)[:2]
        file = name if name == NEMO_FILE else f"{name}{NEMO_FILE}"
        archive, state = _archive(folder, file)
        root = next((root for root in _NEMO_ROOTS if any(key.startswith(root) for key in state)), "")
        models = _models({"model": {key.removeprefix(root): value for key, value in state.items()}}, file)
        files[Rank(tp, pp, 0)] = RankFile(file, archive, {}, tuple(models))
    tps, pps = (1 + max(getattr(rank, word) for rank in files) for word in ("tp", "pp"))
    for rank in (Rank(tp, pp, 0) for tp in range(tps) for pp in range(pps)):
        if rank not in files:
            raise UserError(
                f"`{folder.label}` lacks the file of tensor-parallel rank {rank.tp} of {tps}, pipeline rank {rank.pp} of {pps}",
                hint="copy the checkpoint again",
            )
    return dict(sorted(files.items()))


def _archive(folder: Folder, file: str) -> tuple[OpenArchive, dict[str, Any]]:
    """Open a file and return it with its dictionary."""
    if not folder.has(file):
        raise UserError(f"`{folder.label}` has no `{file}`", hint="copy the checkpoint again")
    archive = OpenArchive.in_place(folder, file)
    state: Any = archive.pickle()
    if not isinstance(state, dict):
        raise UserError(f"`{file}` is not a dictionary", hint="the file is of another program")
    return archive, _named(cast("dict[Any, Any]", state))


def _models(state: Mapping[str, Any], file: str) -> list[Mapping[str, Any]]:
    keys = sorted((key for key in state if _MODEL.fullmatch(key)), key=lambda key: int(key[5:] or 0))
    models: list[Any] = [state[key] for key in keys]
    if not models or not all(isinstance(model, dict) for model in models):
        raise UserError(f"`{file}` has no `model`", hint="it is not a checkpoint of Megatron-LM")
    models = [_named(model) for model in models]
    if any("language_model" in name for model in models for name in model):
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
