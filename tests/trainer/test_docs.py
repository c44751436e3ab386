"""docs/training.md and docs/finetuning.md: the blocks that begin with `# runs in the tests` do."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _blocks(page: str) -> list[str]:
    text = (ROOT / "docs" / page).read_text()
    return re.findall(r"^```bash\n# runs in the tests\n(.+?)^```", text, re.MULTILINE | re.DOTALL)


PROGRAMS = {"mbtrain": "trainer", "mbconvert": "converter"}
PROLOGUE = "set -eu\n" + "".join(f'{name}() {{ "{sys.executable}" -m {module} "$@"; }}\n' for name, module in PROGRAMS.items())
"""The commands of this checkout, wherever it is installed."""


def _bash(block, folder):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        ["bash", "-c", PROLOGUE + block], cwd=folder, env=env, capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def _run(page, folder):
    """What each block said, and the folder they ran in."""
    return folder, [_bash(block, folder) for block in _blocks(page)]


@pytest.mark.slow
def test_the_commands_of_training_do_what_it_says(tmp_path):
    folder, (data, there_and_back, checkpoints) = _run("training.md", tmp_path)
    assert {"corpus.bin", "corpus.idx", "trained", "megatron"} <= {path.name for path in folder.iterdir()}
    assert "saved run/iter_0000002" in data
    assert "loaded 27 of 27 tensors" in there_and_back
    assert "resumed kept/iter_0000002: step 2" in checkpoints
    assert (folder / "kept" / "curves.png").stat().st_size > 0


@pytest.mark.slow
def test_the_commands_of_fine_tuning_do_what_it_says(tmp_path):
    folder, (tuned, packed, converted) = _run("finetuning.md", tmp_path)
    assert "100 examples of 1 file" in tuned
    assert "LoRA: " in tuned
    assert "% filled" in packed
    assert "done: " in converted
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in (folder / "peft").iterdir()}
    assert (folder / "merged" / "model.safetensors").exists()


SMALLER = """
config.train.train_iters, config.train.global_batch_size, config.dataset.sequence_length = 2, 2, 16
config.mixed_precision, config.validation.eval_iters, config.checkpoint.save = "fp32", 0, "run"
"""


def _scripts():
    """The Python examples that train, with settings for a CPU; names of weights stand for a small model here."""
    for page in ("README.md", "docs/training.md"):
        for code in re.findall(r"^```python\n(.+?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL):
            if "pretrain(config" in code:
                small = "".join(f"    {line}\n" for line in SMALLER.strip().splitlines())
                program = re.sub(r'from_hf_pretrained\(".*?"\)', 'from_hf_pretrained("model")', code)
                yield page, program.replace("    pretrain(config", f"{small}    pretrain(config")


def _python(code, folder):
    """A script with this text, run as people run it."""
    (folder / "train.py").write_text(code)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "train.py"], cwd=folder, env=env, capture_output=True, text=True, timeout=1800, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/training.md"])
def test_the_python_examples_run_as_scripts(page, tmp_path, model_folder):
    shutil.copytree(model_folder(), tmp_path / "model")
    done = _python(dict(_scripts())[page], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "saved run/iter_0000002" in done.stderr


@pytest.mark.slow
def test_a_script_without_a_guard_that_nobody_can_see_before_says_so_when_it_is_imported_again(tmp_path, model_folder):
    shutil.copytree(model_folder(), tmp_path / "model")
    done = _python(dict(_scripts())["README.md"].replace('if __name__ == "__main__":', "if True:"), tmp_path)
    assert done.returncode != 0
    assert "UserError: `the main script` calls `pretrain` whenever it is imported" in done.stderr
