"""One rank's share of a job: moved, hashed as it passes, written down as it is done, read back.

What lies beside the tensors is the first rank's; the others wait for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
from blake3 import blake3

from converter import provenance
from converter.comparison import compare
from converter.conversion_plan import ConversionPlan, Reporter
from converter.journal import Finished, Journal, doubted_if_lost, doubted_if_lost_on_the_way, read_journals
from converter.lanes import cut, in_lanes
from converter.plan import PIECE_AXES, PLAN_FORMAT, Piece, TensorPlan, pieces
from converter.run import PIECE_BYTES, Observer, Task, in_threads, run
from converter.sources import changes, sources_changed
from converter.version import VERSION
from formats import integrity
from formats.arrays import as_bytes, offset_of
from formats.errors import UserError
from formats.folder import Folder, LocalFolder
from formats.in_order import InOrder
from formats.integrity import Hash
from formats.outputs import LocalOutputs
from formats.rendezvous import Rendezvous
from formats.spec import Array, Document, Span, extent
from formats.staging import Stage, check_sizes, sync_tree


def resumable(job: ConversionPlan) -> dict[str, Any]:
    """What must be the same for another run to go on with this one: numbers of pieces must mean the same, too."""
    return {
        **job.manifest,
        "mbtools": VERSION,
        "a piece size of": PIECE_BYTES,
        "pieces cut along": PIECE_AXES,
        "a plan of format": PLAN_FORMAT,
    }


class Worker:
    """See the module. Made for one run."""

    def __init__(
        self,
        job: ConversionPlan,
        reporter: Reporter,
        stage: Stage,
        *,
        together: Rendezvous,
        share: Sequence[TensorPlan],
        workers: int,
        sources: Sequence[Folder],
    ) -> None:
        self._job, self._reporter, self._stage, self._together = job, reporter, stage, together
        self._workers, self._sources = workers, sources
        self._share = {tensor_plan.spec.name: tensor_plan for tensor_plan in share}
        self._before = read_journals(stage.state) if stage.resumed else Finished()
        self._hashes = Finished(tensors=dict(self._before.tensors), files=dict(self._before.files))
        self._tensors = InOrder(self._tensor_span, lambda _: blake3(), self._tensor_passed)
        self._contents = InOrder(job.writer.spans, lambda _: hashlib.sha256(), self._file_passed)

    def through(self, files: Mapping[str, int], *, verify: bool) -> int:
        """Everything up to the commit. The first rank does alone what lies beside the tensors, the others wait for it."""
        together, outputs, state = self._together, self._job.outputs, self._stage.state
        with (
            closing(outputs),
            closing(Journal(state, sync=outputs.sync)) as self._journal,
            doubted_if_lost_on_the_way(state, outputs.check),
        ):
            if self._stage.resumed:
                self._go_on()
            reused = self._move()
            self._hash_again(together.part(self._out_of_order()))
            self._gather("moved")
            if together.is_first:
                self._write_around(files)
            [said] = self._announced("readable", {"unknown": self._unknown(files)})
            self._hashes.files |= self._read_back(together.part(said["unknown"]))
            changed = changes(self._sources)
            different = self._compared() if verify and not changed else ""
            changed = changed or changes(self._sources)
            found = self._gather("checked", {"changed": changed, "different": different})
            if together.is_first:
                self._refuse(found)
                self._write_markers(files)
        return reused

    def _go_on(self) -> None:
        """Before anyone writes: get what earlier runs wrote onto the disk, and forget what lay in files that are gone, as
        a machine that goes down may lose a whole one."""
        gone: list[str] = []
        if self._together.is_first:
            with doubted_if_lost(self._stage.state):
                sync_tree(self._stage.partial)
            gone = [file for file in self._job.writer.files if not (self._stage.partial / file).is_file()]
        [left] = self._announced("left", {"gone": gone})
        if left["gone"]:
            self._forget(set(left["gone"]))

    def _forget(self, gone: set[str]) -> None:
        before, touched = self._before, self._job.writer.touched
        before.pieces -= {number for number, piece in self._numbered() if gone & touched(piece.tensor.spec.name, piece.region)}
        for file in gone & before.files.keys():
            del before.files[file], self._hashes.files[file]

    def _gather(self, stage: str, more: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
        """Meet the other ranks: the first learns all hashes, and what each has found."""
        self._journal.sync()
        self._together.arrive(stage, {"tensors": self._hashes.tensors, "files": self._hashes.files, **(more or {})})
        if not self._together.is_first:
            return []
        said = self._together.wait(stage)
        for one in said:
            self._hashes.tensors |= one["tensors"]
            self._hashes.files |= one["files"]
        return said

    def _announced(self, stage: str, payload: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What the first rank says, to all."""
        if self._together.is_first:
            self._together.arrive(stage, payload)
        return self._together.wait(stage, [0])

    def _move(self) -> int:
        job = self._job
        begun, reused = self._written_before()
        self._reporter.start(sum(tensor_plan.spec.nbytes for tensor_plan in self._share.values()) - reused)
        if job.integrity:
            live = self._all_ours(begun)
            job.outputs.tap = lambda file, offset, data: self._contents.put(file, offset, data) if file in live else None
        watch = Observer(done=self._done, stop=self._stop)
        if job.hashed:
            as_read = job.passing == "read"
            watch = replace(watch, read=self._look_at_read) if as_read else replace(watch, made=self._look_at_made)
        run(self._in_lanes(), job.reader, job.writer, workers=self._workers, watch=watch)
        return reused

    def _out_of_order(self) -> list[str]:
        """The source's tensors whose bytes do not pass in order, so that they are hashed by reading them once more."""
        if not self._job.hashed or self._job.passing != "read":
            return []
        plans = self._job.tensor_plans
        return sorted({name for tensor_plan in plans if not tensor_plan.reads_in_order for name in tensor_plan.sources})

    def _hash_again(self, names: Sequence[str]) -> None:
        """Hash source tensors, each from its first byte to its last on one thread."""
        left = [name for name in names if name not in self._before.tensors]
        in_threads(left, lambda: self._hash_one, workers=self._workers)

    def _hash_one(self, name: str) -> None:
        spec, digest = self._job.tensors[name], blake3()
        for piece in pieces([TensorPlan(spec)], limit=PIECE_BYTES):
            data = np.empty(extent(piece.region), spec.dtype)
            self._job.reader.read(name, piece.region, data)
            digest.update(as_bytes(data))
        self._tensor_passed(name, digest)

    def _written_before(self) -> tuple[set[str], int]:
        """Our tensors of which an earlier run wrote some, and how many bytes it wrote."""
        begun, count = set[str](), 0
        for number, piece in self._pieces() if self._before.pieces else ():
            if number in self._before.pieces:
                begun.add(piece.tensor.spec.name)
                count += piece.nbytes
        return begun, count

    def _numbered(self) -> Iterator[tuple[int, Piece]]:
        """The pieces of all ranks, as all number them."""
        return enumerate(pieces(self._job.tensor_plans, limit=PIECE_BYTES))

    def _pieces(self) -> Iterator[tuple[int, Piece]]:
        """Our pieces."""
        return (one for one in self._numbered() if one[1].tensor.spec.name in self._share)

    def _tasks(self) -> Iterator[Task]:
        """What is left to write; and what is written already, where the hash of a tensor needs it once more."""
        for number, piece in self._pieces():
            written = number in self._before.pieces
            if not written or not self._before.tensors.keys() >= self._passing(piece.tensor):
                yield Task(number, piece, written)

    def _in_lanes(self) -> Iterator[Task]:
        """The tasks; where files are hashed, two files' at a time if the layout allows."""
        names = list(self._share)
        hashed = self._job.integrity and isinstance(self._job.outputs, LocalOutputs)  # an upload has as few files open as can be
        touched = [self._job.writer.touched(name) for name in names] if hashed else []
        place = cut([tensor_plan.spec.nbytes for tensor_plan in self._share.values()], touched) if touched else None
        first = set(names[:place])
        return in_lanes(self._tasks, lambda task: task.piece.tensor.spec.name in first) if place else self._tasks()

    def _passing(self, tensor_plan: TensorPlan) -> set[str]:
        """The Hugging Face tensors that pass by with a tensor, to be hashed."""
        if not self._job.hashed:
            return set()
        if self._job.passing == "read":
            return set(tensor_plan.sources) if tensor_plan.reads_in_order else set()
        return {tensor_plan.spec.name}

    def _all_ours(self, begun: set[str]) -> set[str]:
        """Files of which this run writes all, so that they can be hashed as they pass; `begun` are tensors of which an
        earlier one wrote some."""
        others = {tensor_plan.spec.name for tensor_plan in self._job.tensor_plans} - self._share.keys()
        return self._job.writer.files.keys() - {file for name in begun | others for file in self._job.writer.touched(name)}

    def _tensor_span(self, name: str) -> Iterator[Span]:
        yield Span(0, None, self._job.tensors[name].nbytes)

    def _look_at_read(self, name: str, offset: int, data: memoryview) -> None:
        if name not in self._before.tensors:
            self._tensors.put(name, offset, data)

    def _look_at_made(self, piece: Piece, data: Array) -> None:
        spec = piece.tensor.spec
        self._look_at_read(spec.name, offset_of(piece.region, spec.shape) * spec.dtype.itemsize, as_bytes(data))

    def _tensor_passed(self, name: str, digest: blake3) -> None:
        self._hashes.tensors[name] = digest.hexdigest()
        self._journal.tensor(name, digest.hexdigest())

    def _file_passed(self, name: str, digest: Hash) -> None:
        self._hashes.files[name] = digest.hexdigest()
        self._journal.file(name, digest.hexdigest())

    def _done(self, task: Task) -> None:
        self._together.check()
        if not task.written:
            self._journal.piece(task.number)
            self._stage.worth_keeping = True
            self._reporter.progress(task.piece.nbytes)

    def _stop(self) -> None:
        self._tensors.abandon()
        self._contents.abandon()
        self._job.outputs.abandon()

    def _write_around(self, files: Mapping[str, int]) -> None:
        """What lies around the data, copies, and documents."""
        job = self._job
        for file in job.writer.files:
            for span in job.writer.spans(file):
                if span.known:
                    job.outputs.put(file, span.start, span.known)
        for name, file in job.copies.items():
            self._write_in_order(name, file.size, file.bands())
        for name, data in job.documents.items():
            self._put(name, Document.of(data))
        self._put(job.inside(provenance.FILE), job.record(self._hashes.tensors, files))
        for name, document in job.writer.documents.items():
            self._put(name, document)
        self._journal.sync()

    def _write_markers(self, files: Mapping[str, int]) -> None:
        """The hashes of all, and last what makes the output readable."""
        job = self._job
        if job.integrity:
            hashes = {name.removeprefix(job.folder): self._hashes.files[name] for name in job.listed(files)}
            self._put(job.inside(integrity.FILE), Document.of(integrity.make(hashes)))
        for name, data in job.writer.markers.items():
            self._put(name, Document.of(data))
        job.outputs.sync()
        if isinstance(job.outputs, LocalOutputs):
            check_sizes(self._stage.partial, files)

    def _put(self, name: str, document: Document) -> None:
        self._write_in_order(name, document.size, document.blocks())

    def _write_in_order(self, name: str, size: int, blocks: Iterable[bytes | memoryview]) -> None:
        digest, at = hashlib.sha256(), 0
        self._job.outputs.begin(name, size)
        for block in blocks:
            digest.update(block)
            self._job.outputs.put(name, at, block)
            at += len(block)
        self._hashes.files[name] = digest.hexdigest()

    def _unknown(self, files: Mapping[str, int]) -> list[str]:
        """Files of the iteration folder that were not hashed as they passed."""
        if not self._job.integrity:
            return []
        return [name for name in self._job.listed(files) if name not in self._hashes.files]

    def _read_back(self, names: Sequence[str]) -> dict[str, str]:
        with closing(LocalFolder(self._stage.partial)) as written:
            return integrity.hash_files(written, names, workers=self._workers)

    def _compared(self) -> str:
        """How our part of what lies on the disk differs from the source, if it does."""
        sync_tree(self._stage.partial)
        self._reporter.note("reading back from the disk")
        with closing(LocalFolder(self._stage.partial / self._job.folder, direct=True)) as written:
            one, other = self._job.views(written)
            names = set(self._together.part(sorted(one.tensor_plans.keys() | other.tensor_plans.keys())))
            one, other = one.only(names), other.only(names)
            self._reporter.start(sum(tensor_plan.spec.nbytes for tensor_plan in one.tensor_plans.values()))
            return compare(one, other, workers=self._workers, progress=self._reporter.progress).summary

    def _refuse(self, said: Sequence[Mapping[str, Any]]) -> None:
        """Raise UserError if a source changed while a rank read it, or a rank found the output different."""
        changed, different = ([str(one[what]) for one in said if one[what]] for what in ("changed", "different"))
        self._stage.spoilt = bool(changed or different)
        if changed:
            raise sources_changed(changed[0])
        if different:
            raise UserError(
                f"what lies on the disk is not what was converted: {'; '.join(different)}",
                hint="nothing is left at the target; check the disk, the memory, and that no one wrote to the source",
            )
