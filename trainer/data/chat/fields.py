"""What an example says outside of the texts of its messages: which of them are learned, a system prompt beside them, parts, and
fields of which nothing may get lost in silence.

What changes what would be learned is used, or the example is refused by name. What says something about an example, such as
`id` or `source`, is not used, and told once for all of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from formats.errors import shown
from trainer.data.chat.sources import UnusableError

type Message = Mapping[str, Any]

LEARNS = {"weight": True, "loss": True, "train": True, "training": True, "loss_weight": True, "loss_mask": True,
          "mask": False, "masked": False}  # fmt: skip
"""Fields that say whether a message is learned, and of which value that is said: OpenAI's `weight`, LlamaFactory's `loss`,
Axolotl's `train`, and their kin."""

SAYS_MORE = frozenset({
    "tool_calls", "function_call", "tool_responses", "reasoning_content", "reasoning", "thinking", "thoughts", "refusal", "audio",
    "image", "images", "video", "videos", "train_detail",
})  # fmt: skip
"""Fields of a message that are part of what is said in it."""

_MEDIA = frozenset({"image", "images", "video", "videos", "audio", "audios", "functions", "documents"})
_TEXTS = frozenset(
    {"system", "instruction", "input", "query", "context", "history", "prompt", "completion", "response", "output"}
)
"""Fields of an example that change what would be learned from it."""


def plain_message(found: dict[str, Any], number: int) -> tuple[dict[str, Any], bool]:
    """A message without what says whether it is learned, its parts as one text; and whether it is learned. `number` from 1."""
    wanted = [said for name, positive in LEARNS.items() if (said := _wanted(found, name, number, positive=positive)) is not None]
    if any(wanted) and not all(wanted):
        raise UnusableError("a message says both that it is learned and that it is not", f"message {number}")
    if any(wanted) and found.get("role") != "assistant":
        raise UnusableError("a message asks to be learned, and is not the assistant's", f"message {number}")
    rest = {name: value for name, value in found.items() if name not in LEARNS}
    if isinstance(rest.get("content"), list):
        rest["content"] = "".join(_parts(rest["content"], number))
    return rest, all(wanted)


def _wanted(found: Mapping[str, Any], name: str, number: int, *, positive: bool) -> bool | None:
    value = found.get(name)
    if value is None:
        return None
    if not isinstance(value, (bool, int, float)) or value not in (0, 1):
        raise UnusableError(f"a message's `{name}` is neither 0 nor 1", f"that of message {number} is {shown(value)}")
    return bool(value) == positive


def _parts(content: Sequence[Any], number: int) -> Iterator[str]:
    """The texts of a message in parts, as multi-modal models have them."""
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if isinstance(part, dict) else None
        if kind not in ("text", None) or not isinstance(text, str):
            what = f"a `{shown(kind)}`" if kind else f"a {type(part).__name__} without text"
            raise UnusableError("a part of a message is no text", f"{what} in message {number}")
        yield text


def with_system(fields: Mapping[str, Any], messages: Sequence[Message]) -> list[Message]:
    """The messages after what the example's own `system` says, unless the first of them says the same."""
    system = fields.get("system")
    if not system:
        return list(messages)
    if not isinstance(system, str):
        raise UnusableError("its `system` is no text", f"it is a {type(system).__name__}")
    first = messages[0] if messages else {}
    if first.get("role") not in ("system", "developer"):
        return [{"role": "system", "content": system}, *messages]
    if str(first.get("content")).strip() != system.strip():
        raise UnusableError("its `system` and its first message are different system prompts")
    return list(messages)


def check_example(fields: Mapping[str, Any], used: Collection[str], texts: Sequence[str], *, hint: str) -> list[str]:
    """The names of an example's fields that are not used. UnusableError for one that changes what would be learned: media, and
    texts that stand in none of `texts`, what is learned from."""
    unused: list[str] = []
    for name, value in fields.items():
        if name in used:
            continue
        _check_weight(name, value)
        if value and (name in _MEDIA | {"tools"} or (name in _TEXTS and not _stands_in(value, texts))):
            raise UnusableError(f"its `{name}` would be left out", "", hint=hint)
        unused.append(name)
    return unused


def _check_weight(name: str, value: Any) -> None:
    positive = LEARNS.get(name)
    if positive is not None and isinstance(value, (bool, int, float)) and value != positive:
        raise UnusableError(f"its `{name}` asks for another weight than that of other examples", f"it is {shown(value)}")


def _stands_in(value: Any, texts: Sequence[str]) -> bool:
    if isinstance(value, str):
        return any(value.strip() in text for text in texts)
    return isinstance(value, list) and all(_stands_in(one, texts) for one in _strings(value))


def _strings(value: Any) -> Iterator[Any]:
    """The texts in lists and messages of another field; anything else as it is."""
    if isinstance(value, list):
        for one in value:
            yield from _strings(one)
    elif isinstance(value, dict) and isinstance(value.get("content"), str):
        yield value["content"]
    else:
        yield value
