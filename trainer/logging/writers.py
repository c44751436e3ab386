"""Write records to `metrics.jsonl` in the run's folder, to TensorBoard and to Weights & Biases, under the names that the users of
each expect. The caller opens writers on one rank.
"""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from formats.errors import UserError
from formats.faults import fault
from trainer.config import LoggerConfig
from trainer.logging.metrics import GIB
from trainer.logging.records import FILE, Evaluation, JsonLines, Record, Sample, Step

_WANDB_ID = "wandb_run_id"


class Writer(Protocol):
    """A file or a service that records are written to."""

    def log(self, record: Record) -> None: ...

    def close(self) -> None: ...


@dataclass
class Writers:
    """All writers of a run."""

    every_step: list[Writer]
    """Write the record of each step."""

    every_interval: list[Writer]
    """Write the record of each logged interval."""

    def log(self, record: Record) -> None:
        """Write an evaluation or a sample, flushed where the writer can flush."""
        for writer in (*self.every_step, *self.every_interval):
            writer.log(record)

    def log_step(self, record: Step) -> None:
        """Write the record of one step to `metrics.jsonl`."""
        for writer in self.every_step:
            writer.log(record)

    def log_interval(self, record: Step) -> None:
        """Write the record of an interval to the services that draw curves."""
        for writer in self.every_interval:
            writer.log(record)

    def close(self) -> None:
        """Flush and close every writer. Closing twice changes nothing."""
        for writers in (self.every_interval, self.every_step):
            while writers:
                writers.pop().close()


def open_writers(logger: LoggerConfig, run_dir: Path | None, *, settings: dict[str, Any], done: int = 0) -> Writers:
    """Open what `logger` asks for, and `metrics.jsonl` in `run_dir` if that is given.

    TensorBoard and Weights & Biases keep `settings` beside the curves. `done` is the number of steps before a resume: records of
    later steps, which a killed run wrote, are dropped from `metrics.jsonl` and hidden in TensorBoard, since those steps are
    computed again. Raises UserError if a package is missing, before anything is opened.
    """
    if logger.tensorboard_dir:
        _need("tensorboard", setting="tensorboard_dir", install="tensorboard")
    if logger.wandb_project:
        _need("wandb", setting="wandb_project", install="'mbtools[wandb]'")
    lines: list[Writer] = [] if run_dir is None else [JsonLines(run_dir / FILE, done=done)]
    services: list[Writer] = []
    if logger.tensorboard_dir:
        services.append(TensorBoard(Path(logger.tensorboard_dir), settings=settings, done=done))
    if logger.wandb_project:
        services.append(WeightsAndBiases(logger, run_dir, settings=settings, resume=done > 0))
    return Writers(lines, services)


def _need(package: str, *, setting: str, install: str) -> None:
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            f"`logger.{setting}` is set, but the package `{package}` cannot be imported: {fault(error)}",
            hint=f"pip install {install}, or leave `logger.{setting}` out",
        ) from error


class TensorBoard:
    """Write scalars under Megatron-LM's names; the step is the iteration."""

    def __init__(self, folder: Path, *, settings: dict[str, Any], done: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - only if asked for

        self._writer = SummaryWriter(str(folder), purge_step=done + 1 if done else None)
        self._writer.add_text("settings", f"```json\n{json.dumps(settings, indent=2, default=str)}\n```", done)

    def log(self, record: Record) -> None:
        for name, value in curves(record).items():
            self._writer.add_scalar(name, value, record.iteration)
        if isinstance(record, Sample):
            self._writer.add_text("samples", f"{record.prompt}\n\n---\n\n{record.text}", record.iteration)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Write the same curves to a run whose id is kept in `run_dir`, so that a resumed run continues it.

    The x axis is `iteration`, since W&B's own step cannot go back: after a resume from an older checkpoint, the steps computed
    twice are shown twice.
    """

    def __init__(self, logger: LoggerConfig, run_dir: Path | None, *, settings: dict[str, Any], resume: bool) -> None:
        import wandb  # noqa: PLC0415 - only if asked for

        folder = logger.wandb_save_dir or (str(run_dir) if run_dir else None)
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
        id_file = run_dir / _WANDB_ID if run_dir else None
        try:
            self._run = wandb.init(
                project=logger.wandb_project,
                name=logger.wandb_exp_name,
                entity=logger.wandb_entity,
                dir=folder,
                mode=logger.wandb_mode,
                config=settings,
                id=id_file.read_text(encoding="ascii").strip() if id_file and resume and id_file.exists() else None,
                resume="allow",
            )
        except wandb.errors.Error as error:
            raise UserError(
                f"Weights & Biases did not start (its `{type(error).__name__}`)",
                hint="run `wandb login`, or set `logger.wandb_mode=offline`",
            ) from error
        self._run.define_metric("*", step_metric="iteration")
        if id_file:
            id_file.write_text(self._run.id + "\n", encoding="ascii")

    def log(self, record: Record) -> None:
        texts = {"sample prompt": record.prompt, "sample": record.text} if isinstance(record, Sample) else {}
        self._run.log({"iteration": record.iteration, **curves(record), **texts})

    def close(self) -> None:
        self._run.finish()


def curves(record: Record) -> dict[str, float]:
    """Return a record's numbers under Megatron-LM's TensorBoard names, and under names like them where Megatron-LM has none."""
    if isinstance(record, Sample):
        return {}
    if isinstance(record, Evaluation):
        return {f"lm loss {record.split}": record.loss, f"lm loss {record.split} ppl": record.perplexity}
    named = {
        "lm loss": record.loss,
        "learning-rate": record.lr,
        "grad-norm": record.grad_norm,
        "loss-scale": record.loss_scale,
        "iteration-time": record.seconds_per_step,
        "throughput": record.tflops_per_gpu,
        "tokens-per-second-per-gpu": record.tokens_per_second_per_gpu,
        "mfu": record.mfu,
        "mem-max-allocated-bytes": record.memory_gib * GIB,
        "data-wait": record.data_wait,
        "epoch": record.epoch,
        **_counts(record),
        **_of_layers(record),
    }
    return {name: value for name, value in named.items() if value is not None}


_LAYER_CURVES = {"max_expert_load": "max-expert-load", "dropped_tokens": "dropped-tokens"}


def _of_layers(record: Step) -> dict[str, float]:
    """Return what layers report: megatron-core has names for losses and for single layers, counted from 0."""
    means = {_LAYER_CURVES.get(name, _loss_curve(name)): value for name, value in record.layer_metrics.items()}
    layers = {
        f"moe/{name}_layer_{number}": value
        for name, values in record.per_layer.items()
        for number, value in enumerate(values)
    }  # fmt: skip
    return means | layers


def _loss_curve(name: str) -> str:
    return name.replace("_loss", " loss") if name.startswith("mtp_") else name


def _counts(record: Step) -> dict[str, float]:
    return {
        "consumed-samples": record.consumed_samples,
        "consumed-tokens": record.consumed_tokens,
        "skipped-iterations": record.skipped_steps,
    }
