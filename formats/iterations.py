"""A checkpoint's root, its iterations and trackers, as every Megatron format lays them out.

The formats themselves are read elsewhere; what they are is found by `formats/detect.py`.
"""

from __future__ import annotations

import re

from formats.dcp_index import METADATA
from formats.errors import UserError, format_untrusted
from formats.folder import Folder
from formats.json_objects import read_json

TRACKER = "latest_checkpointed_iteration.txt"
TRAIN_STATE = "train_state.pt"
TRAIN_STATE_TRACKER = f"latest_{TRAIN_STATE}"
FORMAT = "metadata.json"
COMMON = "common.pt"

_LEGACY_RANK = re.compile(r"mp_rank_\d+(_\d+)*/")


def iteration_folder(number: int) -> str:
    return f"iter_{number:07d}"


def find_iteration(folder: Folder) -> Folder:
    """The iteration folder that a root's tracker chooses, or the one given.

    Raises UserError for what is not there, not complete, or another format.
    """
    refuse_legacy(folder)
    if folder.has(METADATA):
        return folder
    if not folder.has(TRACKER):
        if any(name.endswith(".distcp") for name in folder.children()):
            raise unfinished(folder)
        raise UserError(
            f"`{folder.label}` is not a Megatron checkpoint: it has neither `{TRACKER}` nor `{METADATA}`",
            hint="point at the checkpoint's root, or at one iteration in it (`iter_0000100`)",
        )
    tracked = folder.get(TRACKER).decode(errors="replace").strip()
    if not re.fullmatch(r"\d{1,18}|release", tracked):
        raise UserError(f"`{TRACKER}` says `{tracked[:40]}`, which is not an iteration")
    chosen = tracked if tracked == "release" else iteration_folder(int(tracked))
    if not folder.below(chosen).children():
        there = ", ".join(name.rstrip("/") for name in folder.children() if name.startswith("iter_")) or "none"
        raise UserError(f"`{TRACKER}` says iteration {tracked}, but `{chosen}` is not there", hint=f"there are: {there}")
    refuse_legacy(folder.below(chosen))
    if not folder.below(chosen).has(METADATA):
        raise unfinished(folder.below(chosen))
    return folder.below(chosen)


def unfinished(folder: Folder) -> UserError:
    """The error for an iteration that has no index."""
    return UserError(
        f"`{folder.label}` has no `{METADATA}`: its saving never finished",
        hint="use an earlier iteration; `.metadata` is what megatron-core writes last",
    )


def refuse_legacy(folder: Folder) -> None:
    """Raise UserError for an iteration in one of Megatron's other formats."""
    if any(_LEGACY_RANK.fullmatch(name) for name in folder.children()):
        raise UserError(
            f"`{folder.label}` is in Megatron's legacy `mp_rank_*` format, which is not supported yet",
            hint="load it in Megatron-LM and save it with `--ckpt-format torch_dist`",
        )
    backend = read_json(folder, FORMAT).get("sharded_backend", "torch_dist") if folder.has(FORMAT) else "torch_dist"
    if backend != "torch_dist":
        raise other_format(folder, format_untrusted(backend))


def other_format(folder: Folder, name: str) -> UserError:
    """The error for an iteration in the format of that name."""
    return UserError(
        f"`{folder.label}` is in the `{name}` format, which is not supported yet",
        hint="load it in Megatron-LM and save it with `--ckpt-format torch_dist`",
    )
