"""Does fine-tuning learn? From the signatures of the standard library's functions to their docstrings.

    python -m benchmarks.docstrings FOLDER [--base-steps 600] [--steps 200] [--device gpu]
    python -m benchmarks.docstrings FOLDER --draw docs/finetuning.png

A small Llama over bytes is first trained on the library's sources, docstrings left out of what it is asked later on; then all of
it, LoRA and DoRA learn the same task from there. Held out is a tenth of the functions. Leaves `FOLDER/curves.json`.
"""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LENGTH = ("model.seq_length=512", "dataset.sequence_length=512", "tokenizer.tokenizer_model=byte")
LARGER = (
    "model.num_layers=8", "model.hidden_size=512", "model.ffn_hidden_size=1536", "model.num_attention_heads=8",
    "model.num_query_groups=4", "model.kv_channels=64",
)  # fmt: skip
"""On a GPU; on a CPU the recipe's own shape."""

METHODS = {
    "all parameters": ("peft=none", "optimizer.lr=3e-4"),
    "LoRA": ("peft=lora", "peft.dim=16", "peft.alpha=32", "optimizer.lr=3e-3"),
    "DoRA": ("peft=dora", "peft.dim=16", "peft.alpha=32", "optimizer.lr=3e-3"),
}
LONGEST = 480
"""Bytes of an example."""


def main() -> None:
    """Train, or draw the curves of a finished run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--base-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16, help="examples or rows per step; four times as many of text")
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--draw", type=Path, metavar="PNG")
    options = parser.parse_args()
    if options.draw:
        draw(json.loads((options.folder / "curves.json").read_text()), options.draw)
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    base = _base(options)
    curves = {name: _tune(options, base, name, settings) for name, settings in METHODS.items()}
    (options.folder / "curves.json").write_text(json.dumps(curves))
    for name, curve in curves.items():
        print(f"{name:15} held-out loss {curve[0][1]:.4f} -> {curve[-1][1]:.4f}")


def _base(options: argparse.Namespace) -> Path:
    """Pretrain a model on the sources without their docstrings, and return its folder."""
    sources, examples, text, run = (options.folder / name for name in ("sources", "examples.jsonl", "text", "base"))
    sources.mkdir(exist_ok=True)
    with examples.open("w", encoding="utf-8") as out:
        for number, (code, examples_of_module) in enumerate(modules()):
            (sources / f"{number:04}.txt").write_text(code, encoding="utf-8")
            out.writelines(json.dumps(example) + "\n" for example in examples_of_module)
    _run("prepare-data", sources, text, "--tokenizer", "byte", "--overwrite", "--quiet")
    _run(
        "pretrain", "llama_tiny", *_common(options), f"dataset.blend=[{text}]", "dataset.split='98,2,0'",
        f"checkpoint.save={run}", f"train.train_iters={options.base_steps}", "validation.eval_interval=200", "optimizer.lr=1e-3",
        f"train.global_batch_size={4 * options.batch}", f"train.micro_batch_size={min(options.batch, 16)}",
    )  # fmt: skip
    return run


def _tune(options: argparse.Namespace, base: Path, name: str, settings: tuple[str, ...]) -> list[tuple[int, float]]:
    """Fine-tune with one method, and return steps with held-out losses."""
    run = options.folder / name.replace(" ", "-")
    _run(
        "finetune", "llama_tiny", *_common(options), *settings, f"dataset.path={options.folder / 'examples.jsonl'}",
        "dataset.split='90,10,0'", f"checkpoint.pretrained_checkpoint={base}", f"logger.run_dir={run}",
        f"train.train_iters={options.steps}", f"train.global_batch_size={options.batch}",
        f"train.micro_batch_size={min(options.batch, 16)}",
        "validation.eval_interval=10", "validation.eval_iters=8", "validation.sample_interval=100",
        "validation.sample_tokens=80",
    )  # fmt: skip
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["iteration"], line["loss"]) for line in lines if line.get("split") == "validation"]


def _common(options: argparse.Namespace) -> list[str]:
    gpu = ["mixed_precision=bf16_mixed", *LARGER] if options.device == "gpu" else []
    return [*LENGTH, f"dist.device={options.device}", *gpu, "optimizer.min_lr=0"]


def _run(*words: Any) -> None:
    subprocess.run([sys.executable, "-m", "trainer", *map(str, words)], check=True)


def modules() -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Yield the source of each module without docstrings, and its functions as examples of signature and docstring."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if {"test", "tests", "site-packages", "idlelib", "lib2to3"} & set(path.relative_to(root).parts):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):
            continue
        yield _apart(source, tree)


def _apart(source: str, tree: ast.Module) -> tuple[str, list[dict[str, str]]]:
    lines, examples = source.splitlines(keepends=True), []
    docstring_lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (text := ast.get_docstring(node)):
            signature = "".join(lines[node.lineno - 1 : node.body[0].lineno - 1]).strip()
            docstring_lines.update(range(node.body[0].lineno - 1, node.body[0].end_lineno or 0))
            completion = text.partition("\n\n")[0]
            if signature and len(f"{signature}{completion}".encode()) < LONGEST:
                examples.append({"prompt": f'{signature}\n    """', "completion": completion})
    return "".join(line for number, line in enumerate(lines) if number not in docstring_lines), examples


def draw(curves: dict[str, list[tuple[int, float]]], picture: Path) -> None:
    """Draw the held-out losses over steps."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, curve in curves.items():
        axes.plot(*zip(*curve, strict=True), label=f"{name}: {curve[-1][1]:.3f}", linewidth=1.8)
    axes.set_xlabel("step")
    axes.set_ylabel("held-out loss per trained byte")
    axes.set_title("From a signature to its docstring: functions of the standard library, one in ten held out")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=140)


if __name__ == "__main__":
    main()
