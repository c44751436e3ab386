"""Scripts that call `pretrain` whenever they are imported.

Processes that a run starts, to read data and to write checkpoints, import the main script again. Each would begin a run of its
own, and end without doing its work.
"""

from __future__ import annotations

import ast
import inspect
import multiprocessing
import sys
from pathlib import Path
from typing import Any

from formats.errors import UserError
from trainer.config import RunConfig


def check(config: RunConfig) -> None:
    """Raise UserError in a process that imports the main script again, and in the program where one that the run starts would."""
    again = getattr(multiprocessing.current_process(), "_inheriting", False)  # as long as it prepares itself
    starts_others = bool(getattr(config.dataset, "num_workers", 0) or config.checkpoint.save)
    if again or (starts_others and _called_on_import()):
        script = getattr(sys.modules["__main__"], "__file__", None)
        raise UserError(
            f"`{Path(script).name if script else 'the main script'}` calls `pretrain` whenever it is imported, and processes "
            "that a run starts import it again",
            hint='put the call, and what comes before it, under `if __name__ == "__main__":`',
        )


def _called_on_import() -> bool:
    """Is the main script at a statement that no `if` guards?"""
    main = sys.modules["__main__"]
    line, script = _line_of(vars(main)), getattr(main, "__file__", None)
    if line is None or script is None:
        return False
    try:
        parsed = ast.parse(Path(script).read_bytes())
    except (OSError, SyntaxError, ValueError):  # not a file of Python: nobody can import it again
        return False
    return not any(isinstance(one, ast.If) and one.lineno <= line <= (one.end_lineno or 0) for one in ast.walk(parsed))


def _line_of(module: dict[str, Any]) -> int | None:
    """The line that a module has come to, while it is imported or run; None where it is done."""
    frame = inspect.currentframe()
    while frame and not (frame.f_code.co_name == "<module>" and frame.f_globals is module):
        frame = frame.f_back
    return frame.f_lineno if frame else None
