"""Training speed beside a bare megatron-core loop, in turns in one run, on the GPUs of this machine.

    python -m benchmarks.train 1b 3b --precision bf16 fp8 [--gpus N] [--rounds 2]

`mbtrain` reads `.bin`/`.idx` files, logs to files and prints lines; the bare loop does nothing of that. Both clip gradients.
Prints a table, and the ratio for each row.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.bare_loop import RECIPES, WARM_UP

SHAPES = {"1b": (4096, 4, 4), "3b": (8192, 1, 4), "8b": (8192, 1, 4)}
"""Sequence, micro batch, microbatches per step and GPU."""

PRECISIONS = {
    "bf16": ("bf16_mixed",),
    "fp8": ("bf16_with_fp8_current_scaling_mixed", "model.first_last_layers_bf16=false"),
}
STEPS = 15


def main() -> None:
    """Measure both programs in turns for each shape and precision, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", nargs="+", choices=SHAPES)
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--sequence", type=int, help="tokens, where the usual number does not fit")
    options = parser.parse_args()
    for shape in options.shapes if options.sequence else ():
        SHAPES[shape] = (options.sequence, *SHAPES[shape][1:])
    with tempfile.TemporaryDirectory() as folder:
        tokens = _tokens(Path(folder))
        print(
            f"{'shape':6}{'precision':10}{'bare tok/s':>12}{'mbtrain':>12}{'ratio':>8}{'TFLOP/s':>9}{'GiB bare':>9}{'mbtrain':>9}"
        )
        for shape in options.shapes:
            for precision in options.precision:
                rounds = [_round(Path(folder), tokens, shape, precision, options.gpus) for _ in range(options.rounds)]
                _print(shape, precision, rounds)


def _tokens(folder: Path) -> Path:
    """Write a `.bin`/`.idx` pair of 64 M random tokens of Llama 3's vocabulary, in documents of 1000."""
    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix, generator = folder / "tokens", np.random.default_rng(0)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for _ in range(64):
        numbers = generator.integers(0, 128256, 1_000_000, dtype=np.int32)
        builder.add_document(numbers, [1000] * 1000)
    builder.finalize(f"{prefix}.idx")
    return prefix


def _round(folder: Path, tokens: Path, shape: str, precision: str, gpus: int) -> tuple[dict[str, Any], dict[str, Any]]:
    return _bare(shape, precision, gpus), _ours(folder, tokens, shape, precision, gpus)


def _run(command: list[str]) -> str:
    completed = subprocess.run(command, capture_output=True, text=True, check=False)
    if completed.returncode:
        sys.exit(f"{' '.join(command)}\n{completed.stdout[-2000:]}\n{completed.stderr[-6000:]}")
    return completed.stdout


def _bare(shape: str, precision: str, gpus: int) -> dict[str, Any]:
    sequence, micro, microbatches = SHAPES[shape]
    words = ["--shape", shape, "--sequence", sequence, "--micro-batch", micro, "--microbatches", microbatches, "--steps", STEPS]
    words += ["--fp8"] if precision == "fp8" else []
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)]
    out = _run([*launcher, "-m", "benchmarks.bare_loop", *map(str, words)])
    return json.loads(out.strip().splitlines()[-1])


def _ours(folder: Path, tokens: Path, shape: str, precision: str, gpus: int) -> dict[str, Any]:
    sequence, micro, microbatches = SHAPES[shape]
    run = folder / f"{shape}-{precision}"
    name, *extra = PRECISIONS[precision]
    settings = [
        f"mixed_precision={name}", *extra, f"dataset.blend=[{tokens}]", f"dataset.sequence_length={sequence}",
        f"train.micro_batch_size={micro}", f"train.global_batch_size={micro * microbatches * gpus}",
        f"train.train_iters={STEPS}", "validation.eval_iters=0", "logger.log_interval=1", f"logger.run_dir={run}",
        "model.tensor_model_parallel_size=1", "model.pipeline_model_parallel_size=1", "model.context_parallel_size=1",
        "model.sequence_parallel=false", "dataset.split='100,0,0'",
    ]  # fmt: skip
    _run([sys.executable, "-m", "trainer", "pretrain", RECIPES[shape], "--nproc", str(gpus), *settings])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line.get("kind", "step") == "step"][-STEPS:][WARM_UP:]
    seconds = statistics.median(line["seconds_per_step"] for line in steps)
    rate = micro * microbatches * sequence / seconds
    flops = steps[-1]["tflops_per_gpu"] / steps[-1]["tokens_per_second_per_gpu"]
    return {"tokens_per_second_per_gpu": rate, "tflops_per_gpu": rate * flops, "memory_gib": steps[-1]["memory_gib"]}


def _print(shape: str, precision: str, rounds: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    bare, ours = ({name: statistics.median(pair[side][name] for pair in rounds) for name in rounds[0][side]} for side in (0, 1))
    rate = "tokens_per_second_per_gpu"
    print(
        f"{shape:6}{precision:10}{bare[rate]:12.0f}{ours[rate]:12.0f}{ours[rate] / bare[rate]:8.3f}{ours['tflops_per_gpu']:9.0f}"
        f"{bare['memory_gib']:10.1f}{ours['memory_gib']:9.1f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
