"""The number of layers of each pipeline stage, as text: `9,9,8,6`, or the same in megatron-core's notation.

megatron-core writes `E` for the embedding, `t` for a transformer layer, `m` for a layer of multi-token prediction, `L` for the
output layer and the loss, `|` between stages, `x*3` for `xxx` and `(t|)*3` for `t|t|t|`; commas mean nothing
(`PipelineParallelLayerLayout.parse_str_to_list`).
A HybridModel has its stages in `hybrid_layer_pattern`, a letter for each layer:
`*-*|-*-`. Knows no model, and only counts such letters: converter/layout.py compares the stages with a model's layers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from converter.hybrid import FEED_FORWARD, MIXERS, PREDICTION, STAGE
from formats.errors import UserError

EXAMPLE = "Et*9|t*9|t*8|t*6L"

_LONGEST, _MOST_STAGES = 1 << 14, 1 << 16
_GROUP = re.compile(r"\(([^()]*)\)\*([0-9]{1,5})")
_PATTERN = re.compile(rf"(?=.*[{re.escape(MIXERS)}])[{re.escape(MIXERS + FEED_FORWARD + STAGE + PREDICTION)}]+")
_ITEM = re.compile(r"(.)(?:\*([0-9]{1,6}))?")


def format_layout(stages: Sequence[int], *, mtp: int = 0) -> str:
    """Return the layers of each stage in megatron-core's notation; `mtp` layers of multi-token prediction are in the last.

    >>> format_layout([9, 9, 8, 6]), format_layout([9, 9, 8, 6], mtp=1)
    ('Et*9|t*9|t*8|t*6L', 'Et*9|t*9|t*8|t*6mL')
    """
    parts = [f"t*{count}" if count else "" for count in stages]
    parts[0] = f"E{parts[0]}"
    parts[-1] += "m" * mtp + "L"
    return "|".join(parts)


def parse_layout(text: str) -> list[int]:
    """Return the layers of each stage from any notation. Raises UserError, which names the stage that is wrong.

    >>> parse_layout("9,9,8,6") == parse_layout("Et*9|t*9|t*8|t*6L") == [9, 9, 8, 6]
    True
    >>> parse_layout("*-*|-*-/*-")
    [3, 3]
    """
    parts = [part.strip() for part in text.split(",")]
    if all(re.fullmatch(r"[0-9]{1,6}", part) for part in parts):
        return [int(part) for part in parts]
    if _PATTERN.fullmatch(text):
        return [len(stage) for stage in text.partition(PREDICTION)[0].split(STAGE)]
    if not re.search(r"[ELtm|]", text):
        raise UserError(
            f"pipeline layout `{text[:40]}` is not a list of layers per stage", hint=f"for example `9,9,8,6` or `{EXAMPLE}`"
        )
    stages = _without_prediction(_stages(_without_groups(re.sub(r"[,\s]", "", text))))
    return [_layers(stage, number, len(stages)) for number, stage in enumerate(stages, 1)]


def layers_per_stage(given: str | Sequence[int] | None, *, mtp: int = 0) -> Sequence[int] | None:
    """Return a layout given as text or as numbers as numbers; None stays None.

    Raises UserError for text with another number of layers of multi-token prediction than the model's, `mtp`. Text may leave
    them out.
    """
    if not isinstance(given, str):
        return given
    stages, predicting = parse_layout(given), _prediction_layers(given)
    if predicting not in {0, mtp}:
        raise UserError(
            f"pipeline layout `{given[:40]}` has {predicting} layers of multi-token prediction, the model has {mtp}",
            hint="each is an `m` before `L`, or a `/` in a pattern; a layout may leave them out",
        )
    return stages


def _prediction_layers(text: str) -> int:
    """Return how many layers of multi-token prediction a valid layout has."""
    plain = _without_groups(re.sub(r"[,\s]", "", text))
    return plain.count(PREDICTION) + sum(int(item[2] or 1) for item in _ITEM.finditer(plain) if item[1] == "m")


def _without_groups(text: str) -> str:
    """Write `(t|)*3` as `t|t|t|`, within a bound on the length."""
    for group in _GROUP.finditer(text):
        if len(group[1]) * int(group[2]) > _LONGEST:
            raise _too_long(text)
    return _GROUP.sub(lambda group: group[1] * int(group[2]), text)


def _stages(text: str) -> list[list[tuple[str, int]]]:
    """Split a layout without groups into stages, each a list of characters and how often they are repeated."""
    stages: list[list[tuple[str, int]]] = [[]]
    for item in _ITEM.finditer(text):
        times = int(item[2] or 1)
        if item[1] != "|":
            stages[-1].append((item[1], times))
        elif len(stages) + times > _MOST_STAGES:
            raise _too_long(text)
        else:
            stages += [[] for _ in range(times)]
    return stages


def _without_prediction(stages: list[list[tuple[str, int]]]) -> list[list[tuple[str, int]]]:
    """Leave out layers of multi-token prediction, which the last stage may have right before `L`."""
    *others, last = stages
    layers, end = last[:-1], last[-1:]
    while layers and layers[-1][0] == "m":
        layers.pop()
    return [*others, [*layers, *end]]


def _layers(stage: Sequence[tuple[str, int]], number: int, stages: int) -> int:
    """Return the layers of one stage: `E` begins the first stage, `L` ends the last, both once."""
    expected = [("E", 1)] * (number == 1), [("L", 1)] * (number == stages)
    begin, end = len(expected[0]), len(stage) - len(expected[1])
    layers = stage[begin:end]
    for char, _ in stage:
        if char not in "ELt":
            raise _wrong(stage, number, f"has `{char}`", _MEANING)
    if list(stage[:begin]) != expected[0]:
        raise _wrong(stage, number, "does not begin with `E`", "the first stage holds the embedding, `E`")
    if begin > end or list(stage[end:]) != expected[1]:
        raise _wrong(stage, number, "does not end with `L`", "the last stage holds the output layer and the loss, `L`")
    for char, _ in layers:
        if char != "t":
            where = "first, and only there" if char == "E" else "last, and only there"
            raise _wrong(stage, number, f"has `{char}`", f"`{char}` comes {where}: `{EXAMPLE}`")
    return sum(times for _, times in layers)


_MEANING = (
    f"`E` is the embedding, `t` a layer, `L` the output layer and the loss, `|` ends a stage: `{EXAMPLE}`; `m`, before `L`, "
    "is a layer that predicts further tokens"
)


def _wrong(stage: Sequence[tuple[str, int]], number: int, what: str, hint: str) -> UserError:
    shown = "".join(char if times == 1 else f"{char}*{times}" for char, times in stage)[:40]
    return UserError(f"stage {number} of the pipeline layout, `{shown}`, {what}", hint=hint)


def _too_long(text: str) -> UserError:
    return UserError(f"pipeline layout `{text[:40]}` is too long", hint=f"for example `{EXAMPLE}`")
