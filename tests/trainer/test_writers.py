"""TensorBoard and Weights & Biases, read back by themselves."""

from __future__ import annotations

import sys
import warnings

import pytest
import wandb

from formats.errors import UserError
from tests.trainer.test_metrics import step
from trainer.config import LoggerConfig
from trainer.logging.records import evaluation
from trainer.logging.writers import Writers, curves, open_writers


def test_without_a_folder_or_tools_there_are_no_writers():
    assert open_writers(LoggerConfig(), None, settings={}) == Writers([], [])


def test_tensorboard_has_megatrons_names(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TensorBoard's own, on import
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = LoggerConfig(tensorboard_dir=str(tmp_path))
    for done, iterations in ((0, (10, 20, 30)), (20, (30, 40))):
        writers = open_writers(logger, None, settings={"seed": 7}, done=done)
        for iteration in iterations:
            writers.log(step(iteration=iteration, loss=float(iteration + done)))
        writers.log(evaluation(iterations[-1], split="validation", loss=0.5))
        writers.close()
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


def test_what_layers_report_has_megatrons_names():
    record = step(
        layer_metrics={"load_balancing_loss": 1.5, "max_expert_load": 2.0, "dropped_tokens": 0.5, "mtp_1_loss": 5.0},
        per_layer={"load_balancing_loss": [0.0, 1.5]},
    )
    written = curves(record)
    expected = {"load_balancing_loss": 1.5, "max-expert-load": 2.0, "dropped-tokens": 0.5, "mtp_1 loss": 5.0}
    expected |= {"moe/load_balancing_loss_layer_0": 0.0, "moe/load_balancing_loss_layer_1": 1.5}
    assert written == {**curves(step()), **expected}


def test_a_resumed_run_goes_on_in_the_same_wandb_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    logger = LoggerConfig(wandb_project="tiny", wandb_exp_name="first", wandb_mode="offline")
    ids = []
    for done in (0, 10):
        writers = open_writers(logger, tmp_path / "run", settings={"train": {"seed": 7}}, done=done)
        writers.log(step(iteration=done + 10))
        writers.close()
        ids.append((tmp_path / "run" / "wandb_run_id").read_text())
    wandb.teardown()  # what `finish` leaves to a process of its own is written
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
        open_writers(LoggerConfig(**{setting: "x"}), tmp_path, settings={})
    assert str(caught.value) == (
        f"`logger.{setting}` is set, but the package `{package}` cannot be imported: "
        f"the package `{package}` is not installed\n\nhint: pip install {install}, or leave `logger.{setting}` out"
    )
    assert list(tmp_path.iterdir()) == []
