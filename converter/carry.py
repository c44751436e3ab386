"""Carry a job out under the commit protocol: move, hash what passes, write down what is done, read back, commit."""

from __future__ import annotations

import hashlib
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from math import prod

from blake3 import blake3

from converter import provenance
from converter.job import How, Job, Summary, Talk
from converter.journal import Finished, Journal, read_journals
from converter.memory import expected_peak, peak_memory
from converter.plan import Making, Piece, pieces
from converter.run import DEFAULT_WORKERS, PIECE_BYTES, Task, Watch, run
from converter.verify import compare
from formats import integrity
from formats.arrays import as_bytes
from formats.errors import TransientError, UserError
from formats.folder import FileIn, LocalFolder
from formats.in_order import InOrder
from formats.integrity import Hash
from formats.spec import Array, Span
from formats.staging import Stage, check_room, staged, sync_tree


def carry_out(job: Job, how: How, talk: Talk) -> Summary:
    """Make the output, or with `dry_run` only say what it would be. The output appears whole or not at all."""
    started, files, reused, workers = time.monotonic(), job.files, 0, how.workers or DEFAULT_WORKERS
    if not how.dry_run:
        _allow_many_files()
        with staged(job.target, job.partial, job.manifest, overwrite=how.overwrite, resume=how.resume) as stage:
            check_room(job.target, sum(files.values()), already=job.partial)
            reused = _kept(stage, talk, _Carrying(job, how, talk, stage, files).through)
    return Summary(
        command=job.command,
        source=job.source,
        target=str(job.target),
        dry_run=how.dry_run,
        tensors=len(job.makings),
        parameters=sum(prod(making.spec.shape) for making in job.makings),
        total_bytes=sum(files.values()),
        files=files,
        seconds=time.monotonic() - started,
        peak_memory=expected_peak(workers) if how.dry_run else peak_memory(),
        workers=workers,
        verified=how.verify and not how.dry_run,
        reused_bytes=reused,
    )


def _kept(stage: Stage, talk: Talk, act: Callable[[], int]) -> int:
    """Act, and when that fails say what stays: nothing, if what failed would fail again."""
    try:
        return act()
    except BaseException as error:
        if isinstance(error, UserError) and not isinstance(error, TransientError):
            stage.worth_keeping = False
        if stage.worth_keeping:
            talk.note(f"`{stage.partial}` keeps what is done: the same command with `--resume` finishes it")
        raise


class _Carrying:
    """One run of a job."""

    def __init__(self, job: Job, how: How, talk: Talk, stage: Stage, files: Mapping[str, int]) -> None:
        self._job, self._how, self._talk, self._stage, self._files = job, how, talk, stage, files
        self._workers = how.workers or DEFAULT_WORKERS
        self._before = read_journals(stage.state) if stage.resumed else Finished()
        self._hashes = Finished(tensors=dict(self._before.tensors), files=dict(self._before.files))
        self._tensors = InOrder(self._tensor_span, lambda _: blake3(), self._tensor_passed)
        self._contents = InOrder(job.writer.spans, lambda _: hashlib.sha256(), self._file_passed)

    def through(self) -> int:
        """Everything up to the commit; answers how many bytes an earlier run had written."""
        with closing(Journal(self._stage.state, sync=self._job.outputs.sync)) as self._journal, closing(self._job.outputs):
            reused = self._move()
            self._write_known()
            self._write_beside()
        self._check_sizes()
        if self._how.verify:
            self._verify()
        return reused

    def _move(self) -> int:
        job = self._job
        reused = sum(piece.nbytes for number, piece in self._pieces() if number in self._before.pieces)
        self._talk.start(sum(making.spec.nbytes for making in job.makings) - reused)
        if job.integrity:
            live = self._never_begun()
            job.outputs.tap = lambda file, offset, data: self._contents.put(file, offset, data) if file in live else None
        look = {job.passing: self._look_at_read if job.passing == "read" else self._look_at_made}
        watch = Watch(**look, done=self._done, stop=self._stop)  # pyright: ignore[reportArgumentType]
        run(self._tasks(), job.reader, job.writer, workers=self._workers, watch=watch)
        return reused

    def _pieces(self) -> Iterator[tuple[int, Piece]]:
        return enumerate(pieces(self._job.makings, limit=PIECE_BYTES))

    def _tasks(self) -> Iterator[Task]:
        """What is left to write; and what is written already, where the hash of a tensor needs it once more."""
        for number, piece in self._pieces():
            written = number in self._before.pieces
            if not written or not self._before.tensors.keys() >= self._passing(piece.making):
                yield Task(number, piece, written)

    def _passing(self, making: Making) -> set[str]:
        """The Hugging Face tensors that pass by with a tensor."""
        return {copy.source for copy in making.copies} if self._job.passing == "read" else {making.spec.name}

    def _never_begun(self) -> set[str]:
        """Files of which nothing is written yet: they can be hashed as they are."""
        begun = {piece.making.spec.name for number, piece in self._pieces() if number in self._before.pieces}
        return self._job.writer.files.keys() - {file for name in begun for file in self._job.writer.touched(name)}

    def _tensor_span(self, name: str) -> Iterator[Span]:
        yield Span(0, None, self._job.tensors[name].nbytes)

    def _look_at_read(self, name: str, offset: int, data: memoryview) -> None:
        if name not in self._before.tensors:
            self._tensors.put(name, offset, data)

    def _look_at_made(self, piece: Piece, data: Array) -> None:
        row_bytes = data.nbytes // max(len(data), 1)
        self._look_at_read(piece.making.spec.name, piece.rows.start * row_bytes, as_bytes(data))

    def _tensor_passed(self, name: str, digest: blake3) -> None:
        self._hashes.tensors[name] = digest.hexdigest()
        self._journal.tensor(name, digest.hexdigest())

    def _file_passed(self, name: str, digest: Hash) -> None:
        self._hashes.files[name] = digest.hexdigest()
        self._journal.file(name, digest.hexdigest())

    def _done(self, task: Task) -> None:
        if not task.written:
            self._journal.piece(task.number)
            self._stage.worth_keeping = True
            self._talk.progress(task.piece.nbytes)

    def _stop(self) -> None:
        self._tensors.abandon()
        self._contents.abandon()

    def _write_known(self) -> None:
        """What lies around the data."""
        for file in self._job.writer.files:
            for span in self._job.writer.spans(file):
                if span.known:
                    self._job.outputs.put(file, span.start, span.known)

    def _write_beside(self) -> None:
        """Copies, documents, then the hashes of all, and last what makes the output readable."""
        job = self._job
        for name, file in job.copies.items():
            self._copy(name, file)
        record = {job.inside(provenance.FILE): job.record(self._hashes.tensors)}
        for name, data in {**job.documents, **record, **job.writer.documents}.items():
            self._put(name, data)
        if job.integrity:
            self._put(job.inside(integrity.FILE), integrity.make(self._hashes_inside()))
        for name, data in job.writer.markers.items():
            self._put(name, data)

    def _copy(self, name: str, file: FileIn) -> None:
        digest, at = hashlib.sha256(), 0
        self._job.outputs.put(name, 0, b"")
        for band in file.bands():
            digest.update(band)
            self._job.outputs.put(name, at, band)
            at += len(band)
        self._hashes.files[name] = digest.hexdigest()

    def _put(self, name: str, data: bytes) -> None:
        self._job.outputs.put(name, 0, data)
        self._hashes.files[name] = hashlib.sha256(data).hexdigest()

    def _hashes_inside(self) -> dict[str, str]:
        """The sha256 of every file of the iteration folder; those not hashed as they passed are read back."""
        folder = LocalFolder(self._stage.partial)
        inside = [name for name in self._files if name.startswith(self._job.folder) and not name.endswith(integrity.FILE)]
        unknown = [name for name in inside if name not in self._hashes.files]
        found = integrity.hash_files(folder, unknown, workers=self._workers)
        return {name.removeprefix(self._job.folder): {**self._hashes.files, **found}[name] for name in inside}

    def _check_sizes(self) -> None:
        for name, size in self._files.items():
            found = (self._stage.partial / name).stat().st_size
            if found != size:
                hint = "did a source change meanwhile?"
                raise UserError(f"`{name}` came out with {found} bytes, planned were {size}", hint=hint)

    def _verify(self) -> None:
        """Compare what lies on the disk with the source; where they differ nothing is kept."""
        sync_tree(self._stage.partial)
        written = LocalFolder(self._stage.partial, direct=True)
        one, other = self._job.sides(written)
        self._talk.note("reading back from the disk")
        self._talk.start(sum(making.spec.nbytes for making in one.makings.values()))
        report = compare(one, other, workers=self._workers, progress=self._talk.progress)
        if not report.same:
            raise UserError(
                f"what lies on the disk is not what was converted: {report.summary}",
                hint="nothing is left at the target; check the disk, the memory, and that no one wrote to the source",
            )


def _allow_many_files() -> None:
    """A checkpoint of hundreds of ranks has hundreds of files open at once."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
