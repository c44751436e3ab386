"""The folders of a run's checkpoints: find the newest, commit a new one, remove old ones.

A checkpoint is written as `iter_0000010.partial`. It is renamed when it is complete and on the disk, and after that the trackers,
which name the checkpoint to resume from, are replaced. So a kill at any time leaves the last good checkpoint as it was.
"""

from __future__ import annotations

import re
import secrets
import shutil
from pathlib import Path

from formats.dcp_index import METADATA, read_index
from formats.folder import LocalFolder
from formats.iterations import TRACKER, TRAIN_STATE, TRAIN_STATE_TRACKER, find_iteration, iteration_folder
from formats.staging import put, sync_tree, take_place

OURS = "mbtrain.yaml"
"""The file that marks a checkpoint as one of this trainer's."""

PARTIAL = ".partial"
_RUN = re.compile(rb"# run ([0-9a-f]+)\n")
_COMPLETE = re.compile(r"iter_(\d{7,})")


def latest(root: str | None) -> Path | None:
    """Return the iteration that a folder's tracker names, else the newest of this trainer's, None if there is neither.

    Without a tracker the run was killed between renaming the first checkpoint and writing the tracker.
    """
    if root is None:
        return None
    if (Path(root) / TRACKER).exists():
        return Path(root) / find_iteration(LocalFolder(Path(root))).name
    return max((path for path in complete(root) if (path / OURS).is_file()), key=_number, default=None)


def new_run() -> str:
    """Return an id that no other run has."""
    return secrets.token_hex(8)


def run_of(folder: Path) -> str:
    """Return the id of the run that wrote an iteration; a resumed run keeps its id. Empty in checkpoints of earlier versions."""
    marker = folder / OURS
    match = _RUN.match(marker.read_bytes()) if marker.is_file() else None
    return match[1].decode() if match else ""


def signature(run: str) -> bytes:
    """Return the first line of `OURS`: a comment, so that the file can be given to another run as its settings."""
    return f"# run {run}\n".encode() if run else b""


def sees(folder: Path) -> bool:
    """Return whether this host sees an iteration. Lists the parent folder, so that a network
    file system asks its server again."""
    return folder.parent.is_dir() and folder in folder.parent.iterdir() and (folder / METADATA).is_file()


def complete(root: str | None) -> list[Path]:
    """Return the iterations in a folder, of any run, the oldest first."""
    paths = Path(root).iterdir() if root and Path(root).is_dir() else ()
    return sorted((path for path in paths if _number(path) >= 0), key=_number)


def is_name(name: str) -> bool:
    """Return whether a folder of this name is an iteration."""
    return _COMPLETE.fullmatch(name) is not None


def leftovers(root: str | None) -> list[Path]:
    """Return the partial checkpoints that interrupted saves left in a folder."""
    return sorted(Path(root).glob(f"iter_*{PARTIAL}*")) if root and Path(root).is_dir() else []


def partial(root: Path, iteration: int) -> Path:
    """Return the folder that an iteration is written to."""
    return root / (iteration_folder(iteration) + PARTIAL)


def begin(partial: Path) -> None:
    """Make the folder to write to, empty."""
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def missing_files(partial: Path) -> list[str]:
    """Return the files that an iteration's index names and that do not exist here, or are empty."""
    existing = {path.name for path in partial.iterdir() if path.stat().st_size}
    return sorted(read_index(LocalFolder(partial)).files - existing)


def commit(partial: Path, *, iteration: int) -> Path:
    """Flush a complete checkpoint to the disk, rename it, and let the trackers name it. Return its folder."""
    target = partial.with_name(iteration_folder(iteration))
    sync_tree(partial)
    replaced = take_place(partial, target)
    if replaced:
        shutil.rmtree(replaced, ignore_errors=True)
    put(target.parent / TRAIN_STATE_TRACKER, (target / TRAIN_STATE).read_bytes())
    put(target.parent / TRACKER, str(iteration).encode())
    return target


def prune(newest: Path, *, keep: int | None) -> None:
    """Remove older checkpoints of the run that wrote `newest`, except the last `keep - 1`; None keeps all."""
    number, run = _number(newest), run_of(newest)
    older = [path for path in complete(str(newest.parent)) if _number(path) < number and _is_of(path, run)]
    for path in older[: max(len(older) - keep + 1, 0)] if keep else ():
        # A checkpoint that is partly removed must not look like a complete one.
        shutil.rmtree(path.rename(path.with_name(path.name + PARTIAL)))


def _is_of(path: Path, run: str) -> bool:
    return (path / OURS).is_file() and run_of(path) == run


def _number(path: Path) -> int:
    match = _COMPLETE.fullmatch(path.name)
    return int(match[1]) if match else -1
