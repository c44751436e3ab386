"""Everything before the first step: folders, weights, adapters, optimizer, data and log of a run."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from converter.adapters.adapter import Base
from formats.errors import UserError
from trainer import collectives, cuda_graph, diagnostics, model, optim, parallel, schedule
from trainer.checkpoints import adapters, iterations, live, resume_point, shared, side_files
from trainer.checkpoints.contents import tokenizer_of_run
from trainer.checkpoints.resume import resume
from trainer.checkpoints.saver import Saver
from trainer.checkpoints.state_dict import Parts, Progress
from trainer.config import CheckpointConfig, FinetuningDatasetConfig, LoggerConfig, RunConfig, ValidationConfig, captures_steps
from trainer.data import iterators
from trainer.logging import layer_metrics, logger, metrics, summary
from trainer.peft.attach import attach
from trainer.settings import refused
from trainer.settings.resolve import Resolved, resolve
from trainer.signals import Stop
from trainer.state import Callback, ForwardStep, Run, say
from trainer.tokenizers import Tokenizer


def resolve_epochs(config: RunConfig, resolved: Resolved, kind: str) -> Resolved:
    """Count the steps of `train.num_epochs` in the training data, and resolve the settings that depend on them."""
    if config.train.num_epochs is None:
        return resolved
    counted = resolved.config
    steps = iterators.steps_of_epochs(
        counted.dataset, train=counted.train, vocab_size=counted.model.vocab_size, tokenizer=tokenizer_of_run(counted)
    )
    return resolve(config, world_size=parallel.world_size(), device=kind, steps=steps)


def setup(resolved: Resolved, forward_step: ForwardStep, *, callbacks: Sequence[Callback], stop: Stop, began: float) -> Run:
    """Build the run: model, weights, optimizer, data, log. `began` is on `time.monotonic`'s clock."""
    config = resolved.config
    for line in resolved.warnings:
        say(f"note: {line}")
    iterators.check(config.dataset)
    _make_folders(config.checkpoint, config.logger)
    resumed = find_checkpoint(config.checkpoint)
    parts, saver = _build(config, resumed)
    tokenizer = tokenizer_of_run(config, resumed=resumed)
    datasets = _datasets(config, parts.progress, tokenizer)
    run = Run(
        config=config,
        parts=parts,
        saver=saver,
        logger=_open_logger(config, parts.progress, samples_per_epoch=getattr(datasets[0], "per_epoch", None)),
        forward_step=forward_step,
        callbacks=[*diagnostics.callbacks(config), *callbacks],
        datasets=datasets,
        stop=stop,
        began=began,
        step_graph=_step_graph(config.model, config.dataset.sequence_length),
        layer_counter=layer_metrics.counter(parts.chunks, config.model),
    )
    if not run.is_complete:
        run.batches = iterators.chunk_iterators(
            datasets[0],
            config.dataset,
            config.train,
            chunks=run.chunks,
            consumed=run.progress.consumed_samples,
            waited=run.waited,
        )
    run.prompts = _prompts(config.validation, datasets[1], tokenizer)
    for line in summary.lines(resolved, chunks=run.chunks, datasets=datasets, iteration=run.progress.iteration):
        say(line)
    for callback in run.callbacks:
        callback.on_start(run)
    return run


def _step_graph(model: Any, sequence_length: int) -> cuda_graph.StepGraph | None:
    if not captures_steps(model):
        return None
    return cuda_graph.StepGraph(warmup_steps=model.cuda_graph_warmup_steps, sequence_length=sequence_length)


def _make_folders(checkpoint: CheckpointConfig, logger: LoggerConfig) -> None:
    """Make the folders that a run writes to, on rank 0. Raises UserError on all ranks if one cannot be written to."""
    for setting, folder in (
        ("checkpoint.save", checkpoint.save),
        ("logger.run_dir", logger.run_dir),
        ("logger.tensorboard_dir", logger.tensorboard_dir),
        ("logger.wandb_save_dir", logger.wandb_save_dir),
    ):
        try:
            collectives.on_first_rank(partial(_make_folder, folder))
        except OSError as error:
            raise UserError(
                f"`{setting}` is `{folder}`, which cannot be written to: {error.strerror}",
                hint="give a folder that can be made or written to",
            ) from error
    if checkpoint.save:
        shared.check(Path(checkpoint.save))


def _make_folder(folder: str | None) -> None:
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), folder)


def find_checkpoint(settings: CheckpointConfig) -> Path | None:
    """Return the checkpoint that all ranks resume from, None for a fresh start: rank 0 decides (`resume_point.find`).

    Raises UserError on all ranks if one of them does not see that checkpoint.
    """
    resumed = collectives.from_first_rank(lambda: resume_point.find(settings))
    if resumed is None:
        return None
    unseen = collectives.name_ranks(not iterations.sees(resumed))
    if unseen:
        raise UserError(
            f"`{resumed}` is to be resumed, and {unseen} does not see it", hint="all hosts should share the folder of checkpoints"
        )
    if resume_point.supersedes(resumed, settings):
        say(f"note: `{resumed}` went on from `checkpoint.load`, `{settings.load}`, and is resumed in its place")
    return resumed


def _build(config: RunConfig, resumed: Path | None) -> tuple[Parts, Saver]:
    """Build the model, load its weights, attach adapters, make the optimizer, and resume where there is a checkpoint."""
    chunks = model.build(config.model)
    _load_weights(chunks, config, resumed)
    base = _attach_adapters(chunks, config, resumed)
    write_side_files = side_files.collect(config, chunks, resumed=resumed, base=base)
    wrapped, optimizer = _trainable(chunks, config)
    scheduler = schedule.make_scheduler(optimizer, config.optimizer, config.scheduler, train_iters=config.train.train_iters)
    parts = Parts(wrapped, optimizer, scheduler, Progress())
    if resumed:
        resume(parts, config, resumed, say=say)
    saver = Saver(config, write_side_files, say, last_good=resumed)
    if resumed and saver.root and resume_point.same(resumed.parent, saver.root):
        saver.saved_iteration = int(resumed.name.removeprefix("iter_"))  # a complete run would save it again
    return parts, saver


def _load_weights(chunks: Sequence[Any], config: RunConfig, resumed: Path | None) -> None:
    """Load the weights that the settings name; without any they stay random, and a line says so.

    A resumed run that trains all parameters gets them from its checkpoint, later.
    """
    for path in iterations.leftovers(config.checkpoint.save):
        say(f"note: `{path}` is left of a save that was interrupted; it can be removed")
    source = adapters.base_of(config, resumed)
    for text in live.settings_changed(chunks, resumed) if resumed else ():
        say(f"note: {text}")
    if resumed is not None and config.peft is None:
        return
    if source:
        say(str(live.load(chunks, source, note=lambda text: say(f"note: {text}"))))
        return
    if isinstance(config.dataset, FinetuningDatasetConfig) and not config.checkpoint.random_weights:
        raise UserError(
            "fine-tuning needs a model to start from, and `checkpoint.pretrained_checkpoint` is not set",
            hint="name a checkpoint or a Hugging Face directory; `checkpoint.random_weights=true` if random ones are meant",
        )
    say("initializing weights at random (no `checkpoint.load`, no `checkpoint.pretrained_checkpoint`)")


def _attach_adapters(chunks: Sequence[Any], config: RunConfig, resumed: Path | None) -> Base | None:
    """Freeze the model and attach the adapters of `peft`. Return the base model; None where all parameters are trained."""
    adapter = config.checkpoint.pretrained_adapter
    if config.peft is None:
        if adapter:
            raise UserError(
                f"`checkpoint.pretrained_adapter` is `{adapter}`, and `peft` is `none`",
                hint="set `peft`, or merge the adapter into its base with `mbconvert merge`",
            )
        return None
    base = adapters.identify(adapters.base_of(config, resumed), saves=bool(config.checkpoint.save), resumed=resumed)
    say(str(attach(chunks, config.peft, seed=config.rng.seed)))
    if resumed:
        adapters.check_same(chunks, resumed)
    elif adapter:
        say(adapters.load(chunks, adapter, peft=config.peft, base=base))
    return base


def _trainable(chunks: list[Any], config: RunConfig) -> tuple[list[Any], Any]:
    """Wrap the chunks for gradient reduction and make the optimizer. Raises UserError for settings that megatron-core refuses."""
    with refused.user_errors("ddp", config.ddp, lambda tried: optim.wrap(chunks, config.model, tried)):
        wrapped = optim.wrap(chunks, config.model, config.ddp)

    def attempt(tried: Any) -> Any:
        return optim.make_optimizer(wrapped, replace(config, optimizer=tried))

    with refused.user_errors("optimizer", config.optimizer, attempt):
        return wrapped, optim.make_optimizer(wrapped, config)


def _datasets(config: RunConfig, progress: Progress, tokenizer: Tokenizer | None) -> Sequence[Any]:
    """Build the datasets, and print the summary of the training data if it has one."""
    datasets = iterators.datasets(
        config.dataset,
        train=config.train,
        validation=config.validation,
        vocab_size=config.model.vocab_size,
        tokenizer=tokenizer,
        iteration=progress.iteration,
        consumed_samples=progress.consumed_samples,
    )
    for line in getattr(datasets[0], "summary", ()):
        say(line)
    return datasets


def _open_logger(config: RunConfig, progress: Progress, *, samples_per_epoch: int | None) -> logger.RunLogger:
    opened = logger.open_logger(
        config, resumed_at=progress.iteration, active=parallel.is_logging_rank(), samples_per_epoch=samples_per_epoch
    )
    if progress.interval:
        opened.interval = metrics.Interval.from_state_dict(progress.interval)
    return opened


_NUM_PROMPTS = 2
"""Held-out examples whose beginnings are the prompts, where none are given."""


def _prompts(
    validation: ValidationConfig, held_out: Any, tokenizer: Tokenizer | None
) -> tuple[Tokenizer, Sequence[str | list[int]]] | None:
    """Return a tokenizer and the prompts to sample from at intervals: `validation.sample_prompts`, else the beginnings of
    held-out examples, up to the first token that is learned.

    Raises UserError if there is no prompt, or no tokenizer.
    """
    if not validation.sample_interval:
        return None
    setting = f"`validation.sample_interval` is `{validation.sample_interval}`"
    if tokenizer is None:
        raise UserError(f"{setting}, and there is no tokenizer", hint="name a folder: `tokenizer.tokenizer_model=DIR`")
    first = next(iter(iterators.named_sets(held_out).values()), None)
    beginnings = getattr(first, "beginnings", lambda _: [])
    prompts = validation.sample_prompts or beginnings(_NUM_PROMPTS)
    if not prompts:
        raise UserError(f"{setting}, and there are no prompts", hint="give some: `validation.sample_prompts=[…]`")
    return tokenizer, prompts
