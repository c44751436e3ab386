"""The folders of a run's checkpoints: which is the newest, how one gets its name, which may go. Knows nothing of what they hold.

A checkpoint is written as `iter_0000010.partial`. It gets its name when it is whole and on the disk; the trackers, which say
what to resume from, come after that. So a kill at any moment leaves the last good checkpoint as it was.
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
"""The file that says a checkpoint is one of this trainer's."""

PARTIAL = ".partial"
_RUN = re.compile(rb"# run ([0-9a-f]+)\n")
_WHOLE = re.compile(r"iter_(\d{7,})")


def latest(root: str | None) -> Path | None:
    """The iteration that a folder's tracker names; where there is no tracker yet, the newest of this trainer's: it has its name,
    so it is whole, and the run was killed right then. None where there is neither."""
    if root is None:
        return None
    if (Path(root) / TRACKER).exists():
        return Path(root) / find_iteration(LocalFolder(Path(root))).name
    return max((path for path in whole(root) if (path / OURS).is_file()), key=_number, default=None)


def new_run() -> str:
    """Return an id that no other run has."""
    return secrets.token_hex(8)


def run_of(folder: Path) -> str:
    """Return the id of the run that wrote an iteration; it stays the same when a run is resumed. Empty where none is named, as in
    checkpoints of earlier versions."""
    named = folder / OURS
    found = _RUN.match(named.read_bytes()) if named.is_file() else None
    return found[1].decode() if found else ""


def signature(run: str) -> bytes:
    """The first line of `OURS`: a comment, so that the file can be given to another run as its settings."""
    return f"# run {run}\n".encode() if run else b""


def sees(folder: Path) -> bool:
    """Is an iteration here? Its parent is listed: for that a network file system asks its server anew."""
    return folder.parent.is_dir() and folder in folder.parent.iterdir() and (folder / METADATA).is_file()


def whole(root: str | None) -> list[Path]:
    """The iterations in a folder, whoever wrote them, the oldest first."""
    inside = Path(root).iterdir() if root and Path(root).is_dir() else ()
    return sorted((path for path in inside if _number(path) >= 0), key=_number)


def is_name(name: str) -> bool:
    """Is a folder of this name an iteration?"""
    return _WHOLE.fullmatch(name) is not None


def leftovers(root: str | None) -> list[Path]:
    """What interrupted saves left in a folder."""
    return sorted(Path(root).glob(f"iter_*{PARTIAL}*")) if root and Path(root).is_dir() else []


def partial(root: Path, iteration: int) -> Path:
    """Where an iteration is written."""
    return root / (iteration_folder(iteration) + PARTIAL)


def begin(partial: Path) -> None:
    """Make the folder to write into, empty."""
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def missing_files(partial: Path) -> list[str]:
    """Return the files that an iteration's index names and that are not here, or are empty."""
    there = {path.name for path in partial.iterdir() if path.stat().st_size}
    return sorted(read_index(LocalFolder(partial)).files - there)


def commit(partial: Path, *, iteration: int) -> Path:
    """Everything is written: get it onto the disk, give it its name, and let the trackers name it."""
    target = partial.with_name(iteration_folder(iteration))
    sync_tree(partial)
    replaced = take_place(partial, target)
    if replaced:
        shutil.rmtree(replaced, ignore_errors=True)
    put(target.parent / TRAIN_STATE_TRACKER, (target / TRAIN_STATE).read_bytes())
    put(target.parent / TRACKER, str(iteration).encode())
    return target


def prune(newest: Path, *, keep: int | None) -> None:
    """Remove checkpoints of the run that wrote `newest` which are older, but for the last `keep - 1` of them."""
    number, run = _number(newest), run_of(newest)
    ours = [path for path in whole(str(newest.parent)) if _number(path) < number and _is_of(path, run)]
    for path in ours[: max(len(ours) - keep + 1, 0)] if keep else ():
        # Half removed, it must not look like a checkpoint.
        shutil.rmtree(path.rename(path.with_name(path.name + PARTIAL)))


def _is_of(path: Path, run: str) -> bool:
    return (path / OURS).is_file() and run_of(path) == run


def _number(path: Path) -> int:
    found = _WHOLE.fullmatch(path.name)
    return int(found[1]) if found else -1
