"""No message of ours carries a library's wording, which changes between its releases.

Read from the sources: what happens to an exception that may be a library's, where it is caught or handed to a function. It may
be chained, asked for its class, and read by attributes that are facts; its text may not get anywhere.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    [ROOT / "mbtools.py", *(path for room in ("formats", "converter", "trainer") for path in (ROOT / room).rglob("*.py"))]
)

FACTS = {
    "strerror", "errno", "filename", "lineno", "colno", "pos", "start", "position", "problem_mark", "context_mark", "name",
    "encoding", "verify_code", "failures", "exitcode", "sigval", "signum", "exit_code", "code", "get_first_failure", "told",
    "option_name", "ctx",
    "__traceback__", "__cause__", "__context__", "response", "returncode",
}  # fmt: skip
"""Attributes that are numbers, names and places."""

ASKS_FOR_FACTS = {
    "fault", "position", "missing_package", "code_location", "isinstance", "type", "getattr", "status_of", "words", "user_error",
    "_reason", "_malformed", "_hub_fault", "_unverified", "_why", "_in_template", "_final", "_cause", "_describe", "_number",
    "_hint", "not_saved", "not_resumed", "unreadable", "cannot_write", "refusal", "_has_user_code", "_megatron_message", "_skip",
    "_other", "_without", "extract_tb", "refuses_direct", "_is_kept", "__exit__",
}  # fmt: skip
"""Functions that take an exception. Those of ours are looked at here themselves, by the annotation of what they take."""

MEANT = {
    (
        "trainer/settings/refused.py",
        "_megatron_message",
    ): "what settings ask of others megatron-core alone knows; its words stand apart, and its version is pinned",
    ("trainer/checkpoints/causes.py", "_number"): "`[Errno 28]` is how a number comes from a process that writes for another",
    ("trainer/data/chat/chat_template.py", "_render"): "a template's own `raise_exception` speaks to the user of the template",
    ("converter/cli.py", "main"): "click's own errors about its own command line",
    ("formats/dcp_index.py", "_reason"): "of a KeyError its argument, which is a name from the file",
}
"""Where a text is passed on, and why."""


def ours() -> set[str]:
    """The names of our exception classes, whose texts are our words."""
    return {name for path in SOURCES for name in re.findall(r"^ *class (\w+Error)\b", path.read_text(), re.MULTILINE)}


OURS = ours()


def names_in(node: ast.AST | None) -> set[str]:
    """The last names of what is named in an expression: of `a.b | c` `b` and `c`."""
    if isinstance(node, ast.Attribute):
        return {node.attr}
    if isinstance(node, ast.Name):
        return {node.id}
    return set().union(*(names_in(child) for child in ast.iter_child_nodes(node))) if node is not None else set()


def caught(function: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Exceptions that may be a library's, by the name of the variable and where it holds."""
    for node in ast.walk(function):
        if isinstance(node, ast.ExceptHandler) and node.name and not names_in(node.type) <= OURS:
            for line in node.body:
                yield node.name, line
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            for arg in (*node.args.args, *node.args.kwonlyargs):
                kinds = set() if isinstance(arg.annotation, ast.Subscript) else names_in(arg.annotation)  # of many, or of classes
                if any(kind.endswith(("Error", "Exception", "Exceptions")) for kind in kinds - OURS):
                    for line in node.body if isinstance(node.body, list) else [node.body]:
                        yield arg.arg, line


def uses(variable: str, scope: ast.AST) -> Iterator[ast.AST]:
    """Where the exception goes that is neither chained nor asked for a fact."""
    parents = {child: parent for parent in ast.walk(scope) for child in ast.iter_child_nodes(parent)}
    for node in ast.walk(scope):
        if not isinstance(node, ast.Name) or node.id != variable or isinstance(node.ctx, ast.Store):
            continue
        parent = parents.get(node)
        if isinstance(parent, ast.Attribute) and parent.attr in FACTS:
            continue
        if isinstance(parent, _HANDED_ON):
            continue
        if is_known_to_be_ours(node, parents):
            continue
        if isinstance(parent, ast.Call) and names_in(parent.func) & ASKS_FOR_FACTS:
            continue
        yield node


_HANDED_ON = (ast.Raise, ast.Compare, ast.Return, ast.List, ast.Tuple, ast.Assign, ast.BoolOp, ast.UnaryOp, ast.If)


def is_known_to_be_ours(node: ast.Name, parents: dict[ast.AST, ast.AST]) -> bool:
    """In `… if isinstance(error, OurError) else …`."""
    above: ast.AST | None = node
    while above is not None:
        if isinstance(above, ast.IfExp) and isinstance(above.test, ast.Call) and names_in(above.test.func) == {"isinstance"}:
            return names_in(above.test.args[1]) <= OURS
        above = parents.get(above)
    return False


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def passed_on(path: Path) -> set[tuple[str, str, int]]:
    file = str(path.relative_to(ROOT))
    passed: set[tuple[str, str, int]] = set()
    for function in functions(ast.parse(path.read_text())):
        for variable, scope in caught(function):
            passed |= {(file, function.name, node.lineno) for node in uses(variable, scope)}
    return passed


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_text_of_an_exception_of_a_library_goes_nowhere(path: Path) -> None:
    assert not {use for use in passed_on(path) if (use[0], use[1]) not in MEANT}


def test_every_exception_to_that_is_needed() -> None:
    needed = {(file, function) for path in SOURCES for file, function, _ in passed_on(path)}
    assert not MEANT.keys() - needed


@pytest.mark.parametrize(
    "line",
    ['raise UserError(f"bad: {error}")', "raise UserError(str(error))", "say(error.args[0])", 'x = "%s" % error', "f(error)"],
)
def test_what_passes_a_text_on_is_found(line: str) -> None:
    tree = ast.parse(f"def f():\n    try:\n        pass\n    except ValueError as error:\n        {line}\n")
    ((variable, scope),) = caught(tree)
    assert list(uses(variable, scope))


def texts(tree: ast.AST) -> Iterator[str]:
    """What errors say, their hints included; a value in the text is `…`."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        if names_in(call.func) & {*OURS, "UsageError"}:
            for node in (*call.args, *(part.value for part in call.keywords)):
                yield "".join(_plain(part) for part in ast.walk(node) if isinstance(part, (ast.Constant, ast.FormattedValue)))


def _plain(node: ast.Constant | ast.FormattedValue) -> str:
    return "…" if isinstance(node, ast.FormattedValue) else node.value if isinstance(node.value, str) else ""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_errors_say_it_as_strangers_do(path: Path) -> None:
    """Not "8, which is no multiple of 3", but "8, which is not divisible by 3"."""
    odd = [text for text in texts(ast.parse(path.read_text())) if ODD.search(text)]
    assert not odd


ODD = re.compile(
    r"(?<!there )\b(is|are) (no\b(?! longer)|none\b)|is no multiple|do not divide|, does not divide|cannot be told\b"
    r"|\b(stands|lies) (at|in|on|inside)\b"
)


@pytest.mark.parametrize(
    ("text", "odd"),
    [
        ('UserError(f"`{name}` is no folder")', True),
        ('UserError("8, which is no multiple of 3", hint="x")', True),
        ('UserError("x", hint=f"it is {n}" + " no more, and the run stands at step 3")', True),
        ('UserError("`x` is not a folder", hint="there is no recipe: it is no longer there")', False),
    ],
)
def test_odd_words_are_found(text: str, odd: bool) -> None:
    assert any(ODD.search(message) for message in texts(ast.parse(text))) is odd
