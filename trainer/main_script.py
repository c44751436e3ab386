"""Refuse scripts that call `pretrain` without `if __name__ == "__main__":`.

Worker processes, which read data and write checkpoints, import the main script again. Each would begin a run of its own.
"""

from __future__ import annotations

import ast
import inspect
import multiprocessing
import sys
from pathlib import Path
from typing import Any

from formats.errors import UserError
from trainer.config import CheckpointConfig


def check(dataset: Any, checkpoint: CheckpointConfig) -> None:
    """Raise UserError in a worker process that imports the main script, and in a main script whose workers would train."""
    starts_workers = bool(getattr(dataset, "num_workers", 0) or checkpoint.save)
    is_worker = getattr(multiprocessing.current_process(), "_inheriting", False)  # true while a worker prepares itself
    if is_worker or (starts_workers and _called_on_import()):
        script = getattr(sys.modules["__main__"], "__file__", None)
        raise UserError(
            f"`{Path(script).name if script else 'the main script'}` calls `pretrain` whenever it is imported, and the worker "
            "processes of a run import it again",
            hint='put the call, and what comes before it, under `if __name__ == "__main__":`',
        )


def _called_on_import() -> bool:
    """Return whether the main script is executing a statement outside any `if`."""
    main = sys.modules["__main__"]
    line, script = _line_of(vars(main)), getattr(main, "__file__", None)
    if line is None or script is None:
        return False
    try:
        parsed = ast.parse(Path(script).read_bytes())
    except (OSError, SyntaxError, ValueError):  # not a Python file: workers cannot import it
        return False
    return not any(isinstance(node, ast.If) and node.lineno <= line <= (node.end_lineno or 0) for node in ast.walk(parsed))


def _line_of(module: dict[str, Any]) -> int | None:
    """Return the line that a module is executing; None if it is not being imported or run."""
    frame = inspect.currentframe()
    while frame and not (frame.f_code.co_name == "<module>" and frame.f_globals is module):
        frame = frame.f_back
    return frame.f_lineno if frame else None
