"""Jobs as NeMo-Run experiments, through NeMo-Run's own local executor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from formats.errors import UserError
from tests.trainer.jobs import AWKWARD, invoke


def test_without_nemo_run_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "nemo_run", None)
    with pytest.raises(UserError) as caught:
        invoke("--nemo-run", "llama_tiny", "--gpus-per-node", "4")
    assert str(caught.value) == "NeMo-Run is not installed\n\nhint: pip install 'mbtools[nemo-run]'"


# NeMo-Run warns on import and keeps its home in a global: it gets a process of its own.
LOCAL = """
import json, sys
from trainer.launch import Job, nemo

if __name__ == "__main__":
    out, words = json.loads(sys.argv[1])
    write = "import json, os, sys; open(sys.argv[1] + os.environ['RANK'], 'w').write(json.dumps(sys.argv[2:]))"
    job = Job(program=("-c", write, out, *words), name="tiny", gpus_per_node=2)
    place = nemo.executor(job, where="local")
    assert nemo.launch(nemo.script(job, where="local"), place, name="tiny", submit=True)
    job = Job(program=("-c", "raise SystemExit(3)"), name="bad", gpus_per_node=1)
    assert not nemo.launch(nemo.script(job, where="local"), place, name="bad", submit=True)
"""
FORMS = """
import json, sys
import fiddle
import nemo_run
from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer
from trainer.commands.launch import run_recipe
from trainer.launch import Job, nemo

words = json.loads(sys.argv[1])
stored = ZlibJSONSerializer().serialize(nemo.partial(run_recipe, "llama3_8b", words))
built = fiddle.build(fiddle.cast(nemo_run.Partial, ZlibJSONSerializer().deserialize(stored)))
assert built.func is run_recipe
assert built.keywords == {"recipe": "llama3_8b", "overrides": words}, built.keywords
limits = {"nodes": 4, "account": "team", "partition": "batch", "time": "01:30:00"}
job = Job(program=("-c", ""), name="tiny", env={"V": "x y"}, container="c", **limits)
place = nemo.executor(job, where="slurm")
assert (place.nodes, place.gpus_per_node, place.time, place.partition) == (4, 8, "01:30:00", "batch")
assert (place.signal, place.env_vars["V"], place.container_image, place.get_launcher().__class__.__name__) == (
    "TERM@300", "'x y'", "c", "Torchrun")
"""
NO_SBATCH = """
import os
from formats.errors import UserError
from trainer.launch import Job, nemo

job = Job(program=("-c", ""), name="tiny", account="team")
place = nemo.executor(job, where="slurm")
os.environ["PATH"] = "/nowhere"
try:
    nemo.launch(nemo.script(job, where="slurm"), place, name="tiny", submit=True)
except UserError as error:
    assert str(error).startswith("there is no `sbatch` on this machine"), error
else:
    raise AssertionError
"""
NO_ACCOUNT = """
from formats.errors import UserError
from trainer.launch import Job, nemo

try:
    nemo.executor(Job(program=("x",), name="tiny"), where="slurm")
except UserError as error:
    assert str(error) == "NeMo-Run's Slurm executor needs an account\\n\\nhint: --account NAME"
else:
    raise AssertionError
"""


@pytest.fixture(scope="module")
def nemo_run_imports(tmp_path_factory) -> None:
    env = {**os.environ, "NEMORUN_HOME": str(tmp_path_factory.mktemp("nemo"))}
    words = [sys.executable, "-W", "ignore", "-c", "import nemo_run"]
    result = subprocess.run(words, env=env, check=False, capture_output=True, text=True)
    if "No module named 'leptonai" in result.stderr:
        pytest.skip("NeMo-Run 0.11 needs leptonai<0.47, and a later one is installed")
    if "No module named 'nemo_run'" in result.stderr:
        pytest.skip("needs `pip install 'mbtools[nemo-run]'`")
    assert result.returncode == 0, result.stderr


@pytest.fixture
def with_nemo_run(tmp_path, nemo_run_imports):
    """Runs a program that uses NeMo-Run, at home in `tmp_path`."""
    env = {**os.environ, "HOME": str(tmp_path), "NEMORUN_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = str(Path(__file__).parents[2])

    def run(program: str, argument: object) -> None:
        (tmp_path / "program.py").write_text(program)
        words = [sys.executable, "-W", "ignore", str(tmp_path / "program.py"), json.dumps(argument)]
        done = subprocess.run(words, check=False, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    return run


def test_nemo_run_starts_the_program_on_every_rank_with_its_arguments_unchanged(with_nemo_run, tmp_path):
    with_nemo_run(LOCAL, [f"{tmp_path}/rank", AWKWARD])
    assert [json.loads((tmp_path / f"rank{rank}").read_text()) for rank in range(2)] == [list(AWKWARD)] * 2


def test_nemo_run_stores_a_recipe_and_its_overrides_and_slurms_numbers(with_nemo_run):
    with_nemo_run(FORMS, list(AWKWARD))


def test_nemo_run_on_slurm_wants_an_account(with_nemo_run):
    with_nemo_run(NO_ACCOUNT, None)


def test_nemo_run_on_slurm_wants_sbatch(with_nemo_run):
    with_nemo_run(NO_SBATCH, None)
