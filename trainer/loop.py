"""A training run, from its settings to its last checkpoint: read `pretrain`, then `train`, then `train_step`.

What a step computes is megatron-core's schedule; what ranks tell each other in it is `agreement`'s. What a run is made of
stands in the modules imported here: its record and its callbacks in `run`, its first weights in `beginning`, its data in
`feed`.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging
from megatron.core.pipeline_parallel import get_forward_backward_func

from trainer import clock, device, diagnostics, main_script, model, optim, parallel
from trainer.checkpoints import checkpoint, shared, side_files
from trainer.checkpoints.contents import tokenizer_of_run
from trainer.collectives import not_a_number, sync_step
from trainer.config import RunConfig
from trainer.data import iterators
from trainer.generation.text import generate
from trainer.initialize import first_weights, make_saver, what_is_trained, where_to_resume
from trainer.logging import logger, summary
from trainer.loss import forward_step as default_forward_step
from trainer.loss import mean, with_token_counts
from trainer.settings import refused
from trainer.settings.resolve import Resolved, resolve
from trainer.signals import Stop
from trainer.state import Callback, ForwardStep, Run, Step, answer_signal, say


def pretrain(
    config: RunConfig, forward_step: ForwardStep = default_forward_step, *, callbacks: Sequence[Callback] = ()
) -> checkpoint.Progress:
    """Train as `config` says, in the processes that torchrun or Slurm started; in this one alone if none did.

    Raises UserError for settings that cannot work, weights that do not fit, a loss that is NaN or Inf. A signal saves, and
    then ends the process: SystemExit with 128 + its number, on every rank.
    """
    began = clock.run_began()
    main_script.check(config)
    parallel.adopt_slurm()
    device.set_environment(config)
    kind = device.choose(config.dist.device)
    resolved = resolve(config, world_size=parallel.world_size(), device=kind)
    with parallel.session(resolved.config, kind), Stop(answer_signal) as stop:
        resolved = _with_epochs(config, resolved, kind)
        run = start(resolved, forward_step, callbacks=callbacks, stop=stop, began=began)
        try:
            if _last(run):
                say(f"training is already complete (step {run.progress.iteration} of {run.config.train.train_iters})")
            else:
                with _collected_together(config.train.manual_gc_interval):
                    train(run)
                finish(run)
        finally:
            iterators.close(run)
            run.saver.close()
            run.telling.close()
        if stop.received:
            raise SystemExit(stop.exit_code)
        return run.progress


def _with_epochs(config: RunConfig, resolved: Resolved, kind: str) -> Resolved:
    """Count the steps of `train.num_epochs`, which the data says, and resolve what follows from them."""
    if config.train.num_epochs is None:
        return resolved
    steps = iterators.steps_of_epochs(resolved.config)
    return resolve(config, world_size=parallel.world_size(), device=kind, steps=steps)


def start(resolved: Resolved, forward_step: ForwardStep, *, callbacks: Sequence[Callback], stop: Stop, began: float) -> Run:
    """Model, weights, optimizer, data: everything before the first step."""
    config = resolved.config
    for line in resolved.warnings:
        say(f"note: {line}")
    iterators.check(config)
    logger.make_folders(config)
    if config.checkpoint.save:
        shared.check(Path(config.checkpoint.save))
    resumed = where_to_resume(config)
    chunks = model.build(config.model)
    first_weights(chunks, config, resumed)
    base = what_is_trained(chunks, config, resumed)
    travels = side_files.collect(config, chunks, resumed=resumed, base=base)
    wrapped, optimizer = _trainable(chunks, config)
    parts = checkpoint.Parts(wrapped, optimizer, optim.make_scheduler(optimizer, config), checkpoint.Progress())
    if resumed:
        checkpoint.resume(parts, config, resumed, say=say)
    tokenizer = tokenizer_of_run(config, resumed=resumed)
    datasets = iterators.datasets(config, parts.progress, tokenizer=tokenizer)
    run = Run(
        config=config,
        parts=parts,
        saver=make_saver(config, travels, resumed),
        telling=logger.open_logger(
            config,
            resumed_at=parts.progress.iteration,
            active=parallel.is_logging_rank(),
            samples_per_epoch=getattr(datasets[0], "per_epoch", None),
        ),
        forward_step=forward_step,
        callbacks=[*diagnostics.callbacks(config), *callbacks],
        datasets=datasets,
        stop=stop,
        began=began,
    )
    if parts.progress.interval:
        run.telling.interval.load_state_dict(parts.progress.interval)
    if not _last(run):
        run.batches = iterators.iterators(run, run.datasets[0], consumed=parts.progress.consumed_samples)
    run.prompts = iterators.prompts(run, tokenizer)
    for line in summary.lines(run, resolved):
        say(line)
    for callback in run.callbacks:
        callback.on_start(run)
    return run


def _trainable(chunks: list[Any], config: RunConfig) -> tuple[list[Any], Any]:
    """Chunks whose gradients are reduced, and the optimizer. UserError for settings that megatron-core refuses."""
    with refused.user_errors("ddp", config.ddp, lambda tried: optim.wrap(chunks, replace(config, ddp=tried))):
        wrapped = optim.wrap(chunks, config)

    def attempt(tried: Any) -> Any:
        return optim.make_optimizer(wrapped, replace(config, optimizer=tried))

    with refused.user_errors("optimizer", config.optimizer, attempt):
        return wrapped, optim.make_optimizer(wrapped, config)


def train(run: Run) -> None:
    """Step until the run is done or asked to stop; tell, evaluate and save on the way."""
    settings, first = run.config, run.progress.iteration
    run.telling.start_clock()
    while run.progress.iteration < settings.train.train_iters:
        with refused.user_errors_in_first_step() if run.progress.iteration == first else nullcontext():
            step = train_step(run)
        run.telling.step(run.progress, step)
        for callback in run.callbacks:
            callback.on_step(run, step)
        stop = step.stop
        if _every(run, settings.validation.eval_interval) and not _last(run):
            evaluate(run, "validation")
            stop = bool(parallel.largest([float(stop or run.stop.requested)])[0])
        if _every(run, settings.validation.sample_interval):
            answer(run)
        run.saver.poll()
        if stop or _every(run, settings.train.exit_interval):
            say(f"stopping after step {run.progress.iteration}")
            return
        if (step.save or _every(run, settings.checkpoint.save_interval)) and not _last(run):
            save(run)
        if _every(run, settings.train.manual_gc_interval):
            gc.collect()


@contextmanager
def _collected_together(interval: int) -> Iterator[None]:
    """No rank's garbage collection makes the others wait: `train` calls for it. What is there before the first step stays,
    and is not looked through again."""
    if not interval:
        yield
        return
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def _every(run: Run, interval: int | None) -> bool:
    return bool(interval) and run.progress.iteration % interval == 0


def _last(run: Run) -> bool:
    return run.progress.iteration >= run.config.train.train_iters


def train_step(run: Run) -> Step:
    """Forward, backward, reduce, update: one global batch.

    Raises UserError if the loss or the gradient norm is NaN or Inf; nothing of that step is saved.
    """
    parts, config = run.parts, run.config
    run.waited.seconds = 0.0
    for chunk in run.chunks:
        chunk.zero_grad_buffer()
    parts.optimizer.zero_grad()
    losses = _schedule(run, run.batches, microbatches=get_num_microbatches(), forward_only=False)
    agreed = sync_step(run, losses)
    applied, grad_norm, _ = parts.optimizer.step()
    if applied and not math.isfinite(grad_norm or 0.0):
        raise not_a_number(run, f"the gradient norm of step {run.progress.iteration + 1} is NaN or Inf")
    lr = get_canonical_lr_for_logging(parts.optimizer.param_groups)
    progress = run.progress
    progress.iteration += 1
    progress.consumed_samples += config.train.global_batch_size
    progress.skipped_steps += not applied
    if applied:
        parts.scheduler.step(1)
    return Step(
        loss=agreed.loss,
        grad_norm=math.nan if grad_norm is None else float(grad_norm),
        lr=lr or 0.0,
        applied=bool(applied),
        loss_scale=parts.optimizer.get_loss_scale().item() if config.model.fp16 else None,
        stop=agreed.stop,
        save=agreed.save,
        waited=agreed.waited,
        work=agreed.work,
        memory_gib=agreed.memory_gib,
    )


def _schedule(run: Run, batches: list[Any], *, microbatches: int, forward_only: bool) -> list[torch.Tensor]:
    """megatron-core's pipeline schedule over one global batch: [loss sum, tokens] per microbatch on the last stage."""
    config = run.config
    rows, length = iterators.rows_between_stages(config)
    per_token = getattr(config.model, "calculate_per_token_loss", False)
    return get_forward_backward_func()(
        forward_step_func=with_token_counts(run.forward_step) if per_token else run.forward_step,
        data_iterator=batches if len(batches) > 1 else batches[0],
        model=run.chunks,
        num_microbatches=microbatches,
        seq_length=length,
        micro_batch_size=rows,
        decoder_seq_length=length,
        forward_only=forward_only,
    )


def evaluate(run: Run, split: str) -> None:
    """The loss over held-out data, the same samples each time; of several sets each, as `validation/NAME`."""
    for name, dataset in iterators.sets_of(run.datasets[1 if split == "validation" else 2]).items():
        if iterations := iterators.evaluations(run.config, dataset):
            _evaluate(run, f"{split}/{name}" if name else split, dataset, iterations)


def _evaluate(run: Run, split: str, dataset: Any, iterations: int) -> None:
    began = time.perf_counter()
    held_out = iterators.iterators(run, dataset, consumed=0)
    for chunk in run.chunks:
        chunk.eval()
    with torch.no_grad(), optim.parameters_gathered(run.chunks):
        count = iterations * get_num_microbatches()
        found = mean(_schedule(run, held_out, microbatches=count, forward_only=True))
    for chunk in run.chunks:
        chunk.train()
    here = -math.inf if found is None else found.item()
    bad = found is not None and not math.isfinite(here)
    bad, loss = parallel.largest([float(bad), -math.inf if bad else here])
    if bad:
        raise not_a_number(run, f"the {split} loss after step {run.progress.iteration} is NaN or Inf")
    run.telling.evaluation(run.progress, split, loss)
    run.telling.pause(time.perf_counter() - began)
    for callback in run.callbacks:
        callback.on_evaluation(run, split, loss)


def answer(run: Run) -> None:
    """Tell what the model says to the run's prompts."""
    began = time.perf_counter()
    tokenizer, asked = run.prompts
    for one in generate(run.chunks, tokenizer, asked, max_new_tokens=run.config.validation.sample_tokens):
        run.telling.sample(run.progress, one.prompt, one.text)
    run.telling.pause(time.perf_counter() - began)


def save(run: Run) -> None:
    """Begin a checkpoint."""
    began = time.perf_counter()
    run.progress.interval = run.telling.interval.state_dict()
    run.saver.save(run.parts)
    run.telling.pause(time.perf_counter() - began)
    for callback in run.callbacks:
        callback.on_save(run)


def finish(run: Run) -> None:
    """The last evaluation, the final test where the run is done, and the last checkpoint."""
    if _last(run):
        evaluate(run, "validation")
        evaluate(run, "test")
    if run.saver.root and run.saver.saved_iteration != run.progress.iteration:
        save(run)
    run.saver.finish()
    for callback in run.callbacks:
        callback.on_end(run)
