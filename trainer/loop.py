"""The training loop: read `pretrain`, then `train`, then `train_step`.

megatron-core's schedule computes a step; `collectives.sync_step` lets ranks agree on its outcome. `setup` does everything before
the first step, and `state` defines what the loop shares with callbacks.
"""

from __future__ import annotations

import gc
import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.pipeline_parallel import get_forward_backward_func

from formats.errors import UserError
from trainer import clock, collectives, cuda_graph, device, gradient_fusion, main_script, optim, parallel, schedule
from trainer.config import RunConfig
from trainer.data import iterators
from trainer.generation.text import generate
from trainer.logging.layer_metrics import LayerMetrics
from trainer.logging.metrics import memory_gib
from trainer.loss import forward_step as default_forward_step
from trainer.loss import mean, mean_and_work, prepare, with_token_counts
from trainer.settings import refused
from trainer.settings.resolve import resolve
from trainer.setup import resolve_epochs, setup
from trainer.signals import Stop
from trainer.state import Callback, ForwardStep, Progress, Run, Step, answer_signal, say


def pretrain(
    config: RunConfig, forward_step: ForwardStep = default_forward_step, *, callbacks: Sequence[Callback] = ()
) -> Progress:
    """Train as `config` says, in the processes that torchrun or Slurm started, else in this one alone.

    Raises UserError for settings that cannot work, weights that do not fit, a loss that is NaN or Inf. A signal saves, and
    then ends the process: SystemExit with 128 + its number, on every rank.

    >>> from trainer.recipes import llama_tiny
    >>> config = llama_tiny.pretrain_config()
    >>> config.train.train_iters, config.validation.eval_iters, config.dataset.num_workers = 1, 0, 0
    >>> pretrain(config).iteration  # a step on mock data
    1
    """
    began = clock.run_began()
    main_script.check(config.dataset, config.checkpoint)
    parallel.adopt_slurm()
    device.set_environment(config)
    kind = device.choose(config.dist.device)
    resolved = resolve(config, world_size=parallel.world_size(), device=kind)
    with parallel.session(resolved.config, kind), cuda_graph.stream(resolved.config.model), Stop(answer_signal) as stop:
        resolved = resolve_epochs(config, resolved, kind)
        if forward_step is not default_forward_step:
            gradient_fusion.leave_out(resolved.config.model)
            cuda_graph.refuse(resolved.config.model)
        run = setup(resolved, forward_step, callbacks=callbacks, stop=stop, began=began)
        try:
            if run.is_complete:
                say(f"training is already complete (step {run.progress.iteration} of {run.config.train.train_iters})")
            else:
                with _synchronized_gc(config.train.manual_gc_interval):
                    train(run)
                finish(run)
        finally:
            iterators.close(run.batches or ())
            run.saver.close()
            run.logger.close()
        if stop.received:
            raise SystemExit(stop.exit_code)
        return run.progress


def train(run: Run) -> None:
    """Step until the run is complete or asked to stop; log, evaluate and save on the way."""
    config, first = run.config, run.progress.iteration
    run.logger.clock.restart()
    while not run.is_complete:
        with refused.user_errors_in_first_step() if run.progress.iteration == first else nullcontext():
            step = train_step(run)
        run.logger.step(run.progress, step)
        for callback in run.callbacks:
            callback.on_step(run, step)
        stop = step.stop
        if _every(run, config.validation.eval_interval) and not run.is_complete:
            evaluate(run, "validation")
            stop = bool(collectives.largest([float(stop or run.stop.requested)])[0])
        if _every(run, config.validation.sample_interval):
            sample(run)
        run.saver.poll()
        if stop or _every(run, config.train.exit_interval):
            say(f"stopping after step {run.progress.iteration}")
            return
        if (step.save or _every(run, config.checkpoint.save_interval)) and not run.is_complete:
            save(run)
        if _every(run, config.train.manual_gc_interval):
            gc.collect()


@contextmanager
def _synchronized_gc(interval: int) -> Iterator[None]:
    """Let `train` collect garbage, on all ranks at the same steps: a rank that collects makes the others wait.

    Objects from before the first step are never collected, so each collection is short.
    """
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


def train_step(run: Run) -> Step:
    """Train on one global batch: forward, backward, reduce, update.

    Raises UserError if the loss or the gradient norm is NaN or Inf; nothing of that step is saved.
    """
    parts, progress = run.parts, run.progress
    run.waited.seconds = 0.0
    for chunk in run.chunks:
        chunk.zero_grad_buffer()
    parts.optimizer.zero_grad()
    losses = _losses(run)
    # No number is read before this: the optimizer handles its weights one by one, and meanwhile a GPU still computes gradients.
    applied, grad_norm, _ = parts.optimizer.step()
    synced = collectives.sync_step(_report(run, losses))
    _check(run, synced)
    layers = run.layer_counter.collect(get_num_microbatches()) if run.layer_counter else LayerMetrics({}, {})
    if applied and not math.isfinite(grad_norm or 0.0):
        raise _not_finite(run, f"the gradient norm of step {progress.iteration + 1}")
    lr = schedule.learning_rate(parts.optimizer)
    progress.iteration += 1
    progress.consumed_samples += run.config.train.global_batch_size
    progress.skipped_steps += not applied
    if applied:
        parts.scheduler.step(1)
    return Step(
        loss=synced.loss,
        grad_norm=math.nan if grad_norm is None else float(grad_norm),
        lr=lr,
        applied=bool(applied),
        loss_scale=parts.optimizer.get_loss_scale().item() if run.config.model.fp16 else None,
        stop=bool(synced.signal or synced.stop),
        save=bool(synced.save),
        waited=synced.waited,
        work=(synced.tokens, synced.squares),
        memory_gib=synced.memory_gib,
        layer_metrics=layers.means,
        per_layer=layers.layers,
        expert_loads=layers.loads,
    )


def _losses(run: Run) -> list[torch.Tensor]:
    """Compute losses and gradients of a global batch: `[loss sum, tokens]` per microbatch on the last stage."""
    microbatches = get_num_microbatches()
    if run.step_graph is None:
        return _schedule(run, run.batches, microbatches=microbatches, forward_only=False)
    inputs = [prepare(next(run.batches[0])) for _ in range(microbatches)]
    return run.step_graph(inputs, lambda prepared: _schedule(run, [prepared], microbatches=microbatches, forward_only=False))


def _schedule(run: Run, batches: list[Any], *, microbatches: int, forward_only: bool) -> list[torch.Tensor]:
    """Run megatron-core's pipeline schedule over one global batch: `[loss sum, tokens]` per microbatch on the last stage."""
    config = run.config
    rows, length = iterators.microbatch_shape(config.dataset, config.train.micro_batch_size)
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


def _report(run: Run, losses: list[torch.Tensor]) -> collectives.StepReport:
    """Return this rank's report of a step. `losses` are the `[loss sum, tokens, *work]` of each microbatch on the last pipeline
    stage, and empty on the others."""
    bad, loss, work = False, -math.inf, list[float]()
    if losses:
        # This rank's own sum too: in the mean over all ranks, one rank's NaN is everybody's.
        loss_sum, loss, *work = torch.cat([torch.stack(losses).sum()[None], mean_and_work(losses)]).tolist()
        bad = not math.isfinite(loss_sum)
    tokens, squares = work or (0.0, 0.0)
    minutes, limit = run.config.checkpoint.save_interval_in_mins, run.config.train.exit_duration_in_mins
    return collectives.StepReport(
        bad_rank=dist.get_rank() + 1.0 if bad else 0.0,
        loss=loss if math.isfinite(loss) else -math.inf,
        signal=float(run.stop.received or 0),
        stop=float(run.stop.requested or (limit is not None and (time.monotonic() - run.began) / 60 >= limit)),
        save=float(minutes is not None and run.saver.root is not None and run.saver.minutes >= minutes),
        waited=run.waited.seconds,
        tokens=tokens,
        squares=squares,
        memory_gib=memory_gib(device.current()),
    )


def _check(run: Run, synced: collectives.StepReport) -> None:
    """Raise UserError on all ranks if the loss of one is NaN or Inf, before it is logged or saved. Note a signal of any rank."""
    if synced.bad_rank:
        raise _not_finite(run, f"the loss of step {run.progress.iteration + 1}", f" on rank {int(synced.bad_rank) - 1}")
    if synced.signal:
        run.stop.received = signal.Signals(int(synced.signal))


def _not_finite(run: Run, number: str, where: str = "") -> UserError:
    """Finish a save that was begun before, and return the error that ends the run and names the last good checkpoint."""
    run.saver.finish()
    return UserError(
        f"{number} is NaN or Inf{where}; {run.saver.last_good_text}",
        hint="look at the data of this step and at `optimizer.lr`; the weights of this step were not saved",
    )


def evaluate(run: Run, split: str) -> None:
    """Compute the loss over `validation` or `test` data, the same samples each time; of several sets each, as
    `validation/NAME`."""
    config = run.config
    for name, dataset in iterators.named_sets(run.datasets[1 if split == "validation" else 2]).items():
        if iterations := iterators.eval_iterations(dataset, train=config.train, validation=config.validation):
            _evaluate(run, f"{split}/{name}" if name else split, dataset, iterations)


def _evaluate(run: Run, split: str, dataset: Any, iterations: int) -> None:
    with run.logger.paused():
        loss = _held_out_loss(run, split, dataset, iterations)
        run.logger.evaluation(run.progress, split, loss)
    for callback in run.callbacks:
        callback.on_evaluation(run, split, loss)


def _held_out_loss(run: Run, split: str, dataset: Any, iterations: int) -> float:
    """Return the mean loss per token over `iterations` global batches, on all ranks. Raises UserError if it is NaN or Inf."""
    held_out = iterators.chunk_iterators(
        dataset, run.config.dataset, run.config.train, chunks=run.chunks, consumed=0, waited=run.waited
    )
    for chunk in run.chunks:
        chunk.eval()
    with torch.no_grad(), optim.parameters_gathered(run.chunks):
        count = iterations * get_num_microbatches()
        value = mean(_schedule(run, held_out, microbatches=count, forward_only=True))
    for chunk in run.chunks:
        chunk.train()
    local_loss = -math.inf if value is None else value.item()  # only the last stage has one
    bad = value is not None and not math.isfinite(local_loss)
    any_bad, loss = collectives.largest([float(bad), -math.inf if bad else local_loss])
    if any_bad:
        raise _not_finite(run, f"the {split} loss after step {run.progress.iteration}")
    return loss


def sample(run: Run) -> None:
    """Generate text from the run's prompts, and log it."""
    with run.logger.paused():
        tokenizer, prompts = run.prompts
        for generated in generate(run.chunks, tokenizer, prompts, max_new_tokens=run.config.validation.sample_tokens):
            run.logger.sample(run.progress, generated.prompt, generated.text)


def save(run: Run) -> None:
    """Begin a checkpoint; without `checkpoint.async_save`, finish it too."""
    with run.logger.paused():
        run.progress.interval = run.logger.interval.state_dict()
        run.saver.save(run.parts)
    for callback in run.callbacks:
        callback.on_save(run)


def finish(run: Run) -> None:
    """Evaluate a last time and save the last checkpoint; test where the run is complete."""
    if run.is_complete:
        evaluate(run, "validation")
        evaluate(run, "test")
    if run.saver.root and run.saver.saved_iteration != run.progress.iteration:
        save(run)
    run.saver.finish()
    for callback in run.callbacks:
        callback.on_end(run)
