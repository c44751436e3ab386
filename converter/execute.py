"""Carry a conversion out under the commit protocol: lock, stage, move, write documents, check, commit.

Into a directory, several ranks share the work: each moves its share of the tensors, the first alone does the rest. What
differs for an upload is in converter/execute_remote.py.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from math import prod
from pathlib import Path
from typing import Any

from converter.checks import replacement_rule
from converter.comparison import compare
from converter.conversion import Conversion, Execution
from converter.conversion_plan import partial_directory
from converter.documents import write_documents, write_markers
from converter.execution import ExecutionOptions, Reporter, Summary
from converter.hashing import Hashing
from converter.journal import Finished, Journal, distrusted_on_sync_error, distrusted_on_write_error, read_journals
from converter.memory import peak_memory, resident_memory
from converter.memory_estimate import expected_peak
from converter.plan import TensorPlan
from converter.ranks import Ranks, alone, share
from converter.run import Task
from converter.sources import changes, sources_changed, workers_for
from converter.worker import Worker, forget, resumable
from formats import integrity
from formats.disk import user_errors
from formats.errors import UserError
from formats.folder import Folder, LocalFolder
from formats.outputs import LocalOutputs
from formats.rendezvous import Rendezvous
from formats.staging import Stage, check_room, check_sizes, staged, sync_tree
from formats.target import look
from formats.urls import is_remote, without_secrets


def execute(
    conversion: Conversion, target: str, *, options: ExecutionOptions, reporter: Reporter, sources: Sequence[Folder]
) -> Summary:
    """Write the output of a conversion to `target`, or with `dry_run` return what it would be.

    The output appears complete or not at all, and not if one of the `sources` changed meanwhile.
    """
    started, reused = time.monotonic(), 0
    workers, dry_run = workers_for(options.get("workers"), sources, target), options.get("dry_run", False)
    if conversion.settle and not dry_run:
        conversion = conversion.settle(workers)
    plan, files = conversion.plan, conversion.plan.files
    if dry_run:
        _check_target(target, files, options)
    else:
        reused = _write(Execution(conversion, target, files, options, reporter, sources, workers))
        if conversion.done:
            reporter.note(conversion.done())
    return Summary(
        command=plan.provenance.command,
        source=plan.source,
        target=without_secrets(target) if is_remote(target) else target,
        dry_run=dry_run,
        tensors=len(plan.tensor_plans),
        parameters=sum(prod(tensor_plan.spec.shape) for tensor_plan in plan.tensor_plans),
        total_bytes=sum(files.values()),
        files=files,
        seconds=time.monotonic() - started,
        peak_memory=_estimate(conversion, target, workers) if dry_run else peak_memory(),
        workers=workers,
        layout=dict(plan.layout),
        verified=options.get("verify", False) and not dry_run,
        reused_bytes=reused,
    )


def _check_target(target: str, files: Mapping[str, int], options: ExecutionOptions) -> None:
    """Raise UserError if the run would not replace what is at a local target."""
    if not is_remote(target):
        look(Path(target), rule=replacement_rule(options, files))


def _estimate(conversion: Conversion, target: str, workers: int) -> int:
    return expected_peak(conversion, target, workers, planned=resident_memory(), highest=peak_memory())


def _write(execution: Execution) -> int:
    """Write the output, from the lock to the commit; return how many bytes an earlier run had written."""
    conversion, options, note = execution.conversion, execution.options, execution.reporter.note
    conversion.check()
    if is_remote(execution.target):
        from converter.execute_remote import upload  # noqa: PLC0415 - the clients of object stores

        upload(execution)
        return 0
    plan, ranks, final = conversion.plan, options.get("ranks") or alone(), Path(execution.target)
    partial = partial_directory(final, plan.tensor_plans, plan.identity)
    meeting = partial.with_name(f"{partial.name}.ranks")
    rule, resume = replacement_rule(options, execution.files), options.get("resume", False)
    with (
        user_errors(final),
        Rendezvous(meeting, ranks.rank, ranks.size, ranks.run_id, target=final, note=note) as together,
        staged(final, partial, resumable(plan), together, rule=rule, resume=resume, note=note) as stage,
    ):
        if together.is_first:
            check_room(final, sum(execution.files.values()), already=partial)
        return _Rank(execution, stage, together).write(_share(plan.tensor_plans, ranks), verify=options.get("verify", False))


def _share(tensor_plans: Sequence[TensorPlan], ranks: Ranks) -> Sequence[TensorPlan]:
    """Return the tensors that this rank moves."""
    return tensor_plans[share([tensor_plan.spec.nbytes for tensor_plan in tensor_plans], ranks.rank, ranks.size)]


class _Rank:
    """One process's steps in a staged directory, up to the commit. Made for one run."""

    def __init__(self, execution: Execution, stage: Stage, together: Rendezvous) -> None:
        self._conversion, self._plan = execution.conversion, execution.conversion.plan
        self._stage, self._together, self._files = stage, together, execution.files
        self._reporter, self._sources, self._workers = execution.reporter, execution.sources, execution.workers
        self._finished = read_journals(stage.state) if stage.resumed else Finished()

    def write(self, tensor_plans: Sequence[TensorPlan], *, verify: bool) -> int:
        """Move these tensors, meet the other ranks, check the output; the first rank also writes what is not tensors.

        Returns how many bytes an earlier run had written.
        """
        plan, stage, first = self._plan, self._stage, self._together.is_first
        with (
            closing(LocalOutputs(stage.partial, threads=self._workers)) as outputs,
            closing(Journal(stage.state, sync=outputs.sync)) as journal,
            distrusted_on_write_error(stage.state, outputs.check),
        ):
            if stage.resumed:
                self._forget_lost_files()
            hashing = Hashing(plan, self._finished, journal)
            reused = self._move(tensor_plans, outputs, hashing, journal)
            again = self._together.part(hashing.out_of_order())
            hashing.read_again(self._conversion.reader, again, workers=self._workers)
            self._gather("moved", hashing, journal)
            if first:
                hashing.files |= write_documents(self._conversion, outputs, self._files, hashing.tensors)
                journal.sync()
            self._hash_the_rest(hashing)
            self._gather_faults(hashing, journal, verify=verify)
            if first:
                write_markers(plan, outputs, self._files, hashing.files)
                outputs.sync()
                check_sizes(stage.partial, self._files)
        return reused

    def _forget_lost_files(self) -> None:
        """Get what earlier runs wrote onto the disk, and drop what was in files that are gone: a machine that goes down may
        lose a whole file. Runs before any rank writes."""
        gone: list[str] = []
        if self._together.is_first:
            with distrusted_on_sync_error(self._stage.state):
                sync_tree(self._stage.partial)
            gone = [file for file in self._plan.writer.files if not (self._stage.partial / file).is_file()]
        gone = self._broadcast("left", {"gone": gone})["gone"]
        if gone:
            forget(self._finished, self._plan, gone)

    def _move(self, tensor_plans: Sequence[TensorPlan], outputs: LocalOutputs, hashing: Hashing, journal: Journal) -> int:
        worker = Worker(self._plan, tensor_plans, hashing, self._finished.pieces)

        def done(task: Task) -> None:
            self._together.check()
            if not task.written:
                journal.piece(task.number)
                self._stage.worth_keeping = True
                self._reporter.progress(task.piece.nbytes)

        self._reporter.start(worker.remaining_bytes)
        two_files = self._plan.output.integrity
        worker.move(self._conversion.reader, outputs, workers=self._workers, done=done, two_files=two_files)
        return worker.reused_bytes

    def _gather(
        self, stage: str, hashing: Hashing, journal: Journal, more: Mapping[str, str] | None = None
    ) -> list[dict[str, Any]]:
        """Meet the other ranks. Return to the first what each sent, `more` among it, and give it all hashes."""
        journal.sync()
        self._together.arrive(stage, {"tensors": hashing.tensors, "files": hashing.files, **(more or {})})
        if not self._together.is_first:
            return []
        payloads = self._together.wait(stage)
        for payload in payloads:
            hashing.tensors |= payload["tensors"]
            hashing.files |= payload["files"]
        return payloads

    def _broadcast(self, stage: str, payload: Mapping[str, Any]) -> dict[str, Any]:
        """Return to every rank the payload of the first."""
        if self._together.is_first:
            self._together.arrive(stage, payload)
        return self._together.wait(stage, [0])[0]

    def _hash_the_rest(self, hashing: Hashing) -> None:
        """Read back, each rank some of them, the files that `integrity.json` lists and that were not hashed as they passed."""
        names = self._broadcast("readable", {"unknown": hashing.unknown(self._files)})["unknown"]
        with closing(LocalFolder(self._stage.partial)) as written:
            hashing.files |= integrity.hash_files(written, self._together.part(names), workers=self._workers)

    def _gather_faults(self, hashing: Hashing, journal: Journal, *, verify: bool) -> None:
        """Raise UserError on the first rank if a source changed while any rank read it, or the output differs from it."""
        changed = changes(self._sources)
        different = self._difference() if verify and not changed else ""
        changed = changed or changes(self._sources)
        payloads = self._gather("checked", hashing, journal, {"changed": changed, "different": different})
        changed, different = ([str(payload[what]) for payload in payloads if payload[what]] for what in ("changed", "different"))
        self._stage.spoilt = bool(changed or different)
        if changed:
            raise sources_changed(changed[0])
        if different:
            raise UserError(
                f"what is on the disk is not what was converted: {'; '.join(different)}",
                hint="nothing is left at the target; check the disk, the memory, and that no one wrote to the source",
            )

    def _difference(self) -> str:
        """Read this rank's part of the output from the disk; return how it differs from the source, or nothing."""
        sync_tree(self._stage.partial)
        self._reporter.note("reading back from the disk")
        with closing(LocalFolder(self._stage.partial / self._plan.output.folder, direct=True)) as written:
            source, output = self._conversion.views(written)
            names = set(self._together.part(sorted(source.tensor_plans.keys() | output.tensor_plans.keys())))
            source, output = source.only(names), output.only(names)
            self._reporter.start(sum(tensor_plan.spec.nbytes for tensor_plan in source.tensor_plans.values()))
            return compare(source, output, workers=self._workers, progress=self._reporter.progress).summary
