"""Mixtures of experts on one GPU of 80 GB: `mbtrain` beside a bare megatron-core loop, and LoRA beside transformers with PEFT.

    python -m benchmarks.gpu_experts [--shapes qwen3-30b gpt-oss-20b] [--precision bf16 fp8] [--lora all] [--gpus 2]
        [--traces DIR]

Shapes are those of published models with as many layers as fit (`benchmarks.expert_shapes`). With `--gpus N`, all but LoRA runs
on N GPUs that share the experts (EP N), each with a batch of its own. Each program runs in a process of its own, in turns.
`mbtrain` reads `.bin`/`.idx` files or packed rows, logs to files and prints lines; the loops do nothing of that. Prints a table;
a program that fails is reported on stderr, the others are still measured, and the exit code is 1.

With `--traces`, two more steps of each program but PEFT's are profiled, and `benchmarks.trace` says in DIR/NAME.txt where the GPU
waited and what took most time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from benchmarks import trace
from benchmarks.bare_experts import TRACED
from benchmarks.expert_shapes import LORA, PRECISIONS, ROWS, SHAPES, Shape, config_of, settings

STEPS, WARM_UP, RANK = 12, 5, 8
TARGETS = {"all": [], "attention": ["peft.target_modules=[linear_qkv,linear_proj]"]}
"""What LoRA adapts: all linear layers, experts included, or those of attention."""

type Figures = dict[str, float]
type Program = Callable[[int], Figures]


class FailedError(Exception):
    """A program ended with an error; the message is its last output."""


def main(words: Sequence[str] | None = None) -> None:
    """Measure all pairs of programs, print the table, and exit with 1 if a program failed."""
    options = _arguments(words)
    with tempfile.TemporaryDirectory() as name:
        print(f"{'':28}{'layers':>7}{'other ms':>10}{'mbtrain ms':>12}{'ratio':>8}{'GiB other':>11}{'mbtrain':>9}", flush=True)
        complete = [_compare(label, layers, programs, options.rounds) for label, layers, programs in _pairs(options, Path(name))]
    sys.exit(not all(complete))


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--lora", nargs="*", choices=TARGETS, default=["all"], help="of Qwen3-30B's shape, in bf16")
    parser.add_argument("--micro-batch", nargs="+", type=int, choices=(1, 2), default=[1, 2], help="rows of a microbatch of LoRA")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--traces", type=Path, help="a folder for summaries of profiles")
    parser.add_argument("--timeout", type=float, default=150, help="seconds for each program")
    return parser.parse_args(words)


def _pairs(options: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Sequence[int], tuple[Program, Program]]]:
    """Yield a label, numbers of layers to try, and the programs to compare, which take a number of layers."""
    tokens = _write_tokens(folder) if options.shapes else folder
    for name in options.shapes:
        for precision in options.precision:
            label = f"{name} {precision}" + (f" EP{options.gpus}" if options.gpus > 1 else "")
            bare = partial(_bare, label, ["--shape", name, "--precision", precision], options)
            ours = partial(_mbtrain, label, SHAPES[name], _pretraining(SHAPES[name], precision, tokens, options.gpus), options)
            yield label, SHAPES[name].layers, (bare, ours)
    rows = _write_rows(folder) if options.lora else folder
    for targets, micro_batch in itertools.product(options.lora, options.micro_batch):
        words = ["--targets", targets, "--rows", rows, "--rank", RANK, "--micro-batch", micro_batch]
        theirs = partial(_last_line, "benchmarks.peft_experts", words, options)
        label = f"LoRA {targets}, {micro_batch} of {ROWS} rows"
        ours = partial(_mbtrain, label, LORA, _adapters(targets, rows, micro_batch), options)
        yield label, LORA.layers, (theirs, ours)


def _write_tokens(folder: Path) -> Path:
    """Write a `.bin`/`.idx` pair of 2 M random tokens, in documents of 1000."""
    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = folder / "tokens"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    builder.add_document(np.random.default_rng(0).integers(0, 150_000, 2_000_000, dtype=np.int32), [1000] * 2000)
    builder.finalize(f"{prefix}.idx")
    return prefix


def _write_rows(folder: Path) -> Path:
    from benchmarks import packed

    packed.write(folder / "rows", vocab_size=LORA.config["vocab_size"], sequence=LORA.sequence)
    return folder / "rows"


def _compare(label: str, layers: Sequence[int], programs: tuple[Program, Program], rounds: int) -> bool:
    """Print the medians of two programs at the largest number of layers that both have memory for. False if one failed."""
    for number in layers:
        try:
            measured = [[program(number) for program in programs] for _ in range(rounds)]
        except FailedError as error:
            print(f"{label}, {number} layers: {error}", file=sys.stderr, flush=True)
            if "OutOfMemoryError" not in str(error):
                return False
            continue
        other, ours = (
            {name: statistics.median(pair[side][name] for pair in measured) for name in ("seconds_per_step", "memory_gib")}
            for side in (0, 1)
        )
        print(
            f"{label:28}{number:7}{1000 * other['seconds_per_step']:10.1f}{1000 * ours['seconds_per_step']:12.1f}"
            f"{other['seconds_per_step'] / ours['seconds_per_step']:8.3f}{other['memory_gib']:11.1f}{ours['memory_gib']:9.1f}",
            flush=True,
        )
        return True
    return False


def _run(module: str, words: Sequence[Any], timeout: float, gpus: int = 1) -> str:
    """Run a program on so many GPUs, and return its output."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"] if gpus > 1 else []
    command, began = [sys.executable, *launcher, "-m", module, *map(str, words)], time.monotonic()
    try:
        completed = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise FailedError(f"{module} was not done in {timeout:.0f} s") from None
    print(f"{module} {' '.join(map(str, words[:6]))}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    if completed.returncode:
        raise FailedError(f"{module} failed\n{completed.stdout[-1000:]}\n{completed.stderr[-5000:]}")
    return completed.stdout


def _last_line(module: str, words: Sequence[Any], options: argparse.Namespace, layers: int, gpus: int = 1) -> Figures:
    """Return the figures that a loop prints."""
    words = [*words, "--layers", layers, "--steps", STEPS, "--warm-up", WARM_UP]
    return json.loads(_run(module, words, options.timeout, gpus).splitlines()[-1])


def _bare(label: str, words: Sequence[Any], options: argparse.Namespace, layers: int) -> Figures:
    """Return the figures of a bare loop of megatron-core."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        traced = ["--trace", file] if options.traces else []
        figures = _last_line("benchmarks.bare_experts", [*words, *traced], options, layers, options.gpus)
        _summarize(file, options.traces, f"{label} bare")
    return figures


def _summarize(file: Path, folder: Path | None, name: str) -> None:
    """Write what a trace says, where a folder for that is named."""
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name.replace(' ', '-')}.txt").write_text(trace.summary(file))


def _mbtrain(label: str, shape: Shape, chosen: Sequence[str], options: argparse.Namespace, layers: int) -> Figures:
    """Return the figures in the log of a command of `mbtrain` on a model's `config.json`."""
    command, gpus = ("finetune", 1) if shape is LORA else ("pretrain", options.gpus)
    with tempfile.TemporaryDirectory() as run:
        file = Path(run) / "run.yaml"
        file.write_text(yaml.safe_dump({"model": {"hf_config": config_of(shape, layers)}}))
        common = ["validation.eval_iters=0", "logger.log_interval=1", f"logger.run_dir={run}"]
        _run("trainer", [command, "--config", file, *chosen, *common, *_steps(options)], options.timeout, gpus)
        _summarize(Path(run) / f"profile/steps-{STEPS + 1}-{STEPS + TRACED}-rank0.json", options.traces, f"{label} mbtrain")
        lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    return {
        "seconds_per_step": statistics.median(step["seconds_per_step"] for step in steps[WARM_UP:STEPS]),
        "memory_gib": steps[-1]["memory_gib"],
    }


def _steps(options: argparse.Namespace) -> list[str]:
    """Return the settings of how many steps there are, and of those that are profiled after the others."""
    if not options.traces:
        return [f"train.train_iters={STEPS}"]
    last = STEPS + TRACED
    window = [f"profiling.profile_step_start={STEPS + 1}", f"profiling.profile_step_end={last}"]
    return [f"train.train_iters={last}", "profiling.use_pytorch_profiler=true", *window]


def _pretraining(shape: Shape, precision: str, tokens: Path, gpus: int) -> list[str]:
    chosen = {**settings(shape, precision, gpus), "dataset.blend": [str(tokens)], "dataset.split": "100,0,0"}
    return [f"{name}={json.dumps(value)}" for name, value in chosen.items()]


def _adapters(targets: str, rows: Path, micro_batch: int) -> list[str]:
    return [
        "peft=lora", f"peft.dim={RANK}", f"peft.alpha={RANK}", *TARGETS[targets], "mixed_precision=bf16_mixed",
        f"dataset.path={rows}", f"dataset.sequence_length={LORA.sequence}", "tokenizer.tokenizer_model=null",
        "checkpoint.random_weights=true", f"train.micro_batch_size={micro_batch}", f"train.global_batch_size={ROWS}",
        "optimizer.lr=1e-4", "optimizer.clip_grad=1.0", "model.cuda_graph_impl=full_iteration",
    ]  # fmt: skip


if __name__ == "__main__":
    main()
