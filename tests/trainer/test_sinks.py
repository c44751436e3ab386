"""JSON lines, TensorBoard and Weights & Biases, read back by Python's json, TensorBoard and W&B themselves."""

from __future__ import annotations

import json
import math
import sys
import warnings
from dataclasses import asdict

import pytest

from formats.errors import UserError
from tests.trainer.test_metrics import step
from trainer.config import LoggerConfig
from trainer.metrics import evaluation
from trainer.sinks import FILE, JsonLines, open_sinks, read_records


def write(folder, iterations, *, done: int = 0, **changes) -> list[str]:
    sink = JsonLines(folder / FILE, done=done)
    for iteration in iterations:
        sink.log(step(iteration=iteration, **changes))
    sink.close()
    return (folder / FILE).read_text().splitlines()


def test_a_line_has_every_field_to_the_last_bit(tmp_path):
    record = step(loss=0.1 + 0.2, lr=1 / 3, grad_norm=5e-324)
    sink = JsonLines(tmp_path / FILE)
    sink.log(record)
    found = json.loads((tmp_path / FILE).read_text())  # before it is closed: lines are flushed
    sink.close()
    assert found == {"kind": "step", **asdict(record)}


def test_numbers_without_digits_are_strings_that_float_reads(tmp_path):
    [line] = write(tmp_path, [1], loss=math.nan, grad_norm=-math.inf)
    found = json.loads(line, parse_constant=pytest.fail)
    assert (found["loss"], found["grad_norm"]) == ("NaN", "-Infinity")
    [record] = read_records(tmp_path / FILE)
    assert math.isnan(record["loss"])
    assert record["grad_norm"] == -math.inf


def test_a_resumed_run_replaces_the_killed_runs_later_lines(tmp_path, capsys):
    straight = write(tmp_path / "straight", range(10, 60, 10))
    write(tmp_path / "killed", range(10, 50, 10))
    with (tmp_path / "killed" / FILE).open("a") as file:
        file.write('{"kind": "st')  # killed while it wrote
    assert write(tmp_path / "killed", [30, 40, 50], done=20) == straight
    said = capsys.readouterr().err
    assert said == f"note: {tmp_path / 'killed' / FILE}: 3 lines of steps after 20 dropped; they are computed again\n"


def test_a_resume_with_nothing_to_drop_says_nothing(tmp_path, capsys):
    write(tmp_path, [10, 20])
    assert len(write(tmp_path, [30], done=20)) == 3
    assert capsys.readouterr().err == ""


def test_a_line_that_is_no_record_is_named(tmp_path):
    lines = write(tmp_path, [1, 2])
    (tmp_path / FILE).write_text(f"{lines[0]}\nnonsense\n{lines[1]}\n")
    with pytest.raises(UserError) as caught:
        JsonLines(tmp_path / FILE, done=1)
    assert str(caught.value) == (
        f"`{tmp_path / FILE}`, line 2: `nonsense` is not a record of a run\n\nhint: remove the line, or choose another folder"
    )


def test_without_a_folder_or_tools_there_are_no_places():
    assert open_sinks(LoggerConfig(), None, settings={}).places == []


def test_tensorboard_has_megatrons_names(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TensorBoard's own, on import
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = LoggerConfig(tensorboard_dir=str(tmp_path))
    for done, iterations in ((0, (10, 20, 30)), (20, (30, 40))):
        sinks = open_sinks(logger, None, settings={"seed": 7}, done=done)
        for iteration in iterations:
            sinks.log(step(iteration=iteration, loss=float(iteration + done)))
        sinks.log(evaluation(iterations[-1], split="validation", loss=0.5))
        sinks.close()
    read = EventAccumulator(str(tmp_path)).Reload()
    assert {
        "lm loss",
        "learning-rate",
        "grad-norm",
        "throughput",
        "iteration-time",
        "lm loss validation",
        "lm loss validation ppl",
    } <= set(read.Tags()["scalars"])
    # Step 30 of the killed run is gone.
    assert [(point.step, point.value) for point in read.Scalars("lm loss")] == [(10, 10), (20, 20), (30, 50), (40, 60)]


def test_a_resumed_run_goes_on_in_the_same_wandb_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    logger = LoggerConfig(wandb_project="tiny", wandb_exp_name="first", wandb_mode="offline")
    ids = []
    for done in (0, 10):
        sinks = open_sinks(logger, tmp_path / "run", settings={"train": {"seed": 7}}, done=done)
        sinks.log(step(iteration=done + 10))
        sinks.close()
        ids.append((tmp_path / "run" / "wandb_run_id").read_text())
    assert ids[0] == ids[1]
    stored = list((tmp_path / "run" / "wandb").glob(f"offline-run-*/run-{ids[0].strip()}.wandb"))
    assert len(stored) == 2
    assert all(b"lm loss" in path.read_bytes() for path in stored)


@pytest.mark.parametrize(
    ("package", "setting", "install"),
    [("tensorboard", "tensorboard_dir", "tensorboard"), ("wandb", "wandb_project", "'mbtools[wandb]'")],
)
def test_a_missing_package_is_an_error_before_anything_is_opened(tmp_path, monkeypatch, package, setting, install):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError) as caught:
        open_sinks(LoggerConfig(**{setting: "x"}), tmp_path, settings={})
    assert str(caught.value) == (
        f"`logger.{setting}` is set, but the package `{package}` cannot be imported: import of {package} halted; None in "
        f"sys.modules\n\nhint: pip install {install}, or leave `logger.{setting}` out"
    )
    assert list(tmp_path.iterdir()) == []
