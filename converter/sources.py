"""Open what a user names as a source: a directory, a URL read by byte range, or a Hub id fetched into the Hub's own cache.

`Source` is a model there, with what is known of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converter import provenance, side_files
from converter.dequantization import dequantized
from converter.hybrid import layout_of
from converter.probe import PROBED
from converter.side_files import CONFIG, EXTRAS, HEADERS, HFReference
from converter.workers import DEFAULT, count_workers
from formats.detect import refuse_file
from formats.errors import UserError
from formats.faults import fault
from formats.folder import FileRef, Folder, LocalFolder
from formats.home import expanded
from formats.huggingface import HuggingFaceReader
from formats.location import open_folder
from formats.machine import check_machine
from formats.megatron_reader import MegatronReader
from formats.quantized.reader import THREAD_BYTES
from formats.spec import Reader
from formats.tar import TarFolder, is_tar
from formats.urls import is_remote

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?")
_IGNORED = ["original/*", "*.bin", "*.pth", "*.pt", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.ot"]


@dataclass(frozen=True, slots=True)
class Source:
    """A model to convert: its tensors, and what is known beside them."""

    label: str
    reader: Reader
    reference: HFReference
    """Its `config.json`, its side files, and its shard map if there is one."""

    files: Mapping[str, FileRef]
    """Those that its tensors are read from."""

    provenance: Mapping[str, Any]
    """What `conversion.json` says of it."""

    left_out: Sequence[str] = ()
    """Files in its folder that are not part of the model."""

    other_state: Sequence[str] = ()
    """Tensors beside the model's that are not converted: an optimizer's."""

    adapter: Mapping[str, Any] | None = None
    """The adapter that was merged into its tensors, as `conversion.json` describes it; None if there is none."""

    layout: str | None = None
    """Of a Megatron checkpoint (see `converter.hybrid`)."""

    memory: int = 0
    """Bytes that reading it holds at most, beside what is read."""

    def command(self, otherwise: str) -> str:
        """Return the command that `conversion.json` records for a conversion of it."""
        return "merge" if self.adapter else otherwise

    def merged(self) -> dict[str, Any]:
        """Return the adapter as an entry of options and provenance; nothing if there is none."""
        return {"adapter": dict(self.adapter)} if self.adapter else {}


def huggingface_source(reader: HuggingFaceReader, given: Folder | None = None) -> Source:
    """Return a Hugging Face directory as a model to convert. Quantized weights are read as plain ones.

    `given`: the folder with the `config.json` of a directory that has none.
    """
    if given:
        if reader.beside.has(CONFIG):
            raise UserError(
                "`--hf-config` is for a source without a `config.json`", hint=f"`{reader.beside.label}` has its own `config.json`"
            )
        reader.beside = given
    reference, left_out = side_files.of_model(reader)
    plain = dequantized(reader, reference.config)
    return Source(
        label=reader.folder.label,
        reader=plain,
        reference=reference,
        files={name: FileRef(reader.folder, name) for name in sorted(reader.files)},
        provenance=provenance.huggingface_source(reader.folder, reader.shards) if reader.shards else provenance.chunks(reader),
        left_out=left_out,
        other_state=reader.others,
        memory=0 if plain is reader else DEFAULT * THREAD_BYTES,
    )


def megatron_source(reader: MegatronReader, root: Folder, reference: HFReference, tensors: Reader) -> Source:
    """Return a Megatron checkpoint as a model to convert. `tensors` reads its tensors, as they are stored or split into those
    of Hugging Face; `root` is the folder that the user named."""
    read = [*reader.files, *reader.index_files, *(f"{HEADERS}/{name}" for name in reference.shards)]
    read += [EXTRAS] if reference.extras else []
    return Source(
        label=reader.folder.label,
        reader=tensors,
        reference=reference,
        files={name: FileRef(reader.folder, name) for name in sorted(read) if reader.folder.has(name)},
        provenance=provenance.megatron_source(root, reader),
        layout=layout_of(reader.specs),
    )


def open_source(source: str | Path, *, or_hub: bool = False) -> Folder:
    """Return the folder of a source. With `or_hub`, a name that is no directory may be `org/name[@revision]` on the Hub.

    Raises UserError if there is no such source, and on a machine that cannot convert: every command begins here.
    """
    check_machine()
    source = expanded(source) if isinstance(source, str) else Path(expanded(source))
    path = Path(source)
    if is_remote(source) or path.is_dir():
        return open_folder(source, probe=PROBED)
    if path.exists():
        if is_tar(LocalFolder(path.parent), path.name):
            return TarFolder(LocalFolder(path.parent), path.name)
        refuse_file(str(source))
    if or_hub and isinstance(source, str) and "/" in source and _HUB_ID.fullmatch(source):
        return _fetch(source)
    hub = ", or a Hub id such as `org/name`" if or_hub else ""
    if not or_hub and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", str(source)) and not path.parent.exists():
        raise UserError(
            f"`{source}` does not exist", hint=f"a model on the Hub is `hf://{source}`; others are a directory or a URL"
        )
    raise UserError(f"`{source}` does not exist", hint=f"give a directory, a URL (hf://, s3://, gs://, https://){hub}")


def changes(sources: Iterable[Folder]) -> str:
    """Return how the first file that changed while the sources were read has changed; nothing if none has."""
    return next((change for source in sources if (change := source.changed())), "")


def check_unchanged(sources: Iterable[Folder]) -> None:
    """Raise UserError if a file of the sources was changed, replaced or removed while they were read."""
    if change := changes(sources):
        raise sources_changed(change)


def sources_changed(what: str) -> UserError:
    """Return the error for a source that changed while it was read."""
    return UserError(what, hint="run it again once nothing writes to it")


def workers_for(workers: int | None, sources: Iterable[Folder], target: str | Path = "") -> int:
    """Return the number of threads for work from `sources` to `target`, by `count_workers`."""
    remote = is_remote(target) or not all(isinstance(source, LocalFolder | TarFolder) for source in sources)
    return count_workers(workers, remote=remote)


def _fetch(source: str) -> Folder:
    from huggingface_hub import snapshot_download  # noqa: PLC0415 # pyright: ignore[reportUnknownVariableType] - slow, seldom needed

    name, _, revision = source.partition("@")
    try:
        return LocalFolder(Path(snapshot_download(name, revision=revision or None, ignore_patterns=_IGNORED)))
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot fetch `{source}` from the Hub, and there is no such directory here: {_hub_fault(error)}",
            hint="check the name, the network and, for gated models, `hf auth login`",
        ) from error


def _hub_fault(error: Exception) -> str:
    """Return why the Hub gave nothing: the HTTP status if there is one, else the kind of error."""
    response: Any = getattr(error, "response", None)
    status: Any = getattr(response, "status_code", None)
    return f"the Hub answered HTTP {status}" if isinstance(status, int) else fault(error)
