"""A conversion as plain data: which tensors are made of which, every file of the output, and what `conversion.json` will say.

A plan has no target and opens nothing. It is carried out by converter/execute.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from converter import provenance
from converter.plan import TensorPlan
from converter.provenance import Provenance
from formats import integrity
from formats.errors import UserError, is_text, printable
from formats.folder import FileRef
from formats.outputs import Writer
from formats.spec import dtype_name


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputFiles:
    """Every file of an output. Names of `documents`, `copied` and `last` are relative to `folder`."""

    writer: Writer
    """The layout of the files that hold tensors, and their metadata."""

    documents: Mapping[str, bytes] = field(default_factory=dict[str, bytes])
    copied: Mapping[str, int] = field(default_factory=dict[str, int])
    """Side files of the source that are copied as they are, and their sizes in bytes."""

    folder: str = ""
    """The folder of the side files in the output, with a slash at its end: an iteration, or empty for the output itself."""

    integrity: bool = False
    """Whether `integrity.json` lists the sha256 of every file of `folder`."""

    last: tuple[str, ...] = ()
    """The files that make the output readable, beside the writer's markers: an upload commits them last."""

    def __post_init__(self) -> None:
        for name in [*self.documents, *self.writer.files]:
            check_name(name.rpartition("/")[2], name)

    @property
    def record(self) -> str:
        """The path of `conversion.json`."""
        return self.inside(provenance.FILE)

    def inside(self, name: str) -> str:
        """Return the path in the output of a name in `folder`."""
        return f"{self.folder}{name}"

    def listed(self, files: Iterable[str]) -> list[str]:
        """Return those of the output's files that `integrity.json` lists: all in `folder` but itself."""
        return [name for name in files if name.startswith(self.folder) and name != self.inside(integrity.FILE)]

    def sizes(self, record: Provenance) -> dict[str, int]:
        """Return every file of the output and its size in bytes."""
        sizes = {self.inside(name): size for name, size in self.copied.items()}
        sizes |= {self.inside(name): len(data) for name, data in self.documents.items()}
        sizes |= {name: len(data) for name, data in self.writer.markers.items()}
        sizes |= {name: document.size for name, document in self.writer.documents.items()}
        sizes |= {**self.writer.files, self.record: 0}
        index = self.inside(integrity.FILE)
        sizes[self.record] = record.document({}, [*sizes, index] if self.integrity else sizes).size
        if self.integrity:
            unknown = {name.removeprefix(self.folder): "0" * 64 for name in self.listed(sizes)}
            sizes[index] = len(integrity.make(unknown))
        return dict(sorted(sizes.items()))


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionPlan:
    """Everything known of a conversion before the first byte moves."""

    source: str
    """The source's name for people."""

    tensor_plans: Sequence[TensorPlan]
    """The tensors of the output, in the order in which their data is in its files."""

    output: OutputFiles
    provenance: Provenance
    manifest: Mapping[str, Any]
    """What must be unchanged for another run to continue this one."""

    identity: Mapping[str, Any]
    """The options that name the partial directory, beside the tensors."""

    layout: Mapping[str, int] = field(default_factory=dict[str, int])
    """Of a Megatron checkpoint: the parallel sizes it is laid out for."""

    @property
    def writer(self) -> Writer:
        """The layout of the files that hold tensors."""
        return self.output.writer

    @property
    def files(self) -> dict[str, int]:
        """Every file of the output and its size in bytes. Computed on each call."""
        return self.output.sizes(self.provenance)


def check_name(name: str, path: str) -> None:
    """Raise UserError if no index could list the file `name`, whose path in the output is `path`."""
    if not is_text(path):
        raise UserError(
            f"the name of `{printable(name)}` is not UTF-8, so `{integrity.FILE}` could not list it",
            hint="rename the file, or move it out of the directory",
        )


def sizes_of(copies: Mapping[str, FileRef]) -> dict[str, int]:
    """Return the sizes in bytes of the files that are copied to these names. Raises UserError for a name that is not UTF-8."""
    for name, file in copies.items():
        check_name(file.name, name)
    return {name: file.size for name, file in copies.items()}


def partial_directory(target: Path, tensor_plans: Iterable[TensorPlan], options: Mapping[str, Any]) -> Path:
    """Return the directory that an output is written to until it is complete.

    Its name is a digest of the plan: the same for the same plan, whichever process or run computes it.
    """
    digest, tables = hashlib.sha256(json.dumps(options, sort_keys=True).encode()), dict[int, int]()
    for tensor_plan in tensor_plans:
        spec, ranges = tensor_plan.spec, tensor_plan.ranges
        if id(ranges) not in tables:  # a table is the same in every layer
            tables[id(ranges)] = len(tables)
            digest.update(repr(ranges).encode())
        line = spec.name, spec.shape, dtype_name(spec.dtype), [part.name for part in tensor_plan.parts], tables[id(ranges)]
        more = (tensor_plan.experts, tensor_plan.transform) if tensor_plan.transform else ()
        digest.update(repr((*line, *more)).encode(errors="surrogatepass"))
    return target.with_name(f"{target.name}.partial-{digest.hexdigest()[:12]}")


def manifest(command: str, options: Mapping[str, Any], files: Mapping[str, FileRef]) -> dict[str, Any]:
    """Return what must be the same for a run to continue another: the command, its options, the versions of source `files`."""
    versions = {f"the source's `{name}`": file.folder.version(file.name) for name, file in files.items()}
    return {"command": command, **{f"option `{name}`": value for name, value in options.items()}, **versions}
