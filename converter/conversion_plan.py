"""One conversion, planned to the last byte: what is made of what, and what an output will hold."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from converter import provenance
from converter.comparison import CheckpointView
from converter.plan import TensorPlan
from converter.ranks import Ranks
from converter.workers import check_workers
from formats import integrity
from formats.errors import UserError, is_text, printable
from formats.folder import FileRef, Folder
from formats.location import is_remote
from formats.outputs import LocalOutputs
from formats.spec import Document, Reader, TensorSpec, Writer, dtype_name

if TYPE_CHECKING:
    from formats.remote.outputs import RemoteOutputs


@dataclass(frozen=True, slots=True)
class Reporter:
    """Callbacks that report what a conversion does.

    `note` receives a sentence for a person, `start` the bytes of the stage that begins, `progress` bytes completed since its
    last call. `note` and `start` run on the thread that called the conversion. `progress` runs on the worker threads, on several
    at once: it must be safe for that and return quickly.

    >>> Reporter(note=print).note("weights are cast from fp32 to bf16")
    weights are cast from fp32 to bf16
    """

    note: Callable[[str], None] = lambda _text: None
    start: Callable[[int], None] = lambda _total: None
    progress: Callable[[int], None] = lambda _count: None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionOptions:
    """How to carry out a conversion. The bytes of the output do not depend on it."""

    workers: int | None = None
    dry_run: bool = False
    overwrite: bool = False
    resume: bool = False
    verify: bool = False
    ranks: Ranks | None = None
    """Which of several processes that share the work this is; None if it is alone."""

    def __post_init__(self) -> None:
        check_workers(self.workers)


class ExecutionArguments(TypedDict, total=False):
    """The same as keyword arguments of a conversion."""

    workers: int | None
    dry_run: bool
    overwrite: bool
    resume: bool
    verify: bool
    ranks: Ranks | None


@dataclass(frozen=True, slots=True)
class ConversionPlan:
    """Everything known before the first byte moves."""

    command: str
    source: str
    target: str
    reader: Reader
    writer: Writer
    outputs: LocalOutputs | RemoteOutputs
    tensor_plans: Sequence[TensorPlan]
    manifest: Mapping[str, Any]
    """What must be unchanged for another run to go on with this one."""

    provenance_fields: Mapping[str, Any]
    """What `conversion.json` says beside the tensors' hashes."""

    tensors: Mapping[str, TensorSpec]
    """The Hugging Face tensors: those that pass by, and are hashed, and those in `hashes` and `aliases`, if they are the
    source's."""

    passing: Literal["read", "made"]
    """Do they pass as the source's, or as the output's?"""

    views: Callable[[Folder], tuple[CheckpointView, CheckpointView]]
    """The source and a written output, as `verify` compares them."""

    hashes: Mapping[str, str] = field(default_factory=dict[str, str])
    """Of Hugging Face tensors that do not pass by."""

    aliases: Mapping[str, str] = field(default_factory=dict[str, str])
    """Further ones, and those they equal."""

    copies: Mapping[str, FileRef] = field(default_factory=dict[str, FileRef])
    documents: Mapping[str, bytes] = field(default_factory=dict[str, bytes])
    folder: str = ""
    """Where `conversion.json` and `integrity.json` lie."""

    integrity: bool = False
    """Is `integrity.json` written?"""

    hashed: bool = True
    """Are the Hugging Face tensors hashed? `conversion.json` lists no hashes if not."""

    memory: int = 0
    """Bytes that reading the source holds at most, beside what is read."""

    last: tuple[str, ...] = ()
    """The files that say that the output is whole, beside the writer's markers."""

    @property
    def files(self) -> dict[str, int]:
        """Every file of the output and its size in bytes. Raises UserError for a name that no index could list."""
        self._check_names()
        copied = {name: file.size for name, file in self.copies.items()}
        record = self.inside(provenance.FILE)
        sizes = {name: len(data) for name, data in {**self.documents, **self.writer.markers}.items()}
        sizes |= {name: document.size for name, document in self.writer.documents.items()}
        sizes = {**copied, **sizes, **self.writer.files, record: 0}
        sizes[record] = self.record({}, [*sizes, self.inside(integrity.FILE)] if self.integrity else sizes).size
        if self.integrity:
            unknown = {name.removeprefix(self.folder): "0" * 64 for name in self.listed(sizes)}
            sizes[self.inside(integrity.FILE)] = len(integrity.make(unknown))
        return dict(sorted(sizes.items()))

    def _check_names(self) -> None:
        for name in [*self.copies, *self.documents, *self.writer.files]:
            if not is_text(name):
                file = self.copies[name].name if name in self.copies else name.rpartition("/")[2]
                raise UserError(
                    f"the name of `{printable(file)}` is not UTF-8, so `{integrity.FILE}` could not list it",
                    hint="rename the file, or move it out of the directory",
                )

    def inside(self, name: str) -> str:
        return f"{self.folder}{name}"

    def listed(self, files: Iterable[str]) -> list[str]:
        """Those of the output's files that `integrity.json` lists: all of its folder but itself."""
        return [name for name in files if name.startswith(self.folder) and name != self.inside(integrity.FILE)]

    def record(self, hashes: Mapping[str, str], files: Iterable[str]) -> Document:
        """`conversion.json`, with the hashes there are and the names of all `files`."""

        def hash_of(name: str) -> str | None:
            known = self.aliases.get(name, name)
            return self.hashes.get(known) or hashes.get(known) or self.hashes.get(name) or hashes.get(name)

        names = {*self.tensors, *self.hashes, *self.aliases} if self.hashed else None
        return provenance.make(self.command, self.provenance_fields, names, hash_of, files=files)


@dataclass(frozen=True, slots=True)
class Summary:
    """What a conversion did, or with `dry_run` would do. Sizes in bytes; `peak_memory` is expected in a dry run;
    `reused_bytes` are those of this process's share that an interrupted run had written."""

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
    verified: bool = False
    reused_bytes: int = 0


def outputs_for(target: str, tensor_plans: Iterable[TensorPlan], options: Mapping[str, Any]) -> LocalOutputs | RemoteOutputs:
    """Where a conversion writes: up to a URL, or into a directory until it is whole."""
    if is_remote(target):
        from formats.remote.outputs import RemoteOutputs  # noqa: PLC0415 - the clients of object stores

        return RemoteOutputs(target)
    return LocalOutputs(partial_directory(Path(target), tensor_plans, options))


def partial_directory(target: Path, tensor_plans: Iterable[TensorPlan], options: Mapping[str, Any]) -> Path:
    """Where a conversion writes until it is whole. Named by what it makes: the same for the same plan, whoever runs it."""
    digest, tables = hashlib.sha256(json.dumps(options, sort_keys=True).encode()), dict[int, int]()
    for made in tensor_plans:
        spec, rows = made.spec, made.ranges
        if id(rows) not in tables:  # a table is the same in every layer
            tables[id(rows)] = len(tables)
            digest.update(repr(rows).encode())
        line = spec.name, spec.shape, dtype_name(spec.dtype), [part.name for part in made.parts], tables[id(rows)]
        more = (made.experts, made.transform) if made.transform else ()
        digest.update(repr((*line, *more)).encode(errors="surrogatepass"))
    return target.with_name(f"{target.name}.partial-{digest.hexdigest()[:12]}")


def manifest(command: str, options: Mapping[str, Any], files: Mapping[str, FileRef]) -> dict[str, Any]:
    """What must be the same for a run to go on with what another began."""
    versions = {f"the source's `{name}`": file.folder.version(file.name) for name, file in files.items()}
    return {"command": command, **{f"option `{name}`": value for name, value in options.items()}, **versions}
