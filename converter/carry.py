"""Carry a job out under the commit protocol: by how many processes and to where, from the lock to the commit."""

from __future__ import annotations

import time
from collections.abc import Mapping
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory

from converter.job import How, Job, Summary, Talk
from converter.memory import expected_peak, peak_memory
from converter.ranks import alone
from converter.ranks import share as divided
from converter.share import Share, resumable
from converter.workers import check_workers
from formats.disk import explained
from formats.errors import UserError
from formats.remote.folder import is_remote
from formats.remote.outputs import RemoteOutputs
from formats.remote.store import without_secrets
from formats.remote.upload import Upload
from formats.rendezvous import Rendezvous
from formats.staging import Stage, check_room, staged


def carry_out(job: Job, how: How, talk: Talk) -> Summary:
    """Make the output, or with `dry_run` only say what it would be. The output appears whole or not at all."""
    started, files, reused, workers = time.monotonic(), job.files, 0, check_workers(how.workers)
    if not how.dry_run:
        reused = _committed(job, how, talk, files, workers)
    return Summary(
        command=job.command,
        source=job.source,
        target=without_secrets(job.target) if is_remote(job.target) else job.target,
        dry_run=how.dry_run,
        tensors=len(job.makings),
        parameters=sum(prod(making.spec.shape) for making in job.makings),
        total_bytes=sum(files.values()),
        files=files,
        seconds=time.monotonic() - started,
        peak_memory=expected_peak(workers) + job.memory if how.dry_run else peak_memory(),
        workers=workers,
        verified=how.verify and not how.dry_run,
        reused_bytes=reused,
    )


def _committed(job: Job, how: How, talk: Talk, files: Mapping[str, int], workers: int) -> int:
    """All ranks of this run, from the lock to the commit; answers how many bytes this one need not write again."""
    if isinstance(job.outputs, RemoteOutputs):
        return _uploaded(job, how, talk, files, workers)
    ranks = how.ranks or alone()
    target, partial = Path(job.target), job.outputs.directory
    place = partial.with_name(f"{partial.name}.ranks")
    share = job.makings[divided([making.spec.nbytes for making in job.makings], ranks.rank, ranks.size)]
    with (
        explained(target),
        Rendezvous(place, ranks.rank, ranks.size, ranks.run_id, target=target, note=talk.note) as together,
        staged(
            target,
            partial,
            resumable(job),
            together,
            overwrite=how.overwrite,
            resume=how.resume,
            note=talk.note,
        ) as stage,
    ):
        if together.is_first:
            check_room(target, sum(files.values()), already=partial)
        ours = Share(job, talk, stage, together=together, share=share, workers=workers)
        return ours.through(files, verify=how.verify)


def _uploaded(job: Job, how: How, talk: Talk, files: Mapping[str, int], workers: int) -> int:
    """The same to an object store: one process, and nothing that a later run could go on with."""
    assert isinstance(job.outputs, RemoteOutputs)
    ranks = how.ranks or alone()
    if ranks.size > 1:
        raise UserError(
            f"`{without_secrets(job.target)}` cannot be written by {ranks.size} processes together",
            hint="use one process, or convert to a shared file system and copy",
        )
    last = [name for name in job.last if name in files]
    with (
        TemporaryDirectory() as nowhere,
        Rendezvous(Path(nowhere, "ranks"), 0, 1, ranks.run_id, target=Path(nowhere, "upload")) as together,
        Upload(job.target, overwrite=how.overwrite) as upload,
    ):
        job.outputs.open(upload, job.writer.files, job.writer.spans)
        stage = Stage(Path(nowhere), Path(nowhere))
        ours = Share(job, talk, stage, together=together, share=job.makings, workers=workers)
        ours.through(files, verify=False)
        upload.commit([*last, *job.writer.markers])
    return 0
