"""Carry a conversion out to an object store: uploaded in parts, committed at the end.

One process does it all. Nothing of an unfinished upload can be read, so there is no journal, no `--resume` and no `--verify`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace

from converter.checks import replacement_rule
from converter.conversion import Execution
from converter.conversion_plan import ConversionPlan
from converter.documents import write_documents, write_markers
from converter.hashing import Hashing
from converter.journal import Finished
from converter.plan import TensorPlan
from converter.ranks import alone
from converter.run import Task
from converter.sources import check_unchanged
from converter.worker import Worker
from formats.errors import UserError
from formats.remote.outputs import RemoteOutputs
from formats.remote.upload import Upload
from formats.urls import without_secrets


def upload(execution: Execution) -> None:
    """Write the output to a URL. Raises UserError for more than one rank, or if a source changed meanwhile."""
    conversion, files, workers = execution.conversion, execution.files, execution.workers
    ranks = execution.options.get("ranks") or alone()
    if ranks.size > 1:
        raise UserError(
            f"`{without_secrets(execution.target)}` cannot be written by {ranks.size} processes together",
            hint="use one process, or convert to a shared file system and copy",
        )

    def done(task: Task) -> None:
        execution.reporter.progress(task.piece.nbytes)

    plan = replace(conversion.plan, tensor_plans=file_by_file(conversion.plan))
    with Upload(execution.target, rule=replacement_rule(execution.options, files)) as uploaded:
        with closing(RemoteOutputs(uploaded, plan.writer)) as outputs:
            hashing = Hashing(plan, Finished())
            worker = Worker(plan, plan.tensor_plans, hashing, ())
            execution.reporter.start(worker.remaining_bytes)
            worker.move(conversion.reader, outputs, workers=workers, done=done)
            hashing.read_again(conversion.reader, hashing.out_of_order(), workers=workers)
            hashing.files |= write_documents(conversion, outputs, files, hashing.tensors)
            check_unchanged(execution.sources)
            write_markers(plan, outputs, files, hashing.files)
        uploaded.commit(_last(plan, files), record=plan.output.record)


def _last(plan: ConversionPlan, files: Mapping[str, int]) -> list[str]:
    """Return the files that make the output readable, in the order in which they are committed."""
    named = map(plan.output.inside, plan.output.last)
    return [*(name for name in named if name in files), *plan.writer.markers]


def file_by_file(plan: ConversionPlan) -> list[TensorPlan]:
    """Return the plan's tensors in an order in which few files are open at a time: a part of each open file is in memory.

    Files that have a tensor in common (those of one pipeline rank) are filled together. Tensors that share a file keep their
    order, in which their bytes are in the file: a thread that arrives early blocks until the one before has passed.
    """
    leader: dict[str, str] = {}

    def first(file: str) -> str:
        while leader.setdefault(file, file) != file:
            file = leader[file]
        return file

    touched = [sorted(plan.writer.touched(tensor_plan.spec.name)) for tensor_plan in plan.tensor_plans]
    for files in touched:
        for file in files:
            leader[first(file)] = first(files[0])
    order: dict[str, int] = {}
    groups = [order.setdefault(first(files[0]), len(order)) if files else 0 for files in touched]
    return [tensor_plan for _, tensor_plan in sorted(zip(groups, plan.tensor_plans, strict=True), key=lambda item: item[0])]
