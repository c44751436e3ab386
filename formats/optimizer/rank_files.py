"""Read the optimizer state of Megatron-LM's files of ranks, in the names and shapes of the weights.

It is divided over ranks as the weights are: reading the one is reading the other at other offsets. What several ranks hold is
compared while it is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from formats.errors import UserError, format_untrusted
from formats.optimizer import rank_distributed, rank_plain
from formats.optimizer.model_space import PLAIN
from formats.optimizer.state import LOSS_SCALE, STATES, WEIGHTS_ALONE, OptimizerState
from formats.optimizer.state_locations import StateLocations, as_dict, as_sequence, optimizers_of
from formats.pickles import Record
from formats.rank_files import RankFilesReader
from formats.rank_folders import OPTIMIZER_FILE, RankFile
from formats.rank_shards import ShardedReader, Shards
from formats.spec import is_size

_LAYER_WISE = "layer_wise_optimizer_"


def read(reader: RankFilesReader) -> OptimizerState:
    """Return the state of all ranks. Raises UserError where it is missing in part, or not of one run."""
    _refuse_layer_wise(reader)
    files = list(reader.ranks.values())
    optimizers = {file.name: list(optimizers_of(file)) for file in files}
    locations = {state: StateLocations(state) for state in STATES}
    plain = any("state" in each for each in optimizers[files[0].name])
    for rank, file in reader.ranks.items():
        if plain:
            rank_plain.add(locations, file, optimizers[file.name])
        else:
            rank_distributed.add(locations, reader.folder, file, rank.ep)
    tensors = {state: held for state, of_state in locations.items() if (held := of_state.tensors(reader.weights.tensors))}
    _check_states(tensors)
    states = {state: ShardedReader(reader.folder, held) for state, held in tensors.items()}
    groups, loss_scale = _groups(files, optimizers), _loss_scale(files[0], optimizers[files[0].name])
    return OptimizerState(PLAIN if plain else OPTIMIZER_FILE, states, groups, loss_scale)


def _loss_scale(file: RankFile, optimizers: Sequence[Mapping[Any, Any]]) -> Mapping[str, Any]:
    """Return the loss scale, which all optimizers and ranks share."""
    scales = [scale for each in optimizers if (scale := as_dict(each.get(LOSS_SCALE)))]
    return file.archive.resolved(scales[0]) if scales else {}


def _check_states(tensors: Mapping[str, Mapping[str, Shards]]) -> None:
    """Raise UserError unless all states are of the same weights."""
    for state, held in tensors.items():
        for other, names in tensors.items():
            if missing := sorted(names.keys() - held.keys()):
                raise UserError(f"the optimizer has `{other}` of `{missing[0]}`, and no `{state}`", hint="a file is damaged")


def _refuse_layer_wise(reader: RankFilesReader) -> None:
    folder = next(iter(reader.ranks.values())).folder
    for name in reader.folder.below(folder.rstrip("/")).children():
        if name.startswith(_LAYER_WISE):
            raise UserError(
                f"`{folder}{name}` is of a layer-wise optimizer (Muon), whose state is not read",
                hint=WEIGHTS_ALONE,
            )


def _groups(files: Sequence[RankFile], optimizers: Mapping[str, Sequence[Mapping[Any, Any]]]) -> list[list[dict[str, Any]]]:
    """Return the hyper-parameters of the groups, which all ranks share. Raises UserError where they do not."""
    shared: list[list[dict[str, Any]]] = []
    for file in files:
        groups = [[_settings(file, each, as_dict(group)) for group in each["param_groups"]] for each in optimizers[file.name]]
        shared = shared or groups
        if difference := next(_differences(shared, groups), None):
            name, value, other = difference
            raise UserError(
                f"`{name}` of a parameter group is {format_untrusted(value)} in `{files[0].name}` and "
                f"{format_untrusted(other)} in `{file.name}`",
                hint="the files are of two runs, or of two iterations",
            )
    return shared


def _settings(file: RankFile, optimizer: Mapping[Any, Any], group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyper-parameters of a group, with `step`, which torch's Adam counts for each weight."""
    settings = {name: value for name, value in group.items() if name != "params"}
    first = next((index for index in as_sequence(group.get("params")) if is_size(index)), None)
    match as_dict(as_dict(optimizer.get("state")).get(first)).get("step"):
        case Record() as step if "step" not in settings:
            return {**settings, "step": file.archive.array(step).item()}
        case int() | float() as step if "step" not in settings:
            return {**settings, "step": step}
        case _:
            return settings


def _differences(
    first: Sequence[Sequence[Mapping[str, Any]]], other: Sequence[Sequence[Mapping[str, Any]]]
) -> Iterator[tuple[str, Any, Any]]:
    """Yield what two ranks say differently of their groups: name and both values."""
    if [len(groups) for groups in first] != [len(groups) for groups in other]:
        yield "the number", [len(groups) for groups in first], [len(groups) for groups in other]
        return
    pairs = ((a, b) for groups, others in zip(first, other, strict=True) for a, b in zip(groups, others, strict=True))
    for ours, theirs in pairs:
        for name in ours.keys() | theirs.keys():
            if ours.get(name) != theirs.get(name):
                yield name, ours.get(name), theirs.get(name)
