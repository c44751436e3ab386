"""A folder some of whose files have another content: settings that are changed on the way, without a copy of the rest."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256

from formats.folder import Folder


class OverlaidFolder:
    """See `Folder`. `documents` are the contents that replace those of files in `folder`, by their names there."""

    def __init__(self, folder: Folder, documents: Mapping[str, bytes]) -> None:
        self._folder, self._documents = folder, documents

    @property
    def label(self) -> str:
        return self._folder.label

    @property
    def name(self) -> str:
        return self._folder.name

    @property
    def origin(self) -> Mapping[str, str]:
        return self._folder.origin

    def has(self, name: str) -> bool:
        return self._folder.has(name)

    def size(self, name: str) -> int:
        return len(self._documents[name]) if name in self._documents else self._folder.size(name)

    def version(self, name: str) -> str:
        stored = self._folder.version(name)
        return f"{stored}, as {sha256(self._documents[name]).hexdigest()}" if name in self._documents else stored

    def sha256(self, name: str) -> str | None:
        return sha256(self._documents[name]).hexdigest() if name in self._documents else self._folder.sha256(name)

    def children(self) -> list[str]:
        return self._folder.children()

    def files(self) -> list[str]:
        return self._folder.files()

    def get(self, name: str) -> bytes:
        return self._documents[name] if name in self._documents else self._folder.get(name)

    def read_into(self, name: str, offset: int, out: memoryview) -> None:
        if name in self._documents:
            out[:] = self._documents[name][offset : offset + len(out)]
        else:
            self._folder.read_into(name, offset, out)

    def changed(self) -> str:
        return self._folder.changed()

    def below(self, name: str) -> OverlaidFolder:
        inside = f"{name}/"
        documents = {file.removeprefix(inside): data for file, data in self._documents.items() if file.startswith(inside)}
        return OverlaidFolder(self._folder.below(name), documents)

    def close(self) -> None:
        self._folder.close()
