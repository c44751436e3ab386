"""The root of a Megatron checkpoint, its iterations and trackers, which all Megatron formats share.

Reading the formats is left to their readers, detection to `formats/detect.py`.
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
    """Return the iteration that the tracker of a root names, or `folder` itself if it is an iteration.

    Raises UserError for an iteration that is missing, incomplete or in another format.
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
        existing = ", ".join(name.rstrip("/") for name in folder.children() if name.startswith("iter_")) or "none"
        raise UserError(f"`{TRACKER}` says iteration {tracked}, but `{chosen}` is not there", hint=f"there are: {existing}")
    refuse_legacy(folder.below(chosen))
    if not folder.below(chosen).has(METADATA):
        raise unfinished(folder.below(chosen))
    return folder.below(chosen)


def unfinished(folder: Folder) -> UserError:
    """Return the error for an iteration that has no index."""
    return UserError(
        f"`{folder.label}` is an incomplete checkpoint: `{METADATA}` is missing",
        hint=f"use an earlier iteration; megatron-core writes `{METADATA}` last",
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
    """Return the error for an iteration in an unsupported format."""
    return UserError(
        f"`{folder.label}` is in the `{name}` format, which is not supported yet",
        hint="load it in Megatron-LM and save it with `--ckpt-format torch_dist`",
    )
