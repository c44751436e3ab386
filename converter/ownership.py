"""Decide which directories `--overwrite` may replace: outputs of conversions to which nothing was added since.

`conversion.json` lists every file of its output. Earlier versions did not list them: their outputs are recognized by the
names that a conversion could give, those of usual side files, and those that the conversion at hand writes too.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any, cast

from converter import provenance, run_config
from converter.adapter_files import DESCRIPTION, PEFT_CONFIG, PEFT_WEIGHTS
from converter.side_files import CONFIG, EXTRAS, FILES, HEADERS, TOKENIZER_FILES
from formats import integrity
from formats.dcp_index import METADATA
from formats.errors import UserError
from formats.iterations import COMMON, FORMAT, RELEASE, TRACKER, TRAIN_STATE, TRAIN_STATE_TRACKER
from formats.json_objects import parse_json
from formats.replacement import Present, Rule, first
from formats.shard_files import INDEX, SINGLE

_RECORD = re.compile(rf"((iter_\d+|{RELEASE})/)?{re.escape(provenance.FILE)}")
_IN_AN_ITERATION = re.compile(
    "|".join((
        *map(re.escape, (METADATA, FORMAT, COMMON, TRAIN_STATE, run_config.FILE, provenance.FILE, integrity.FILE, EXTRAS)),
        re.escape(DESCRIPTION),
        r"__\d+_\d+\.distcp",
        rf"({FILES}|{HEADERS})/.+",
        rf"tokenizer/({'|'.join(map(re.escape, TOKENIZER_FILES))})",
    ))
)  # fmt: skip
_IN_A_MODEL = {
    provenance.FILE, INDEX, SINGLE, CONFIG, "generation_config.json", PEFT_WEIGHTS, PEFT_CONFIG, *TOKENIZER_FILES,
    ".gitattributes", "README.md", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "USE_POLICY.md",
}  # fmt: skip
_NOT_LISTED = "which the conversion that made it did not write"
_NO_LIST = f"which may be somebody else's: the `{provenance.FILE}` there, of an earlier version, does not list its files"
_INSTEAD = "move it away or remove it yourself, or choose another place"


def replaceable(planned: Collection[str] | None = None) -> Rule:
    """Return the rule for a conversion that writes the files `planned`.

    Without `planned`, before they are known, it accepts any output of a version that did not list its files.
    """

    def check(present: Present) -> None:
        record = next(iter(sorted(filter(_RECORD.fullmatch, present.entries), key=len)), None)
        document = _read(present, record) if record else {}
        if record is None or document.get("tool") != provenance.TOOL:
            raise UserError(
                f"`{present.label}` holds `{first(present.entries)}` and no `{provenance.FILE}` of this tool: it is not the "
                "output of a conversion, so `--overwrite` does not replace it",
                hint=_INSTEAD,
            )
        unlisted = _unlisted(present, record, document, planned)
        if unlisted:
            why = _NOT_LISTED if "files" in document else _NO_LIST
            raise UserError(
                f"`{present.label}` holds `{first(unlisted)}`, {why}, so `--overwrite` does not replace it", hint=_INSTEAD
            )

    return check


def _read(present: Present, name: str) -> dict[str, Any]:
    """Return a JSON document; an empty one if it is damaged."""
    data = present.read(name)
    try:
        return parse_json(data, source=name)
    except UserError:
        return {}


def _unlisted(present: Present, record: str, document: dict[str, Any], planned: Collection[str] | None) -> list[str]:
    """Return the files that are no part of the output."""
    match document.get("files"):
        case [*names]:
            return list(present.entries.keys() - {name for name in names if isinstance(name, str)})
        case _:
            known = _known(present, record.removesuffix(provenance.FILE))
            return [] if planned is None else list(present.entries.keys() - known - set(planned))


def _known(present: Present, folder: str) -> set[str]:
    """Return the names that earlier versions could give; `folder` is the iteration, empty for a Hugging Face directory."""
    if not folder:
        return _IN_A_MODEL | _shards(present)
    inside = [name.removeprefix(folder) for name in present.entries if name.startswith(folder)]
    listed = _listed(present, folder)
    known = listed & set(inside) if listed else set(filter(_IN_AN_ITERATION.fullmatch, inside))
    return {TRACKER, TRAIN_STATE_TRACKER, *(f"{folder}{name}" for name in known)}


def _listed(present: Present, folder: str) -> set[str]:
    """Return the files that the iteration's `integrity.json` lists, and itself; none if there is no such document."""
    if f"{folder}{integrity.FILE}" not in present.entries:
        return set()
    files: Any = _read(present, f"{folder}{integrity.FILE}").get("files")
    return {integrity.FILE, *cast("dict[str, Any]", files)} if isinstance(files, dict) else set()


def _shards(present: Present) -> set[str]:
    """Return the files that the model's index names."""
    listed: Any = _read(present, INDEX).get("weight_map") if INDEX in present.entries else {}
    names: Iterable[Any] = cast("dict[str, Any]", listed).values() if isinstance(listed, dict) else ()
    return {name for name in names if isinstance(name, str) and name.endswith(".safetensors")}
