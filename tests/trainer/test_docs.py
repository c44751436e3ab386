"""docs/training.md: the blocks that begin with `# runs in the tests` do."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(
    r"^```bash\n# runs in the tests\n(.+?)^```", (ROOT / "docs" / "training.md").read_text(), re.MULTILINE | re.DOTALL
)
PROGRAMS = {"mbtrain": "trainer", "mbconvert": "converter"}
PROLOGUE = "set -eu\n" + "".join(f'{name}() {{ "{sys.executable}" -m {module} "$@"; }}\n' for name, module in PROGRAMS.items())
"""The commands of this checkout, wherever it is installed."""


def _bash(block, folder):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        ["bash", "-c", PROLOGUE + block], cwd=folder, env=env, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What each block said, and the folder they ran in."""
    folder = tmp_path_factory.mktemp("newcomer")
    return folder, [_bash(block, folder) for block in BLOCKS]


def test_the_pages_commands_do_what_it_says(told):
    folder, (data, there_and_back, checkpoints) = told
    assert {"corpus.bin", "corpus.idx", "trained", "megatron"} <= {path.name for path in folder.iterdir()}
    assert "saved run/iter_0000002" in data
    assert "loaded 27 of 27 tensors" in there_and_back
    assert "resumed kept/iter_0000002: step 2" in checkpoints
    assert (folder / "kept" / "curves.png").stat().st_size > 0
