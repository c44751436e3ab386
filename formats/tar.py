"""A `Folder` over an uncompressed tar archive, whose members are read where they are: NeMo's `.nemo` files.

Headers are parsed by Python's `tarfile`. Nothing is unpacked, and no name in an archive becomes a path of the file system.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from formats.errors import UserError, format_untrusted
from formats.faults import fault
from formats.folder import Folder, whole
from formats.relative_names import stays_below

if TYPE_CHECKING:
    import tarfile

_BLOCK = 512
_MOST_HEADER = 1 << 20
"""Bytes that one read of a header may take: an extended header gives its own size."""

_MOST_MEMBERS = 1 << 20
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}
_COPY = "copy the archive again, or unpack it with `tar` and give the folder"


class Member(NamedTuple):
    """A file in the archive: the byte offset of its data, and its size."""

    start: int
    size: int


class TarFolder:
    """An opened archive, or a folder in it; see `Folder`."""

    def __init__(self, folder: Folder, archive: str, *, within: TarFolder | None = None, below: str = "") -> None:
        """`archive`: the file in `folder`. `within`, `below`: the opened archive, and the folder in it.

        Raises UserError for an archive that is compressed, truncated or damaged, and for members that are no plain files.
        """
        self._folder, self._archive, self._prefix = folder, archive, below
        self._members = within._members if within else _members(folder, archive)
        self._children = within._children if within else _children(self._members)

    @property
    def label(self) -> str:
        return f"{self._folder.label}/{self._archive}" + (f"/{self._prefix.rstrip('/')}" if self._prefix else "")

    @property
    def name(self) -> str:
        return (self._prefix.rstrip("/") or self._archive).rpartition("/")[2]

    @property
    def origin(self) -> Mapping[str, str]:
        return {"name": self.name}

    def has(self, name: str) -> bool:
        return self._prefix + name in self._members

    def size(self, name: str) -> int:
        return self._member(name).size

    def version(self, name: str) -> str:
        return f"{self._member(name)} of {self._folder.version(self._archive)}"

    def sha256(self, name: str) -> str | None:  # noqa: ARG002 - of the protocol
        return None

    def children(self) -> list[str]:
        return sorted(self._children.get(self._prefix, ()))

    def files(self) -> list[str]:
        return sorted(name.removeprefix(self._prefix) for name in self._members if name.startswith(self._prefix))

    def get(self, name: str) -> bytes:
        return whole(self, name)

    def read_into(self, name: str, offset: int, out: memoryview) -> None:
        member = self._member(name)
        if offset + len(out) > member.size:
            raise UserError(f"`{name}` in `{self.label}` ends after {member.size} bytes", hint="the checkpoint is damaged")
        self._folder.read_into(self._archive, member.start + offset, out)

    def changed(self) -> str:
        return self._folder.changed()

    def below(self, name: str) -> TarFolder:
        return TarFolder(self._folder, self._archive, within=self, below=f"{self._prefix}{name}/")

    def close(self) -> None:
        self._folder.close()

    def _member(self, name: str) -> Member:
        if not self.has(name):
            raise UserError(f"`{self.label}` has no `{name}`")
        return self._members[self._prefix + name]


class _Stream(io.RawIOBase):
    """The archive as a file whose headers are read."""

    def __init__(self, folder: Folder, archive: str) -> None:
        self._folder, self._archive, self._at = folder, archive, 0
        self.length = folder.size(archive)

    def read(self, size: int = -1, /) -> bytes:
        size = max(0, min(size, self.length - self._at))
        if size > _MOST_HEADER:
            raise UserError(f"a header in `{self._archive}` has {size} bytes", hint="the archive is damaged")
        data = bytearray(size)
        self._folder.read_into(self._archive, self._at, memoryview(data))
        self._at += size
        return bytes(data)

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0, /) -> int:  # noqa: ARG002 - from the start alone
        self._at = offset
        return offset


def is_tar(folder: Folder, name: str) -> bool:
    """Return whether a file is a tar archive, compressed or not."""
    start = _Stream(folder, name).read(_BLOCK)
    return start[257:262] == b"ustar" or (name.endswith(".nemo") and start[:2] in _COMPRESSED)


def _members(folder: Folder, archive: str) -> dict[str, Member]:
    import tarfile  # noqa: PLC0415 - most sources are no archives

    stream = _Stream(folder, archive)
    if kind := _COMPRESSED.get(stream.read(2)):
        raise UserError(
            f"`{folder.label}/{archive}` is compressed with {kind}: it cannot be read in place",
            hint=f"unpack it, `mkdir DIR && tar xf {archive} -C DIR`, and give `DIR`",
        )
    stream.seek(0)
    members: dict[str, Member] = {}
    try:
        with tarfile.open(fileobj=stream, mode="r:") as opened:
            for info in opened:
                _add(members, info, archive)
                stop = info.offset_data + (info.size if info.isreg() else 0)
                _check_stop(stream, archive, stop + -stop % _BLOCK)
    except UserError:
        raise
    except Exception as error:  # a damaged header makes the parser raise anything
        raise UserError(f"`{folder.label}/{archive}` is not a readable tar archive: {fault(error)}", hint=_COPY) from error
    return members


def _add(members: dict[str, Member], info: tarfile.TarInfo, archive: str) -> None:
    """Add a member. Raises UserError for links, sparse files, devices, names that leave the archive, and a second of a name."""
    name = info.name.removeprefix("./").rstrip("/")
    if info.isdir():
        return
    what = ""
    if not stays_below(name):
        what = "a name that leaves the archive"
    elif not info.isreg() or info.issparse():
        what = "a member that is not a plain file"
    elif name in members:
        what = "two members of one name"
    if what or len(members) >= _MOST_MEMBERS:
        raise UserError(f"`{archive}` has {what or 'too many members'}: `{format_untrusted(info.name)}`", hint=_COPY)
    members[name] = Member(info.offset_data, info.size)


def _check_stop(stream: _Stream, archive: str, stop: int) -> None:
    """Raise UserError unless a block follows a member: the next header, or the first of the blocks of zeros at the end."""
    if stop + _BLOCK > stream.length:
        raise UserError(
            f"`{archive}` is truncated: it has {stream.length} bytes, and a member ends at {stop} before its last block",
            hint=_COPY,
        )


def _children(members: Mapping[str, Member]) -> dict[str, set[str]]:
    """Return the names in each folder, itself with a slash; those of folders end in one."""
    inside: dict[str, set[str]] = {}
    for name in members:
        folder, _, file = name.rpartition("/")
        inside.setdefault(f"{folder}/" if folder else "", set()).add(file)
        while folder:
            above, _, last = folder.rpartition("/")
            inside.setdefault(f"{above}/" if above else "", set()).add(f"{last}/")
            folder = above
    return inside
