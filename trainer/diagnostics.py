"""Callbacks that show why a run fails, hangs or is slow, each switched on by a setting of `profiling`, `diagnostics` or `dist`.

torch and megatron-core do the measuring; this module chooses the steps, the ranks and the files.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import StragglerDetector, check_param_hashes_across_dp_replicas

from formats.errors import UserError
from trainer import collectives, optim
from trainer.config import ProfilingConfig, RunConfig
from trainer.logging.logger import run_dir
from trainer.state import Callback, Run, Step


def callbacks(config: RunConfig) -> Iterator[Callback]:
    """Yield the callbacks that the settings switch on, on this rank."""
    settings = config.diagnostics
    if config.dist.step_timeout_minutes is not None:
        yield StepTimeout(config.dist.step_timeout_minutes)
    if settings.check_weight_hash_across_dp_replicas_interval is not None:
        yield SameWeights(settings.check_weight_hash_across_dp_replicas_interval)
    if settings.gpu_sniff_test:
        yield SniffTest()
    if settings.log_straggler:
        yield Stragglers(settings.straggler_minmax_count)
    if dist.get_rank() in config.profiling.profile_ranks:
        folder = run_dir(config.logger, config.checkpoint) or Path()
        yield from _profilers(config.profiling, folder / "profile")


def _profilers(settings: ProfilingConfig, folder: Path) -> Iterator[Callback]:
    if settings.use_pytorch_profiler:
        yield TorchProfiler(settings, folder)
    if settings.use_nsys_profiler:
        yield Nsys(settings)
    if settings.record_memory_history:
        yield MemoryHistory(settings, folder)


class StepTimeout(Callback):
    """Set the timeout of collective operations after the first step, when nothing is built or compiled any more."""

    def __init__(self, minutes: float) -> None:
        self.timeout, self._set = timedelta(minutes=minutes), False

    def on_step(self, run: Run, step: Step) -> None:  # noqa: ARG002
        """Set it after the first step, for every process group of this rank."""
        if not self._set:
            self._set = True
            for group in dist.distributed_c10d._world.pg_map:
                dist.distributed_c10d._set_pg_timeout(self.timeout, group)


class SameWeights(Callback):
    """Compare the weights of data-parallel ranks, which differ only if hardware or software is faulty."""

    def __init__(self, interval: int) -> None:
        self.interval = interval

    def on_step(self, run: Run, step: Step) -> None:  # noqa: ARG002
        """Raise UserError on all ranks if the weights of two of them differ."""
        if run.progress.iteration % self.interval:
            return
        with optim.parameters_gathered(run.chunks):
            same = check_param_hashes_across_dp_replicas(run.chunks, cross_check=False)
        (differs,) = collectives.largest([0.0 if same else dist.get_rank() + 1.0])
        if differs:
            run.saver.finish()
            raise UserError(
                f"after step {run.progress.iteration}, the weights of rank {int(differs) - 1} are not those of the other "
                f"data-parallel ranks; {run.saver.last_good_text}",
                hint="look for a faulty GPU on that rank's host, and go on from a checkpoint that was saved before",
            )


class Stragglers(Callback):
    """Time each forward pass with megatron-core's detector, and log the slowest and the fastest ranks of each interval."""

    def __init__(self, shown: int) -> None:
        self.detector, self.shown = StragglerDetector(), shown

    def on_start(self, run: Run) -> None:
        """Wrap the run's forward step."""
        _unmute(logging.getLogger("megatron.core.utils"))
        self.detector.configure(dist.get_world_size(), dist.get_rank(), mmcnt=self.shown, enabled=True)
        forward = run.forward_step

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.detector:
                return forward(*args, **kwargs)

        run.forward_step = timed

    def on_step(self, run: Run, step: Step) -> None:  # noqa: ARG002
        """Report, on all ranks together."""
        interval = run.config.logger.log_interval
        if run.progress.iteration % interval == 0:
            measure = run.logger.measure
            self.detector.report(measure.flops_per_token * measure.tokens_per_step * interval, interval)


class SniffTest(Callback):
    """Run NVIDIA's short measurement of every GPU and link before the first step."""

    def on_start(self, run: Run) -> None:  # noqa: ARG002
        """Run it; that takes some seconds."""
        from megatron.training import gpu_sniff_test  # noqa: PLC0415 - brings all of Megatron-LM's training

        _unmute(gpu_sniff_test.logger)
        gpu_sniff_test.run_sniff_tests(
            ep_group=parallel_state.get_expert_model_parallel_group(),
            dp_group=parallel_state.get_data_parallel_group(),
            ar_group=dist.group.WORLD,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
        )


def _unmute(logger: logging.Logger) -> None:
    """Print the messages of one of megatron's loggers, which commands silence (`trainer.warnings_filter`)."""
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler())


class Windowed(Callback):
    """Record from step `profile_step_start` to the end of step `profile_step_end`, or of the run."""

    def __init__(self, settings: ProfilingConfig) -> None:
        self.first, self.last, self.active = settings.profile_step_start, settings.profile_step_end, False

    def begin(self) -> None:
        """Start recording, before the first of those steps."""

    def end(self) -> None:
        """Stop recording, after the last of them."""

    def on_start(self, run: Run) -> None:
        """Start if the first step is recorded."""
        self._move(run)

    def on_step(self, run: Run, step: Step) -> None:  # noqa: ARG002
        """Start before the step that follows, or stop after this one."""
        self._move(run)

    def on_end(self, run: Run) -> None:  # noqa: ARG002
        """Stop with the run."""
        if self.active:
            self.active = False
            self.end()

    def _move(self, run: Run) -> None:
        following = run.progress.iteration + 1
        if self.active and following > self.last:
            self.on_end(run)
        elif not self.active and self.first <= following <= self.last:
            self.active = True
            self.begin()


class TorchProfiler(Windowed):
    """Write a trace by torch's profiler, for chrome://tracing or Perfetto."""

    def __init__(self, settings: ProfilingConfig, folder: Path) -> None:
        super().__init__(settings)
        self.profiler = torch.profiler.profile(record_shapes=settings.record_shapes)
        self.file = folder / f"steps-{self.first}-{self.last}-rank{dist.get_rank()}.json"

    def begin(self) -> None:
        self.profiler.start()

    def end(self) -> None:
        self.profiler.stop()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.profiler.export_chrome_trace(str(self.file))
        click.echo(f"wrote `{self.file}`", err=True)


class Nsys(Windowed):
    """Mark the range that `nsys profile --capture-range=cudaProfilerApi` records."""

    def begin(self) -> None:
        torch.cuda.cudart().cudaProfilerStart()

    def end(self) -> None:
        torch.cuda.cudart().cudaProfilerStop()


class MemoryHistory(Windowed):
    """Write snapshots of allocated memory for pytorch.org/memory_viz: after the last of the steps, and when memory is full.

    Allocations are recorded from the first step on, because that is where most runs fill the memory.
    """

    def __init__(self, settings: ProfilingConfig, folder: Path) -> None:
        super().__init__(settings)
        self.folder = folder

    def on_start(self, run: Run) -> None:
        """Record from here on, and write a snapshot when an allocation fails."""
        torch.cuda.memory._record_memory_history(max_entries=100_000)
        torch._C._cuda_attach_out_of_memory_observer(lambda *_: self._dump("out-of-memory"))
        super().on_start(run)

    def end(self) -> None:
        self._dump("memory")

    def _dump(self, name: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{name}-rank{dist.get_rank()}.pickle"
        torch.cuda.memory._dump_snapshot(str(file))
        click.echo(f"wrote `{file}`", err=True)
