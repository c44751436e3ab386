"""One conversion, planned to the last byte; and carrying it out under the commit protocol."""

from __future__ import annotations

import hashlib
import json
import resource
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from converter.carried import copy_file
from converter.memory import expected_peak, peak_memory
from converter.plan import Making
from converter.run import DEFAULT_WORKERS, run
from formats.errors import UserError
from formats.spec import Reader, Writer
from formats.staging import check_room, staged


@dataclass(frozen=True, slots=True)
class Talk:
    """Where a conversion says what it does: notes for a person, the bytes ahead, and bytes done."""

    note: Callable[[str], None] = lambda _text: None
    start: Callable[[int], None] = lambda _total: None
    progress: Callable[[int], None] = lambda _count: None


@dataclass(frozen=True, slots=True)
class Job:
    """Everything known before the first byte moves. `partial` is where the writer writes; `copies` and `documents` are
    the files beside the weights, by relative path."""

    command: str
    source: Path
    target: Path
    reader: Reader
    writer: Writer
    makings: Sequence[Making]
    partial: Path
    copies: Mapping[str, Path] = field(default_factory=dict[str, Path])
    documents: Mapping[str, bytes] = field(default_factory=dict[str, bytes])

    @property
    def files(self) -> dict[str, int]:
        """Every file of the output and its size in bytes."""
        copied = {name: path.stat().st_size for name, path in self.copies.items()}
        written = {name: len(data) for name, data in self.documents.items()}
        return dict(sorted({**copied, **written, **self.writer.files}.items()))


@dataclass(frozen=True, slots=True)
class Summary:
    """What a conversion did, or with `dry_run` would do. Sizes in bytes; `peak_memory` is expected in a dry run."""

    command: str
    source: str
    target: str
    dry_run: bool
    tensors: int
    parameters: int
    total_bytes: int
    files: dict[str, int]
    seconds: float
    peak_memory: int
    workers: int


def partial_directory(target: Path, makings: Iterable[Making], options: Mapping[str, Any]) -> Path:
    """Where a conversion writes until it is whole. Named by what it makes: the same for the same plan, whoever runs it."""
    plan = [[m.spec.name, m.spec.shape, str(m.spec.dtype), [(c.source, c.there) for c in m.copies]] for m in makings]
    digest = hashlib.sha256(json.dumps([plan, options], sort_keys=True).encode()).hexdigest()
    return target.with_name(f"{target.name}.partial-{digest[:12]}")


def carry_out(job: Job, *, workers: int | None, dry_run: bool, overwrite: bool, talk: Talk) -> Summary:
    """Make the output, or with `dry_run` only say what it would be. The output appears whole or not at all."""
    started, workers, files = time.monotonic(), workers or DEFAULT_WORKERS, job.files
    if not dry_run:
        check_room(job.target, sum(files.values()))
        _allow_many_files()
        talk.start(sum(making.spec.nbytes for making in job.makings))
        with (
            staged(job.target, job.partial, overwrite=overwrite),
            closing(job.writer),
        ):
            _write(job, files, workers, talk)
    return Summary(
        command=job.command,
        source=str(job.source),
        target=str(job.target),
        dry_run=dry_run,
        tensors=len(job.makings),
        parameters=sum(prod(making.spec.shape) for making in job.makings),
        total_bytes=sum(files.values()),
        files=files,
        seconds=time.monotonic() - started,
        peak_memory=expected_peak(workers) if dry_run else peak_memory(),
        workers=workers,
    )


def _write(job: Job, files: Mapping[str, int], workers: int, talk: Talk) -> None:
    for name in files:
        (job.partial / name).parent.mkdir(parents=True, exist_ok=True)
    run(job.makings, job.reader, job.writer, workers=workers, progress=talk.progress)
    for name, source in job.copies.items():
        copy_file(source, job.partial / name)
    for name, data in job.documents.items():
        (job.partial / name).write_bytes(data)
    job.writer.finish()
    for name, size in files.items():
        found = (job.partial / name).stat().st_size
        if found != size:
            raise UserError(f"`{name}` came out with {found} bytes, planned were {size}", hint="did a source change meanwhile?")


def _allow_many_files() -> None:
    """A checkpoint of hundreds of ranks has hundreds of files open at once."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
