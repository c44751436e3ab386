"""Move one process's share of a plan's tensors: cut it into pieces, leave out those that are written, run the others.

Pieces are carried out by converter/run.py and hashed by converter/hashing.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from converter.conversion_plan import ConversionPlan
from converter.hashing import Hashing
from converter.journal import Finished
from converter.lanes import cut, in_lanes
from converter.plan import PIECE_AXES, PLAN_FORMAT, Piece, TensorPlan, pieces
from converter.run import PIECE_BYTES, Observer, Task, run
from converter.version import VERSION
from formats.outputs import Outputs
from formats.spec import Reader


def resumable(plan: ConversionPlan) -> dict[str, Any]:
    """Return what must be the same for another run to continue a plan: its manifest, and what the numbers of pieces mean."""
    return {
        **plan.manifest,
        "mbtools": VERSION,
        "a piece size of": PIECE_BYTES,
        "pieces cut along": PIECE_AXES,
        "a plan of format": PLAN_FORMAT,
    }


def forget(finished: Finished, plan: ConversionPlan, files: Collection[str]) -> None:
    """Drop from `finished` what was written to `files`, which are gone."""
    gone, touched = set(files), plan.writer.touched
    finished.pieces -= {
        number for number, piece in _numbered(plan.tensor_plans) if gone & touched(piece.tensor.spec.name, piece.region)
    }
    for file in gone & finished.files.keys():
        del finished.files[file]


def _numbered(tensor_plans: Sequence[TensorPlan]) -> Iterator[tuple[int, Piece]]:
    """Yield the pieces of a plan with the numbers that journals use: the same on every rank."""
    return enumerate(pieces(tensor_plans, limit=PIECE_BYTES))


class Worker:
    """Moves a `share` of a plan's tensors. `written` are the numbers of the pieces that an earlier run has written."""

    def __init__(self, plan: ConversionPlan, share: Sequence[TensorPlan], hashing: Hashing, written: Collection[int]) -> None:
        self._plan, self._hashing, self._written = plan, hashing, written
        self._share = {tensor_plan.spec.name: tensor_plan for tensor_plan in share}
        self._begun, self.reused_bytes = self._written_before()

    @property
    def remaining_bytes(self) -> int:
        """Bytes of the output that are left to write."""
        return sum(tensor_plan.spec.nbytes for tensor_plan in self._share.values()) - self.reused_bytes

    def move(
        self, reader: Reader, outputs: Outputs, *, workers: int, done: Callable[[Task], None], two_files: bool = False
    ) -> None:
        """Read, write and hash every piece that is left, on `workers` threads.

        `done` is called on these threads. With `two_files`, two files are hashed at a time where the layout allows it.
        """
        hashing, writer = self._hashing, self._plan.writer

        def stop() -> None:
            hashing.abandon()
            outputs.abandon()

        outputs.tap = hashing.tap(self._complete_files())
        observer = hashing.observing(Observer(done=done, stop=stop))
        tasks = self._in_lanes() if two_files else self._tasks()
        run(tasks, reader, writer, outputs=outputs, workers=workers, observer=observer)

    def _written_before(self) -> tuple[set[str], int]:
        """Return the tensors of this share of which an earlier run wrote some pieces, and how many bytes it wrote."""
        begun, count = set[str](), 0
        for number, piece in self._pieces() if self._written else ():
            if number in self._written:
                begun.add(piece.tensor.spec.name)
                count += piece.nbytes
        return begun, count

    def _pieces(self) -> Iterator[tuple[int, Piece]]:
        """Yield the pieces of this share with their numbers."""
        return (item for item in _numbered(self._plan.tensor_plans) if item[1].tensor.spec.name in self._share)

    def _tasks(self) -> Iterator[Task]:
        """Yield what is left to write, and pieces that are written but must be read again for the hash of a tensor."""
        for number, piece in self._pieces():
            written = number in self._written
            if not written or self._hashing.lacks(piece.tensor):
                yield Task(number, piece, written)

    def _in_lanes(self) -> Iterator[Task]:
        """Yield the tasks, alternating between two parts of the share that have no file in common, if there are such parts."""
        names = list(self._share)
        touched = [self._plan.writer.touched(name) for name in names]
        middle = cut([tensor_plan.spec.nbytes for tensor_plan in self._share.values()], touched)
        first = set(names[:middle])
        return in_lanes(self._tasks, lambda task: task.piece.tensor.spec.name in first) if middle else self._tasks()

    def _complete_files(self) -> set[str]:
        """Return the files of which this run writes every byte, so that they can be hashed as they pass."""
        others = {tensor_plan.spec.name for tensor_plan in self._plan.tensor_plans} - self._share.keys()
        touched = {file for name in self._begun | others for file in self._plan.writer.touched(name)}
        return self._plan.writer.files.keys() - touched
