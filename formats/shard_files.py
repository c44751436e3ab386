"""Find the files of a Hugging Face directory that hold its model: by the index, or by their names if there is none.

Only the index is opened; the other files are left to the reader.
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
    """Read from the index which file holds which tensor; empty without an index. UserError for names outside the folder."""
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
    """Return the files that hold the model: those of the index, or `model.safetensors`, or chosen by name.

    `listed` is the index's `weight_map`, if it was read already. Raises UserError if a file is missing, or if the names are
    ambiguous.
    """
    local = folder.children() if isinstance(folder, LocalFolder) else []  # stores have no links, and whole files alone
    if INDEX in local:
        _check_there(folder, INDEX, local)
    if indexed := _indexed(folder, weight_map(folder) if listed is None else listed):
        names = indexed
    elif folder.has(SINGLE):
        names = [SINGLE]
    else:
        children = folder.children()
        names = _without_index(folder, model_files(children) or [name for name in children if name.endswith(".safetensors")])
    if not names:
        foreign.refuse(folder.label, folder.children())
        raise UserError(f"`{folder.label}` holds no safetensors files", hint="point at a Hugging Face model directory")
    for name in names:
        _check_there(folder, name, local)
    return names


def _indexed(folder: Folder, listed: Mapping[str, str]) -> list[str]:
    """Return the index's files; none if all are missing and `model.safetensors` exists, which transformers reads first."""
    names = sorted(set(listed.values()))
    if not folder.has(SINGLE) or SINGLE in names:
        return names
    existing = [name for name in names if folder.has(name)]
    if existing:
        more = f" and {len(existing) - 1} more" if len(existing) > 1 else ""
        raise UserError(
            f"`{folder.label}` holds two models: `{SINGLE}`, and the one of `{INDEX}` in `{existing[0]}`{more}",
            hint=f"transformers reads `{SINGLE}` and ignores the index: remove the outdated one",
        )
    return []


def model_files(names: Iterable[str]) -> list[str]:
    """Return the files that may hold a model: safetensors, without adapters and hidden files.

    >>> model_files(["._model.safetensors", "adapter_model.safetensors", "config.json", "model.safetensors"])
    ['model.safetensors']
    """
    return [name for name in names if name.endswith(".safetensors") and not name.startswith((".", "adapter"))]


def _without_index(folder: Folder, names: Sequence[str]) -> list[str]:
    """Choose among files without an index: the one numbered set (`model-00001-of-00002.safetensors`), or if none is numbered all
    but `consolidated.safetensors`, which holds the same model under other names."""
    sets: dict[tuple[str, str], dict[int, str]] = {}
    for name in names:
        if numbered := _NUMBERED.fullmatch(name):
            sets.setdefault((numbered["stem"], numbered["count"]), {})[int(numbered["number"])] = name
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
    """Raise UserError if a file of the model is missing, or if its download is incomplete."""
    if not folder.has(name):
        who = f"`{INDEX}` names `{name}`, which" if folder.has(INDEX) else f"`{name}` of `{folder.label}`"
        where = link(folder, name) if name in names else f"is not in `{folder.label}`"
        raise UserError(f"{who} {where}", hint=_fetch(folder, names))
    for ending in _UNFINISHED:
        if f"{name}{ending}" in names:
            raise UserError(
                f"`{name}` is incomplete: `{name}{ending}` beside it belongs to an unfinished download",
                hint="restart the download and wait until it is complete; if the file is complete, remove the other one",
            )


def _fetch(folder: Folder, names: Collection[str]) -> str:
    """Return what to do about missing files."""
    unfinished = foreign.unfinished_downloads(folder, list(names))
    if unfinished:
        return f"a download is incomplete (`{unfinished[0]}`): restart it, and fetch the missing file"
    return "fetch the missing file"


_UNFINISHED = (".aria2", ".part", ".crdownload")
"""Suffixes of the files that downloads keep beside a file while they write it."""
