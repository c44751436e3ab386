"""`python -m trainer` and `python -m converter`, forked from a process that has imported torch: a start costs no seconds.

Tests of what a start itself does (imports, signals, torchrun) start a Python instead.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.ranks import LONGEST, check_warm, warm

RANK_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def run_module(
    module: str, *words: str, said: str = "", cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """What `python -m MODULE WORDS…` answers that hears `said` on stdin; `env` is added to the environment."""
    with tempfile.TemporaryDirectory() as name:
        files = [Path(name) / stream for stream in ("stdin", "stdout", "stderr")]
        files[0].write_text(said)
        context = (str(cwd) if cwd else None, {**os.environ, **(env or {})}, [str(file) for file in files])
        process = warm().Process(target=_run, args=(module, words, *context))
        process.start()
        process.join(LONGEST)
        code = process.exitcode
        if code is None:
            process.kill()
            process.join()
        return subprocess.CompletedProcess([module, *words], code, *(file.read_text() for file in files[1:]))  # type: ignore[arg-type]


def expected_memory(*words: object) -> int:
    """The bytes that a dry run of `mbconvert WORDS…` expects to take at most, in a process that has taken no more before."""
    command = [sys.executable, "-m", "converter", *map(str, words), "--dry-run", "--json"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(answer.stdout)["peak_memory"]


def _run(module: str, words: tuple[str, ...], cwd: str | None, env: dict[str, str], files: list[str]) -> None:
    for number, (file, mode) in enumerate(zip(files, (os.O_RDONLY, *[os.O_WRONLY | os.O_CREAT] * 2), strict=True)):
        os.dup2(os.open(file, mode), number)
    sys.stdin, sys.stdout, sys.stderr = (open(number, mode) for number, mode in ((0, "r"), (1, "w"), (2, "w")))  # noqa: PTH123, SIM115
    os.environ.clear()
    os.environ.update({name: value for name, value in env.items() if name not in RANK_NAMES})
    if cwd:
        os.chdir(cwd)
    check_warm()
    sys.argv = [module, *words]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
