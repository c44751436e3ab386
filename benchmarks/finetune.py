"""LoRA of rank 32 beside all linear layers: `mbtrain finetune`, a bare megatron-core loop and PEFT, in turns, on one GPU.

    python -m benchmarks.finetune 8b --precision bf16 fp8 [--rounds 1] [--micro-batch 2] [--only ours bare peft] [--layers N]

All three have random weights and the same packed rows. `mbtrain` reads them from a folder that is as `mbtrain pack` makes it,
logs to files and prints lines; the loops hold them on the GPU. All clip gradients. PEFT has no FP8: beside FP8 stands its bf16,
measured once. Where PEFT's micro batch does not fit, half of it is tried, with as many sequences per step.

A failure is reported on stderr, and the other programs are still measured. `tiny --device cpu` tests the benchmark itself.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import packed

SHAPES = {"tiny": ("llama_tiny", 256, 2, 1), "1b": ("llama32_1b", 4096, 4, 2), "8b": ("llama3_8b", 4096, 2, 2)}
"""Recipe, sequence, micro batch, microbatches per step."""

PRECISIONS = {
    "bf16": ("bf16_mixed",),
    "fp8": ("bf16_with_fp8_current_scaling_mixed", "model.first_last_layers_bf16=false"),
}
PROGRAMS = ("bare", "ours", "peft", "peft-fp32")
PEFT = ("peft", "peft-fp32")
"""With adapters in bf16, and as it is by default: in fp32."""

type Figures = dict[str, float]


class FailedError(Exception):
    """A program ended with an error; the message is its last output."""


def main(words: Sequence[str] | None = None) -> None:
    """Measure the programs in turns for each precision, print the table, and exit with 1 if a program failed."""
    options = _arguments(words)
    recipe, sequence, micro, microbatches = SHAPES[options.shape]
    options.recipe, options.sequence, options.microbatches = recipe, options.sequence or sequence, microbatches
    options.micro_batch = options.micro_batch or micro
    with tempfile.TemporaryDirectory() as name:
        options.folder = Path(name)
        provider = packed.provider(recipe, options.layers)
        packed.write(options.folder / "rows", vocab_size=provider.vocab_size, sequence=options.sequence)
        measured = _measure(options)
    _print(options, measured)
    sys.exit(any(not figures for figures in measured.values()))


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--only", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warm-up", type=int, default=4, help="steps that do not count")
    parser.add_argument("--sequence", type=int)
    parser.add_argument("--micro-batch", type=int)
    parser.add_argument("--layers", type=int, help="instead of the shape's own")
    parser.add_argument("--adapters", choices=("ours", "plain"), default="ours", help="of the bare loop")
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--timeout", type=float, default=240, help="seconds for each program")
    parser.add_argument("--setting", nargs="+", default=[], help="further settings for mbtrain, as peft.canonical=true")
    options = parser.parse_args(words)
    if options.warm_up >= options.steps:
        parser.error(f"--warm-up is {options.warm_up}, which leaves none of {options.steps} steps")
    if options.device == "cpu":
        options.only = [program for program in options.only if program != "bare"]
        options.precision = [precision for precision in options.precision if precision != "fp8"]
        _say("the bare loop and FP8 need a GPU: left out")
    return options


def _measure(options: argparse.Namespace) -> dict[tuple[str, str], list[Figures]]:
    """Return the figures of each round by program and precision; an empty list for a program that failed."""
    todo = [(program, precision) for precision in options.precision for program in options.only]
    todo = list(dict.fromkeys((program, "bf16" if program in PEFT else precision) for program, precision in todo))
    measured: dict[tuple[str, str], list[Figures]] = {key: [] for key in todo}
    for number in range(options.rounds):
        for program, precision in todo:
            began = time.monotonic()
            try:
                figures = _MEASURES[program](options, precision)
            except FailedError as error:
                _say(f"{program} {precision} failed:\n{error}")
                continue
            measured[program, precision].append(figures)
            _say(f"round {number + 1}: {program} {precision} {json.dumps(figures)} in {time.monotonic() - began:.0f} s")
    return measured


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _run(options: argparse.Namespace, module: str, words: list[Any], **environment: str) -> str:
    """Run a program and return its output."""
    command = [sys.executable, "-m", module, *map(str, words)]
    try:
        completed = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=options.timeout, env=os.environ | environment
        )
    except subprocess.TimeoutExpired as error:
        last_lines = error.stderr.decode(errors="replace")[-2000:] if isinstance(error.stderr, bytes) else ""
        raise FailedError(f"{' '.join(command)}\nnot done in {options.timeout:.0f} s\n{last_lines}") from None
    if completed.returncode:
        raise FailedError(f"{' '.join(command)}\n{completed.stdout[-1000:]}\n{completed.stderr[-5000:]}")
    return completed.stdout


def _ours(options: argparse.Namespace, precision: str) -> Figures:
    name, *extra = PRECISIONS[precision]
    batch = options.micro_batch * options.microbatches
    layers = [f"model.num_layers={options.layers}"] if options.layers else []
    with tempfile.TemporaryDirectory(dir=options.folder) as run:
        settings = [
            "peft=lora", f"peft.dim={packed.RANK}", f"peft.alpha={packed.RANK}", f"mixed_precision={name}", *extra, *layers,
            f"dataset.path={options.folder / 'rows'}", f"dataset.sequence_length={options.sequence}",
            "tokenizer.tokenizer_model=null", "checkpoint.random_weights=true",
            f"train.micro_batch_size={options.micro_batch}", f"train.global_batch_size={batch}",
            f"train.train_iters={options.steps}", "validation.eval_iters=0", "optimizer.lr=1e-4", "optimizer.clip_grad=1.0",
            "logger.log_interval=1", f"logger.run_dir={run}", f"dist.device={options.device}", *options.setting,
        ]  # fmt: skip
        _run(options, "trainer", ["finetune", options.recipe, *settings])
        lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line.get("kind", "step") == "step"]
    seconds = statistics.median(line["seconds_per_step"] for line in steps[options.warm_up :])
    rate = batch * options.sequence / seconds
    provider = packed.provider(options.recipe, options.layers)
    trained = packed.lora_parameters(provider, packed.RANK)
    rows = packed.microbatches(
        options.folder / "rows", vocab_size=provider.vocab_size, sequence=options.sequence, micro_batch=batch, count=options.steps
    )
    work = packed.flops(provider, rows) / (options.steps * batch * options.sequence)
    return {
        "tokens_per_second": rate,
        "tflops": rate * work / 1e12,
        "memory_gib": steps[-1]["memory_gib"],
        "trained": trained,
        "first_loss": steps[0]["loss"],
    }


def _words(options: argparse.Namespace, *, halvings: int = 0) -> list[Any]:
    micro, microbatches = options.micro_batch >> halvings, options.microbatches << halvings
    words = ["--shape", options.shape, "--sequence", options.sequence, "--micro-batch", micro, "--microbatches", microbatches]
    words += [
        "--steps",
        options.steps,
        "--warm-up",
        options.warm_up,
        "--rows",
        options.folder / "rows",
        "--device",
        options.device,
    ]
    return words + (["--layers", options.layers] if options.layers else [])


def _bare(options: argparse.Namespace, precision: str) -> Figures:
    words = [*_words(options), "--adapters", options.adapters, *(["--fp8"] if precision == "fp8" else [])]
    return _last_line(_run(options, "benchmarks.bare_finetune", words))


def _peft(options: argparse.Namespace, _precision: str, adapters: str = "bf16") -> Figures:
    """Measure PEFT with the micro batch, or with half of it if memory runs out."""
    kind = ["--adapters", adapters]
    room = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}  # without it, less fits
    try:
        return _last_line(_run(options, "benchmarks.peft_finetune", [*_words(options), *kind], **room))
    except FailedError as error:
        if "OutOfMemoryError" not in str(error) or options.micro_batch % 2:
            raise
        _say(f"PEFT runs out of memory with a micro batch of {options.micro_batch}: half of it")
    return _last_line(_run(options, "benchmarks.peft_finetune", [*_words(options, halvings=1), *kind], **room))


def _last_line(printed: str) -> Figures:
    return json.loads(printed.strip().splitlines()[-1])


_MEASURES = {"bare": _bare, "ours": _ours, "peft": _peft, "peft-fp32": partial(_peft, adapters="fp32")}


def _print(options: argparse.Namespace, measured: dict[tuple[str, str], list[Figures]]) -> None:
    print(f"{options.shape}, {options.layers or 'all'} layers, sequence {options.sequence}, micro batch {options.micro_batch}")
    heads = [f"{program} {figure}" for figure in ("tok/s", "TFLOP/s", "GiB") for program in PROGRAMS]
    ratios = [f"ours/{other}" for other in PROGRAMS if other != "ours"]
    print(f"{'precision':10}" + "".join(f"{head:>18}" for head in [*heads[:4], *ratios, *heads[4:]]))
    for precision in options.precision:
        by_program = {program: measured.get((program, "bf16" if program in PEFT else precision), []) for program in PROGRAMS}
        rates, work, memory = (
            {program: _median(rounds, figure) for program, rounds in by_program.items()}
            for figure in ("tokens_per_second", "tflops", "memory_gib")
        )
        cells = [_cell(rates[program], 0) for program in PROGRAMS]
        cells += [_cell(_ratio(rates["ours"], rates[other]), 3) for other in PROGRAMS if other != "ours"]
        cells += [_cell(work[program], 1) for program in PROGRAMS] + [_cell(memory[program], 1) for program in PROGRAMS]
        print(f"{precision:10}" + "".join(f"{cell:>18}" for cell in cells), flush=True)


def _median(rounds: list[Figures], figure: str) -> float | None:
    return statistics.median(figures[figure] for figures in rounds) if rounds else None


def _ratio(numerator: float | None, denominator: float | None) -> float | None:
    return numerator / denominator if numerator and denominator else None


def _cell(number: float | None, digits: int) -> str:
    return "-" if number is None else f"{number:,.{digits}f}"


if __name__ == "__main__":
    main()
