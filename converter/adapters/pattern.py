"""Regular expressions from somebody else's file, matched as Python's `re` matches them, in bounded time.

`re` tries every way to divide a text among nested repeats, which takes for ever where a pattern is made for that. Here no step
is tried twice at the same place of the text (as RE2's `bitstate.cc` does it), so a match takes at most program length ×
text length steps. A match is a match in both: without backreferences it does not depend on how one came to a step. Single
characters, character classes and anchors are left to `re` itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from formats.errors import UserError, format_untrusted
from formats.faults import fault

LONGEST = 4096
"""Characters of a pattern. Lists of modules in patterns that PEFT, Unsloth or ms-swift write have some hundreds."""

_MOST_INSTRUCTIONS = 8192
_DEEPEST = 50
_STEPS, _STEPS_EACH = 500_000, 2_000

_ESCAPE = re.compile(r"\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|N\{[^}]*\}|0[0-7]{0,2}|[^1-9])", re.DOTALL)
_CLASS = re.compile(r"\[\^?\]?(?:[^\]\\]|\\.)*\]", re.DOTALL)
_REPEAT = re.compile(r"(?:[*+?]|\{(?!\})(\d*)(,?)(\d*)\})(\??)")
_GROUP = re.compile(r"\((?:\?(?:P<(\w+)>|([aiLmsu]*)(?:-([ims]+))?:|(<?[=!])))?")
_FLAGS = re.compile(r"\(\?([aimsu]+)\)")
_PLAIN = re.compile(r"(?:[\w\-.^$]|\\[\w.])*")
_ANCHORS = {"^", "$", r"\A", r"\Z", r"\b", r"\B"}


class Budget:
    """The steps that all matches of one configuration may take together: a reserve, and some more for each match."""

    def __init__(self) -> None:
        self._left = _STEPS

    def begin(self) -> None:
        self._left += _STEPS_EACH

    def spend(self, pattern: str) -> None:
        self._left -= 1
        if self._left < 0:
            raise UserError(f"`{format_untrusted(pattern)}`, which takes too long to match", hint="name the modules one by one")


@dataclass(frozen=True, slots=True)
class Character:
    """One character that `test` matches; or with `width` 0 an anchor, which takes none."""

    test: re.Pattern[str]
    width: int = 1


@dataclass(frozen=True, slots=True)
class Split:
    """Go on at either of two distances, rather at the first."""

    first: int
    second: int


@dataclass(frozen=True, slots=True)
class Look:
    """Only where `program` matches ahead, or behind; with `wanted` false only where it does not."""

    program: tuple[Instruction, ...]
    ahead: bool
    wanted: bool


@dataclass(frozen=True, slots=True)
class Mark:
    """The text's position here is remembered."""


Instruction = Character | Split | Look | Mark
_Code = tuple[Instruction, ...]


def is_plain(pattern: str) -> bool:
    """Has it neither repeats nor alternatives, as the name of a module has none? Then `re` itself is quick."""
    return _PLAIN.fullmatch(pattern) is not None


def fullmatch(pattern: str, text: str, budget: Budget) -> bool:
    """As `re.fullmatch`. Raises UserError for a pattern that is no regular expression, not supported, or too much."""
    budget.begin()
    return _run(_program(pattern), text, 0, budget=budget, pattern=pattern, end=len(text)) is not None


def match(pattern: str, text: str, budget: Budget) -> tuple[int, ...] | None:
    """As `re.match`: None, or where the group `idx` starts and ends in the first match, if there is such a group."""
    budget.begin()
    return _run(_program(pattern), text, 0, budget=budget, pattern=pattern)


@lru_cache(1 << 14)
def compiled(pattern: str) -> re.Pattern[str]:
    """As `re.compile`; UserError for what it does not take, and for what is too long."""
    if len(pattern) > LONGEST:
        raise UserError(f"`{format_untrusted(pattern)}`, which has {len(pattern)} characters; a pattern may have {LONGEST}")
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"`{format_untrusted(pattern)}`, which is no regular expression: {fault(error)}") from error


@lru_cache(512)
def _program(pattern: str) -> _Code:
    compiled(pattern)
    return _Parser(pattern).all()


def _run(code: _Code, text: str, start: int, *, budget: Budget, pattern: str, end: int | None = None) -> tuple[int, ...] | None:
    """Follow the program from `start`, rather the first way at each split: the positions marked on the first way through,
    that ends at `end` if it is given."""
    seen = set[tuple[int, int]]()
    todo: list[tuple[int, int, tuple[int, ...]]] = [(0, start, ())]
    while todo:
        at, position, marks = todo.pop()
        if (at, position) in seen:
            continue
        seen.add((at, position))
        budget.spend(pattern)
        if at < len(code):
            one = code[at]
            if isinstance(one, Split):
                todo += [(at + one.second, position, marks), (at + one.first, position, marks)]
            elif isinstance(one, Mark):
                todo.append((at + 1, position, (*marks, position)))
            elif (width := _width(one, text, position, budget, pattern)) is not None:
                todo.append((at + 1, position + width, marks))
        elif end in (None, position):
            return marks
    return None


def _width(one: Character | Look, text: str, position: int, budget: Budget, pattern: str) -> int | None:
    """How much of the text is taken here; None where it does not match."""
    if isinstance(one, Character):
        return one.width if one.test.match(text, position) else None
    starts, end = ((position,), None) if one.ahead else (range(position + 1), position)
    ways = (_run(one.program, text, start, budget=budget, pattern=pattern, end=end) for start in starts)
    return 0 if any(way is not None for way in ways) == one.wanted else None


class _Parser:
    """From a pattern that `re` takes to instructions. Distances are relative, so that parts can be put together."""

    def __init__(self, pattern: str) -> None:
        flags = _FLAGS.match(pattern)
        self._text = self._shown = pattern[flags.end() :] if flags else pattern
        self._flags = frozenset(flags[1]) if flags else frozenset[str]()
        self._at = self._depth = 0

    def all(self) -> _Code:
        code = self._alternatives()
        if self._at < len(self._text):
            raise self._unknown()
        return code

    def _alternatives(self) -> _Code:
        branches = [self._sequence()]
        while self._take("|"):
            branches.append(self._sequence())
        code = branches.pop()
        while branches:
            branch = branches.pop()
            code = self._bounded((Split(1, len(branch) + 2), *branch, _jump(len(code) + 1), *code))
        return code

    def _sequence(self) -> _Code:
        code: list[Instruction] = []
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            item = self._item()
            while repeat := self._matched(_REPEAT):
                item = self._repeated(item, repeat)
            code += item
        return self._bounded(tuple(code))

    def _item(self) -> _Code:
        if self._text[self._at] == "(":
            return self._group()
        for one in (_ESCAPE, _CLASS):
            if found := self._matched(one):
                return (self._character(found[0]),)
        if self._text[self._at] == "\\":
            raise self._unknown()
        self._at += 1
        return (self._character(self._text[self._at - 1]),)

    def _character(self, source: str) -> Character:
        return Character(_single(source, self._flags), 0 if source in _ANCHORS else 1)

    def _group(self) -> _Code:
        found, flags, self._depth = self._matched(_GROUP), self._flags, self._depth + 1
        if not found or self._text.startswith("?", self._at) or self._depth > _DEEPEST:
            raise self._unknown()
        name, on, off, look = found.groups()
        self._flags = self._flags.union(on or "").difference(off or "")
        code = self._alternatives()
        if not self._take(")"):
            raise self._unknown()
        self._flags, self._depth = flags, self._depth - 1
        if look:
            return (Look(code, ahead="<" not in look, wanted="=" in look),)
        return (Mark(), *code, Mark()) if name == "idx" else code

    def _repeated(self, code: _Code, repeat: re.Match[str]) -> _Code:
        if self._text.startswith("+", self._at):  # possessive: it never gives back, which is no set of texts to match
            raise self._unknown()
        sign, (low, comma, high, lazy) = repeat[0][0], repeat.groups()
        least = int(low or 0) if sign == "{" else int(sign == "+")
        most = (int(high) if high else None) if comma else least
        most = most if sign == "{" else 1 if sign == "?" else None
        if (len(code) + 1) * max(least, most or 0) > _MOST_INSTRUCTIONS:
            raise self._too_long()
        more = _loop(code, lazy=bool(lazy)) if most is None else ()
        for _ in range((most or least) - least):
            more = (_either(1, len(code) + len(more) + 1, lazy=bool(lazy)), *code, *more)
        return self._bounded(code * least + more)

    def _bounded(self, code: _Code) -> _Code:
        if len(code) > _MOST_INSTRUCTIONS:
            raise self._too_long()
        return code

    def _matched(self, one: re.Pattern[str]) -> re.Match[str] | None:
        found = one.match(self._text, self._at)
        self._at = found.end() if found else self._at
        return found

    def _take(self, sign: str) -> bool:
        here = self._text.startswith(sign, self._at)
        self._at += here
        return here

    def _unknown(self) -> UserError:
        return UserError(
            f"`{format_untrusted(self._shown)}`, which has at `{format_untrusted(self._text[self._at :])}` what is not "
            "supported in a pattern",
            hint="backreferences, possessive repeats, conditions and comments are not; name the modules one by one",
        )

    def _too_long(self) -> UserError:
        return UserError(f"`{format_untrusted(self._shown)}`, which repeats too much", hint="name the modules one by one")


def _jump(distance: int) -> Split:
    return Split(distance, distance)


def _either(first: int, second: int, *, lazy: bool) -> Split:
    return Split(second, first) if lazy else Split(first, second)


def _loop(code: _Code, *, lazy: bool) -> _Code:
    return (_either(1, len(code) + 2, lazy=lazy), *code, _jump(-len(code) - 1))


@lru_cache(4096)
def _single(source: str, flags: frozenset[str]) -> re.Pattern[str]:
    letters = "".join(sorted(flags))
    return re.compile(f"(?{letters}:{source})" if letters else source)
