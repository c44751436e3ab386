"""Which files of a Hugging Face directory hold its model: by the index, by their names where there is none.

Opens the index alone; what is in the others is left to the reader.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, cast

from formats import foreign
from formats.errors import UserError
from formats.folder import Folder, LocalFolder, link
from formats.json_objects import read_json
from formats.relative_names import check_below

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
USUAL_FILES = (
    "config.json", "generation_config.json", INDEX, SINGLE,
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "tiktoken.model", "tekken.json", "params.json",
    "chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json",
    "README.md", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "USE_POLICY.md", ".gitattributes",
)  # fmt: skip
"""Names that files of a model directory usually have: what is asked for where a server lists no directory."""


def weight_map(folder: Folder) -> dict[str, str]:
    """Which file holds which tensor, by the index; empty where there is no index. File names must stay in the directory."""
    if not folder.has(INDEX):
        return {}
    listed = read_json(folder, INDEX).get("weight_map")
    if not isinstance(listed, dict):
        raise UserError(f"`{INDEX}` has no `weight_map`")
    files = cast("dict[str, Any]", listed).values()
    named = set(files) if all(isinstance(file, str) for file in files) else files  # a file holds many tensors
    for file in named:
        check_below(file, source=INDEX)
    return cast("dict[str, str]", listed)


def shard_names(folder: Folder, listed: Mapping[str, str] | None = None) -> list[str]:
    """The files that hold the model: the index's, or `model.safetensors`, or those that are left where there is no index.
    `listed` is the index's `weight_map`, if it was read already.

    Raises UserError where one of them is not there, or where they do not tell which of them are the model.
    """
    local = folder.children() if isinstance(folder, LocalFolder) else []  # stores have no links, and whole files alone
    if INDEX in local:
        _check_there(folder, INDEX, local)
    if indexed := _indexed(folder, weight_map(folder) if listed is None else listed):
        names = indexed
    elif folder.has(SINGLE):
        names = [SINGLE]
    else:
        there = folder.children()
        names = _without_index(folder, model_files(there) or [name for name in there if name.endswith(".safetensors")])
    if not names:
        foreign.refuse(folder.label, folder.children())
        raise UserError(f"`{folder.label}` holds no safetensors files", hint="point at a Hugging Face model directory")
    for name in names:
        _check_there(folder, name, local)
    return names


def _indexed(folder: Folder, listed: Mapping[str, str]) -> list[str]:
    """The index's files; none where they are all gone and `model.safetensors` is there, which transformers reads first."""
    names = sorted(set(listed.values()))
    if not folder.has(SINGLE) or SINGLE in names:
        return names
    there = [name for name in names if folder.has(name)]
    if there:
        more = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise UserError(
            f"`{folder.label}` holds two models: `{SINGLE}`, and the one of `{INDEX}` in `{there[0]}`{more}",
            hint=f"transformers reads `{SINGLE}` and never looks at the index: remove the one that is old",
        )
    return []


def model_files(names: Iterable[str]) -> list[str]:
    """Those of a folder's files that may hold a model: safetensors that are no adapter's, and not hidden.

    >>> model_files(["._model.safetensors", "adapter_model.safetensors", "config.json", "model.safetensors"])
    ['model.safetensors']
    """
    return [name for name in names if name.endswith(".safetensors") and not name.startswith((".", "adapter"))]


def _without_index(folder: Folder, names: Sequence[str]) -> list[str]:
    """Of files that no index names, those of the one set that is numbered (`model-00001-of-00002.safetensors`); where none
    is, all but `consolidated.safetensors`, which holds the same model under other names."""
    sets: dict[tuple[str, str], dict[int, str]] = {}
    for name in names:
        if found := _NUMBERED.fullmatch(name):
            sets.setdefault((found["stem"], found["count"]), {})[int(found["number"])] = name
    chosen = {key: files for key, files in sets.items() if not key[0].startswith(_CONSOLIDATED)} or sets
    if len(chosen) > 1:
        listed = ", ".join(f"`{stem}-*-of-{count}.safetensors`" for stem, count in sorted(chosen))
        raise UserError(
            f"`{folder.label}` has no `{INDEX}` and files of several models: {listed}",
            hint="fetch the index, or move the files that are not to be converted elsewhere",
        )
    for (stem, count), files in chosen.items():
        _check_numbers(folder, stem, count, files)
        return sorted(files.values())
    return [name for name in names if not name.startswith(_CONSOLIDATED)] or list(names)


_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d{1,6})-of-(?P<count>\d{1,6})\.safetensors")
_CONSOLIDATED = "consolidated"


def _check_numbers(folder: Folder, stem: str, count: str, numbers: Collection[int]) -> None:
    """Raise UserError if files of a numbered set are missing. Some writers count from 0."""
    first = 0 if 0 in numbers else 1
    missing = [number for number in range(first, first + int(count)) if number not in numbers]
    if missing:
        names = ", ".join(f"`{stem}-{number:0{len(count)}d}-of-{count}.safetensors`" for number in missing[:3])
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        hint = _fetch(folder, folder.children())
        raise UserError(f"`{folder.label}` lacks {names}{more}, of {int(count)} files", hint=f"{hint}, and `{INDEX}`")


def _check_there(folder: Folder, name: str, names: Collection[str]) -> None:
    """Raise UserError if a file of the model is not there, or if a download is still writing it."""
    if not folder.has(name):
        who = f"`{INDEX}` names `{name}`, which" if folder.has(INDEX) else f"`{name}` of `{folder.label}`"
        where = link(folder, name) if name in names else f"is not in `{folder.label}`"
        raise UserError(f"{who} {where}", hint=_fetch(folder, names))
    for ending in _UNFINISHED:
        if f"{name}{ending}" in names:
            raise UserError(
                f"`{name}` is not whole: `{name}{ending}` beside it is a download's that has not come to its end",
                hint="start the download again and wait for its end; if the file is whole, remove the other one",
            )


def _fetch(folder: Folder, names: Collection[str]) -> str:
    """What to do about missing files."""
    found = foreign.unfinished_downloads(folder, list(names))
    if found:
        return f"a download has not come to its end (`{found[0]}`): start it again, and fetch the missing file"
    return "fetch the missing file"


_UNFINISHED = (".aria2", ".part", ".crdownload")
"""Endings of what downloads keep beside a file that they write to."""
