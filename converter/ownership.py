"""Which directories a conversion may replace: those that a conversion made, where nothing else has come to since.

`conversion.json` lists every file of its output. Outputs of versions that did not list them are known by the names that they
could have; of side files, by those that most models have, and those that the conversion at hand writes too.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any, cast

from converter import provenance, run_config
from converter.adapters.files import DESCRIPTION, PEFT_CONFIG, PEFT_WEIGHTS
from converter.side_files import CONFIG, EXTRAS, FILES, HEADERS, TOKENIZER_FILES
from formats import integrity
from formats.dcp_index import METADATA
from formats.errors import UserError
from formats.iterations import COMMON, FORMAT, TRACKER, TRAIN_STATE, TRAIN_STATE_TRACKER
from formats.json_objects import parse_json
from formats.replacement import Present, Rule, first
from formats.shard_files import INDEX, SINGLE

_RECORD = re.compile(rf"(iter_\d+/)?{re.escape(provenance.FILE)}")
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
    """The rule for a conversion that writes the files `planned`; without them, before they are known, what an earlier version
    may have written passes."""

    def check(found: Present) -> None:
        record = next(iter(sorted(filter(_RECORD.fullmatch, found.entries), key=len)), None)
        document = _read(found, record) if record else {}
        if record is None or document.get("tool") != provenance.TOOL:
            raise UserError(
                f"`{found.label}` holds `{first(found.entries)}` and no `{provenance.FILE}` of this tool: it is not the output "
                "of a conversion, so `--overwrite` does not replace it",
                hint=_INSTEAD,
            )
        strangers = _strangers(found, record, document, planned)
        if strangers:
            why = _NOT_LISTED if "files" in document else _NO_LIST
            raise UserError(
                f"`{found.label}` holds `{first(strangers)}`, {why}, so `--overwrite` does not replace it", hint=_INSTEAD
            )

    return check


def _read(found: Present, name: str) -> dict[str, Any]:
    """A document; an empty one where it is damaged."""
    data = found.read(name)
    try:
        return parse_json(data, source=name)
    except UserError:
        return {}


def _strangers(found: Present, record: str, document: dict[str, Any], planned: Collection[str] | None) -> list[str]:
    match document.get("files"):
        case [*names]:
            return list(found.entries.keys() - {name for name in names if isinstance(name, str)})
        case _:
            known = _known(found, record.removesuffix(provenance.FILE))
            return [] if planned is None else list(found.entries.keys() - known - set(planned))


def _known(found: Present, folder: str) -> set[str]:
    """The names that conversions of earlier versions could give; `folder` is the iteration, empty for a Hugging Face folder."""
    if not folder:
        return _IN_A_MODEL | _shards(found)
    inside = [name.removeprefix(folder) for name in found.entries if name.startswith(folder)]
    listed = _listed(found, folder)
    known = listed & set(inside) if listed else set(filter(_IN_AN_ITERATION.fullmatch, inside))
    return {TRACKER, TRAIN_STATE_TRACKER, *(f"{folder}{name}" for name in known)}


def _listed(found: Present, folder: str) -> set[str]:
    """The files of an iteration that has their hashes; none where it has not."""
    if f"{folder}{integrity.FILE}" not in found.entries:
        return set()
    files: Any = _read(found, f"{folder}{integrity.FILE}").get("files")
    return {integrity.FILE, *cast("dict[str, Any]", files)} if isinstance(files, dict) else set()


def _shards(found: Present) -> set[str]:
    """The files of a model in several."""
    listed: Any = _read(found, INDEX).get("weight_map") if INDEX in found.entries else {}
    names: Iterable[Any] = cast("dict[str, Any]", listed).values() if isinstance(listed, dict) else ()
    return {name for name in names if isinstance(name, str) and name.endswith(".safetensors")}
