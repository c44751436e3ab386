"""Carry a job out to an object store: uploaded in parts, committed at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from converter import provenance
from converter.conversion_plan import ConversionPlan, ExecutionOptions, Reporter
from converter.execute import rule
from converter.plan import TensorPlan
from converter.ranks import alone
from converter.worker import Worker
from formats.errors import UserError
from formats.folder import Folder
from formats.location import without_secrets
from formats.remote.outputs import RemoteOutputs
from formats.remote.upload import Upload
from formats.rendezvous import Rendezvous
from formats.staging import Stage


def upload(
    job: ConversionPlan,
    how: ExecutionOptions,
    reporter: Reporter,
    *,
    sources: Sequence[Folder],
    files: Mapping[str, int],
    workers: int,
) -> None:
    """The work of one process, with nothing that a later run could go on with."""
    outputs, ranks = job.outputs, how.ranks or alone()
    assert isinstance(outputs, RemoteOutputs)
    if ranks.size > 1:
        raise UserError(
            f"`{without_secrets(job.target)}` cannot be written by {ranks.size} processes together",
            hint="use one process, or convert to a shared file system and copy",
        )
    job = replace(job, tensor_plans=file_by_file(job))
    last = [name for name in job.last if name in files]
    with (
        TemporaryDirectory() as nowhere,
        Rendezvous(Path(nowhere, "ranks"), 0, 1, ranks.run_id, target=Path(nowhere, "upload")) as together,
        Upload(job.target, rule=rule(how, files)) as uploaded,
    ):
        outputs.open(uploaded, job.writer.files, job.writer.spans)
        stage = Stage(Path(nowhere), Path(nowhere))
        ours = Worker(job, reporter, stage, together=together, share=job.tensor_plans, workers=workers, sources=sources)
        ours.through(files, verify=False)
        uploaded.commit([*last, *job.writer.markers], record=job.inside(provenance.FILE))


def file_by_file(job: ConversionPlan) -> list[TensorPlan]:
    """What is made, ordered so that as few files as can be are open at a time: a part of each open file is held. Files that have
    a tensor in common (those of one pipeline rank) are filled together. Among tensors that share a file the order stays: its
    bytes arrive in order, and a thread that comes early waits for the one before."""
    leader: dict[str, str] = {}

    def first(file: str) -> str:
        while leader.setdefault(file, file) != file:
            file = leader[file]
        return file

    touched = [sorted(job.writer.touched(tensor_plan.spec.name)) for tensor_plan in job.tensor_plans]
    for files in touched:
        for file in files:
            leader[first(file)] = first(files[0])
    order: dict[str, int] = {}
    places = [order.setdefault(first(files[0]), len(order)) if files else 0 for files in touched]
    return [tensor_plan for _, tensor_plan in sorted(zip(places, job.tensor_plans, strict=True), key=lambda item: item[0])]
