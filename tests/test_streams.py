"""Standard streams that are closed, full, or read by somebody who goes away."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SAYS = """
import os, sys
from converter.streams import prepare
from formats.errors import UserError
prepare()
descriptor = os.open("written", os.O_WRONLY | os.O_CREAT)
try:
    for _ in range(3):
        print("x" * 100_000, flush=True)
        print("note: é\\udcff", file=sys.stderr)
except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(1)
os.write(descriptor, b"the work")
sys.exit(7)
"""


def run(shell: str, folder, program: str = SAYS) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "P": sys.executable, "PROGRAM": program, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(["bash", "-c", shell], cwd=folder, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "shell",
    [
        '"$P" -c "$PROGRAM" >&-',
        '"$P" -c "$PROGRAM" >&- 2>&- <&-',
        'set -o pipefail; "$P" -c "$PROGRAM" | head -c 1',
        'set -o pipefail; "$P" -c "$PROGRAM" 2>&1 >&- | true',
        '"$P" -c "$PROGRAM" > /dev/null 2> /dev/full',
    ],
    ids=["no output", "no streams", "a reader that goes", "an error reader that goes", "full errors"],
)
def test_the_work_is_finished_with_its_own_exit_code(shell: str, tmp_path) -> None:
    done = run(shell, tmp_path)
    assert (tmp_path / "written").read_bytes() == b"the work"
    assert done.returncode == 7
    assert "Traceback" not in done.stderr


def test_a_result_that_there_is_no_room_for_is_an_error(tmp_path) -> None:
    done = run('"$P" -c "$PROGRAM" > /dev/full', tmp_path)
    assert done.returncode == 1
    assert done.stderr == (
        "error: cannot write to standard output: No space left on device\n\nhint: redirect it to a disk with room\n"
    )


@pytest.mark.parametrize("shell", ['"$P" -m converter families >&-', 'set -o pipefail; "$P" -m converter --help | true'])
def test_mbconvert_is_such_a_command(shell: str, tmp_path) -> None:
    done = run(shell, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_mbtrain_is_such_a_command(tmp_path) -> None:
    done = run('"$P" -m trainer nothing >&-', tmp_path)
    assert done.returncode == 2
    assert "No such command" in done.stderr
    assert run('"$P" -m trainer --help >&-', tmp_path).returncode == 0
