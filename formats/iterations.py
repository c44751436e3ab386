"""The root of a Megatron checkpoint, its iterations and trackers, which all Megatron formats share.

Reading the formats is left to their readers, detection to `formats/detect.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from formats.dcp_index import METADATA
from formats.errors import UserError, format_untrusted
from formats.folder import Folder
from formats.json_objects import read_json
from formats.rank_folders import is_rank_folder

TRACKER = "latest_checkpointed_iteration.txt"
TRAIN_STATE = "train_state.pt"
TRAIN_STATE_TRACKER = f"latest_{TRAIN_STATE}"
FORMAT = "metadata.json"
COMMON = "common.pt"
TORCH_DIST, ZARR, TORCH = "torch_dist", "zarr", "torch"
"""What Megatron-LM's `--ckpt-format` calls the formats: two of `dist_checkpointing`, and files of ranks."""

FSDP_DTENSOR, TORCH_DCP = "fsdp_dtensor", "torch_dcp"
"""The same, of Megatron-FSDP and of PyTorch's FSDP2."""

WRITTEN = (TORCH_DIST, TORCH, FSDP_DTENSOR)
"""Those that are written here."""

RELEASE = "release"
"""The folder, and what the tracker says, of weights that are no step of a run."""


NEMO_SETTINGS = ("context/model.yaml", "model_config.yaml")
"""The files in which NeMo 2 and NeMo 1 describe the model."""

_NEMO = {"weights": "context/", "model_weights": NEMO_SETTINGS[1]}
"""The folders that they put weights in, and what is beside them."""


def iteration_folder(number: int) -> str:
    return f"iter_{number:07d}"


def find_iteration(folder: Folder) -> Folder:
    """Return the iteration that the tracker of a root names, or `folder` itself if it is an iteration.

    Raises UserError for an iteration that is missing, incomplete or in another format.
    """
    if backend(folder):
        return folder
    if not folder.has(TRACKER):
        if inner := nemo_weights(folder.children()):
            return _finished(folder.below(inner))
        if any(name.endswith(".distcp") for name in folder.children()):
            raise unfinished(folder)
        raise UserError(
            f"`{folder.label}` is not a Megatron checkpoint: it has neither `{TRACKER}` nor `{METADATA}`",
            hint="point at the checkpoint's root, or at one iteration in it (`iter_0000100`)",
        )
    tracked = folder.get(TRACKER).decode(errors="replace").strip()
    if not re.fullmatch(rf"\d{{1,18}}|{RELEASE}", tracked):
        raise UserError(f"`{TRACKER}` says `{tracked[:40]}`, which is not an iteration")
    chosen = tracked if tracked == RELEASE else iteration_folder(int(tracked))
    if not folder.below(chosen).children():
        existing = ", ".join(name.rstrip("/") for name in folder.children() if name.startswith("iter_")) or "none"
        raise UserError(f"`{TRACKER}` says iteration {tracked}, but `{chosen}` is not there", hint=f"there are: {existing}")
    return _finished(folder.below(chosen))


def _finished(folder: Folder) -> Folder:
    if not backend(folder):
        raise unfinished(folder)
    return folder


def nemo_weights(names: Sequence[str]) -> str:
    """Return the folder of the weights in a checkpoint of NeMo 2 or NeMo 1, by the names in it; empty for other folders.

    >>> nemo_weights(["context/", "weights/"])
    'weights'
    """
    return next((weights for weights, beside in _NEMO.items() if f"{weights}/" in names and beside in names), "")


def unfinished(folder: Folder, missing: str = METADATA) -> UserError:
    """Return the error for an iteration that lacks the file that is written last."""
    return UserError(
        f"`{folder.label}` is an incomplete checkpoint: `{missing}` is missing",
        hint=f"use an earlier iteration; megatron-core writes `{missing}` last",
    )


def backend(folder: Folder) -> str:
    """Return what Megatron calls the format of a complete iteration, `torch_dist`, `zarr` or `torch`; empty if it is none.

    Raises UserError for an iteration in another format.
    """
    if any(is_rank_folder(name) for name in folder.children()):
        return TORCH
    name = read_json(folder, FORMAT).get("sharded_backend", TORCH_DIST) if folder.has(FORMAT) else TORCH_DIST
    if name not in (TORCH_DIST, ZARR):
        raise other_format(folder, format_untrusted(name))
    return name if name == ZARR or folder.has(METADATA) else ""


def other_format(folder: Folder, name: str) -> UserError:
    """Return the error for an iteration in an unsupported format."""
    return UserError(
        f"`{folder.label}` is in the `{name}` format, which is not supported yet",
        hint="load it in Megatron-LM and save it with `--ckpt-format torch_dist`",
    )
