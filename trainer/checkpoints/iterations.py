"""The folders of a run's checkpoints: which is the newest, how one gets its name, which may go. Knows nothing of what they hold.

A checkpoint is written as `iter_0000010.partial`. It gets its name when it is whole and on the disk; the trackers, which say
what to resume from, come after that. So a kill at any moment leaves the last good checkpoint as it was.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from formats.folder import LocalFolder
from formats.staging import put, sync_tree, take_place
from formats.torch_dist import TRACKER, TRAIN_STATE, TRAIN_STATE_TRACKER, find_iteration, iteration_folder

OURS = "mbtrain.yaml"
"""The file that says a checkpoint is one of this trainer's."""

PARTIAL = ".partial"
_WHOLE = re.compile(r"iter_(\d{7,})")


def latest(root: str | None) -> Path | None:
    """The iteration that a folder's tracker names; where there is no tracker yet, the newest of this trainer's: it has its name,
    so it is whole, and the run was killed right then. None where there is neither."""
    if root is None:
        return None
    if (Path(root) / TRACKER).exists():
        return Path(root) / find_iteration(LocalFolder(Path(root))).name
    return max((path for path in whole(root) if (path / OURS).is_file()), key=_number, default=None)


def whole(root: str | None) -> list[Path]:
    """The iterations in a folder, whoever wrote them, the oldest first."""
    inside = Path(root).iterdir() if root and Path(root).is_dir() else ()
    return sorted((path for path in inside if _number(path) >= 0), key=_number)


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
    """Remove this trainer's checkpoints that are older than `newest`, but for the last `keep - 1` of them."""
    number = _number(newest)
    ours = [path for path in whole(str(newest.parent)) if _number(path) < number and (path / OURS).is_file()]
    for path in ours[: max(len(ours) - keep + 1, 0)] if keep else ():
        # Half removed, it must not look like a checkpoint.
        shutil.rmtree(path.rename(path.with_name(path.name + PARTIAL)))


def _number(path: Path) -> int:
    found = _WHOLE.fullmatch(path.name)
    return int(found[1]) if found else -1
