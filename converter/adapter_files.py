"""The files of an adapter: their names, the folders that hold them, and the types of their JSON fields.

Imported by every conversion, so it imports no format and no plan.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from typing import Any, cast

from formats.detect import HUGGINGFACE, MEGATRON, Format, detect
from formats.errors import UserError, format_untrusted
from formats.folder import Folder
from formats.spec import is_size

DESCRIPTION = "adapter.json"
"""In the iteration's folder of a Megatron checkpoint."""

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_PICKLE = "adapter_model.bin"


def is_peft(folder: Folder) -> bool:
    """Return whether a folder holds PEFT's files."""
    return folder.has(PEFT_CONFIG) or folder.has(PEFT_PICKLE)


def refuse_adapter(folder: Folder) -> None:
    """Raise UserError for an adapter where a model is expected."""
    kind = detect(folder)
    has_weights = any(folder.has(name) for name in (PEFT_WEIGHTS, PEFT_PICKLE))
    if kind is Format.HUGGINGFACE and has_weights and folder.has(PEFT_CONFIG):
        raise UserError(
            f"`{folder.label}` holds a model and an adapter beside it, `{PEFT_CONFIG}`: transformers would load both",
            hint="`mbconvert merge DIR DIR DST`, with this folder as both, puts the adapter into the model; for the model alone "
            "move the files `adapter_*` elsewhere",
        )
    if kind is Format.PEFT or folder.has(DESCRIPTION):
        raise UserError(
            f"`{folder.label}` is an adapter without its model",
            hint="`mbconvert adapter-to-hf` and `adapter-to-mcore` convert it, `mbconvert merge` merges it into its model",
        )


def require_peft(folder: Folder) -> None:
    """Raise UserError for a folder without a PEFT adapter. The base model may be in the same folder."""
    if not is_peft(folder):
        require(folder, Format.PEFT, adapter=True)


def require(folder: Folder, expected: Format, *, adapter: bool = False) -> None:
    """Raise UserError for a folder of another format, and name the command that converts it.

    `adapter`: expect an adapter in that format, not a model.
    """
    if not adapter:
        refuse_adapter(folder)
    kind = detect(folder)
    if kind is expected or any({kind, expected} <= kinds for kinds in (HUGGINGFACE, MEGATRON)):
        return
    description, hint = _DESCRIPTIONS[kind]
    wanted = {
        Format.HUGGINGFACE: "a Hugging Face model",
        Format.PEFT: "a PEFT adapter",
        Format.TORCH_DIST: f"a Megatron {'adapter ' if adapter else ''}checkpoint",
    }
    raise UserError(f"`{folder.label}` is {description}, not {wanted[expected]}", hint=hint)


_HUGGINGFACE = (
    "a Hugging Face model",
    "`mbconvert hf-to-mcore` converts it; `mbconvert merge BASE ADAPTER DST` takes the model first, then its adapter",
)
_MEGATRON = "a Megatron checkpoint", "`mbconvert mcore-to-hf` converts it, or `adapter-to-hf` if it holds an adapter"
_DESCRIPTIONS = {
    Format.PEFT: ("a PEFT adapter", "`mbconvert adapter-to-mcore` converts it"),
    **dict.fromkeys(HUGGINGFACE, _HUGGINGFACE),
    **dict.fromkeys(MEGATRON, _MEGATRON),
}
"""What a folder of each format is, and the commands that take it."""


@dataclass(frozen=True, slots=True)
class FieldType:
    """The values that a JSON field may have; `expected` names them in messages."""

    expected: str
    accepts: Callable[[Any], bool]

    def check(self, name: str, value: Any, *, source: str, hint: str = "") -> None:
        """Raise UserError if `value` is not of this type; `source` is the document, for the message.

        >>> FLAG.check("use_dora", True, source="`adapter_config.json`")
        """
        if not self.accepts(value):
            raise UserError(f"`{name}` in {source} is `{format_untrusted(value)}`, which should be {self.expected}", hint=hint)


def _is_number(value: Any) -> bool:
    """Exclude infinities, NaN and integers that a double cannot hold exactly."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1 << 53 and isfinite(value)


def list_of(item: FieldType, expected: str) -> FieldType:
    return FieldType(expected, lambda value: isinstance(value, list) and all(map(item.accepts, cast("list[Any]", value))))


def table_of(item: FieldType, expected: str, *, most: int) -> FieldType:
    """Return the type of an object with at most `most` fields, all of type `item`."""

    def accepts(value: Any) -> bool:
        table = cast("dict[str, Any]", value) if isinstance(value, dict) else None
        return table is not None and len(table) <= most and all(map(item.accepts, table.values()))

    return FieldType(expected, accepts)


STRING = FieldType("a string", lambda value: isinstance(value, str))
STRINGS = list_of(STRING, "a list of strings")
FLAG = FieldType("true or false", lambda value: isinstance(value, bool))
NUMBER = FieldType("a finite number", _is_number)
SIZE = FieldType("a whole number, 0 or more", is_size)
RANK = FieldType("a whole number, 1 or more", lambda value: is_size(value) and value > 0)
OBJECT = FieldType("an object", lambda value: isinstance(value, dict))
