"""A training run, from its settings to its last checkpoint: read `pretrain`, then `train`, then `train_step`.

What a step computes is megatron-core's schedule; what it is made of stands in the modules imported here.
"""

from __future__ import annotations

import gc
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging
from megatron.core.pipeline_parallel import get_forward_backward_func

from formats.errors import UserError
from formats.torch_dist import TRACKER
from trainer import checkpoint, data, device, iterations, live, luggage, model, optim, parallel, telling, tokenizers
from trainer.config import RunConfig
from trainer.data.loader import batches
from trainer.loss import forward_step as default_forward_step
from trainer.loss import mean
from trainer.resolve import Resolved, resolve
from trainer.signals import Stop

ForwardStep = Callable[[Any, Any], Any]


class Callback:
    """What may look at a run, or change it, at the loop's seams. Every rank calls each.

    `run.stop.request()` on one rank or on all lets the run save and end: after this step where it is called in
    `on_evaluation`, after the next one where it is called in `on_step`, since ranks agree once in a step.
    """

    def on_start(self, run: Run) -> None:
        """Before the first step, with weights, optimizer and data in place."""

    def on_step(self, run: Run, step: Step) -> None:
        """After an optimizer step."""

    def on_evaluation(self, run: Run, split: str, loss: float) -> None:
        """After an evaluation; `loss` is the same on all ranks."""

    def on_save(self, run: Run) -> None:
        """After a checkpoint was begun."""

    def on_end(self, run: Run) -> None:
        """After the last checkpoint."""


@dataclass(frozen=True, slots=True)
class Step:
    """What one optimizer step did. The loss is the mean over all tokens that count, the same on all ranks."""

    loss: float
    grad_norm: float
    lr: float
    applied: bool
    """False where fp16 gradients overflowed and nothing changed."""

    loss_scale: float | None
    """Of fp16; None in other precisions."""

    stop: bool
    """Some rank was asked to stop, or the run's time is up."""

    save: bool
    """Some rank's clock says that it is time to save."""


@dataclass
class Run:
    """A run in progress, as one rank sees it."""

    config: RunConfig
    parts: checkpoint.Parts
    saver: checkpoint.Saver
    telling: telling.Telling
    forward_step: ForwardStep
    callbacks: Sequence[Callback]
    datasets: Sequence[Any]
    """Train, validation, test; None where there is none."""

    stop: Stop
    started: float = field(default_factory=time.monotonic)
    batches: Any = None

    @property
    def progress(self) -> checkpoint.Progress:
        """Where the run stands."""
        return self.parts.progress

    @property
    def chunks(self) -> list[Any]:
        """This rank's model chunks."""
        return self.parts.chunks


def pretrain(
    config: RunConfig, forward_step: ForwardStep = default_forward_step, *, callbacks: Sequence[Callback] = ()
) -> checkpoint.Progress:
    """Train as `config` says, in the processes that torchrun or Slurm started; in this one alone if none did.

    Raises UserError for settings that cannot work, weights that do not fit, a loss that is no number. A signal saves, and
    then ends the process: SystemExit with 128 + its number, on every rank.
    """
    parallel.adopt_slurm()
    device.set_environment(config)
    kind = device.choose(config.dist.device)
    resolved = resolve(config, world_size=parallel.world_size(), device=kind)
    with parallel.session(resolved.config, kind), Stop() as stop:
        run = start(resolved, forward_step, callbacks=callbacks, stop=stop)
        try:
            if _last(run):
                say(f"nothing to do: the run stands at step {run.progress.iteration} of {config.train.train_iters}")
            else:
                train(run)
                finish(run)
        finally:
            run.saver.close()
            run.telling.close()
        if stop.received:
            raise SystemExit(stop.exit_code)
        return run.progress


def start(resolved: Resolved, forward_step: ForwardStep, *, callbacks: Sequence[Callback], stop: Stop) -> Run:
    """Model, weights, optimizer, data: everything before the first step."""
    config = resolved.config
    for line in resolved.warnings:
        say(f"note: {line}")
    telling.make_folders(config)
    chunks = model.build(config.model)
    resumed = iterations.latest(config.checkpoint.load)
    _first_weights(chunks, config, resumed)
    travels = luggage.pack(config, chunks, resumed=resumed)
    wrapped = optim.wrap(chunks, config)
    optimizer = optim.make_optimizer(wrapped, config)
    parts = checkpoint.Parts(wrapped, optimizer, optim.make_scheduler(optimizer, config), checkpoint.Progress())
    if resumed:
        checkpoint.resume(parts, config, resumed, say=say)
    run = Run(
        config=config,
        parts=parts,
        saver=_saver(config, travels, resumed),
        telling=telling.open_telling(config, resumed_at=parts.progress.iteration, active=parallel.speaks()),
        forward_step=forward_step,
        callbacks=callbacks,
        datasets=_datasets(config, parts.progress),
        stop=stop,
    )
    if parts.progress.interval:
        run.telling.interval.load_state_dict(parts.progress.interval)
    if not _last(run):
        run.batches = _iterators(run, run.datasets[0], consumed=parts.progress.consumed_samples)
    for callback in callbacks:
        callback.on_start(run)
    return run


def _saver(config: RunConfig, travels: Callable[[Path], None], resumed: Path | None) -> checkpoint.Saver:
    """What it would save first may be there already: that of a run that was done."""
    saver = checkpoint.Saver(config, travels, say, last_good=resumed)
    if resumed and saver.root and _same(resumed.parent, saver.root):
        saver.saved_iteration = int(resumed.name.removeprefix("iter_"))
    return saver


def _same(one: str | Path, other: str | Path) -> bool:
    return Path(one).resolve() == Path(other).resolve()


def say(text: str) -> None:
    """Tell people, once for all ranks."""
    if parallel.speaks():
        click.echo(text, err=True)


def _first_weights(chunks: Sequence[Any], config: RunConfig, resumed: Path | None) -> None:
    """Weights from where the settings say; random ones only where they name none, and told."""
    told = config.checkpoint
    for path in iterations.leftovers(told.save):
        say(f"note: `{path}` is left of a save that was interrupted; it can be removed")
    if resumed:
        return
    if told.load and not (told.save and _same(told.load, told.save)):
        raise UserError(
            f"`checkpoint.load` is `{told.load}`, where there is no checkpoint to resume",
            hint="to start from weights alone use `checkpoint.pretrained_checkpoint`; a first start needs no `load`",
        )
    if told.save and (Path(told.save) / TRACKER).exists():
        say(f"note: `{told.save}` has checkpoints, and this run starts anew beside them; to resume set `checkpoint.load`")
    source = told.pretrained_checkpoint or getattr(config.model, "pretrained_from", None)
    if source:
        say(str(live.load(chunks, source)))
    else:
        say("weights are random: neither `checkpoint.load` nor `checkpoint.pretrained_checkpoint` names any")


def _datasets(config: RunConfig, progress: checkpoint.Progress) -> Sequence[Any]:
    """Long enough for the steps to come, and for those that were made with another batch size."""
    train, checks = config.train, config.validation
    to_come = max(train.train_iters - progress.iteration, 0) * train.global_batch_size
    evaluated = checks.eval_iters * train.global_batch_size
    return data.build(
        config.dataset,
        tokenizer=tokenizers.of_run(config.tokenizer.tokenizer_model, beside=getattr(config.model, "hf_source", None)),
        vocab_size=config.model.vocab_size,
        samples=(progress.consumed_samples + to_come, evaluated, evaluated),
    )


def _iterators(run: Run, dataset: Any, *, consumed: int) -> list[Iterator[Any] | None]:
    """One iterator of microbatches per model chunk; None for chunks that see neither tokens nor labels."""
    config = run.config
    return [
        batches(
            dataset,
            consumed=consumed,
            micro_batch_size=config.train.micro_batch_size,
            global_batch_size=config.train.global_batch_size,
            rank=parallel_state.get_data_parallel_rank(),
            size=parallel_state.get_data_parallel_world_size(),
            num_workers=getattr(config.dataset, "num_workers", 0),
            pin_memory=device.current().type == "cuda",
        )
        if model.sees_data(chunk)
        else None
        for chunk in run.chunks
    ]


def train(run: Run) -> None:
    """Step until the run is done or asked to stop; tell, evaluate and save on the way."""
    settings = run.config
    while run.progress.iteration < settings.train.train_iters:
        step = train_step(run)
        run.telling.step(run.progress, step)
        for callback in run.callbacks:
            callback.on_step(run, step)
        stop = step.stop
        if _every(run, settings.validation.eval_interval) and not _last(run):
            evaluate(run, "validation")
            stop = bool(parallel.largest([float(stop or run.stop.requested)])[0])
        run.saver.poll()
        if stop or _every(run, settings.train.exit_interval):
            say(f"stopping after step {run.progress.iteration}")
            return
        if (step.save or _every(run, settings.checkpoint.save_interval)) and not _last(run):
            save(run)
        if _every(run, settings.train.manual_gc_interval):
            gc.collect()


def _every(run: Run, interval: int | None) -> bool:
    return bool(interval) and run.progress.iteration % interval == 0


def _last(run: Run) -> bool:
    return run.progress.iteration >= run.config.train.train_iters


def train_step(run: Run) -> Step:
    """Forward, backward, reduce, update: one global batch. UserError, before anything is saved, where a number is none."""
    parts, config = run.parts, run.config
    for chunk in run.chunks:
        chunk.zero_grad_buffer()
    parts.optimizer.zero_grad()
    losses = _schedule(run, run.batches, microbatches=get_num_microbatches(), forward_only=False)
    loss, stop, save_now = _agree(run, losses)
    applied, grad_norm, _ = parts.optimizer.step()
    if applied and not math.isfinite(grad_norm or 0.0):
        raise _not_a_number(run, f"the gradient norm of step {run.progress.iteration + 1} is NaN or Inf")
    lr = get_canonical_lr_for_logging(parts.optimizer.param_groups)
    progress = run.progress
    progress.iteration += 1
    progress.consumed_samples += config.train.global_batch_size
    progress.skipped_steps += not applied
    if applied:
        parts.scheduler.step(config.train.global_batch_size)
    return Step(
        loss=loss,
        grad_norm=math.nan if grad_norm is None else float(grad_norm),
        lr=lr or 0.0,
        applied=bool(applied),
        loss_scale=parts.optimizer.get_loss_scale().item() if config.model.fp16 else None,
        stop=stop,
        save=save_now,
    )


def _schedule(run: Run, iterators: list[Any], *, microbatches: int, forward_only: bool) -> list[torch.Tensor]:
    """megatron-core's pipeline schedule over one global batch: [loss sum, tokens] per microbatch on the last stage."""
    config = run.config
    return get_forward_backward_func()(
        forward_step_func=partial(run.forward_step),
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=run.chunks,
        num_microbatches=microbatches,
        seq_length=config.dataset.sequence_length,
        micro_batch_size=config.train.micro_batch_size,
        decoder_seq_length=config.dataset.sequence_length,
        forward_only=forward_only,
    )


def _agree(run: Run, losses: list[torch.Tensor]) -> tuple[float, bool, bool]:
    """All ranks learn the loss, whether some rank was asked to stop, and whether it is time to save.

    Raises UserError on all of them where the loss is no number: before it reaches the weights.
    """
    settings, bad, here = run.config, 0.0, -math.inf
    if losses:
        # This rank's own sum too: in the mean over all ranks, one rank's NaN is everybody's.
        here, ours = torch.stack([mean(losses), torch.stack(losses).sum()]).tolist()
        bad = 0.0 if math.isfinite(ours) else dist.get_rank() + 1.0
    minutes = settings.checkpoint.save_interval_in_mins
    limit = settings.train.exit_duration_in_mins
    over = run.stop.requested or (limit is not None and (time.monotonic() - run.started) / 60 >= limit)
    due = minutes is not None and run.saver.root is not None and run.saver.minutes >= minutes
    asked = float(run.stop.received or 0)
    worst, value, asked, over, due = parallel.largest(
        [bad, here if math.isfinite(here) else -math.inf, asked, float(over), float(due)]
    )
    if worst:
        raise _not_a_number(run, f"the loss of step {run.progress.iteration + 1} is NaN or Inf on rank {int(worst) - 1}")
    if asked:
        run.stop.received = signal.Signals(int(asked))
    return value, bool(asked or over), bool(due)


def _not_a_number(run: Run, what: str) -> UserError:
    run.saver.finish()  # what was begun before is good
    return UserError(
        f"{what}; {run.saver.standing}",
        hint="look at the data of this step and at `optimizer.lr`; the weights of this step were not saved",
    )


def evaluate(run: Run, split: str) -> float | None:
    """The loss over held-out data, the same samples each time; None where there are none."""
    dataset = run.datasets[1 if split == "validation" else 2]
    iterations = run.config.validation.eval_iters
    if dataset is None or iterations == 0:
        return None
    began = time.perf_counter()
    held_out = _iterators(run, dataset, consumed=0)
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
        raise _not_a_number(run, f"the {split} loss after step {run.progress.iteration} is NaN or Inf")
    run.telling.evaluation(run.progress, split, loss)
    run.telling.pause(time.perf_counter() - began)
    for callback in run.callbacks:
        callback.on_evaluation(run, split, loss)
    return loss


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
