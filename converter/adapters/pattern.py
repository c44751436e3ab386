"""Match regular expressions from untrusted files as Python's `re` matches them, in bounded time.

`re` tries every way to divide a text among nested repeats, which takes exponential time for some patterns. Here no instruction
is tried twice at the same position of the text (the method of RE2's `bitstate.cc`), so a match takes at most program length ×
text length steps. Both find the same matches: without backreferences, what follows a step does not depend on the steps before it.
Single characters, character classes and anchors are matched by `re` itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from formats.errors import UserError, format_untrusted
from formats.faults import fault

LONGEST = 4096
"""The most characters of a pattern. Lists of modules in patterns by PEFT, Unsloth or ms-swift have some hundreds."""

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
    """The steps that all matches of one configuration may take together: a reserve, and a further allowance for each match."""

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
    """One character that `test` matches, or with `width` 0 an anchor."""

    test: re.Pattern[str]
    width: int = 1


@dataclass(frozen=True, slots=True)
class Split:
    """Continue at either of two relative addresses, the first with priority."""

    first: int
    second: int


@dataclass(frozen=True, slots=True)
class Look:
    """A lookahead or lookbehind: continue if whether `program` matches equals `wanted`."""

    program: tuple[Instruction, ...]
    ahead: bool
    wanted: bool


@dataclass(frozen=True, slots=True)
class Mark:
    """Record the position in the text."""


Instruction = Character | Split | Look | Mark
_Code = tuple[Instruction, ...]


def is_plain(pattern: str) -> bool:
    """Return whether a pattern has neither repeats nor alternatives, like the name of a module: `re` is fast for these.

    >>> is_plain("layers.1.self_attn.q_proj"), is_plain(r".*\\.(q|v)_proj")
    (True, False)
    """
    return _PLAIN.fullmatch(pattern) is not None


def fullmatch(pattern: str, text: str, budget: Budget) -> bool:
    """Return whether `re.fullmatch` would match. Raises UserError for a pattern that is invalid, unsupported, or too expensive.

    >>> fullmatch(r".*\\.(q|v)_proj", "model.layers.0.self_attn.q_proj", Budget())
    True
    """
    budget.begin()
    return _run(_program(pattern), text, 0, budget=budget, pattern=pattern, end=len(text)) is not None


def match(pattern: str, text: str, budget: Budget) -> tuple[int, ...] | None:
    """Return None if `re.match` would not match, otherwise the span of the group `idx`: empty without such a group.

    >>> match(r".*\\.(?P<idx>\\d+)\\.", "model.layers.11.mlp", Budget())
    (13, 15)
    """
    budget.begin()
    return _run(_program(pattern), text, 0, budget=budget, pattern=pattern)


@lru_cache(1 << 14)
def compiled(pattern: str) -> re.Pattern[str]:
    """Return `re.compile(pattern)`. Raises UserError for a pattern that is invalid or too long."""
    if len(pattern) > LONGEST:
        raise UserError(f"`{format_untrusted(pattern)}`, which has {len(pattern)} characters; a pattern may have {LONGEST}")
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"`{format_untrusted(pattern)}`, which is not a regular expression: {fault(error)}") from error


@lru_cache(512)
def _program(pattern: str) -> _Code:
    compiled(pattern)
    return _Parser(pattern).all()


def _run(code: _Code, text: str, start: int, *, budget: Budget, pattern: str, end: int | None = None) -> tuple[int, ...] | None:
    """Run the program from `start` of the text and return the marked positions of the first match, or None.

    At each split the first branch has priority. With `end`, only a match that ends there counts.
    """
    seen = set[tuple[int, int]]()
    stack: list[tuple[int, int, tuple[int, ...]]] = [(0, start, ())]
    while stack:
        address, position, marks = stack.pop()
        if (address, position) in seen:
            continue
        seen.add((address, position))
        budget.spend(pattern)
        if address < len(code):
            instruction = code[address]
            if isinstance(instruction, Split):
                stack += [(address + instruction.second, position, marks), (address + instruction.first, position, marks)]
            elif isinstance(instruction, Mark):
                stack.append((address + 1, position, (*marks, position)))
            elif (width := _width(instruction, text, position, budget, pattern)) is not None:
                stack.append((address + 1, position + width, marks))
        elif end in (None, position):
            return marks
    return None


def _width(instruction: Character | Look, text: str, position: int, budget: Budget, pattern: str) -> int | None:
    """Return how many characters an instruction consumes at `position`; None if it does not match."""
    if isinstance(instruction, Character):
        return instruction.width if instruction.test.match(text, position) else None
    starts, end = ((position,), None) if instruction.ahead else (range(position + 1), position)
    matches = (_run(instruction.program, text, start, budget=budget, pattern=pattern, end=end) for start in starts)
    return 0 if any(match is not None for match in matches) == instruction.wanted else None


class _Parser:
    """Compile a pattern that `re` accepts to instructions. Addresses are relative, so that parts can be concatenated."""

    def __init__(self, pattern: str) -> None:
        flags = _FLAGS.match(pattern)
        self._text = self._pattern = pattern[flags.end() :] if flags else pattern
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
        for kind in (_ESCAPE, _CLASS):
            if token := self._matched(kind):
                return (self._character(token[0]),)
        if self._text[self._at] == "\\":
            raise self._unknown()
        self._at += 1
        return (self._character(self._text[self._at - 1]),)

    def _character(self, source: str) -> Character:
        return Character(_single(source, self._flags), 0 if source in _ANCHORS else 1)

    def _group(self) -> _Code:
        group, flags, self._depth = self._matched(_GROUP), self._flags, self._depth + 1
        if not group or self._text.startswith("?", self._at) or self._depth > _DEEPEST:
            raise self._unknown()
        name, on, off, look = group.groups()
        self._flags = self._flags.union(on or "").difference(off or "")
        code = self._alternatives()
        if not self._take(")"):
            raise self._unknown()
        self._flags, self._depth = flags, self._depth - 1
        if look:
            return (Look(code, ahead="<" not in look, wanted="=" in look),)
        return (Mark(), *code, Mark()) if name == "idx" else code

    def _repeated(self, code: _Code, repeat: re.Match[str]) -> _Code:
        if self._text.startswith("+", self._at):  # possessive: it never backtracks, and this matcher always does
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

    def _matched(self, token: re.Pattern[str]) -> re.Match[str] | None:
        """Consume a token, if it is next."""
        matched = token.match(self._text, self._at)
        self._at = matched.end() if matched else self._at
        return matched

    def _take(self, sign: str) -> bool:
        """Consume one character, if it is next."""
        taken = self._text.startswith(sign, self._at)
        self._at += taken
        return taken

    def _unknown(self) -> UserError:
        return UserError(
            f"`{format_untrusted(self._pattern)}`, which has at `{format_untrusted(self._text[self._at :])}` what is not "
            "supported in a pattern",
            hint="backreferences, possessive repeats, conditions and comments are not; name the modules one by one",
        )

    def _too_long(self) -> UserError:
        return UserError(f"`{format_untrusted(self._pattern)}`, which repeats too much", hint="name the modules one by one")


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
