"""LoRA of rank 32 beside all linear layers: `mbtrain finetune`, a bare megatron-core loop and PEFT, in turns, on one GPU.

    python -m benchmarks.finetune 8b --precision bf16 fp8 [--rounds 1] [--micro-batch 2] [--only ours bare peft] [--layers N]

All three have random weights and the same packed rows. `mbtrain` reads them from a folder that is as `mbtrain pack` makes it,
logs to files and prints lines; the loops hold them on the GPU. All clip gradients. PEFT has no FP8: beside FP8 stands its bf16,
measured once. Where PEFT's micro batch does not fit, half of it is tried, with as many sequences per step.

What fails is told on stderr, and the others are measured all the same. `tiny --device cpu` tries the program itself.
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
    """A program ended with an error; what it said last."""


def main(words: Sequence[str] | None = None) -> None:
    """Measure each precision in turns, and print the table. SystemExit, of 1 where a program failed."""
    told = _arguments(words)
    recipe, sequence, micro, microbatches = SHAPES[told.shape]
    told.recipe, told.sequence, told.microbatches = recipe, told.sequence or sequence, microbatches
    told.micro_batch = told.micro_batch or micro
    with tempfile.TemporaryDirectory() as name:
        told.folder = Path(name)
        provider = packed.provider(recipe, told.layers)
        packed.write(told.folder / "rows", vocab_size=provider.vocab_size, sequence=told.sequence)
        found = _measure(told)
    _print(told, found)
    sys.exit(any(not figures for figures in found.values()))


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
    told = parser.parse_args(words)
    if told.warm_up >= told.steps:
        parser.error(f"--warm-up is {told.warm_up}, which leaves none of {told.steps} steps")
    if told.device == "cpu":
        told.only = [one for one in told.only if one != "bare"]
        told.precision = [one for one in told.precision if one != "fp8"]
        _say("the bare loop and FP8 need a GPU: left out")
    return told


def _measure(told: argparse.Namespace) -> dict[tuple[str, str], list[Figures]]:
    """Figures of each round, by program and precision; none where a program failed."""
    todo = [(program, precision) for precision in told.precision for program in told.only]
    todo = list(dict.fromkeys((program, "bf16" if program in PEFT else precision) for program, precision in todo))
    found: dict[tuple[str, str], list[Figures]] = {one: [] for one in todo}
    for number in range(told.rounds):
        for program, precision in todo:
            began = time.monotonic()
            try:
                figures = _MEASURES[program](told, precision)
            except FailedError as error:
                _say(f"{program} {precision} failed:\n{error}")
                continue
            found[program, precision].append(figures)
            _say(f"round {number + 1}: {program} {precision} {json.dumps(figures)} in {time.monotonic() - began:.0f} s")
    return found


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _run(told: argparse.Namespace, module: str, words: list[Any], **environment: str) -> str:
    """What a program printed."""
    command = [sys.executable, "-m", module, *map(str, words)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=told.timeout, env=os.environ | environment
        )
    except subprocess.TimeoutExpired as error:
        last = error.stderr.decode(errors="replace")[-2000:] if isinstance(error.stderr, bytes) else ""
        raise FailedError(f"{' '.join(command)}\nnot done in {told.timeout:.0f} s\n{last}") from None
    if done.returncode:
        raise FailedError(f"{' '.join(command)}\n{done.stdout[-1000:]}\n{done.stderr[-5000:]}")
    return done.stdout


def _ours(told: argparse.Namespace, precision: str) -> Figures:
    name, *more = PRECISIONS[precision]
    batch = told.micro_batch * told.microbatches
    layers = [f"model.num_layers={told.layers}"] if told.layers else []
    with tempfile.TemporaryDirectory(dir=told.folder) as run:
        settings = [
            "peft=lora", f"peft.dim={packed.RANK}", f"peft.alpha={packed.RANK}", f"mixed_precision={name}", *more, *layers,
            f"dataset.path={told.folder / 'rows'}", f"dataset.sequence_length={told.sequence}",
            "tokenizer.tokenizer_model=null", "checkpoint.random_weights=true",
            f"train.micro_batch_size={told.micro_batch}", f"train.global_batch_size={batch}",
            f"train.train_iters={told.steps}", "validation.eval_iters=0", "optimizer.lr=1e-4", "optimizer.clip_grad=1.0",
            "logger.log_interval=1", f"logger.run_dir={run}", f"dist.device={told.device}", *told.setting,
        ]  # fmt: skip
        _run(told, "trainer", ["finetune", told.recipe, *settings])
        lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line.get("kind", "step") == "step"]
    seconds = statistics.median(line["seconds_per_step"] for line in steps[told.warm_up :])
    rate = batch * told.sequence / seconds
    provider = packed.provider(told.recipe, told.layers)
    trained = packed.lora_parameters(provider, packed.RANK)
    rows = packed.microbatches(
        told.folder / "rows", vocab_size=provider.vocab_size, sequence=told.sequence, micro_batch=batch, count=told.steps
    )
    work = packed.flops(provider, rows) / (told.steps * batch * told.sequence)
    return {
        "tokens_per_second": rate,
        "tflops": rate * work / 1e12,
        "memory_gib": steps[-1]["memory_gib"],
        "trained": trained,
        "first_loss": steps[0]["loss"],
    }


def _words(told: argparse.Namespace, *, halvings: int = 0) -> list[Any]:
    micro, microbatches = told.micro_batch >> halvings, told.microbatches << halvings
    words = ["--shape", told.shape, "--sequence", told.sequence, "--micro-batch", micro, "--microbatches", microbatches]
    words += ["--steps", told.steps, "--warm-up", told.warm_up, "--rows", told.folder / "rows", "--device", told.device]
    return words + (["--layers", told.layers] if told.layers else [])


def _bare(told: argparse.Namespace, precision: str) -> Figures:
    words = [*_words(told), "--adapters", told.adapters, *(["--fp8"] if precision == "fp8" else [])]
    return _last_line(_run(told, "benchmarks.bare_finetune", words))


def _peft(told: argparse.Namespace, _precision: str, adapters: str = "bf16") -> Figures:
    """With the micro batch, or half of it where it does not fit."""
    kind = ["--adapters", adapters]
    room = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}  # without it, less fits
    try:
        return _last_line(_run(told, "benchmarks.peft_finetune", [*_words(told), *kind], **room))
    except FailedError as error:
        if "OutOfMemoryError" not in str(error) or told.micro_batch % 2:
            raise
        _say(f"PEFT runs out of memory with a micro batch of {told.micro_batch}: half of it")
    return _last_line(_run(told, "benchmarks.peft_finetune", [*_words(told, halvings=1), *kind], **room))


def _last_line(printed: str) -> Figures:
    return json.loads(printed.strip().splitlines()[-1])


_MEASURES = {"bare": _bare, "ours": _ours, "peft": _peft, "peft-fp32": partial(_peft, adapters="fp32")}


def _print(told: argparse.Namespace, found: dict[tuple[str, str], list[Figures]]) -> None:
    print(f"{told.shape}, {told.layers or 'all'} layers, sequence {told.sequence}, micro batch {told.micro_batch}")
    heads = [f"{program} {what}" for what in ("tok/s", "TFLOP/s", "GiB") for program in PROGRAMS]
    ratios = [f"ours/{other}" for other in PROGRAMS if other != "ours"]
    print(f"{'precision':10}" + "".join(f"{head:>18}" for head in [*heads[:4], *ratios, *heads[4:]]))
    for precision in told.precision:
        seen = {program: found.get((program, "bf16" if program in PEFT else precision), []) for program in PROGRAMS}
        rates, work, memory = (
            {program: _median(rounds, what) for program, rounds in seen.items()}
            for what in ("tokens_per_second", "tflops", "memory_gib")
        )
        cells = [_cell(rates[program], 0) for program in PROGRAMS]
        cells += [_cell(_ratio(rates["ours"], rates[other]), 3) for other in PROGRAMS if other != "ours"]
        cells += [_cell(work[program], 1) for program in PROGRAMS] + [_cell(memory[program], 1) for program in PROGRAMS]
        print(f"{precision:10}" + "".join(f"{cell:>18}" for cell in cells), flush=True)


def _median(rounds: list[Figures], what: str) -> float | None:
    return statistics.median(one[what] for one in rounds) if rounds else None


def _ratio(one: float | None, other: float | None) -> float | None:
    return one / other if one and other else None


def _cell(number: float | None, digits: int) -> str:
    return "-" if number is None else f"{number:,.{digits}f}"


if __name__ == "__main__":
    main()
