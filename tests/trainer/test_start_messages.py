"""What a run says: eight lines before its first step, a line after it, a record for every step, and at once when it is asked to
stop."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import models
from tests.converter.family_suite import small_model
from tests.trainer import small
from tests.trainer.chat import packed


class Interrupted(small.History):
    """Asks to stop in the first step, and notes how much was said until then and at once."""

    def __init__(self, log: Path) -> None:
        super().__init__()
        self.log, self.told = log, ""

    def on_step(self, run: Any, step: Any) -> None:
        """A signal is handled before the next line of Python; a second one would end the run."""
        if run.progress.iteration > 1:
            return
        before = self.log.read_text()
        os.kill(os.getpid(), signal.SIGINT)
        self.told = self.log.read_text().removeprefix(before)


def _run(folder: str, log: str, changes: dict[str, Any], interrupted: bool = False) -> tuple[str, str, int]:
    """What this rank said, what of it came with the signal, and the exit status."""
    import trainer.warnings_filter  # noqa: F401 - as the commands do
    from trainer.loop import pretrain

    path = Path(f"{log}-{os.environ['RANK']}")
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    callback, status = Interrupted(path), 0
    try:
        pretrain(small.settings(Path(folder), **changes), callbacks=[callback] if interrupted else [])
    except SystemExit as ended:
        status = int(ended.code or 0)
    return path.read_text(), callback.told, status


@pytest.fixture
def plan(tmp_path: Path) -> dict[str, Any]:
    return {"train__train_iters": 3, "scheduler__lr_warmup_iters": 1, "checkpoint__save": str(tmp_path / "run")}


def test_a_run_says_what_it_is_before_its_first_step(ranks: Any, model_folder: Any, tmp_path: Path, plan: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    folder = str(model_folder("padded_vocab"))
    changes = {**plan, "model__tensor_model_parallel_size": 2, "checkpoint__save_interval": 2}
    (silent, *_), (output, *_) = ranks.run(_run, 2, folder, str(tmp_path / "log"), changes)
    assert silent == ""
    lines = output.splitlines()
    (first,) = (number for number, line in enumerate(lines) if line.startswith("model "))
    assert [line.split()[0] for line in lines[first : first + 8]] == [
        "model", "layout", "device", "batch", "schedule", "data", "checkpoints", "memory",
    ]  # fmt: skip
    table = dict(line.split(maxsplit=1) for line in lines[first : first + 8])
    parameters = AutoModelForCausalLM.from_pretrained(folder).num_parameters()
    assert table["model"] == f"llama, {parameters:,} parameters, 4 layers of 64"
    assert table["layout"] == "2 ranks, TP 2"
    assert table["device"] == "CPU, fp32"
    assert table["batch"] == "128 tokens per step: 4 sequences of 32, 2 microbatches of 2 on each rank"
    assert table["schedule"] == "3 steps, 384 tokens; learning rate 0.003 to 0.0003, cosine after 1 step of warm-up"
    assert table["data"] == "FixedTokens; no validation"
    assert table["checkpoints"] == f"{tmp_path / 'run'}, every 2 steps and at the end"
    assert table["memory"].endswith(" MB in the fullest of 2 processes, estimated")
    assert [line.split()[1] for line in lines[first + 8 :] if line.startswith("step ")] == ["1/3", "3/3"]


def test_a_run_says_before_its_first_step_how_often_it_reads_its_data_and_that_nothing_is_saved(
    ranks: Any, model_folder: Any, tmp_path: Path, plan: dict[str, Any]
) -> None:
    changes = {**plan, "checkpoint__save": None, "dataset": packed.Given(count=5, packed=False)}
    ((output, *_),) = ranks.run(_run, 1, str(model_folder("gqa")), str(tmp_path / "log"), changes)
    before, _, _ = output.partition("step 1/3")
    assert "an example a row, 2.4 epochs of 5 samples; no validation\n" in before
    assert re.search(r"^checkpoints +nothing is saved: `checkpoint.save` is not set$", before, re.MULTILINE)


@pytest.mark.parametrize(("times", "words"), [(0.5, "0.5"), (9.94, "9.9"), (32_000, "32,000")])
def test_many_epochs_are_a_number_that_one_can_read(times: float, words: str) -> None:
    """As fine-tuning 40 examples with the settings of a recipe is."""
    from trainer.config import TrainingConfig
    from trainer.logging import summary

    class Examples:
        per_epoch = 100

    train = TrainingConfig(train_iters=round(100 * times), global_batch_size=1)
    assert summary._epochs(train, Examples()) == f", {words} epochs of 100 samples"


@pytest.mark.parametrize(("family", "kinds"), [("nemotron_h", "ME*-"), ("llama", "*-*-*-*-")])
def test_a_hybrid_says_its_layout_and_the_kinds_of_its_layers(family, kinds, ranks, tmp_path, plan) -> None:
    folder = models.save(small_model(family, dtype="float32"), tmp_path / "hf")
    changes = {**plan, "model__layout": "hybrid"}
    ((output, *_),) = ranks.run(_run, 1, str(folder), str(tmp_path / "log"), changes)
    (model,) = (line for line in output.splitlines() if line.startswith("model "))
    assert model.endswith(f"4 layers of 64, layout hybrid: {kinds}")


def test_every_step_is_in_the_metrics_whatever_the_interval_of_lines(
    ranks: Any, model_folder: Any, tmp_path: Path, plan: dict[str, Any]
) -> None:
    history = ranks.run(small.train, 1, str(model_folder()), {**plan, "logger__log_interval": 3})[0]
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in records] == [1, 2, 3]
    assert [record["loss"] for record in records] == history.losses
    assert [record["grad_norm"] for record in records] == history.grad_norms
    assert all(0 <= record["data_wait"] <= 1 for record in records)


def test_ctrl_c_is_answered_at_once(ranks: Any, model_folder: Any, tmp_path: Path, plan: dict[str, Any]) -> None:
    ((output, at_once, status),) = ranks.run(_run, 1, str(model_folder()), str(tmp_path / "log"), plan, True)
    assert at_once == "\nSIGINT: stopping after this step; Ctrl-C again ends it now, and nothing is saved\n"
    assert status == 130
    assert "stopping after step 2" in output


def _processes_left(folder: str, changes: dict[str, Any]) -> list[str]:
    """What is alive after a run, where garbage is never collected: at exit Python waits for it, and it ignores signals."""
    import gc
    import multiprocessing

    from trainer.loop import pretrain

    gc.disable()
    config = small.settings(Path(folder), **changes)
    config.dataset.num_workers = 1
    pretrain(config, callbacks=[small.History()])
    return [process.name for process in multiprocessing.active_children()]


def test_processes_that_read_end_with_their_run(ranks: Any, model_folder: Any, plan: dict[str, Any]) -> None:
    changes = {**plan, "checkpoint__save": None, "train__exit_interval": 1}
    assert ranks.run(_processes_left, 1, str(model_folder()), changes) == [[]]
