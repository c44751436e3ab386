"""Carry a job out under the commit protocol: by how many processes and to where, from the lock to the commit."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from math import prod
from pathlib import Path

from converter.conversion_plan import ConversionPlan, ExecutionOptions, Reporter, Summary
from converter.memory import peak_memory, resident_memory
from converter.memory_estimate import expected_peak
from converter.ranks import alone
from converter.ranks import share as divided
from converter.sources import workers_for
from converter.worker import Worker, resumable
from formats.disk import user_errors
from formats.folder import Folder
from formats.location import is_remote, without_secrets
from formats.outputs import LocalOutputs
from formats.rendezvous import Rendezvous
from formats.replacement import Rule
from formats.staging import check_room, staged
from formats.target import look


def execute(job: ConversionPlan, how: ExecutionOptions, reporter: Reporter, *, sources: Sequence[Folder]) -> Summary:
    """Make the output, or with `dry_run` only say what it would be. The output appears whole or not at all, and not if one of
    the `sources` changed meanwhile."""
    started, files, reused = time.monotonic(), job.files, 0
    workers = workers_for(how.workers, sources, job.target)
    if not how.dry_run:
        reused = _committed(job, how, reporter, sources=sources, files=files, workers=workers)
    elif not is_remote(job.target):
        look(Path(job.target), rule=rule(how, files))
    return Summary(
        command=job.command,
        source=job.source,
        target=without_secrets(job.target) if is_remote(job.target) else job.target,
        dry_run=how.dry_run,
        tensors=len(job.tensor_plans),
        parameters=sum(prod(tensor_plan.spec.shape) for tensor_plan in job.tensor_plans),
        total_bytes=sum(files.values()),
        files=files,
        seconds=time.monotonic() - started,
        peak_memory=_expected(job, workers) if how.dry_run else peak_memory(),
        workers=workers,
        verified=how.verify and not how.dry_run,
        reused_bytes=reused,
    )


def _expected(job: ConversionPlan, workers: int) -> int:
    return expected_peak(job, workers, planned=resident_memory(), highest=peak_memory())


def rule(how: ExecutionOptions, planned: Collection[str] | None = None) -> Rule | None:
    """What this run may replace, once it is known which files it writes; None where nothing was said of replacing."""
    if not how.overwrite:
        return None
    from converter.ownership import replaceable  # noqa: PLC0415 - knows every format's names, and is seldom needed

    return replaceable(planned)


def _committed(
    job: ConversionPlan,
    how: ExecutionOptions,
    reporter: Reporter,
    *,
    sources: Sequence[Folder],
    files: Mapping[str, int],
    workers: int,
) -> int:
    """All ranks of this run, from the lock to the commit; answers how many bytes this one need not write again."""
    if not isinstance(job.outputs, LocalOutputs):
        from converter.execute_remote import upload  # noqa: PLC0415 - the clients of object stores

        upload(job, how, reporter, sources=sources, files=files, workers=workers)
        return 0
    ranks = how.ranks or alone()
    target, partial = Path(job.target), job.outputs.directory
    place = partial.with_name(f"{partial.name}.ranks")
    share = job.tensor_plans[divided([tensor_plan.spec.nbytes for tensor_plan in job.tensor_plans], ranks.rank, ranks.size)]
    with (
        user_errors(target),
        Rendezvous(place, ranks.rank, ranks.size, ranks.run_id, target=target, note=reporter.note) as together,
        staged(
            target,
            partial,
            resumable(job),
            together,
            rule=rule(how, files),
            resume=how.resume,
            note=reporter.note,
        ) as stage,
    ):
        if together.is_first:
            check_room(target, sum(files.values()), already=partial)
        ours = Worker(job, reporter, stage, together=together, share=share, workers=workers, sources=sources)
        return ours.through(files, verify=how.verify)
